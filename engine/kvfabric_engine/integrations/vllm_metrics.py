"""What the vLLM connector counts: deltas through vLLM's connector statistics into its /metrics."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvfabric_engine.connector import ConnectorStatistics

COUNTERS = {
    "loaded_blocks": "Blocks loaded from the fabric",
    "loaded_bytes": "Bytes loaded from the fabric",
    "saved_blocks": "Blocks stored in the fabric",
    "saved_bytes": "Bytes stored in the fabric",
}
MISS = "miss:"
"""Prefix of a reason for a miss among the counts."""


class FabricStats(KVConnectorStats):
    """Counts by name, since the last time."""

    data: dict[str, int]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> FabricStats:
        total = Counter(self.data)
        total.update(other.data)
        return FabricStats(data=dict(total))

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not any(self.data.values())


class StatsTaker:
    """Differences between the statistics of one Connector."""

    def __init__(self) -> None:
        self._last: Counter[str] = Counter()

    def take(self, now: ConnectorStatistics) -> FabricStats | None:
        """What was counted since the last call; None if nothing was."""
        counts: Counter[str] = Counter({name: getattr(now, name) for name in COUNTERS})
        counts.update({MISS + reason.value: count for reason, count in now.misses.items()})
        if sum(counts.values()) < sum(self._last.values()):
            self._last.clear()  # another Connector
        change, self._last = counts - self._last, counts
        return FabricStats(data=dict(change)) if change else None


class FabricPromMetrics(KVConnectorPromMetrics):
    """The counters in vLLM's registry, one set an engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(
                name=f"kvfabric_engine_{name}", documentation=text, labelnames=labelnames
            )
            for name, text in COUNTERS.items()
        }
        self._misses = self._counter_cls(
            name="kvfabric_engine_misses",
            documentation="Calls that brought less than was asked for, by reason",
            labelnames=[*labelnames, "reason"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for name, count in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name].labels(*labels).inc(count)
            elif name.startswith(MISS):
                self._misses.labels(*labels, name.removeprefix(MISS)).inc(count)
