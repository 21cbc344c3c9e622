"""What a node measures of its own: from host memory to its engines, from SSD, and from each peer. Sync.

From host memory: from the answer that says where blocks lie until the engine confirms them, so its copies and
its checks count. Routers hear of it in the event stream.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.store.meter import Meter
from kvfabric.types import TierName

KEPT = 4096
NEWS_SHARE = 0.1
"""A rate that differs by less from what was told is no news."""

Load = tuple[bytes, str, int, int]
"""(session, request, group, shard)"""


class Meters:
    """`ssd` is the store's own; `clock`: seconds."""

    def __init__(self, ssd: Meter, clock: Callable[[], float] = time.perf_counter) -> None:
        self.ssd = ssd
        self.host = Meter(clock)
        self._peers: dict[str, Meter] = {}
        self._clock = clock
        self._located: OrderedDict[Load, tuple[float, int]] = OrderedDict()
        self._told: dict[tuple[str, str], float] = {}

    def peer(self, node_id: str) -> Meter:
        """Of blocks that come from this node."""
        return self._peers.setdefault(node_id, Meter(self._clock))

    def located(self, load: Load, num_bytes: int) -> None:
        """An engine was just told where so much lies."""
        if num_bytes:
            self._located[load] = (self._clock(), num_bytes)
            if len(self._located) > KEPT:
                self._located.popitem(last=False)

    def confirmed(self, load: Load, *, is_good: bool) -> None:
        """It has it, or not all of it."""
        since, num_bytes = self._located.pop(load, (0.0, 0))
        if num_bytes and is_good:
            self.host.saw(num_bytes, self._clock() - since)

    def rates(self) -> list[pb.Rate]:
        """All that was measured so far."""
        own = [(TierName.HOST, "", self.host), (TierName.SSD, "", self.ssd)]
        peers = [(TierName.PEER, name, meter) for name, meter in self._peers.items()]
        return [
            pb.Rate(
                tier=tier, peer=peer, bytes_per_s=meter.bytes_per_s, num_sights=meter.num_sights
            )
            for tier, peer, meter in (*own, *peers)
            if meter.num_sights
        ]

    def news(self) -> list[pb.Rate]:
        """`rates`, if any of them changed since they were told last; else none."""
        rates = self.rates()
        now = {(rate.tier, rate.peer): rate.bytes_per_s for rate in rates}
        told = self._told
        if all(abs(now[name] - told.get(name, 0.0)) <= NEWS_SHARE * now[name] for name in now):
            return []
        self._told = now
        return rates
