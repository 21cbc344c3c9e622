"""Where nodes are, and how fast blocks move within and between them, as the nodes measured it. Sync state.

A link is what lies between two nodes: they are on one machine, in one rack, in one zone, or further apart. A
node tells for each peer how fast blocks came from it. A link that nobody measured is as fast as the median of
its class, and one of a class that nobody measured as slow as `DEFAULTS` says: a fetch that looks too dear
costs a recompute, one that looks too cheap makes a request wait.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.types import NodeId, TierName
from kvfabric_router.journal import Capacity
from kvfabric_router.policy import PeerLink
from kvfabric_router.rates import UNMEASURED, NodeRates

MIN_MEASURED = 2
"""Sights of a link before it counts as measured: the first one opens connections."""


class LinkClass(enum.StrEnum):
    HOST = "host"
    RACK = "rack"
    ZONE = "zone"
    FAR = "far"


DEFAULTS: Mapping[LinkClass, float] = {
    LinkClass.HOST: 1e6,
    LinkClass.RACK: 1e6,
    LinkClass.ZONE: 5e5,
    LinkClass.FAR: 1e5,
}
"""Bytes a millisecond."""


@dataclass(frozen=True, slots=True)
class Place:
    """`machine` is one id for all nodes of a machine. An empty `rack` is no other's; nodes without a `zone`
    are in one. `exchanges`: it fetches blocks from others and gives them. `host_bytes`, `ssd_bytes`: of its
    tiers."""

    machine: bytes = b""
    rack: str = ""
    zone: str = ""
    exchanges: bool = False
    host_bytes: int = 0
    ssd_bytes: int = 0


def class_of(one: Place, other: Place) -> LinkClass:
    if one.machine and one.machine == other.machine:
        return LinkClass.HOST
    if one.zone != other.zone:
        return LinkClass.FAR
    if one.rack and one.rack == other.rack:
        return LinkClass.RACK
    return LinkClass.ZONE


class Topology:
    """What the links to the nodes tell goes in here, what the policy asks comes out."""

    def __init__(self) -> None:
        self._places: dict[NodeId, Place] = {}
        self._tiers: dict[NodeId, NodeRates] = {}
        self._peers: dict[tuple[NodeId, NodeId], float] = {}
        self._classes: dict[LinkClass, float] = {}
        self._links: dict[NodeId, dict[NodeId, PeerLink]] = {}

    def __repr__(self) -> str:
        return f"<Topology {len(self._places)} nodes, {len(self._peers)} links measured>"

    def placed(self, node: NodeId, place: Place) -> None:
        self._places[node] = place
        self._changed()

    def lost(self, node: NodeId) -> None:
        """Its blocks are nobody's now. What it measured is forgotten: it tells again when it is back."""
        self._places.pop(node, None)
        self._tiers.pop(node, None)
        self._peers = {pair: rate for pair, rate in self._peers.items() if node not in pair}
        self._changed()

    def measured(self, node: NodeId, rates: Iterable[pb.Rate]) -> None:
        """All that a node measured so far; an empty message of them is no news."""
        host = ssd = 0.0
        told = False
        for rate in rates:
            told = True
            if rate.tier == TierName.HOST:
                host = rate.bytes_per_s / 1e3
            elif rate.tier == TierName.SSD:
                ssd = rate.bytes_per_s / 1e3
            elif rate.tier == TierName.PEER and rate.num_sights >= MIN_MEASURED:
                self._peers[node, NodeId(rate.peer)] = rate.bytes_per_s / 1e3
        if told:
            self._tiers[node] = NodeRates(host, ssd)
            self._changed()

    def _changed(self) -> None:
        found: dict[LinkClass, list[float]] = {}
        for (node, peer), rate in self._peers.items():
            if node in self._places and peer in self._places:
                found.setdefault(class_of(self._places[node], self._places[peer]), []).append(rate)
        self._classes = {name: median(rates) for name, rates in found.items()}
        self._links = {}

    def capacities(self, nodes: Iterable[NodeId]) -> dict[str, Capacity]:
        """Of those that said how much they hold, by node."""
        found = {node: self._places[node] for node in nodes if node in self._places}
        return {
            node: Capacity(place.host_bytes, place.ssd_bytes)
            for node, place in found.items()
            if place.host_bytes
        }

    def rates_of(self, node: NodeId | None) -> NodeRates:
        return self._tiers.get(node, UNMEASURED) if node else UNMEASURED

    def links_of(self, node: NodeId | None) -> Mapping[NodeId, PeerLink]:
        """From which nodes this one can fetch, and how fast."""
        own = self._places.get(node) if node else None
        if node is None or own is None or not own.exchanges:
            return {}
        if node not in self._links:
            self._links[node] = {
                peer: self._link(node, own, peer, place)
                for peer, place in self._places.items()
                if peer != node and place.exchanges
            }
        return self._links[node]

    def _link(self, node: NodeId, own: Place, peer: NodeId, place: Place) -> PeerLink:
        name = class_of(own, place)
        rate = self._peers.get((node, peer))
        if rate is not None:
            return PeerLink(name, rate, "link")
        if name in self._classes:
            return PeerLink(name, self._classes[name], "class")
        return PeerLink(name, DEFAULTS[name], "default")
