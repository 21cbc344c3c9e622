"""The write budget of the SSD tier: a token bucket that fills over the day. Pure; `clock` is wall time.

A device wears by what is written to it, so the budget is of bytes written, rescued records and headers
included. The bucket holds an hour's worth: in any 24 hours at most 25/24 of the daily bytes are begun, and
one record more, since whoever finds the bucket not empty may overdraw it once. What is kept across restarts
is the level without what may be under way, so that neither a restart nor a crash gives anything back.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from kvfabric.tiers.segment_index import BudgetState
from kvfabric.types import TenantId

DAY_S = 86_400.0
BURST_S = 3_600.0


class WriteBudget:
    """`bytes_per_day` 0: no limit. `clock`: seconds since 1970. `refused` counts."""

    def __init__(self, bytes_per_day: int, clock: Callable[[], float] = time.time) -> None:
        self.refused = 0
        self._rate = bytes_per_day / DAY_S
        self._most = self._rate * BURST_S
        self._clock = clock
        self._left, self._at = self._most, clock()

    def resize(self, bytes_per_day: int) -> None:
        """Another rate from now on; nothing above its hour's worth is left. A first limit starts full."""
        self._fill()
        was_limited = self.is_limited
        self._rate = bytes_per_day / DAY_S
        self._most = self._rate * BURST_S
        self._left = min(self._left, self._most) if was_limited else self._most

    def resume(self, kept: BudgetState) -> None:
        """Go on with what an earlier life left; of a larger budget's rest nothing above today's."""
        self._left, self._at = min(kept.left, self._most), kept.at
        self._fill()

    def empty(self) -> None:
        """What an earlier life left is not known."""
        self._left, self._at = 0.0, self._clock()

    def __repr__(self) -> str:
        return f"<WriteBudget {self._left:.0f} of {self._most:.0f} bytes left>"

    @property
    def is_limited(self) -> bool:
        return self._rate > 0

    @property
    def left_bytes(self) -> int:
        """Negative while overdrawn."""
        self._fill()
        return int(self._left)

    def take(self, num_bytes: int) -> bool:
        """Whether so many bytes may be written now; they are taken then, else the refusal is counted."""
        if not self.is_limited:
            return True
        self._fill()
        if self._left <= 0:
            self.refused += 1
            return False
        self._left -= num_bytes
        return True

    def spend(self, num_bytes: int) -> None:
        """What was written without asking: the debt is paid first."""
        if self.is_limited:
            self._fill()
            self._left -= num_bytes

    def give_back(self, num_bytes: int) -> None:
        """What was taken and will not be written."""
        if self.is_limited:
            self._left = min(self._most, self._left + num_bytes)

    def to_keep(self, under_way: int) -> BudgetState:
        """What the next life may start with, if this one ends before it says more: `under_way` is what
        may still be taken until then."""
        self._fill()
        return BudgetState(self._left - min(under_way, max(0.0, self._left)), self._at)

    def _fill(self) -> None:
        now = self._clock()
        passed = max(0.0, now - self._at)  # a clock that was set back gives nothing
        self._left = min(self._most, self._left + passed * self._rate)
        self._at = now


class TenantBudgets:
    """One bucket for each tenant that has a budget of its own, and how much each wrote. Levels are handed to
    a successor and not kept: what a daemon finds at an ordinary start begins empty, so that it gives nothing
    back."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.written: Counter[TenantId] = Counter()
        self._clock = clock
        self._budgets: dict[TenantId, WriteBudget] = {}
        self._resumed: dict[TenantId, BudgetState] = {}
        self._is_new = True

    def levels(self) -> dict[TenantId, BudgetState]:
        """For a successor. Nothing is being written."""
        return {tenant: budget.to_keep(0) for tenant, budget in self._budgets.items()}

    def resume(self, levels: Mapping[TenantId, BudgetState]) -> None:
        """Go on with what a predecessor left, of tenants that are known already or to come."""
        self._resumed = dict(levels)
        for tenant in self._budgets.keys() & levels.keys():
            self._budgets[tenant].resume(self._resumed.pop(tenant))

    def configure(self, bytes_per_day: Mapping[TenantId, int]) -> None:
        """0 for no limit, as for tenants that are not named."""
        for tenant in self._budgets.keys() - bytes_per_day.keys():
            del self._budgets[tenant]
        for tenant, rate in bytes_per_day.items():
            budget = self._budgets.get(tenant)
            if budget is None:
                budget = self._budgets[tenant] = WriteBudget(rate, self._clock)
                if tenant in self._resumed:
                    budget.resume(self._resumed.pop(tenant))
                elif self._is_new:
                    budget.empty()
            else:
                budget.resize(rate)
        self._is_new = False

    def take(self, tenant: TenantId, num_bytes: int) -> bool:
        """Whether the tenant may write so much now; it is taken then."""
        budget = self._budgets.get(tenant)
        if budget is not None and not budget.take(num_bytes):
            return False
        self.written[tenant] += num_bytes
        return True

    def spend(self, tenant: TenantId, num_bytes: int) -> None:
        """What of the tenant's was written by the tier's own decision."""
        self.written[tenant] += num_bytes
        if tenant in self._budgets:
            self._budgets[tenant].spend(num_bytes)

    def give_back(self, tenant: TenantId, num_bytes: int) -> None:
        """What was taken and not written after all."""
        self.written[tenant] -= num_bytes
        if tenant in self._budgets:
            self._budgets[tenant].give_back(num_bytes)
