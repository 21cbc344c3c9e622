"""What other replicas of the router have at the engines, as far as it is known here. Sync state, no I/O.

Each replica tells what it has at each engine twice a second; what others told is up to seconds old when it
counts. Believed as it is it does harm: all see the same engine empty, and all go there. So what was told
fades by `FADE_S`: what is seconds old counts next to nothing, and a router is then as good as one that hears
nothing. Chosen in the offline simulation (`benchmarks/router_offline.py --replicas 4 --share-s S`). A replica
that falls silent is forgotten `FORGET_S` after its last word.
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


@dataclass(slots=True)
class _Told:
    """Of all others together, at one engine."""

    waiting_ms: float = 0.0
    num_waiting: float = 0.0
    num_decoding: float = 0.0
    held_ms: float = 0.0
    num_held: float = 0.0

    def add(self, load: EngineLoad) -> None:
        self.waiting_ms += load.waiting_ms
        self.num_waiting += load.num_waiting
        self.num_decoding += load.num_decoding
        self.held_ms += load.held_ms
        self.num_held += load.num_held


class SharedLoad:
    """See the module. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float], *, replica: str = "") -> None:
        self.replica = replica or secrets.token_hex(8)
        self._clock = clock
        self._number = 0
        self._others: dict[str, _Replica] = {}
        self._told: dict[str, _Told] = {}
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
        times = [one.heard_at for one in self._others.values()]
        self._since = sum(times) / len(times) if times else 0.0

    def seen(self, engine: EngineView) -> EngineView:
        """`engine`, which shows what we have there, with what the others probably have there now."""
        if not self._others:
            return engine
        told = self._told.get(engine.endpoint)
        if told is None:
            return engine
        left = math.exp(-max(self._clock() - self._since, 0.0) / FADE_S)
        background_ms = left * told.waiting_ms
        return replace(
            engine,
            waiting_ms=engine.waiting_ms + background_ms,
            num_waiting=engine.num_waiting + left * told.num_waiting,
            num_decoding=engine.num_decoding + left * told.num_decoding,
            held_ms=engine.held_ms + left * told.held_ms,
            num_held=engine.num_held + left * told.num_held,
            background_ms=background_ms,
        )
