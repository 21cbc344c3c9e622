"""The network between simulated processes: calls and streams that are late, lost, cut off or refused.

A call to a process that is dead is refused; one that a partition swallows is never answered, so whoever asks
needs a deadline. A stream is in order until it breaks. `Chaos` says how often what goes wrong.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

from kvfabric.testing.simulation.loop import Process, SimulatedLoop, here

KEEPALIVE_S = 1.5
"""After this a stream across a partition is known to be broken."""

Unary = Callable[[str, Any], Awaitable[Any]]
Streams = Callable[[str, Any], AsyncIterator[Any]]


class Unreachable(Exception):
    """The connection was refused or broke."""


@dataclass(slots=True)
class Chaos:
    """Mean delays in seconds and probabilities, of one message each.

    `stream_loss`, `stream_twice`, `stream_swap`: of an item of a stream of `careless` methods, which no TCP
    would do: for readers that claim to notice.
    """

    far_s: float = 0.0008
    near_s: float = 0.00004
    slow: float = 0.0
    slow_s: float = 0.08
    break_call: float = 0.0
    stream_loss: float = 0.0
    stream_twice: float = 0.0
    stream_swap: float = 0.0
    careless: str = "Watch"

    def calm(self) -> None:
        self.slow = self.break_call = 0.0
        self.stream_loss = self.stream_twice = self.stream_swap = 0.0


@dataclass(slots=True)
class _Service:
    process: Process
    unary: Unary
    streams: Streams | None


@dataclass(slots=True, eq=False)
class _Waiter:
    """A call under way."""

    caller: Process
    future: asyncio.Future[Any]


@dataclass(slots=True, eq=False)
class _Stream:
    """The reader's end. `broken`: how it ended, once what came before is read."""

    caller: Process
    host: str
    items: deque[Any] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    broken: Exception | None = None
    ended: bool = False
    pump: asyncio.Task[None] | None = None
    due: float = 0.0


