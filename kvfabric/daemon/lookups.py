"""What the node answered to lookups: kept for a while, so that a request can be explained. Pure and sync.

Kept under the id that the router gave the request, with its tenant: whoever asks names both. Holds neither
tokens nor keys.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from kvfabric.types import MissReason, TenantId

KEPT = 8192


@dataclass(frozen=True, slots=True)
class Lookup:
    """Of `num_asked` leading blocks of a prompt, how many were promised from each tier, and why the next
    one was not: NONE if all were.
    """

    tenant: TenantId
    num_asked: int
    num_host: int
    num_ssd: int
    num_peer: int
    reason: MissReason


class Lookups:
    """The last `max_kept` requests that were opened with a handle."""

    def __init__(self, *, max_kept: int = KEPT) -> None:
        self._max_kept = max_kept
        self._opened: OrderedDict[tuple[bytes, str], tuple[str, TenantId]] = OrderedDict()
        self._answers: OrderedDict[str, Lookup] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def opened(self, session: bytes, request_id: str, told_id: str, tenant: TenantId) -> None:
        """An engine calls `request_id` what its router called `told_id`."""
        self._opened[session, request_id] = told_id, tenant
        if len(self._opened) > self._max_kept:
            self._opened.popitem(last=False)

    def told(self, session: bytes, request_id: str) -> tuple[str, TenantId]:
        """What its router called this request, and whose it is; empty for one without a handle."""
        return self._opened.get((session, request_id), ("", TenantId("")))

    def refused(self, told_id: str, tenant: TenantId, reason: MissReason) -> None:
        """Its handle was genuine and does not count any more."""
        self._keep(told_id, Lookup(tenant, 0, 0, 0, 0, reason))

    def matched(
        self, session: bytes, request_id: str, num_asked: int, tiers: bytes, reason: str
    ) -> None:
        """Of several lookups of one request the first counts: later ones renew leases."""
        told_id, tenant = self.told(session, request_id)
        if not told_id or told_id in self._answers:
            return
        host, ssd, peer = (tiers.count(tier) for tier in range(3))  # as `Matched.tiers` has them
        why = MissReason(reason) if len(tiers) < num_asked else MissReason.NONE
        self._keep(told_id, Lookup(tenant, num_asked, host, ssd, peer, why))

    def released(self, session: bytes, request_ids: Iterable[str]) -> None:
        """These ask no more; their answers are kept."""
        for request_id in request_ids:
            self._opened.pop((session, request_id), None)

    def find(self, told_id: str, tenant: TenantId) -> Lookup | None:
        """None too if it is another tenant's."""
        found = self._answers.get(told_id)
        return found if found is not None and found.tenant == tenant else None

    def _keep(self, told_id: str, lookup: Lookup) -> None:
        self._answers[told_id] = lookup
        if len(self._answers) > self._max_kept:
            self._answers.popitem(last=False)
