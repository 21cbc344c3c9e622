"""Several worker processes behind one port (`--workers N`): this process decides, they do the HTTP.

They accept on one socket that this process listens on and passes to each, so a connection that no worker has
accepted yet waits for any of them. One that ends is started anew; its own connections end with it, and
what they had at engines is accounted for no more. There is one index, one account of what engines do, one
queue and one journal, whatever the number of workers: nothing has to be shared, so nothing can differ.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from aiohttp import web

from kvfabric.errors import ConfigError
from kvfabric_router import front
from kvfabric_router.worker_link import WorkerLink

PAUSE_S, MAX_PAUSE_S = 0.1, 5.0
"""Before a worker that ended is started anew; longer each time if it never got ready."""
_STOP_S = front.STOP_S + 5.0

_log = logging.getLogger(__name__)


class Workers:
    """`links`: those of the workers that run now. `link` makes one, given what owns its tasks."""

    def __init__(
        self,
        number: int,
        *,
        link: Callable[[asyncio.TaskGroup], WorkerLink],
        timeout_s: float,
        log_level: str,
    ) -> None:
        self._number = number
        self._link = link
        self._arguments = [f"--timeout-s={timeout_s}", f"--log-level={log_level}"]
        self._running: dict[int, WorkerLink] = {}
        self._all_ready = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Workers {self._running}>"

    @property
    def processes(self) -> dict[int, WorkerLink]:
        """Of those that accept connections now, by process id."""
        return {pid: link for pid, link in self._running.items() if link.ready.is_set()}

    @contextlib.asynccontextmanager
    async def running(self, app: web.Application, host: str, port: int) -> AsyncIterator[str]:
        """The URL they serve at, once all do. `app` answers what is no completion. Raises ConfigError."""
        async with _one_fault(), contextlib.AsyncExitStack() as stack:
            listener = stack.enter_context(contextlib.closing(_listener(host, port)))
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvfabric-router-"))
            own = str(Path(directory) / "router.sock")
            runner = await stack.enter_async_context(front.serving(app))
            await web.UnixSite(runner, own).start()
            group = await stack.enter_async_context(asyncio.TaskGroup())
            for _ in range(self._number):
                stack.callback(group.create_task(self._keep(listener, own)).cancel)
            await self._all_ready.wait()
            address = listener.getsockname()
            yield f"http://{address[0]}:{address[1]}"

    async def _keep(self, listener: socket.socket, own: str) -> None:
        pause = PAUSE_S
        while True:
            async with asyncio.TaskGroup() as calls:
                link = self._link(calls)
                await self._run(listener, own, link)
            pause = PAUSE_S if link.ready.is_set() else min(2 * pause, MAX_PAUSE_S)
            await asyncio.sleep(pause)

    async def _run(self, listener: socket.socket, own: str, link: WorkerLink) -> None:
        """One worker, until it ends."""
        ours, theirs = socket.socketpair()
        with theirs:
            await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
            try:
                process = _spawn(listener, theirs, [f"--decider={own}", *self._arguments])
            except OSError as exc:
                _log.error("a worker could not be started: %s", exc)
                link.close()
                return
        self._running[process.pid] = link
        try:
            async with asyncio.TaskGroup() as group:
                getting_ready = group.create_task(self._get_ready(link))
                await _ended(process)
                getting_ready.cancel()
            _log.error("worker %d ended (%d); another is started", process.pid, process.wait())
        finally:
            await _stop(process)
            del self._running[process.pid]
            link.close()

    async def _get_ready(self, link: WorkerLink) -> None:
        await link.ready.wait()
        if len(self.processes) == self._number:
            self._all_ready.set()


@contextlib.asynccontextmanager
async def _one_fault() -> AsyncIterator[None]:
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def _spawn(
    listener: socket.socket, channel: socket.socket, arguments: list[str]
) -> subprocess.Popen[bytes]:
    # Not the event loop's way: that forks, which runs what gRPC does at a fork.
    passed = listener.fileno(), channel.fileno()
    command = [sys.executable, "-m", "kvfabric_router.worker", *arguments]
    command += [f"--listener={passed[0]}", f"--channel={passed[1]}"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=passed)


async def _ended(process: subprocess.Popen[bytes]) -> None:
    """Until it has."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    descriptor = os.pidfd_open(process.pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def _stop(process: subprocess.Popen[bytes]) -> None:
    """It stops accepting, ends what it has, and goes; after `_STOP_S` it is made to."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_STOP_S):
            await _ended(process)
    except TimeoutError:
        process.kill()
    process.wait()


def _listener(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=front.BACKLOG)
    except OSError as exc:
        raise ConfigError(f"router.listen: cannot listen on {host}:{port}: {exc.strerror}") from exc
