"""UCX between simulated processes: tagged messages that overtake each other, are late, spoilt or swallowed.

As with the real one, memory is touched until a request has ended: what a link is told to abort ends later,
and until then bytes may still arrive. A peer that is gone is noticed after a while.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvfabric.errors import ConnectError
from kvfabric.testing.simulation.loop import Process
from kvfabric.testing.simulation.network import Network
from kvfabric.transfer.ucx import Message, Posted

PEER_DEATH_S = 1.0

Touched = Callable[[memoryview, int], None]


@dataclass(slots=True)
class WireChaos:
    """Of one message each: seconds, probabilities."""

    delay_s: float = 0.0005
    slow: float = 0.0
    slow_s: float = 0.5
    lost: float = 0.0
    spoilt: float = 0.0
    abort_s: float = 0.02

    def calm(self) -> None:
        self.slow = self.lost = self.spoilt = 0.0


@dataclass(slots=True, eq=False)
class _Request:
    """One message of one side. `peer_gone`: the time at which it ends if nothing else ends it."""

    posted: SimulatedPosted
    place: int
    buffer: memoryview
    tag: int
    link: SimulatedLink


class SimulatedPosted(Posted):
    """`touched` hears of each buffer when it may be touched (+1) and when no more (-1)."""

    def __init__(self, messages: Sequence[Message], touched: Touched) -> None:
        super().__init__(len(messages))
        self._buffers = [memoryview(message.buffer) for message in messages]
        self._errors: list[str | None] = [None] * len(messages)
        self._touched = touched
        for buffer in self._buffers:
            touched(buffer, +1)
        if not messages:
            self._ended.set_result(())

    def end(self, place: int, error: str) -> None:
        if self._errors[place] is not None:
            return
        self._errors[place] = error
        self._touched(self._buffers[place], -1)
        if None not in self._errors:
            self._ended.set_result(tuple(error or "" for error in self._errors))


class Fabric:
    """All transports, by address."""

    def __init__(self, network: Network, rng: random.Random, touched: Touched) -> None:
        self.network = network
        self.rng = rng
        self.chaos = WireChaos()
        self.touched = touched
        self.transports: dict[bytes, SimulatedTransport] = {}
        self.num_messages = 0


class SimulatedTransport:
    """In place of `transfer.ucx.Transport`."""

    is_sealed = False

    def __init__(self, fabric: Fabric, process: Process) -> None:
        self.fabric = fabric
        self.process = process
        self.address = f"ucx {process.name} {len(fabric.transports)}".encode()
        fabric.transports[self.address] = self
        self._links: dict[bytes, SimulatedLink] = {}
        self._numbers = itertools.count(1)
        self.receives: dict[int, _Request] = {}
        self.early: dict[int, _Request] = {}

    async def link_to(self, address: bytes) -> SimulatedLink:
        if address not in self.fabric.transports:
            raise ConnectError("no worker has this address")
        known = self._links.get(address)
        if known is None or not known.is_alive:
            known = self._links[address] = SimulatedLink(self, address, next(self._numbers))
        return known


@dataclass(slots=True, eq=False)
class SimulatedLink:
    """In place of `transfer.ucx.Link`."""

    transport: SimulatedTransport
    address: bytes
    number: int
    is_alive: bool = True
    _flying: dict[_Request, None] = field(default_factory=dict)

    def send(self, messages: Sequence[Message]) -> Posted:
        fabric = self.transport.fabric
        posted, requests = self._post(messages)
        for request in requests:
            fabric.num_messages += 1
            self._later(self._delay(), self._arrive, request)
        return posted

    def receive(self, messages: Sequence[Message]) -> Posted:
        posted, requests = self._post(messages)
        for request in requests:
            early = self.transport.early.pop(request.tag, None)
            if early is not None:
                self._move(early, request)
            else:
                self.transport.receives[request.tag] = request
        self._watch()
        return posted

    def close(self) -> None:
        """Nobody uses it any more; what is in flight goes on."""
        self.is_alive = False

    def abort(self) -> None:
        self.is_alive = False
        for request in list(self._flying):
            delay = self.transport.fabric.rng.expovariate(1 / self.transport.fabric.chaos.abort_s)
            self._later(delay, self._end, request, "aborted")

    def _post(self, messages: Sequence[Message]) -> tuple[SimulatedPosted, list[_Request]]:
        posted = SimulatedPosted(messages, self.transport.fabric.touched)
        requests = [
            _Request(posted, place, memoryview(message.buffer), message.tag, self)
            for place, message in enumerate(messages)
        ]
        self._flying |= dict.fromkeys(requests)
        if not self.is_alive:
            for request in requests:
                self._end(request, "the link was ended")
        return posted, requests

    @property
    def _peer(self) -> SimulatedTransport:
        return self.transport.fabric.transports[self.address]

    def _arrive(self, request: _Request) -> None:
        """Of a send. Its bytes are read now: nothing may have changed them since it was posted."""
        if request not in self._flying:
            return
        fabric, peer = self.transport.fabric, self._peer
        if not peer.process.is_alive or not self._is_joined:
            self._later(PEER_DEATH_S, self._end, request, "the peer is gone")
        elif fabric.chaos.lost and fabric.rng.random() < fabric.chaos.lost:
            return  # until somebody's patience ends
        elif (receive := peer.receives.pop(request.tag, None)) is not None:
            self._move(request, receive)
        else:
            peer.early[request.tag] = request

    @property
    def _is_joined(self) -> bool:
        mine, its = self.transport.process.host, self._peer.process.host
        return self.transport.fabric.network.joined(mine, its)

    def _move(self, sent: _Request, receive: _Request) -> None:
        fabric = self.transport.fabric
        data = bytearray(sent.buffer.cast("B"))
        if fabric.chaos.spoilt and fabric.rng.random() < fabric.chaos.spoilt:
            data[fabric.rng.randrange(len(data))] ^= 1 << fabric.rng.randrange(8)
        target = receive.buffer.cast("B")
        error = "" if len(data) <= len(target) else "truncated"
        if not error:
            target[: len(data)] = data
        receive.link._later(self._delay(), receive.link._end, receive, error)
        sent.link._later(self._delay(), sent.link._end, sent, error)

    def _watch(self) -> None:
        """A receive from a peer that is gone ends too."""
        if not self._flying:
            return
        if not self._peer.process.is_alive:
            for request in list(self._flying):
                self._later(PEER_DEATH_S, self._end, request, "the peer is gone")
            return
        self._later(PEER_DEATH_S, self._watch)

    def _end(self, request: _Request, error: str) -> None:
        if self._flying.pop(request, False) is False:
            return
        self.transport.receives.pop(request.tag, None)
        self._peer.early.pop(request.tag, None)
        request.posted.end(request.place, error)

    def _delay(self) -> float:
        chaos, rng = self.transport.fabric.chaos, self.transport.fabric.rng
        mean = chaos.slow_s if chaos.slow and rng.random() < chaos.slow else chaos.delay_s
        return 1e-5 + rng.expovariate(1 / mean)

    def _later(self, delay: float, call: Callable[..., None], *args: object) -> None:
        self.transport.process.call_later(delay, call, *args)
