"""No core file holds a secret: processes that have some leave none, engines none with the arena in it."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvfabric.keyring import Keyring
from kvfabric.testing.engine import TinyEngine
from kvfabric.testing.processes import READY, NodeProcess

pytestmark = pytest.mark.slow

GUARD = "import kvfabric.keyring as k; k.hide_memory = lambda: None; "
MAIN = "import sys; from kvfabric.cli import main; sys.exit(main(sys.argv[1:]))"
NODE = ["node", "--http", "", "--host-bytes", "1MiB", "--ssd-bytes", "0", "--max-blocks", "64"]
ROUTER = ["router", "--listen", "127.0.0.1:0"]


def crash(directory: Path, command: list[str], ready: str, *, without_guard: bool = False) -> bool:
    """Start it with core files allowed, have it crash; whether it left one."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    if hard == 0:
        pytest.skip("core files are forbidden here")
    code = (GUARD if without_guard else "") + MAIN
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command, "--state-dir", str(directory)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
    )
    resource.prlimit(process.pid, resource.RLIMIT_CORE, (hard, hard))
    assert process.stderr is not None
    with process.stderr:
        assert any(line.startswith(ready) for line in process.stderr)
        process.send_signal(signal.SIGABRT)
        _, status = os.waitpid(process.pid, 0)
    process.returncode = -os.WTERMSIG(status)
    assert process.returncode == -signal.SIGABRT
    return os.WCOREDUMP(status)


def core_files(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if re.fullmatch(r"core(\.\d+)?", path.name)]


def test_neither_node_nor_router_leaves_a_core_file(tmp_path: Path) -> None:
    assert not crash(tmp_path, NODE, READY)
    assert not crash(tmp_path, ROUTER, "kvfabric router ready")
    assert core_files(tmp_path) == []


def test_without_the_guard_a_core_file_has_the_secrets(tmp_path: Path) -> None:
    """The twin."""
    assert crash(tmp_path, NODE, READY, without_guard=True)
    secret = Keyring.open(tmp_path).tenant_secret("default")  # type: ignore[arg-type]
    for path in core_files(tmp_path):  # where the kernel writes it is the machine's affair
        assert secret in path.read_bytes()
        path.unlink()


def test_a_core_file_of_an_engine_holds_nothing_of_arena_and_window(tmp_path: Path) -> None:
    """Which the kernel would write: it takes memory without a name for the process's own."""
    with NodeProcess(tmp_path) as node:
        engine = TinyEngine.connect(node.socket)
        maps = Path("/proc/self/smaps").read_text()
        rows = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", maps, flags=re.MULTILINE)
        shared = [row for row in rows if "/memfd:" in row.partition("\n")[0]]
        assert len(shared) >= 2
        for row in shared:
            flags = re.search(r"^VmFlags: (.*)$", row, flags=re.MULTILINE)
            assert flags is not None
            assert "dd" in flags[1].split(), row
        engine.client.close()
