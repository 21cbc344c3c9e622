"""The gates of tests/conftest.py, each in a small test run of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"

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


def _run(directory: Path, body: str, *, skips: str = "", ci: bool = True) -> tuple[int, str]:
    (directory / "conftest.py").write_text(CONFTEST.read_text())
    (directory / "SKIPS").write_text(skips)
    (directory / "test_it.py").write_text(body)
    (directory / "pytest.ini").write_text("[pytest]\n")
    environment = {k: v for k, v in os.environ.items() if k != "CI"} | (
        {"CI": "true"} if ci else {}
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr + done.stdout


def test_a_skip_fails_ci_unless_it_is_listed(tmp_path: Path) -> None:
    """Unlisted: red, and named; listed with its reason: green; without CI: green."""
    code, out = _run(tmp_path, SKIPPING)
    assert code == 1
    assert "test_it.py::test_needs_a_device: Skipped: no such device here" in out
    assert "1 passed, 1 skipped" in out.splitlines()[-1]
    assert _run(tmp_path, SKIPPING, skips="test_it.py::*device | needs a device\n")[0] == 0
    assert _run(tmp_path, SKIPPING, ci=False)[0] == 0


def test_a_module_that_is_skipped_whole_counts_too(tmp_path: Path) -> None:
    """A skip at import would otherwise hide every test of a file."""
    (tmp_path / "test_other.py").write_text("def test_runs(): pass\n")
    body = "import pytest\npytest.skip('not here', allow_module_level=True)\n"
    code, out = _run(tmp_path, body)
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
