"""Bytes of one tier by tenant: what may be charged, and whose blocks go first. Pure and sync.

Charged are RESERVED, READY and DRAINING bytes, in whole slots. Three rules (design 7):

* a tenant's hard maximum is never passed: the store is refused once its own evictable blocks are gone;
* a floor is guaranteed: an eviction for somebody else never takes a tenant below it, and bytes nobody
  can evict (reserved, leased, draining, pinned) above their owners' floors never exceed what the floors
  leave;
* whoever is furthest above its budget goes first. Budget = floor + an equal share of what the floors
  leave, among the tenants present.

Leased and draining bytes above one's floor are at most a tenth of the tier, so that nobody can keep a
cache from turning over, and never more than the tenant's own `lease_max_bytes`. The public
namespace has no such bound of its own: what is public is chosen by the operator, and one tenant's leases
on it must not make another's request miss.

Blocks that a pinned template keeps are bounded per tenant, whatever is pinned: by `pin_max_bytes`, or by its
floor and a twentieth of the tier, then at most half of its maximum so that it can store something else too.
Above the floors, all tenants together may pin half of what these leave.

`strict`: every tenant of the registry has a fixed room, its floor and an equal share of what the floors
leave, as floor and maximum in one. What one tenant does then never moves another's blocks; what nobody
uses stays empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvfabric.registry.state import Tenant, TierQuota
from kvfabric.types import PUBLIC_TENANT, TenantId

Field = Literal["reserved", "ready", "detached", "leased", "lapsed", "pinned", "pinned_idle"]

MAX_FLOORS = 0.9
"""Of a tier's capacity: floors beyond that are scaled down together."""

PIN_SHARE = 0.05
"""Of the tier, above its floor: what a tenant without a pin budget of its own may have pinned."""

PIN_POOL = 0.5
"""Of what the floors leave: pinned bytes of all tenants above their floors."""

AHEAD_SHARE = 1 / 64
"""Of the host tier, kept free between reserves, so that they seldom have to evict."""


@dataclass(slots=True)
class Account:
    """Bytes of one tenant in one tier.

    `leased`: READY under at least one live lease. `lapsed`: READY under ended rights only. `detached`:
    left READY while somebody may still read them. Physical bytes are counted once, however many hold them.
    `pinned`: READY and kept by a pin; `pinned_idle`: those of them under nobody's right, past or present.
    """

    tenant: TenantId
    reserved: int = 0
    ready: int = 0
    detached: int = 0
    leased: int = 0
    lapsed: int = 0
    pinned: int = 0
    pinned_idle: int = 0
    max_bytes: int = 0
    floor_bytes: int = 0
    lease_max_bytes: int = 0
    pin_max_bytes: int = 0

    @property
    def used(self) -> int:
        return self.reserved + self.ready + self.detached

    @property
    def draining(self) -> int:
        return self.lapsed + self.detached

    @property
    def held(self) -> int:
        """Bytes that readers' rights, past or present, keep from being freed."""
        return self.leased + self.lapsed + self.detached

    @property
    def unevictable(self) -> int:
        return self.reserved + self.held + self.pinned_idle


