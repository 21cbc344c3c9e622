"""What the admin plane shows and changes: handed in by the node, so that its services know no node."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvfabric.daemon.fleet_models import FleetModels
from kvfabric.daemon.handoffs import Handoffs
from kvfabric.daemon.lookups import Lookups
from kvfabric.events.stream import EventStream
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.registry.base import Registry
from kvfabric.store.scrub import ScrubReport
from kvfabric.types import TierName

if TYPE_CHECKING:
    from kvfabric.daemon.prefetching import Prefetches
    from kvfabric.daemon.sending import Sender
    from kvfabric.registry.fleet_keys import FleetKeys

Runs = Iterator[list[tuple[bytes, bytes, bytes]]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node is and how much it holds, for whoever asks: see `NodeDescription`."""

    machine: bytes = b""
    rack: str = ""
    zone: str = ""
    exchanges: bool = False
    host_bytes: int = 0
    ssd_bytes: int = 0


@dataclass(frozen=True, slots=True)
class AdminSources:
    """What the admin plane shows and changes.

    `status(sealed_keys)` fills tiers, usage, counters, `arena_adopted` and, if asked, the sealed keys of a
    NodeStatus; the rest is filled in here. `resident(tier)` yields slices of (namespace tag, parent prefix,
    packed key prefixes), each asked for in a `turn` of the event loop. `reports`: whether this node writes
    rows of receipts (`withdrawals`), for which an answer waits a moment.
    """

    registry: Registry
    keyring: Keyring
    events: EventStream
    status: Callable[[bool], pb.NodeStatus]
    resident: Callable[[TierName], Runs]
    turn: Callable[[], Awaitable[None]]
    models: FleetModels
    reports: bool = False
    fleet_keys: FleetKeys | None = None
    scrub: Callable[[], Awaitable[ScrubReport]] | None = None
    lookups: Lookups = field(default_factory=Lookups)
    handoffs: Handoffs = field(default_factory=Handoffs)
    sender: Sender | None = None
    measure_links: Callable[[], Awaitable[pb.MeasuredLinks]] | None = None
    prefetches: Prefetches | None = None
    rates: Callable[[], list[pb.Rate]] = list
    place: Place = Place()
