"""A node that a `Launcher` forked: fast to start, and with a guard taken out if a twin wants that."""

from __future__ import annotations

import contextlib
import os
import signal
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvfabric.testing.processes import READY, until
from tests.torture.launcher import Launcher

DEADLINE_S = 60.0


class ForkedNode:
    """A context manager; it may be killed before the end, and hand over to another on its directory."""

    verb = "node"
    has_state = True
    defaults: Mapping[str, object] = {
        "http": "127.0.0.1:0",
        "host_bytes": 8 << 20,
        "ssd_bytes": 0,
        "max_blocks": 16384,
        "sessions_return_s": 0.2,
    }

    def __init__(
        self,
        launcher: Launcher,
        directory: Path,
        /,
        *,
        changes: tuple[str, ...] = (),
        failpoint: str = "",
        takeover: bool = False,
        namespace: str = "",
        **options: object,
    ) -> None:
        """`options`: keys of NodeConfig. The host tier is 8 MiB, no SSD."""
        self.socket = directory / "node.sock"
        self._launcher = launcher
        self._log = directory / f"log.{os.urandom(4).hex()}"
        argv = ["--state-dir", str(directory)] if self.has_state else []
        argv += ["--takeover"] if takeover else []
        for name, value in ({**self.defaults} | options).items():
            argv += ["--" + name.replace("_", "-"), str(value)]
        directory.mkdir(exist_ok=True, mode=0o700)
        self.pid = launcher.start(
            argv,
            failpoint=failpoint,
            changes=changes,
            log=self._log,
            verb=self.verb,
            namespace=namespace,
        )
        self._ended = False

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def wait_ready(self) -> None:
        """Raises TimeoutError; also for a node that ended before."""
        ready = f"kvfabric {self.verb} ready"
        until(lambda: ready in self.log or not self.is_running(), deadline_s=DEADLINE_S)
        assert ready in self.log, self.log

    def is_running(self) -> bool:
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{self.pid}/stat").read_text()
            return stat[stat.rindex(")") + 2] not in "ZX"
        return False

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by name and labels."""
        line = next(line for line in self.log.splitlines() if line.startswith(READY))
        url = f"http://{line.rsplit(' ', 1)[1]}/metrics"
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
            lines = answer.read().decode().splitlines()
        rows = (row.rsplit(" ", 1) for row in lines if not row.startswith("#"))
        return {name.removeprefix("kvfabric_node_"): float(value) for name, value in rows}

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def reap(self) -> int:
        """Wait for its end; the exit code."""
        self._ended = True
        return self._launcher.reap(self.pid)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.reap()

    def __enter__(self) -> ForkedNode:
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._ended:
            os.kill(self.pid, signal.SIGKILL)
            self.reap()


class ForkedRouter(ForkedNode):
    """A router, likewise. `options`: keys of RouterConfig."""

    verb = "router"
    defaults: Mapping[str, object] = {"listen": "127.0.0.1:0"}

    @property
    def url(self) -> str:
        """Of its API, once it is ready."""
        return self.log.split("kvfabric router ready", 1)[1].split()[-1]


class ForkedEngine(ForkedNode):
    """A reference engine, likewise. `options`: keys of EngineConfig; `directory` has its log."""

    verb = "engine"
    has_state = False
    defaults: Mapping[str, object] = {"listen": "127.0.0.1:0"}


def arenas(*pids: int) -> set[int]:
    """Inodes of every arena that these processes map or have open."""
    found: set[int] = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.update(_of(pid))
    return found


def _of(pid: int) -> Iterator[int]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "memfd:kvfabric-arena" in str(entry.readlink()):
                yield entry.stat().st_ino
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "memfd:kvfabric-arena" in line:
            yield int(line.split(maxsplit=5)[4])
