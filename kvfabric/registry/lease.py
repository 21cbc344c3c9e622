"""A holder's lease on the epochs: how long it may believe the registry state it holds. Pure but a clock.

Counted on CLOCK_BOOTTIME (it runs on while the machine sleeps) from before the renewal was sent, so the
registry never thinks a lease over that the holder still uses. Without a lease a router mints nothing and
a node answers every lookup with a miss.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvfabric.registry.state import RegistryState

RENEW_EVERY_S = 0.5


def boottime() -> float:
    """Seconds since boot, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class EpochLease:
    """One lease, renewed by the link to the registry, asked by every request.

    `store_id`: which run of which copy of the registry's store was trusted last, from before a restart of
    this process. Empty if there is no such thing, as where a node's own registry is asked.
    """

    def __init__(self, clock: Callable[[], float] = boottime, *, store_id: bytes = b"") -> None:
        self._clock = clock
        self._registry_id: bytes | None = None
        self._store_id = store_id
        self._version = 0
        self._ttl_s = 0.0
        self._ends = float("-inf")
        self._quiet_until = float("-inf")

    def now(self) -> float:
        return self._clock()

    @property
    def left_s(self) -> float:
        """Seconds that it lasts yet; 0 without one."""
        now = self._clock()
        return max(0.0, self._ends - now) if now >= self._quiet_until else 0.0

    @property
    def quiet_s(self) -> float:
        """Seconds for which nothing is trusted, because the store is another one than before."""
        return max(0.0, self._quiet_until - self._clock())

    def renewed(
        self,
        *,
        sent_at: float,
        registry_id: bytes,
        ttl_s: float,
        version: int,
        store_id: bytes = b"",
    ) -> None:
        """An answer to a renewal sent at `sent_at` (this lease's clock)."""
        # A renewal that is behind grants 0 s: what runs out are leases as long as those granted before.
        self._ttl_s = max(self._ttl_s, ttl_s)
        other_registry = self._registry_id is not None and registry_id != self._registry_id
        if other_registry or store_id != self._store_id:
            # Another store than the one trusted so far: what it forgot must first run out everywhere.
            self._quiet_until = self._clock() + 2 * self._ttl_s
            self._ends = float("-inf")
        if other_registry:
            self._version = 0
        self._registry_id, self._store_id = registry_id, store_id
        # Answers may overtake each other; neither the end nor the version ever goes back.
        self._ends = max(self._ends, sent_at + ttl_s)
        self._version = max(self._version, version)

    def allows(self, state: RegistryState | None) -> bool:
        """Whether `state` may be acted on now: newest as far as the registry said, and in time."""
        now = self._clock()
        return (
            state is not None
            and self._quiet_until <= now < self._ends
            and state.registry_id == self._registry_id
            and state.version >= self._version
        )
