"""The wheel, installed without the checkout: commands and demo run from it, a missing extra is one line.

The environments are made by `venv`, and pip installs the wheel. Its dependencies are linked from the
environment of the tests, each by name, so that a run needs no network and no second torch; the editable
installation of the checkout is not among them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

ROOT = Path(__file__).parents[2]
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])


def _run(*command: str | Path, cwd: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    # Neither the checkout nor settings of the caller's may help.
    environment = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("PYTHON", "KVFABRIC_", "VIRTUAL_ENV"))
    }
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout. The build backend is the one of the tests' own environment."""
    directory = tmp_path_factory.mktemp("wheel")
    done = _run(
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


def _make_environment(directory: Path, wheel: Path, extras: Iterable[str]) -> Path:
    """An environment with the wheel and what `extras` need; returns its python."""
    venv.create(directory, with_pip=False)
    python = directory / "bin" / "python"
    done = _run(
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


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    return _make_environment(
        tmp_path_factory.mktemp("full") / "venv", wheel, ["node", "router", "engine"]
    )


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    return _make_environment(tmp_path_factory.mktemp("bare") / "venv", wheel, [])


def test_the_wheel_has_the_slice_and_the_licences_and_no_tests(wheel: Path) -> None:
    """What runs without the checkout is inside; attribution travels with the data."""
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"kvfabric/demo/slice.jsonl.gz", "kvfabric/demo/SLICE.md", "kvfabric/py.typed"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {
        "kvfabric",
        "kvfabric_engine",
        "kvfabric_router",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_environment_sees_no_checkout(python: Path, tmp_path: Path) -> None:
    """All three packages come from the wheel."""
    code = "import kvfabric, kvfabric_engine, kvfabric_router as r; print(kvfabric.__file__, r.__file__)"
    done = _run(python, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(python.parents[1]) in done.stdout
    assert str(ROOT) not in done.stdout


def test_doctor_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    """The console script that pip made, from another directory."""
    done = _run(python.with_name("kvfabric"), "doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


def test_the_demo_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    """The whole fleet, started by the installed package alone."""
    done = _run(python.with_name("kvfabric"), "demo", "--quick", cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "demo-report.json").read_text())["passed"]


@pytest.mark.parametrize(
    ("command", "extra"), [("node", "node"), ("router", "router"), ("engine", "engine")]
)
def test_a_missing_extra_is_one_line(
    bare_python: Path, tmp_path: Path, command: str, extra: str
) -> None:
    """It names the extra and how to get it; no traceback."""
    done = _run(bare_python.with_name("kvfabric"), command, cwd=tmp_path)
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"kvfabric[{extra}]" in done.stderr


def test_the_client_library_needs_no_extra(bare_python: Path, tmp_path: Path) -> None:
    """What an engine process imports works with the three light dependencies."""
    done = _run(bare_python, "-c", "import kvfabric.client, kvfabric.hashing", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
