"""What other replicas of the router have at the engines, as far as it is known here. Sync state, no I/O.

Each replica tells what it has at each engine twice a second; what others told is up to seconds old when it
counts. Believed as it is it does harm: all see the same engine empty, and all go there. So

    what was told fades    towards the mean of all engines, by `FADE_S`: an old difference is no difference
    what was not told yet  is concluded from ourselves: the others choose as we do, so what we sent since they
                           told counts again, `MIRROR` times for each of them

Both were chosen in the offline simulation (`benchmarks/router_offline.py --replicas 4 --share-s S`). A
replica that falls silent counts until `FORGET_S` after its last word.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
from msgspec.structs import replace

from kvfabric_router.policy import EngineView

PUBLISH_S = 0.5
FORGET_S = 3.0
FADE_S = 0.5
MIRROR = 0.3
MAX_REPLICAS = 64
MAX_ENGINES = 4096


class EngineLoad(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one replica has at one engine, and what waits there for it. Times in milliseconds of work."""

    endpoint: str
    waiting_ms: float = 0.0
    num_waiting: int = 0
    num_decoding: int = 0
    held_ms: float = 0.0
    num_held: int = 0


class LoadReport(msgspec.Struct, frozen=True, array_like=True):
    """`number` rises with each report of a replica."""

    replica: str
    number: int
    engines: tuple[EngineLoad, ...] = ()


@dataclass(slots=True)
class _Replica:
    number: int
    heard_at: float
    engines: Mapping[str, EngineLoad] = field(default_factory=dict)


_NAMES = ("waiting_ms", "num_waiting", "num_decoding", "held_ms", "num_held")


@dataclass(slots=True)
class _Told:
    """Of all others together, at one engine."""

    waiting_ms: float = 0.0
    num_waiting: float = 0.0
    num_decoding: float = 0.0
    held_ms: float = 0.0
    num_held: float = 0.0

    def add(self, load: EngineLoad | _Told, share: float = 1.0) -> None:
        for name in _NAMES:
            setattr(self, name, getattr(self, name) + share * getattr(load, name))


_NOTHING = _Told()


class SharedLoad:
    """See the module. `clock`: monotonic seconds; `sent_since(endpoint, at)`: (requests, their work in
    milliseconds) that we sent to an engine after `at` and that wait there."""

    def __init__(
        self,
        clock: Callable[[], float],
        sent_since: Callable[[str, float], tuple[int, float]],
        *,
        replica: str = "",
    ) -> None:
        self.replica = replica or secrets.token_hex(8)
        self._clock = clock
        self._sent_since = sent_since
        self._number = 0
        self._others: dict[str, _Replica] = {}
        self._told: dict[str, _Told] = {}
        self._mean = _Told()
        self._num_engines = 1
        self._since = 0.0

    def __repr__(self) -> str:
        return f"<SharedLoad of {self.num_others} others>"

    @property
    def num_others(self) -> int:
        """Replicas that count."""
        self._forget()
        return len(self._others)

    def report(self, engines: Iterable[EngineLoad]) -> LoadReport:
        """What to tell the others."""
        self._number += 1
        engines = list(engines)
        self._num_engines = max(len(engines), 1)
        busy = [e for e in engines if e.num_waiting or e.num_decoding or e.num_held]
        return LoadReport(self.replica, self._number, tuple(busy[:MAX_ENGINES]))

    def hear(self, reports: Iterable[LoadReport], *, late_s: float = 0.0) -> None:
        """What others told last; told again it is no news. `late_s`: how old it is at least."""
        now = self._clock()
        for report in list(reports)[:MAX_REPLICAS]:
            known = self._others.get(report.replica)
            if report.replica == self.replica or (known and known.number == report.number):
                continue
            engines = {load.endpoint: load for load in report.engines}
            self._others[report.replica] = _Replica(report.number, now - late_s, engines)
        self._forget()
        self._add_up()

    def _forget(self) -> None:
        now = self._clock()
        gone = [name for name, one in self._others.items() if now - one.heard_at > FORGET_S]
        for name in gone:
            del self._others[name]
        if gone:
            self._add_up()

    def _add_up(self) -> None:
        self._told = {}
        for one in self._others.values():
            for endpoint, load in one.engines.items():
                self._told.setdefault(endpoint, _Told()).add(load)
        self._mean = _Told()
        num_engines = max(len(self._told), self._num_engines)
        for told in self._told.values():
            self._mean.add(told, 1 / num_engines)
        times = [one.heard_at for one in self._others.values()]
        self._since = sum(times) / len(times) if times else 0.0

    def seen(self, engine: EngineView) -> EngineView:
        """`engine`, which shows what we have there, with what the others probably have there now."""
        if not self._others:
            return engine
        told = self._told.get(engine.endpoint, _NOTHING)
        mean, certain = self._mean, math.exp(-max(self._clock() - self._since, 0.0) / FADE_S)
        vague = 1.0 - certain
        num_sent, sent_ms = self._sent_since(engine.endpoint, self._since)
        mirrored = MIRROR * len(self._others)
        background_ms = certain * told.waiting_ms + vague * mean.waiting_ms + mirrored * sent_ms
        num_waiting = certain * told.num_waiting + vague * mean.num_waiting + mirrored * num_sent
        num_decoding = certain * told.num_decoding + vague * mean.num_decoding
        return replace(
            engine,
            waiting_ms=engine.waiting_ms + background_ms,
            num_waiting=engine.num_waiting + num_waiting,
            num_decoding=engine.num_decoding + num_decoding,
            held_ms=engine.held_ms + certain * told.held_ms + vague * mean.held_ms,
            num_held=engine.num_held + certain * told.num_held + vague * mean.num_held,
            background_ms=background_ms,
            vague_ms=vague * mean.waiting_ms,
            vague_waiting=vague * mean.num_waiting,
        )
