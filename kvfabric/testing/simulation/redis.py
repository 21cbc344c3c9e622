"""A directory's Redis, simulated: the commands that `registry.redis.store` uses, on the simulated network.

Every write is durable when it is answered (`appendfsync always`). What can go wrong: it is away, slow or cut
off; it starts anew, which is another run; it comes back with an older state, as a fail-over or a restored
backup does; an answer is lost after the command was done.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self

from redis import exceptions as failures

from kvfabric.registry.redis.address import DirectoryAddress, Link
from kvfabric.testing.simulation.loop import Process, here
from kvfabric.testing.simulation.network import Network, Unreachable

ADDRESS = "redis"

Command = tuple[str, tuple[Any, ...], dict[str, Any]]


class SimulatedRedis:
    """The server's data outlive its process."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._data: dict[str, Any] = {}
        self._versions: dict[str, int] = {}
        self._changes = itertools.count(1)
        self._runs = itertools.count(1)
        self._listeners: dict[_Listener, None] = {}
        self.run_id = ""
        self.num_commands = 0
        self.process: Process | None = None

    def start(self, process: Process) -> None:
        """A server process with the data there are."""
        self.process = process
        self.run_id = f"run-{next(self._runs)}"
        self._listeners.clear()
        self._network.serve(ADDRESS, process, self._serve)

    def backup(self) -> Any:
        return copy.deepcopy((self._data, self._versions))

    def restore(self, backup: Any) -> None:
        self._data, self._versions = copy.deepcopy(backup)

    async def _serve(self, method: str, payload: Any) -> Any:
        if method == "subscribe":
            self._listeners[payload] = None
            return None
        if method == "unsubscribe":
            self._listeners.pop(payload, None)
            return None
        if method == "listening":
            return payload in self._listeners
        commands, watched, atomic = payload
        if method == "watch":
            return self._versions.get(commands, 0)
        if any(self._versions.get(key, 0) != version for key, version in watched.items()):
            raise failures.WatchError("a watched key changed")
        results = []
        for name, args, kwargs in commands:
            self.num_commands += 1
            results.append(getattr(self, f"_{name}")(*args, **kwargs))
            if not atomic and len(results) == 1:
                await asyncio.sleep(0)  # others' commands come in between
        return results

    def _touch(self, key: str) -> None:
        self._versions[key] = next(self._changes)

    # ------------------------------------------------------------------ commands

    def _hset(
        self,
        key: str,
        field: Any = None,
        value: Any = None,
        *,
        mapping: Mapping[Any, Any] | None = None,
    ) -> int:
        self._touch(key)
        table = self._data.setdefault(key, {})
        for name, one in (mapping or {field: value}).items():
            table[_bytes(name)] = _bytes(one)
        return 0

    def _hmget(self, key: str, fields: Any) -> list[bytes | None]:
        table = self._data.get(key, {})
        return [table.get(_bytes(field)) for field in fields]

    def _hgetall(self, key: str) -> dict[bytes, bytes]:
        return dict(self._data.get(key, {}))

    def _rpush(self, key: str, *values: bytes) -> int:
        self._touch(key)
        items = self._data.setdefault(key, [])
        items.extend(map(_bytes, values))
        return len(items)

    def _lrange(self, key: str, first: int, last: int) -> list[bytes]:
        items = self._data.get(key, [])
        return list(items[first:] if last == -1 else items[first : last + 1])

    def _set(self, key: str, value: Any) -> bool:
        self._touch(key)
        self._data[key] = _bytes(value)
        self._data.pop(f"expiry {key}", None)
        return True

    def _get(self, key: str) -> bytes | None:
        value: bytes | None = self._data.get(key)
        return value

    def _mget(self, keys: list[str]) -> list[bytes | None]:
        return [self._data.get(key) for key in keys]

    def _delete(self, key: str) -> int:
        self._touch(key)
        self._data.pop(f"expiry {key}", None)
        return int(self._data.pop(key, None) is not None)

    def _pexpire(self, key: str, milliseconds: int) -> int:
        if key not in self._data:
            return 0
        self._touch(key)
        assert self.process is not None
        self._data[f"expiry {key}"] = int(self.process.wall_clock() * 1000) + milliseconds
        return 1

    def _pexpiretime(self, key: str) -> int:
        if key not in self._data:
            return -2
        found: int = self._data.get(f"expiry {key}", -1)
        return found

    def _sadd(self, key: str, member: str) -> int:
        self._touch(key)
        self._data.setdefault(key, {})[_bytes(member)] = None
        return 1

    def _srem(self, key: str, member: str) -> int:
        self._touch(key)
        self._data.get(key, {}).pop(_bytes(member), None)
        return 1

    def _smembers(self, key: str) -> list[bytes]:
        return list(self._data.get(key, {}))

    def _publish(self, channel: str, message: Any) -> int:
        told = [one for one in self._listeners if channel in one.channels]
        for listener in told:
            self._network.send(listener.process, listener.heard, channel)
        return len(told)

    def _info(self, *_sections: str) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "master_replid": "one",
            "role": "master",
            "aof_enabled": 1,
        }

    def _config_get(self, _name: str) -> dict[str, str]:
        return {"appendfsync": "always"}

    def _ping(self) -> bool:
        return True


