"""The wheel, installed without the checkout: commands run from it, a missing extra is one line.

The demo too: `test_demo.py`.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.fleet.wheels import EVERYTHING, ROOT, build, make_environment, run

pytestmark = [pytest.mark.slow, pytest.mark.fleet]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    return make_environment(tmp_path_factory.mktemp("full") / "venv", wheel, EVERYTHING)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    return make_environment(tmp_path_factory.mktemp("bare") / "venv", wheel, [])


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
    done = run(python, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(python.parents[1]) in done.stdout
    assert str(ROOT) not in done.stdout


def test_doctor_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    """The console script that pip made, from another directory."""
    done = run(python.with_name("kvfabric"), "doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("command", "extra"), [("node", "node"), ("router", "router"), ("engine", "engine")]
)
def test_a_missing_extra_is_one_line(
    bare_python: Path, tmp_path: Path, command: str, extra: str
) -> None:
    """It names the extra and how to get it; no traceback."""
    done = run(bare_python.with_name("kvfabric"), command, cwd=tmp_path)
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"kvfabric[{extra}]" in done.stderr


def test_the_client_library_needs_no_extra(bare_python: Path, tmp_path: Path) -> None:
    """What an engine process imports works with the three light dependencies."""
    done = run(bare_python, "-c", "import kvfabric.client, kvfabric.hashing", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
