"""The wheel of this checkout, and environments with it and without the checkout.

They are made by `venv`, and pip installs the wheel. Its dependencies are linked from the environment of the
tests, each by name, so that a run needs no network and no second torch; the editable installation of the
checkout is not among them.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
EVERYTHING = ("node", "router", "engine")


def bare_environment() -> dict[str, str]:
    """Neither the checkout nor settings of the caller's may help."""
    return {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("PYTHON", "KVFABRIC_", "VIRTUAL_ENV"))
    }


def run(*command: str | Path, cwd: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Outside the checkout."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=bare_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def build(directory: Path) -> Path:
    """The wheel. The build backend is the one of the tests' own environment."""
    done = run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--constraint", ROOT / "constraints.txt", "--wheel-dir", directory, ROOT),
        cwd=directory,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = directory.glob("*.whl")
    return built


def _requirements(extras: Iterable[str]) -> set[str]:
    """Names of the distributions that kvfabric with `extras` needs, theirs included."""
    found: set[str] = set()
    waiting = [("kvfabric", extra) for extra in ("", *extras)]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            requirement, _, marker = line.partition(";")
            wanted = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
            if (wanted[1] if wanted else "") != extra:
                continue
            parts = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement)
            assert parts, line
            for child_extra in ("", *(parts[2].split(",") if parts[2] else ())):
                child = (parts[1], child_extra)
                if child not in seen and _is_installed(parts[1]):
                    seen.add(child)
                    waiting.append(child)
    return found - {"kvfabric"}


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False  # behind a marker of another platform or Python
    return True


def make_environment(directory: Path, wheel: Path, extras: Iterable[str]) -> Path:
    """An environment with the wheel and what `extras` need; returns its python."""
    venv.create(directory, with_pip=False)
    python = directory / "bin" / "python"
    done = run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--no-deps", "--no-index", wheel),
        cwd=directory,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (site,) = directory.glob("lib/python*/site-packages")
    for name in _requirements(extras):
        for file in importlib.metadata.files(name) or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(SITE_PACKAGES / top)
    return python