def _bytes(value: Any) -> bytes:
    return bytes(value) if isinstance(value, bytes | memoryview) else str(value).encode()


class SimulatedLink(Link):
    """In place of `registry.redis.address.Link`."""

    def __init__(self, network: Network, address: DirectoryAddress, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.client: Any = _Client(network, timeout_s)

    async def aclose(self) -> None:
        await self.client.aclose()


class _Client:
    def __init__(self, network: Network, timeout_s: float) -> None:
        self._network = network
        self._timeout_s = timeout_s

    async def aclose(self) -> None:
        pass

    async def ask(self, method: str, payload: Any) -> Any:
        try:
            return await self._network.call(ADDRESS, method, payload, timeout=self._timeout_s)
        except Unreachable as exc:
            raise failures.ConnectionError(str(exc)) from exc
        except TimeoutError as exc:
            raise failures.TimeoutError("no answer in time") from exc

    async def one(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return (await self.ask("run", ([(name, args, kwargs)], {}, True)))[0]

    async def smembers(self, key: str) -> Any:
        return await self.one("smembers", key)

    async def hmget(self, key: str, fields: Any) -> Any:
        return await self.one("hmget", key, fields)

    async def hgetall(self, key: str) -> Any:
        return await self.one("hgetall", key)

    async def info(self, section: str) -> Any:
        return await self.one("info", section)

    async def config_get(self, name: str) -> Any:
        return await self.one("config_get", name)

    def pipeline(self, *, transaction: bool) -> _Pipeline:
        return _Pipeline(self, transaction=transaction)

    @asynccontextmanager
    async def pubsub(self) -> AsyncIterator[_Listener]:
        listener = _Listener(self)
        try:
            yield listener
        finally:
            listener.channels = ()


class _Pipeline:
    """Commands are sent together; after `watch` each at once, until `multi`."""

    def __init__(self, client: _Client, *, transaction: bool) -> None:
        self._client = client
        self._transaction = transaction
        self._commands: list[Command] = []
        self._watched: dict[str, int] = {}
        self._at_once = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._commands.clear()

    async def watch(self, key: str) -> None:
        self._watched[key] = await self._client.ask("watch", (key, {}, True))
        self._at_once = True

    def multi(self) -> None:
        self._at_once = False

    def __getattr__(self, name: str) -> Any:
        def command(*args: Any, **kwargs: Any) -> Any:
            if self._at_once:
                return self._client.one(name, *args, **kwargs)
            self._commands.append((name, args, kwargs))
            return self

        return command

    async def execute(self) -> Any:
        commands, self._commands = self._commands, []
        return await self._client.ask("run", (commands, self._watched, self._transaction))


class _Listener:
    """A subscription; what is published while it is cut off is lost."""

    def __init__(self, client: _Client) -> None:
        self.process = here()
        self.channels: tuple[str, ...] = ()
        self._client = client
        self._heard: deque[str] = deque()
        self._news = asyncio.Event()

    async def subscribe(self, *channels: str) -> None:
        self.channels = channels
        await self._client.ask("subscribe", self)

    def heard(self, channel: str) -> None:
        if channel in self.channels:
            self._heard.append(channel)
            self._news.set()

    async def get_message(
        self,
        *,
        ignore_subscribe_messages: bool,
        timeout: float,
    ) -> dict[str, Any] | None:
        if not self._heard:
            self._news.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._news.wait()
            except TimeoutError:
                return None
        return {"type": "message", "channel": self._heard.popleft().encode()}

    async def ping(self) -> None:
        # A server that started anew knows nothing of us: the connection is gone.
        if await self._client.ask("listening", self) is False:
            raise failures.ConnectionError("the connection broke")