class Network:
    """See the module. Everything that happens is drawn from `rng`."""

    def __init__(self, loop: SimulatedLoop, rng: random.Random) -> None:
        self.chaos = Chaos()
        self._loop = loop
        self._rng = rng
        self._services: dict[str, _Service] = {}
        self._cut: set[tuple[str, str]] = set()
        self._waiting: dict[Process, dict[_Waiter, None]] = {}
        self._streams: dict[Process, dict[_Stream, None]] = {}
        self._due: dict[tuple[str, str], float] = {}
        self.num_calls = 0

    # ------------------------------------------------------------------ who is where

    def serve(
        self, address: str, process: Process, unary: Unary, streams: Streams | None = None
    ) -> None:
        """`unary(method, payload)` and `streams(method, payload)` answer there from now on."""
        self._services[address] = _Service(process, unary, streams)

    def killed(self, process: Process) -> None:
        """Its peers' connections break."""
        for waiter in self._waiting.pop(process, {}):
            self._settle(waiter, process.host, Unreachable(f"{process.name} is gone"), None)
        for stream in self._streams.pop(process, {}):
            self._break(
                stream, Unreachable(f"{process.name} is gone"), self._delay(stream, process)
            )

    def cut(self, one: str, other: str) -> None:
        """Nothing passes between two hosts."""
        self._cut |= {(one, other), (other, one)}

    def heal(self) -> None:
        self._cut.clear()

    def joined(self, one: str, other: str) -> bool:
        return (one, other) not in self._cut

    # ------------------------------------------------------------------ calls

    async def call(
        self,
        address: str,
        method: str,
        payload: Any,
        *,
        timeout: float | None = None,
        in_order: bool = False,
    ) -> Any:
        """The answer. Raises Unreachable, TimeoutError, or what the other side raised."""
        caller = here()
        self.num_calls += 1
        waiter = _Waiter(caller, self._loop.create_future())
        service = self._services.get(address)
        host = service.process.host if service is not None else caller.host
        delay = self._transit(caller.host, host)
        if in_order:
            due = max(self._loop.time() + delay, self._due.get((caller.name, address), 0.0) + 1e-7)
            self._due[caller.name, address] = due
            delay = due - self._loop.time()
        self._loop.call_later(
            delay, self._arrive, address, method, payload, waiter, context=Context()
        )
        async with asyncio.timeout(timeout):
            return await waiter.future

    def _arrive(self, address: str, method: str, payload: Any, waiter: _Waiter) -> None:
        service = self._services.get(address)
        caller = waiter.caller
        if service is None or not service.process.is_alive:
            host = service.process.host if service is not None else caller.host
            self._settle(waiter, host, Unreachable(f"nobody serves {address}"), None)
            return
        process = service.process
        if not self.joined(caller.host, process.host):
            return
        if (
            self.chaos.break_call
            and caller.host != process.host
            and self._draw(self.chaos.break_call)
        ):
            self._settle(waiter, process.host, Unreachable("the connection broke"), None)
            if self._rng.random() < 0.5:
                return  # it never came; otherwise only the answer is lost
        self._waiting.setdefault(process, {})[waiter] = None
        process.start(self._answer(service, method, payload, waiter))

    async def _answer(self, service: _Service, method: str, payload: Any, waiter: _Waiter) -> None:
        error: Exception | None = None
        result = None
        try:
            result = await service.unary(method, payload)
        except Exception as exc:  # noqa: BLE001 - it is the caller's
            error = exc
        self._waiting.get(service.process, {}).pop(waiter, None)
        self._settle(waiter, service.process.host, error, result)

    def _settle(self, waiter: _Waiter, host: str, error: Exception | None, result: Any) -> None:
        caller = waiter.caller
        if not self.joined(caller.host, host):
            return

        def settle() -> None:
            if waiter.future.done():
                return
            if error is not None:
                waiter.future.set_exception(error)
                waiter.future.exception()  # seen, should nobody wait any more
            else:
                waiter.future.set_result(result)

        caller.call_later(self._transit(host, caller.host), settle)

    # ------------------------------------------------------------------ streams

    async def stream(self, address: str, method: str, payload: Any) -> AsyncIterator[Any]:
        """Items as they come. Raises Unreachable when it breaks, or what the other side raised."""
        caller = here()
        service = self._services.get(address)
        if service is None or not service.process.is_alive or service.streams is None:
            await asyncio.sleep(self._transit(caller.host, caller.host))
            raise Unreachable(f"nobody serves {address}")
        stream = _Stream(caller, service.process.host)
        self._loop.call_later(
            self._transit(caller.host, stream.host),
            self._open,
            service,
            method,
            payload,
            stream,
            context=Context(),
        )
        try:
            while True:
                while stream.items:
                    yield stream.items.popleft()
                if stream.broken is not None:
                    raise stream.broken
                if stream.ended:
                    return
                stream.news.clear()
                await stream.news.wait()
        finally:
            self._streams.get(service.process, {}).pop(stream, None)
            if stream.pump is not None:
                stream.pump.cancel()

    def _open(self, service: _Service, method: str, payload: Any, stream: _Stream) -> None:
        process = service.process
        if not process.is_alive or not self.joined(stream.caller.host, process.host):
            self._break(stream, Unreachable("no connection"), KEEPALIVE_S)
            return
        self._streams.setdefault(process, {})[stream] = None
        stream.pump = process.start(self._pump(service, method, payload, stream))

    async def _pump(self, service: _Service, method: str, payload: Any, stream: _Stream) -> None:
        assert service.streams is not None
        process, kept = service.process, None
        try:
            async for item in service.streams(method, payload):
                if not stream.caller.is_alive or stream.broken is not None:
                    return
                if not self.joined(stream.caller.host, process.host):
                    self._break(stream, Unreachable("the stream broke"), KEEPALIVE_S)
                    return
                for one in self._mangled(method, item, kept):
                    self._post(stream, process, one)
                kept = item
        except asyncio.CancelledError:
            raise
        except Exception as exc:  # noqa: BLE001 - it is the reader's
            self._break(stream, exc, self._delay(stream, process))
        else:
            stream.caller.call_later(self._delay(stream, process), self._end, stream)

    def _mangled(self, method: str, item: Any, before: Any) -> list[Any]:
        chaos = self.chaos
        if not method.endswith(chaos.careless):
            return [item]
        if chaos.stream_loss and self._draw(chaos.stream_loss):
            return []
        if chaos.stream_twice and self._draw(chaos.stream_twice):
            return [item, item]
        if chaos.stream_swap and before is not None and self._draw(chaos.stream_swap):
            return [item, before]
        return [item]

    def _post(self, stream: _Stream, process: Process, item: Any) -> None:
        def put() -> None:
            if not self.joined(stream.caller.host, process.host):
                self._break(stream, Unreachable("the stream broke"), KEEPALIVE_S)
            elif stream.broken is None:
                stream.items.append(item)
                stream.news.set()

        stream.caller.call_later(self._delay(stream, process), put)

    def _break(self, stream: _Stream, error: Exception, delay: float) -> None:
        def tell() -> None:
            stream.broken = stream.broken or error
            stream.news.set()

        stream.caller.call_later(delay, tell)

    def _end(self, stream: _Stream) -> None:
        stream.ended = True
        stream.news.set()

    def _delay(self, stream: _Stream, process: Process) -> float:
        """In order: after what was sent before."""
        now = self._loop.time()
        stream.due = max(now + self._transit(process.host, stream.caller.host), stream.due + 1e-7)
        return stream.due - now

    # ------------------------------------------------------------------ chance

    def send(self, to: Process, call: Callable[..., object], *args: Any) -> None:
        """One message without an answer; lost where nothing passes."""
        host = here().host

        def arrive() -> None:
            if self.joined(host, to.host):
                call(*args)

        to.call_later(self._transit(host, to.host), arrive)

    def _transit(self, one: str, other: str) -> float:
        if one == other:
            return 1e-6 + self._rng.expovariate(1 / self.chaos.near_s)
        if self.chaos.slow and self._draw(self.chaos.slow):
            return self._rng.expovariate(1 / self.chaos.slow_s)
        return 1e-5 + self._rng.expovariate(1 / self.chaos.far_s)

    def _draw(self, probability: float) -> bool:
        return self._rng.random() < probability
