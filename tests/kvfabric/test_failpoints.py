"""Failpoints: each named one is somewhere in the code, an armed one ends the process at its count."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvfabric.errors import ConfigError
from kvfabric.failpoints import POINTS, VARIABLE, arm, failpoint

SOURCE = Path(__file__).parents[2] / "kvfabric"


def test_the_list_and_the_code_agree() -> None:
    """A name nobody passes would be tested in vain; a place without a name cannot be tested."""
    used = [
        name
        for path in SOURCE.rglob("*.py")
        for name in re.findall(r'\bfailpoint\("([^"]+)"\)', path.read_text())
    ]
    assert sorted(used) == sorted(POINTS)
    assert len(set(used)) == len(used)


def _run(spec: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"from kvfabric.failpoints import failpoint\n{code}"],
        env=os.environ | {VARIABLE: spec},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_nth_passing_is_the_last() -> None:
    """Two passings of three are survived, and other points are never counted."""
    loop = 'for i in range(9):\n failpoint("{}")\n print(i, flush=True)'
    died = _run("segment.synced:3", loop.format("segment.synced"))
    assert (died.returncode, died.stdout.split()) == (-signal.SIGKILL, ["0", "1"])
    assert _run("segment.synced:3", loop.format("segment.appended")).returncode == 0


@pytest.mark.parametrize("spec", ["segment.sinked:1", "segment.synced", "segment.synced:x"])
def test_an_unknown_point_is_refused(spec: str) -> None:
    """A typo would look like a crash that was survived."""
    with pytest.raises(ConfigError, match=VARIABLE):
        arm(spec)


def test_nothing_happens_unless_armed() -> None:
    """A test run has no variable set; every point is passed unharmed."""
    for name in POINTS:
        failpoint(name)
