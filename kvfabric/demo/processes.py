"""Child processes of the demo: start, wait until ready, stop, kill. Each by its own pid, never by name."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from kvfabric.errors import KVFabricError

_STOP_S = 10.0
_POLL_S = 0.05
_TAIL_BYTES = 4096
_PORTS = range(12_000, 32_000)
"""Below those that Linux gives to outgoing connections (`ip_local_port_range`)."""


class DemoError(KVFabricError):
    """The demo cannot go on: a process did not start, or a request that must succeed failed."""

    code = "demo"


class Child:
    """One `kvfabric` process. Its output goes to a log file, whose end is shown when it fails."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log

    def __repr__(self) -> str:
        state = "running" if self.is_running else f"exited {self._process.returncode}"
        return f"<Child {self.name} pid {self._process.pid} {state}>"

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    async def wait_ready(self, check: Callable[[], Awaitable[bool]], deadline_s: float) -> None:
        """Poll `check` until it holds. Raises DemoError when the process ends or the deadline passes."""
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        while not await check():
            if not self.is_running:
                raise DemoError(f"{self!r} before it was ready; the end of its log:\n{self.tail()}")
            if loop.time() > end:
                raise DemoError(
                    f"{self!r} was not ready in {deadline_s:.0f} s; the end of its log:\n{self.tail()}"
                )
            await asyncio.sleep(_POLL_S)

    async def kill(self) -> None:
        """SIGKILL, then wait for the exit."""
        if self.is_running:
            self._process.kill()
        await self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def stop(self) -> None:
        """SIGTERM; SIGKILL when that takes too long."""
        if self.is_running:
            self._process.terminate()
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            await self.kill()

    def tail(self) -> str:
        """The last lines of the log, indented."""
        data = self._log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        return "\n".join("    " + line for line in data.splitlines()[-20:]) or "    (empty)"


class Children:
    """Owns every child of the demo: what still runs when the block ends is stopped, newest first."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._started: list[Child] = []

    async def __aenter__(self) -> Children:
        return self

    async def __aexit__(self, *_: object) -> None:
        for child in reversed(self._started):
            await child.stop()

    async def start(self, name: str, arguments: Sequence[str]) -> Child:
        """Run `kvfabric` with `arguments` under this Python. Logs of one name are appended."""
        log = self._logs / f"{name}.log"
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command_line(arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        child = Child(name, process, log)
        self._started.append(child)
        return child

    def dead(self) -> list[Child]:
        """Children that ended; the caller knows which it ended itself."""
        return [child for child in self._started if not child.is_running]


def command_line(arguments: Sequence[str]) -> list[str]:
    """`kvfabric` as installed beside this very code, whatever PATH says."""
    return [sys.executable, "-m", "kvfabric", *arguments]


async def run_command(arguments: Sequence[str], deadline_s: float = 30.0) -> str:
    """Run a `kvfabric` command to its end and return its standard output. Raises DemoError."""
    process = await asyncio.create_subprocess_exec(
        *command_line(arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(deadline_s):
            out, err = await process.communicate()
    except TimeoutError as exc:
        process.kill()
        await process.wait()
        raise DemoError(f"`kvfabric {' '.join(arguments)}` took over {deadline_s:.0f} s") from exc
    if process.returncode != 0:
        raise DemoError(f"`kvfabric {' '.join(arguments)}` failed: {err.decode().strip()}")
    return out.decode()


def free_addresses(count: int) -> list[str]:
    """`count` loopback addresses with ports that were free a moment ago, and that no outgoing connection gets
    meanwhile. Raises DemoError."""
    sockets: list[socket.socket] = []
    try:
        for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
            if len(sockets) == count:
                return [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
            with contextlib.suppress(OSError):
                sockets.append(socket.create_server(("127.0.0.1", port)))
        raise DemoError(f"no {count} ports are free on loopback")
    finally:
        for s in sockets:
            s.close()
