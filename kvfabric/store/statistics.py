"""What a store says of itself, for metrics, status and tests. Pure data, read from accounts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvfabric.store.residency import Residency
from kvfabric.types import MissReason, TenantId, TierName


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """Bytes of one tenant. `host` and `ssd` are what it is charged there, draining included;
    `ssd_written` since the start of the process; `pins_refused`: blocks of pinned templates that found no
    room in `pin_max`, at each use."""

    tenant: TenantId
    host_bytes: int
    ssd_bytes: int
    leased_bytes: int
    draining_bytes: int
    ssd_written_bytes: int
    pinned_bytes: int
    pin_max_bytes: int
    pins_refused: int


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """Counters run from the start of the process. `hits` and `misses` count blocks of lookups."""

    capacity_bytes: dict[TierName, int]
    used_bytes: dict[TierName, int]
    num_blocks: dict[TierName, int]
    leased_bytes: int
    draining_bytes: int
    reserved_bytes: int
    num_sessions: int
    num_requests: int
    tenants: tuple[TenantUsage, ...]
    hits: dict[TierName, int]
    misses: dict[MissReason, int]
    stored_blocks: int
    stored_bytes: int
    refusals: dict[str, int]
    evictions: int
    corrupt: int
    promotions: int
    ssd_writes: int
    ssd_errors: int
    ssd_refused: int
    index_bytes_per_block: float


def tenant_usage(residency: Residency) -> Iterator[TenantUsage]:
    """Of everybody who has an account."""
    for slot, account in enumerate(residency.host.accounts):
        yield TenantUsage(
            tenant=account.tenant,
            host_bytes=account.used,
            ssd_bytes=residency.ssd.accounts[slot].used,
            leased_bytes=account.leased,
            draining_bytes=account.draining,
            ssd_written_bytes=residency.write_budgets.written[account.tenant],
            pinned_bytes=account.pinned,
            pin_max_bytes=account.pin_max_bytes,
            pins_refused=residency.pins.refused[slot],
        )
