"""The gates of tests/conftest.py, each in a small test run of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"

WORKERS = ("-p", "xdist", "-n", "2")

pytestmark = pytest.mark.slow

SKIPPING = """
import pytest
@pytest.mark.skip(reason="no such device here")
def test_needs_a_device(): pass
def test_runs(): pass
"""
LEAKING = """
import socket
kept = []
def test_leaks(): kept.append(socket.socket())
"""
CLOSING = """
import pytest, socket
@pytest.fixture(scope="module")
def pair():
    with socket.socket() as s:
        yield s
def test_one(pair): pass
def test_two(pair): pass
"""


TIMING = """
import pathlib, time, pytest
BUSY = pathlib.Path("busy")
{marks}
@pytest.mark.parametrize("n", range(3))
def test_timing(n):
    ends = time.monotonic() + 0.2
    while time.monotonic() < ends:
        assert not BUSY.exists()
        time.sleep(0.002)
"""
BUSY = """
import pathlib, time, pytest
@pytest.mark.parametrize("n", range(12))
def test_busy(n):
    pathlib.Path("busy").touch()
    time.sleep(0.05)
    pathlib.Path("busy").unlink()
    time.sleep(0.01)
"""


def _run(
    directory: Path, body: str, *options: str, skips: str = "", ci: bool = True
) -> tuple[int, str]:
    (directory / "conftest.py").write_text(CONFTEST.read_text())
    (directory / "SKIPS").write_text(skips)
    (directory / "test_it.py").write_text(body)
    (directory / "pytest.ini").write_text("[pytest]\nmarkers = alone\n")
    environment = {k: v for k, v in os.environ.items() if k != "CI"}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | ({"CI": "true"} if ci else {})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr + done.stdout


@pytest.mark.parametrize("options", [(), WORKERS], ids=["alone", "workers"])
def test_a_skip_fails_ci_unless_it_is_listed(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Unlisted: red, and named; listed with its reason: green; without CI: green."""
    code, out = _run(tmp_path, SKIPPING, *options)
    assert code == 1
    assert "test_it.py::test_needs_a_device: Skipped: no such device here" in out
    assert "1 passed, 1 skipped" in out.splitlines()[-1]
    listed = "test_it.py::*device | needs a device\n"
    assert _run(tmp_path, SKIPPING, *options, skips=listed)[0] == 0
    assert _run(tmp_path, SKIPPING, *options, ci=False)[0] == 0


@pytest.mark.parametrize("options", [(), WORKERS], ids=["alone", "workers"])
def test_a_module_that_is_skipped_whole_counts_too(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    """A skip at import would otherwise hide every test of a file."""
    (tmp_path / "test_other.py").write_text("def test_runs(): pass\n")
    body = "import pytest\npytest.skip('not here', allow_module_level=True)\n"
    code, out = _run(tmp_path, body, *options)
    assert code == 1
    assert "skipped without a line in tests/SKIPS" in out


def test_a_line_without_a_reason_is_refused(tmp_path: Path) -> None:
    """The list says why, or it does not count."""
    code, out = _run(tmp_path, SKIPPING, skips="test_it.py::*\n")
    assert code != 0
    assert "no reason given" in out


def test_a_module_that_leaves_a_socket_open_fails(tmp_path: Path) -> None:
    """The leak is named; a module whose fixture closes what it opened passes."""
    code, out = _run(tmp_path, LEAKING)
    assert code == 1
    assert "test_it.py left open: {'socket': 1}" in out
    assert _run(tmp_path, CLOSING)[0] == 0


def test_timings_run_alone(tmp_path: Path) -> None:
    """Nothing runs beside a test with the mark `alone`; without the mark something does."""
    (tmp_path / "test_busy.py").write_text(BUSY)
    workers = (*WORKERS, "--dist", "loadfile")
    code, out = _run(tmp_path, TIMING.format(marks="@pytest.mark.alone"), *workers)
    assert code == 0, out
    code, out = _run(tmp_path, TIMING.format(marks=""), *workers)
    assert code == 1, out
