"""`kvfabric router` as a process: it says when it is ready, stops when told, and names what is wrong."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROUTER = [sys.executable, "-m", "kvfabric", "router"]


def test_it_says_where_it_listens_and_stops_gracefully(tmp_path: Path) -> None:
    command = [*ROUTER, "--listen", "127.0.0.1:0", "--state-dir", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr)
        ready = next(line for line in lines if "ready" in line)
        assert ready.startswith("kvfabric router ready: http://127.0.0.1:")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--listen", "nowhere"], "router.listen"),
        (["--policy", "best"], "router.policy"),
        (["--no-such-key", "1"], "--no-such-key"),
    ],
)
def test_wrong_use_is_one_line_that_names_the_key(arguments: list[str], message: str) -> None:
    done = subprocess.run([*ROUTER, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
