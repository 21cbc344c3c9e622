"""A real Redis for tests, alone in its directory, and a way to it that can be slow, cut or turned."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Self

from redis import Redis
from redis import exceptions as failures

READY_S = 10.0


class RedisServer:
    """A redis-server on a Unix socket, with what a directory needs; a context manager.

    `settings`: further lines of its configuration; `namespace`: of the network that it is in. It may be
    killed, emptied and started again.
    """

    def __init__(self, directory: Path, **settings: object) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.socket = directory / "redis.sock"
        self._command = ["redis-server", str(directory / "redis.conf")]
        if namespace := settings.pop("namespace", ""):
            self._command = ["ip", "netns", "exec", str(namespace), *self._command]
        self._settings: dict[str, object] = {
            "port": 0,
            "unixsocket": self.socket,
            "unixsocketperm": 700,
            "dir": directory,
            "save": '""',
            "appendonly": "yes",
            "appendfsync": "always",
            "logfile": directory / "redis.log",
            "repl-diskless-sync-delay": 0,
        } | {name.replace("_", "-"): value for name, value in settings.items()}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def start(self) -> Self:
        """Start and wait until it answers. Raises RuntimeError with its log if it does not."""
        config = self.directory / "redis.conf"
        lines = (f"{name} {value}\n" for name, value in self._settings.items())
        config.write_text("".join(lines))
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        ends = time.monotonic() + READY_S
        while not self._answers():
            if time.monotonic() > ends or self._process.poll() is not None:
                self.kill()
                raise RuntimeError((self.directory / "redis.log").read_text())
            time.sleep(0.01)
        return self

    def kill(self) -> None:
        """SIGKILL, and wait for the end. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self.socket.unlink(missing_ok=True)

    def forget(self) -> None:
        """Kill it and lose everything it wrote."""
        self.kill()
        shutil.rmtree(self.directory / "appendonlydir", ignore_errors=True)

    def keep(self, where: Path) -> None:
        """Copy what it has written."""
        shutil.copytree(self.directory / "appendonlydir", where)

    def bring_back(self, where: Path) -> None:
        """Kill it and let it have what `keep` copied."""
        self.forget()
        shutil.copytree(where, self.directory / "appendonlydir")

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def call(self, *command: object) -> object:
        """One command, as its administrator."""
        with Redis(unix_socket_path=str(self.socket)) as client:
            return client.execute_command(*command)

    def caught_up_with(self, primary: RedisServer) -> bool:
        """Whether this replica has all that its primary wrote; waits for it up to 5 s."""
        return primary.call("WAIT", 1, 5000) == 1 and self.info("replication")["role"] == "slave"

    def info(self, section: str) -> Mapping[str, object]:
        with Redis(unix_socket_path=str(self.socket)) as client:
            found: Mapping[str, object] = client.info(section)
            return found

    def _answers(self) -> bool:
        try:
            return bool(self.call("PING"))
        except failures.AuthenticationError:
            return True
        except (failures.ConnectionError, OSError):
            return False


class RedisSentinel:
    """A redis-sentinel that decides alone, and quickly; a context manager. `primary`: (name, port)."""

    def __init__(self, directory: Path, *, port: int, primary: tuple[str, int]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        name, where = primary
        self._port = port
        self._config = directory / "sentinel.conf"
        self._config.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {directory}\nlogfile {directory}/sentinel.log\n"
            f"sentinel monitor {name} 127.0.0.1 {where} 1\n"
            f"sentinel down-after-milliseconds {name} 500\n"
            f"sentinel failover-timeout {name} 5000\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = ["redis-sentinel", str(self._config)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def num_replicas(self, primary: str) -> int:
        """How many it has found; 0 while it does not answer."""
        try:
            with Redis(port=self._port) as client:
                return len(client.execute_command("SENTINEL", "REPLICAS", primary))
        except (failures.ConnectionError, OSError):
            return 0


class Way:
    """A Unix socket that leads to another one. `delay_s` holds back answers; `cut` breaks it."""

    def __init__(self, path: Path, to: Path) -> None:
        self.path = path
        self.to = to
        self.delay_s = 0.0
        self._open = True
        self._writers: set[asyncio.StreamWriter] = set()
        self._quiet = asyncio.Event()

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    def cut(self) -> None:
        """From now on nothing passes: what is connected hangs, what connects is closed."""
        self._open = False

    def mend(self, to: Path | None = None) -> None:
        """Whoever hangs is disconnected; new connections pass, to `to` if given."""
        self.to = to or self.to
        for writer in self._writers:
            writer.close()
        self._open = True

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Way]:
        server = await asyncio.start_unix_server(self._serve, self.path)
        try:
            yield self
        finally:
            server.close()
            for writer in list(self._writers):
                writer.close()
            await server.wait_closed()
            if self._writers:
                await self._quiet.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._open:
            writer.close()
            return
        try:
            there, out = await asyncio.open_unix_connection(self.to)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, out}
        self._quiet.clear()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, out, late=False))
                group.create_task(self._pass_on(there, writer, late=True))
        finally:
            for one in (writer, out):
                one.close()
                with contextlib.suppress(OSError):
                    await one.wait_closed()
                self._writers.discard(one)
            if not self._writers:
                self._quiet.set()

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, late: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if late and self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if self._open:
                    writer.write(data)
                    await writer.drain()
        writer.close()
