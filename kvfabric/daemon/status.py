"""What a node says of itself: samples for /metrics, `NodeStatus` for administrators. Reads only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvfabric.metrics import Distribution, Sample
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.registry.base import RegistryStatus
from kvfabric.registry.receipts import NO_CONTROL, PASSED
from kvfabric.store.statistics import StoreStatistics
from kvfabric.tiers.segment_accounts import SegmentStatistics
from kvfabric.types import TierName

if TYPE_CHECKING:
    from kvfabric.daemon.auditor import Auditor
    from kvfabric.daemon.node import Node

_PREFIX = "kvfabric_node_"


def node_samples(node: Node) -> Iterator[Sample | Distribution]:
    """Everything that /metrics shows."""
    yield from _store_samples(node.store.statistics())
    details = degraded(node)
    for tier, there in ((TierName.HOST, node.keeper.arena), (TierName.SSD, node.ssd)):
        up = there is not None and not details[tier]
        yield Sample(_PREFIX + "tier_up_info", float(up), (tier,))
    sessions, counts = node.sessions, node.engines.counts
    registry = node.registry.status
    values: tuple[tuple[str, float], ...] = (
        ("sessions", len(sessions.live())),
        ("sessions_draining", sessions.num_ended),
        ("connections", sessions.num_connections),
        ("loop_stall_seconds_max", node.probe.max_s),
        ("adoption_waits_processes", len(node.keeper.waiting_for) * node.keeper.is_missing()),
        ("arena_adopted_info", node.keeper.adopted),
        ("registry_version", node.registry.state.version),
        ("registry_holders", registry.num_holders),
        ("registry_restores", registry.num_restores),
        ("tenants_without_keys", len(_lacking(node))),
        ("epoch_lease_valid", registry.state == "serving"),
        ("event_sequence", node.events.sequence),
        ("protocol_errors", counts.protocol_errors),
        ("refused_connections", counts.refused_connections),
        ("stale_serves", node.auditor.stale_serves),
    )
    for name, value in values:
        yield Sample(_PREFIX + name, value)
    yield from _moving_samples(node)
    if node.ssd is not None:
        yield from _ssd_samples(node.ssd.statistics())
    for result, count in counts.requests.items():
        yield Sample(_PREFIX + "requests", count, (result,))
    for reason, count in registry.num_errors.items():
        yield Sample(_PREFIX + "registry_errors", count, (reason,))
    for result, count in node.auditor.results.items():
        yield Sample(_PREFIX + "audit_probes", count, (result,))
    yield Distribution(_PREFIX + "withdrawal_visible_seconds", node.auditor.visible_s)


def _moving_samples(node: Node) -> Iterator[Sample]:
    if node.transfers is not None:
        for result, count in node.transfers.counts():
            yield Sample(_PREFIX + "transfers", count, (result,))
    if node.prefetches is not None:
        for result, count in node.prefetches.counts.items():
            yield Sample(_PREFIX + "prefetches", count, (result,))


def _lacking(node: Node) -> list[str]:
    return [] if node.fleet_keys is None else sorted(node.fleet_keys.lacking())


def _registry_status(status: RegistryStatus, lacking: list[str]) -> pb.RegistryStatus:
    return pb.RegistryStatus(
        home=status.home,
        state=status.state,
        detail=status.detail,
        lease_left_s=status.lease_left_s if status.lease_left_s < float("inf") else 0.0,
        num_holders=status.num_holders,
        num_restores=status.num_restores,
        num_errors=status.num_errors,
        tenants_without_keys=lacking,
    )


def node_status(node: Node, *, sealed_keys: bool) -> pb.NodeStatus:
    """Tiers, usage and counters. `sealed_keys`: also list every key that SSD holds durably."""
    store = node.store.statistics()
    details = degraded(node)
    states = {TierName.HOST: _host_state(node), TierName.SSD: _ssd_state(node)}
    tiers = [
        pb.TierStatus(
            tier=tier,
            state="degraded" if details[tier] else state,
            detail=details[tier],
            capacity_bytes=store.capacity_bytes.get(tier, 0),
            used_bytes=store.used_bytes.get(tier, 0),
            draining_bytes=store.draining_bytes if tier == TierName.HOST else 0,
            num_blocks=store.num_blocks.get(tier, 0),
        )
        for tier, state in states.items()
    ]
    usage = [
        pb.TenantUsage(
            tenant_id=tenant.tenant,
            host_bytes=tenant.host_bytes,
            ssd_bytes=tenant.ssd_bytes,
            leased_bytes=tenant.leased_bytes,
            ssd_written_bytes=tenant.ssd_written_bytes,
            pinned_bytes=tenant.pinned_bytes,
            pin_max_bytes=tenant.pin_max_bytes,
            pins_refused=tenant.pins_refused,
        )
        for tenant in store.tenants
    ]
    keys: set[bytes] = set()
    if sealed_keys and node.ssd is not None:
        keys = {identity.part.key for identity, _ in node.ssd.records()}
    return pb.NodeStatus(
        tiers=tiers,
        usage=usage,
        arena_adopted=node.keeper.adopted,
        counters=_counters(node, store),
        sealed_keys=sorted(keys),
        registry=_registry_status(node.registry.status, _lacking(node)),
        audit=_audit_status(node.auditor),
    )


def _audit_status(auditor: Auditor) -> pb.AuditStatus:
    return pb.AuditStatus(
        num_audits=auditor.num_audits,
        num_refused=auditor.results[PASSED],
        num_uncontrolled=auditor.results[NO_CONTROL],
        stale_serves=auditor.stale_serves,
        alarm=auditor.alarm,
    )


def degraded(node: Node) -> dict[TierName, str]:
    """Why each tier is out of service, wholly or in part; empty for one that is not."""
    whole = {TierName.HOST: node.host_breaker, TierName.SSD: node.ssd_breaker}
    found = {}
    for tier, breaker in whole.items():
        parts = [f"{what}: {why}" for what, why in node.store.degraded(tier).items()]
        found[tier] = "; ".join([*parts, *([breaker.reason] if breaker.reason else [])])
    return found


def _host_state(node: Node) -> str:
    return "adopting" if node.keeper.arena is None else "serving"


def _ssd_state(node: Node) -> str:
    if not node.config.ssd_bytes:
        return "off"
    return "opening" if node.ssd is None else "serving"


def _counters(node: Node, store: StoreStatistics) -> dict[str, int]:
    counters = {
        "stored_blocks": store.stored_blocks,
        "stored_bytes": store.stored_bytes,
        "evictions": store.evictions,
        "corrupt": store.corrupt,
        "promotions": store.promotions,
        "ssd_writes": store.ssd_writes,
        "ssd_errors": store.ssd_errors,
        "protocol_errors": node.engines.counts.protocol_errors,
    }
    counters |= {f"hits_{tier}": count for tier, count in store.hits.items()}
    return counters | {f"misses_{reason}": count for reason, count in store.misses.items()}


def _ssd_samples(ssd: SegmentStatistics) -> Iterator[Sample]:
    for name, value in (
        ("direct_info", float(ssd.direct)),
        ("dead_bytes", ssd.dead_bytes),
        ("file_bytes", ssd.file_bytes),
        ("budget_left_bytes", ssd.budget_left_bytes),
        ("budget_refused", ssd.budget_refused),
        ("written_bytes", ssd.write_bytes),
        ("rescued_bytes", ssd.rescued_bytes),
        ("quarantined", ssd.quarantined),
        ("unreadable", ssd.unreadable),
        ("scrubbed_bytes", ssd.scrubbed_bytes),
        ("scrub_rounds", ssd.scrub_rounds),
    ):
        yield Sample(f"{_PREFIX}ssd_{name}", value)


def _store_samples(store: StoreStatistics) -> Iterator[Sample]:
    for metric, by_tier in (
        ("tier_capacity_bytes", store.capacity_bytes),
        ("tier_used_bytes", store.used_bytes),
        ("tier_blocks", store.num_blocks),
        ("blocks_matched", store.hits),
    ):
        for tier, amount in by_tier.items():
            yield Sample(_PREFIX + metric, amount, (tier,))
    values: tuple[tuple[str, float], ...] = (
        ("leased_bytes", store.leased_bytes),
        ("draining_bytes", store.draining_bytes),
        ("reserved_bytes", store.reserved_bytes),
        ("requests_open", store.num_requests),
        ("index_bytes_per_block", store.index_bytes_per_block),
        ("blocks_stored", store.stored_blocks),
        ("stored_bytes", store.stored_bytes),
        ("blocks_evicted", store.evictions),
        ("corrupt_parts", store.corrupt),
        ("blocks_promoted", store.promotions),
        ("ssd_writes", store.ssd_writes),
        ("ssd_errors", store.ssd_errors),
        ("ssd_refused", store.ssd_refused),
    )
    for name, value in values:
        yield Sample(_PREFIX + name, value)
    for miss, count in store.misses.items():
        yield Sample(_PREFIX + "misses", count, (miss,))
    for refusal, count in store.refusals.items():
        yield Sample(_PREFIX + "stores_refused", count, (refusal,))
    for usage in store.tenants:
        yield Sample(_PREFIX + "tenant_used_bytes", usage.host_bytes, (usage.tenant, TierName.HOST))
        yield Sample(_PREFIX + "tenant_used_bytes", usage.ssd_bytes, (usage.tenant, TierName.SSD))
        yield Sample(_PREFIX + "tenant_leased_bytes", usage.leased_bytes, (usage.tenant,))
        yield Sample(_PREFIX + "tenant_draining_bytes", usage.draining_bytes, (usage.tenant,))
        yield Sample(_PREFIX + "tenant_pinned_bytes", usage.pinned_bytes, (usage.tenant,))
        yield Sample(_PREFIX + "pins_refused", usage.pins_refused, (usage.tenant,))
