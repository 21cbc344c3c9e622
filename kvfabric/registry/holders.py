"""Who may act on the registry's state, and for how long: the epoch leases of routers. Sync state.

A holder's lease runs `ttl_s` from its last renewal that had applied the newest version. A renewal that is
behind gets none, and does not lengthen the one it has: so from the moment of a change on, every lease under
the old state is running out, and `ttl_s + GRACE_S` later nobody acts on it, heard from or not.

A `Round` follows one change: it is over when each holder that had a lease applied it or was waited out.
Leases granted by the node's previous life are not known to this one: no round ends before they are over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvfabric.errors import Conflict, Overloaded

GRACE_S = 0.5
"""Added to a lease before it is believed over: clocks of two processes, and a request just being sent."""
MAX_HOLDERS = 1024
PREVIOUS_LIFE = "leases of this node before its start"


@dataclass(slots=True)
class _Holder:
    holder_id: str
    kind: str
    applied_version: int
    lease_ends: float


@dataclass(frozen=True, slots=True)
class Ack:
    """How the news reached a holder. `at`: on the clock of the `Holders`. `waited_out`: it did not, and
    its lease is over.
    """

    holder_id: str
    kind: str
    at: float
    waited_out: bool = False


@dataclass(slots=True)
class Round:
    """One change under way. `acks` grows; `pending`: holder id -> (kind, end of its lease and grace)."""

    version: int
    pending: dict[str, tuple[str, float]]
    acks: list[Ack] = field(default_factory=list)


class Holders:
    """See the module. `clock` in seconds; it must not stop while the machine sleeps (CLOCK_BOOTTIME)."""

    def __init__(
        self, *, ttl_s: float, clock: Callable[[], float], grace_s: float = GRACE_S
    ) -> None:
        self.ttl_s = ttl_s
        self._grace_s = grace_s
        self._clock = clock
        self._known_since = clock()
        self._holders: dict[str, _Holder] = {}
        self._rounds: list[Round] = []

    def __repr__(self) -> str:
        return f"<Holders {sorted(self._holders)}, {len(self._rounds)} rounds>"

    def renew(self, holder_id: str, kind: str, applied_version: int, newest_version: int) -> float:
        """Seconds of the lease granted, counted from before the renewal was sent; 0: none.

        Raises Conflict if the holder has seen a newer registry than this one: it went back.
        """
        now = self._clock()
        if applied_version > newest_version:
            raise Conflict(
                f"{kind} {holder_id} has applied version {applied_version} of the registry, which is at "
                f"{newest_version}: an old copy was restored, and nothing may be served by it"
            )
        self._forget_ended(now)
        holder = self._holders.get(holder_id)
        if holder is None:
            if len(self._holders) >= MAX_HOLDERS:
                raise Overloaded(f"{MAX_HOLDERS} holders have epoch leases already")
            holder = self._holders[holder_id] = _Holder(holder_id, kind, applied_version, now)
        holder.applied_version = applied_version
        self._acknowledge(holder_id, applied_version, now)
        if applied_version < newest_version:
            return 0.0
        holder.lease_ends = now + self.ttl_s
        return self.ttl_s

    def begin(self, version: int) -> Round:
        """Follow the change that made `version`, published just now."""
        now = self._clock()
        self._forget_ended(now)
        unknown_until = self._known_since + self.ttl_s + self._grace_s
        pending = {
            holder.holder_id: (holder.kind, holder.lease_ends + self._grace_s)
            for holder in self._holders.values()
        }
        if now < unknown_until:
            pending[PREVIOUS_LIFE] = ("unknown", unknown_until)
        started = Round(version, pending)
        self._rounds.append(started)
        for holder in list(self._holders.values()):
            self._acknowledge(holder.holder_id, holder.applied_version, now)
        return started

    def wait_s(self, current: Round) -> float | None:
        """Seconds after which to ask again unless news comes first; None: the round is over."""
        now = self._clock()
        for holder_id, (kind, ends) in list(current.pending.items()):
            if now >= ends:
                del current.pending[holder_id]
                current.acks.append(Ack(holder_id, kind, now, waited_out=True))
        if not current.pending:
            return None
        return min(ends for _, ends in current.pending.values()) - now

    def end(self, current: Round) -> None:
        """Nobody waits for it any more."""
        self._rounds.remove(current)

    def _acknowledge(self, holder_id: str, applied_version: int, now: float) -> None:
        for current in self._rounds:
            if applied_version >= current.version and holder_id in current.pending:
                kind, _ = current.pending.pop(holder_id)
                current.acks.append(Ack(holder_id, kind, now))

    def _forget_ended(self, now: float) -> None:
        ended = [h.holder_id for h in self._holders.values() if h.lease_ends + self._grace_s <= now]
        for holder_id in ended:
            del self._holders[holder_id]
