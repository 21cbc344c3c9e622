"""What a request may do now, and which blocks are its own. Pure and sync.

The one place where the store asks the registry: every verb comes here before it answers, and again after
it awaited.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvfabric.registry.state import RegistryState
from kvfabric.store.index import Rows
from kvfabric.store.lease import LeaseBook, Request, RequestGrant, Session
from kvfabric.store.residency import Residency
from kvfabric.types import PUBLIC_TENANT, MissReason

Flags = npt.NDArray[np.bool_]


class Access:
    """`registry` returns None while the node holds no epoch lease: then nothing may be done."""

    def __init__(
        self,
        residency: Residency,
        leases: LeaseBook,
        *,
        registry: Callable[[], RegistryState | None],
        now: Callable[[], int],
        on_state: Callable[[RegistryState], None],
    ) -> None:
        self._residency = residency
        self._index = residency.index
        self._leases = leases
        self._registry = registry
        self._now = now
        self._on_state = on_state
        self._state: RegistryState | None = None

    def refresh(self) -> RegistryState | None:
        """The registry's state; `on_state` hears of each new one before anything is decided by it."""
        state = self._registry()
        if state is not None and state is not self._state:
            self._state = state
            self._on_state(state)
        return state

    def to_read(self, request: Request) -> MissReason:
        """Why this request may read nothing; NONE if it may."""
        grant = request.grant
        reason = self._fence(grant)
        if reason is not MissReason.NONE:
            return reason
        if grant.no_read or self._opted_out(grant):
            return MissReason.NO_READ
        if self._residency.arena is None:
            return MissReason.TIER_DOWN
        return MissReason.DEADLINE if self._leases.is_lapsed(request) else MissReason.NONE

    def to_store(self, grant: RequestGrant) -> str:
        """Why nothing may be stored under this grant; empty if it may."""
        reason = self._fence(grant)
        if reason is not MissReason.NONE:
            return reason.value
        if grant.no_store or self._opted_out(grant):
            return MissReason.NO_STORE.value
        return MissReason.TIER_DOWN.value if self._residency.arena is None else ""

    def _fence(self, grant: RequestGrant) -> MissReason:
        state = self.refresh()
        if state is None:
            return MissReason.NO_EPOCH_LEASE
        return state.fence_reason(grant.epochs, grant.segments)

    def _opted_out(self, grant: RequestGrant) -> bool:
        tenant = self._state.tenants.get(grant.tenant) if self._state is not None else None
        return tenant is not None and tenant.opted_out

    def lineages(self, session: Session, grant: RequestGrant, first: int, count: int) -> Rows:
        """The lineage ids that `count` blocks from block `first` on must have.

        0 for a lineage nothing is stored under: it equals that of stubs alone, which are never READY.
        """
        spans = list(grant.lineages(session.layout.fingerprint, first, count))
        ids = np.array([self._index.find_lineage(lineage) for _, lineage in spans], dtype=np.uint32)
        return np.repeat(ids, [length for length, _ in spans])

    def expired(self, rows: Rows, grant: RequestGrant, first: int = 0) -> Flags:
        """Which of a prompt's blocks from block `first` on are older than their owner's `max_age`."""
        expired: Flags = np.zeros(len(rows), dtype=np.bool_)
        if self._state is None:
            return expired
        public = slice(0, max(0, grant.public_blocks - first))
        for owner, own in ((PUBLIC_TENANT, public), (grant.tenant, slice(public.stop, None))):
            tenant = self._state.tenants.get(owner)
            if tenant is None or tenant.max_age_s <= 0:
                continue
            stored_at = self._index.stored_at.array[rows[own]].astype(np.int64)
            # 0: from an earlier life of the daemon, of unknown age.
            expired[own] = (stored_at == 0) | (self._now() - stored_at > tenant.max_age_s)
        return expired


def cacheable(grant: RequestGrant, num_blocks: int) -> int:
    """How many of a prompt's leading `num_blocks` may be read or stored."""
    return num_blocks if grant.cacheable_blocks < 0 else min(num_blocks, grant.cacheable_blocks)
