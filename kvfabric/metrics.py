"""Every metric of kvfabric's own processes, as data: name, kind, unit in the name, labels, meaning.

Names are `kvfabric_<process>_<what>_<unit>`; a counter's exposition adds `_total`. Labels come from
{tenant, template, tier, reason, result} and name tenants by their opaque id. No Prometheus import here:
engine processes read this table too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

LABELS = frozenset({"tenant", "template", "tier", "reason", "result"})


@dataclass(frozen=True, slots=True)
class Metric:
    """`kind`: gauge | counter | histogram."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of a metric; `labels` in the metric's order."""

    name: str
    value: float
    labels: tuple[str, ...] = ()


class Histogram:
    """How often a value was at most each of `bounds`, which rise."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.total = 0.0
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)

    def observe(self, value: float) -> None:
        self.total += value
        self._counts[bisect_left(self._bounds, value)] += 1

    @property
    def count(self) -> int:
        return sum(self._counts)

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, values at most so), as an exposition has them."""
        bounds = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        return list(zip(bounds, accumulate(map(float, self._counts)), strict=True))


@dataclass(frozen=True, slots=True)
class Distribution:
    """All values of a histogram without labels."""

    name: str
    values: Histogram


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(f"kvfabric_node_{name}", "gauge", help, labels)


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(f"kvfabric_node_{name}", "counter", help, labels)


def _histogram(name: str, help: str) -> Metric:
    return Metric(f"kvfabric_node_{name}", "histogram", help)


NODE_METRICS: tuple[Metric, ...] = (
    _gauge("tier_capacity_bytes", "Size of a tier", "tier"),
    _gauge("tier_used_bytes", "Bytes in use, draining and dead ones included", "tier"),
    _gauge("tier_blocks", "Blocks that a tier holds, ready to be served", "tier"),
    _gauge("tier_up_info", "0 while the tier is out of service after an error", "tier"),
    _gauge("tenant_used_bytes", "Bytes charged to a tenant", "tenant", "tier"),
    _gauge("tenant_leased_bytes", "Bytes that a tenant's requests keep from eviction", "tenant"),
    _gauge("tenant_draining_bytes", "Bytes that await proof that nobody reads them", "tenant"),
    _gauge("tenant_pinned_bytes", "Bytes that pinned templates keep in the host tier", "tenant"),
    _gauge("leased_bytes", "Bytes that requests keep from eviction"),
    _gauge("draining_bytes", "Bytes that await proof that nobody reads them"),
    _gauge("reserved_bytes", "Bytes of parts that are being stored"),
    _gauge("requests_open", "Requests of engines that were not released yet"),
    _gauge("index_bytes_per_block", "Memory of the index over the blocks it can hold"),
    _gauge("sessions", "Engine sessions with a connection"),
    _gauge("sessions_draining", "Engine sessions that ended and are not quiet yet"),
    _gauge("connections", "Connections of engine processes"),
    _gauge("loop_stall_seconds_max", "Longest stall of the event loop since start"),
    _gauge("adoption_waits_processes", "Processes that still have an earlier daemon's arena"),
    _gauge("arena_adopted_info", "1 if the arena is an earlier daemon's"),
    _gauge("registry_version", "Version of the registry's state"),
    _gauge("tenants_without_keys", "Tenants whose secret the fleet has and this node has not"),
    _gauge("registry_holders", "Nodes and routers registered in the directory"),
    _gauge("epoch_lease_valid", "1 if the epochs may be believed; at 0 every lookup is a miss"),
    _gauge("event_sequence", "Number of the newest batch of the event stream"),
    _counter("requests", "Requests of engines, by result: ok or the code of an error", "result"),
    _counter("protocol_errors", "Connections ended because the wire contract was broken"),
    _counter("refused_connections", "Connections refused during the handshake"),
    _counter(
        "transfers",
        "Blocks to and from other nodes, bytes of them, and refusals, by what",
        "result",
    ),
    _counter(
        "prefetches",
        "Routers' hints by what became of them (used, unused, refused; early: the engine was faster), and "
        "the blocks that they brought",
        "result",
    ),
    _counter("blocks_matched", "Blocks that lookups found", "tier"),
    _counter("misses", "Blocks that lookups did not find, by the reason of the first", "reason"),
    _counter("blocks_stored", "Blocks that became ready in the host tier"),
    _counter("stored_bytes", "Bytes copied from windows into the arena"),
    _counter("stores_refused", "Parts that were not reserved", "reason"),
    _counter("blocks_evicted", "Blocks that gave way to others in the host tier"),
    _counter(
        "pins_refused", "Blocks of pinned templates beyond a pin budget, at each use", "tenant"
    ),
    _counter("blocks_promoted", "Blocks brought from SSD into the arena"),
    _counter("ssd_writes", "Parts sealed on SSD"),
    _counter("ssd_errors", "Reads and writes that SSD failed"),
    _counter("ssd_refused", "Parts that SSD had no room for"),
    _counter("registry_errors", "Failed renewals of the epoch lease", "reason"),
    _counter("registry_restores", "Times that a directory got back what it had lost"),
    _gauge("ssd_direct_info", "0 if SSD I/O goes through the page cache: no O_DIRECT there"),
    _gauge("ssd_dead_bytes", "Bytes of the SSD tier that wait for the reclaim of their segment"),
    _gauge("ssd_file_bytes", "Length of all files of the SSD tier, at most its capacity"),
    _gauge("ssd_budget_left_bytes", "What may be written to SSD now; negative: overdrawn"),
    _counter("ssd_budget_refused", "Writes that found the write budget of SSD spent"),
    _counter("ssd_written_bytes", "Bytes of parts written to SSD, rescued ones included"),
    _counter("ssd_rescued_bytes", "Bytes of hot records that were written anew at a reclaim"),
    _counter("ssd_quarantined", "Records on SSD that did not verify, read or at rest"),
    _counter("ssd_unreadable", "Records on SSD that could not be read at rest"),
    _counter("ssd_scrubbed_bytes", "Bytes on SSD that were verified at rest"),
    _counter("ssd_scrub_rounds", "How often all of SSD was verified at rest"),
    _counter("corrupt_parts", "Parts whose bytes did not verify"),
    _counter("stale_serves", "Times the auditor was served what is withdrawn: must stay 0"),
    _counter(
        "audit_probes",
        "Chains of withdrawn blocks that the auditor asked for: passed (refused while something live was "
        "served), no_control (nothing live was there to compare), brought_back, stale",
        "result",
    ),
    _histogram(
        "withdrawal_visible_seconds",
        "From the command of a change to the last refusal that the auditor saw here",
    ),
)


def by_name(metrics: tuple[Metric, ...]) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}