class TierAccounts:
    """All accounts of one tier. A tenant's slot number is stable for the life of the daemon."""

    def __init__(
        self,
        capacity_bytes: int,
        quota_of: Callable[[Tenant], TierQuota],
        *,
        strict: bool = False,
    ) -> None:
        self._strict = strict
        self.capacity_bytes = capacity_bytes
        self.accounts: list[Account] = []
        self._quota_of = quota_of
        self._slots: dict[TenantId, int] = {}
        self._tenants: Mapping[TenantId, Tenant] = {}

    def slot(self, tenant: TenantId) -> int:
        """The slot number of a tenant, with an account from now on."""
        if tenant not in self._slots:
            self._add_account(tenant)
            self._apply_quotas()
        return self._slots[tenant]

    def _add_account(self, tenant: TenantId) -> None:
        if tenant not in self._slots:
            self._slots[tenant] = len(self.accounts)
            self.accounts.append(Account(tenant))

    def configure(self, tenants: Mapping[TenantId, Tenant]) -> None:
        """The registry's tenants, from now on. Over-long floors are scaled to 90 % together."""
        self._tenants = tenants
        for tenant in tenants:
            self._add_account(tenant)
        self._apply_quotas()

    def resize(self, capacity_bytes: int) -> None:
        """What the tier really has."""
        self.capacity_bytes = capacity_bytes
        self._apply_quotas()

    def _apply_quotas(self) -> None:
        quotas = [
            self._quota_of(self._tenants[account.tenant])
            if account.tenant in self._tenants
            else TierQuota()
            for account in self.accounts
        ]
        floors = sum(quota.floor_bytes for quota in quotas)
        scale = min(1.0, MAX_FLOORS * self.capacity_bytes / floors) if floors else 1.0
        for account, quota in zip(self.accounts, quotas, strict=True):
            account.max_bytes = quota.max_bytes or self.capacity_bytes
            account.floor_bytes = int(quota.floor_bytes * scale)
            tenant = self._tenants.get(account.tenant)
            account.lease_max_bytes = tenant.limits.lease_max_bytes if tenant else 0
        floored = [account.floor_bytes for account in self.accounts]
        if self._strict:
            self._divide()
        for account, floor_bytes in zip(self.accounts, floored, strict=True):
            account.pin_max_bytes = self._pin_budget(account, floor_bytes)

    def _pin_budget(self, account: Account, floor_bytes: int) -> int:
        tenant = self._tenants.get(account.tenant)
        own = tenant.limits.pin_max_bytes if tenant else None
        if own is None:
            share = floor_bytes + int(PIN_SHARE * self.capacity_bytes)
            own = min(share, account.max_bytes // 2)
        return min(own, account.max_bytes)

    def _divide(self) -> None:
        """What is kept free between reserves stays free: nobody is evicted for it."""
        known = [account for account in self.accounts if self._has_room(account.tenant)]
        floors = sum(account.floor_bytes for account in known)
        left = int(self.capacity_bytes * (1 - AHEAD_SHARE)) - floors
        share = max(0, left) // max(1, len(known))
        for account in self.accounts:
            room = account.floor_bytes + share if self._has_room(account.tenant) else 0
            account.floor_bytes = account.max_bytes = min(room, account.max_bytes)

    def _has_room(self, tenant: TenantId) -> bool:
        known = self._tenants.get(tenant)
        return known is not None and not known.is_offboarded

    def add(
        self, field: Field, slots: npt.NDArray[np.uint32], num_bytes: int | npt.NDArray[Any]
    ) -> None:
        """Add (or with a negative number take) bytes to one field: one entry of `slots` a part."""
        present = distinct_values(slots)
        for slot in present:
            own = slots == slot if len(present) > 1 else ...
            if isinstance(num_bytes, int):
                self.add_one(field, slot, num_bytes * len(slots[own]))
            else:
                self.add_one(field, slot, int(num_bytes[own].sum()))

    def add_one(self, field: Field, slot: int, num_bytes: int) -> None:
        """As `add`, for one tenant."""
        account = self.accounts[slot]
        value = getattr(account, field) + num_bytes
        assert value >= 0, f"{field} bytes of {account.tenant} would be {value}"
        setattr(account, field, value)

    @property
    def used(self) -> int:
        return sum(account.used for account in self.accounts)

    @property
    def unfloored_bytes(self) -> int:
        """What the floors leave of the tier."""
        return self.capacity_bytes - sum(account.floor_bytes for account in self.accounts)

    def room_to_reserve(self, slot: int) -> int:
        """Bytes this tenant may have reserved beyond those it has, by hard maximum and floors alone."""
        mine = self.accounts[slot]
        return max(0, min(self._room_by_floors(mine), mine.max_bytes - mine.unevictable))

    def _room_by_floors(self, mine: Account) -> int:
        """Bytes of this tenant that may become unevictable, with every floor still to be had."""
        above = sum(
            max(0, account.unevictable - account.floor_bytes)
            for account in self.accounts
            if account is not mine
        )
        return self.unfloored_bytes - above + mine.floor_bytes - mine.unevictable

    def pin_budgets(self) -> list[tuple[int, int]]:
        """What `over_pin_budget` goes by, of each account."""
        return [(account.pin_max_bytes, account.floor_bytes) for account in self.accounts]

    def room_to_pin(self, slot: int) -> int:
        """Bytes that may be pinned beyond those that are."""
        room = min(-self.over_pin_budget(slot), self._room_by_floors(self.accounts[slot]))
        return max(0, room)

    def over_pin_budget(self, slot: int) -> int:
        """Bytes that have to be unpinned; negative: that may be pinned, as far as budgets go."""
        mine = self.accounts[slot]
        above = sum(
            max(0, account.pinned - account.floor_bytes)
            for account in self.accounts
            if account is not mine
        )
        pool = max(0, int(PIN_POOL * self.unfloored_bytes) - above)
        return mine.pinned - min(mine.pin_max_bytes, mine.floor_bytes + pool)

    def room_to_lease(self, slot: int, share: float) -> int:
        """Bytes that may be leased beyond those that are: `share` of the tier above the floor."""
        account = self.accounts[slot]
        if account.tenant == PUBLIC_TENANT:
            return self.capacity_bytes
        most = account.floor_bytes + int(share * self.capacity_bytes)
        if account.lease_max_bytes:
            most = min(most, account.lease_max_bytes)
        return max(0, most - account.held)

    def over_maximum(self, slot: int, num_bytes: int) -> int:
        """Bytes of its own this tenant has to lose before it is charged `num_bytes` more."""
        account = self.accounts[slot]
        return account.used + num_bytes - account.max_bytes

    def over_capacity(self, num_bytes: int) -> int:
        """Bytes somebody has to lose before `num_bytes` more fit the tier."""
        return self.used + num_bytes - self.capacity_bytes

    def above_floor(self, slot: int) -> int:
        """Bytes that evictions for others may take from this tenant."""
        account = self.accounts[slot]
        return account.used - account.floor_bytes

    def by_excess(self) -> list[int]:
        """Slots of those that hold anything, furthest above budget first."""
        present = [slot for slot, account in enumerate(self.accounts) if account.used]
        share = self.unfloored_bytes // max(1, len(present))
        return sorted(
            present,
            key=lambda slot: self.accounts[slot].used - self.accounts[slot].floor_bytes - share,
            reverse=True,
        )


def distinct_values(slots: npt.NDArray[np.uint32]) -> list[int]:
    """The distinct values of a short vector that mostly has one."""
    if not len(slots):
        return []
    first = int(slots[0])
    return [first] if (slots == first).all() else sorted(set(slots.tolist()))
