"""What is done to one process of a fleet under load, and what became of the load."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvfabric.testing.processes import until
from tests.torture.fleet_lab import LEASE_S, Lab, Load, Seen

KINDS = ("node", "engine", "machine", "router", "redis")
"""`machine`: a node and its engine together."""

HOWS = ("killed", "paused", "cut off", "lost")
"""`lost`: as by a power failure. No connection is closed; another machine comes back at its address."""

SLOW = "slow"
"""Of a node: its cable takes 5 ms more each way, loses one frame in a hundred, and carries 50 Mbit/s."""

CALM_S = 1.0
HELD_S = 3.0 * LEASE_S
"""A fault lasts at least so long: epoch leases end in it."""

SLOW_S, SLOW_TIMES, BRISK_S = 1.0, 6.0, 0.2
"""An answer was disturbed if it took longer than this, or needed the other router. On a machine so busy that
the usual one takes more than `BRISK_S`, than so many times what it takes more."""
STEADY = 24
"""So many answers in a row that were not are calm."""


CALM_AGAIN_S = 120.0


@dataclass(frozen=True, slots=True)
class Fault:
    """`number`: which of its kind."""

    kind: str
    how: str
    number: int

    @property
    def names(self) -> tuple[str, ...]:
        """The processes that it strikes."""
        if self.kind == "redis":
            return ("redis",)
        if self.kind == "machine":
            return (f"node{self.number}", f"engine{self.number}")
        return (f"{self.kind}{self.number}",)


@dataclass(frozen=True, slots=True)
class Became:
    """`recovery_s`: from the fault to the end of the last answer that it disturbed; 0 if none was.
    `rejoin_s`: from the repair until all was well."""

    fault: Fault
    num_requests: int
    num_failed: int
    num_wrong: int
    num_retried: int
    num_disturbed: int
    num_reusing: int
    usual_s: float
    worst_s: float
    recovery_s: float
    rejoin_s: float
    first_error: str = ""


def suffer(
    lab: Lab, fault: Fault, load: Load, right: Sequence[tuple[int, ...]], *, for_s: float = 0.0
) -> Became:
    """Under load: a calm while, the fault, until calm again, the repair, until all is well.

    `for_s`: repair after so long, calm or not: for a twin, in which it may never be calm again.
    """
    with load.running():
        time.sleep(CALM_S)
        until(lambda: len(load.seen) >= len(load.asked), deadline_s=CALM_AGAIN_S)
        struck = time.monotonic()
        usual = usual_s(list(load.seen), struck)
        for name in fault.names:
            strike(lab, name, fault.how)
        if not for_s:
            until(lambda: is_calm(load, struck, usual), deadline_s=CALM_AGAIN_S)
        time.sleep(max(struck + (for_s or HELD_S) - time.monotonic(), 0.0))
        if not for_s:
            until(lambda: is_calm(load, struck, usual), deadline_s=CALM_AGAIN_S)
        repaired = time.monotonic()
        for name in fault.names:
            repair(lab, name, fault.how)
        rejoin_s = lab.wait_well()
        if not for_s:
            until(lambda: is_calm(load, repaired, usual), deadline_s=CALM_AGAIN_S)
    return became(fault, load.seen, right, struck, repaired, rejoin_s)


def strike(lab: Lab, name: str, how: str) -> None:
    if how == SLOW:
        lab.network.delay(name, 0.005, 0.01)
        lab.network.limit(name, "50mbit")
    if how in ("cut off", "lost"):
        lab.network.cut(name)
    if how in ("killed", "lost"):
        lab.kill(name)
    if how == "paused":
        lab.pause(name)


def repair(lab: Lab, name: str, how: str) -> None:
    if how == SLOW:
        lab.network.delay(name, 0.0, 0.0)
        lab.network.unlimit(name)
    if how == "cut off":
        lab.network.mend(name)
    if how == "lost":
        lab.network.lose(name)
    if how in ("killed", "lost"):
        lab.start(name)
    if how == "paused":
        lab.go_on(name)


def is_disturbed(one: Seen, now: float, usual_s: float) -> bool:
    slow_s = max(SLOW_S, SLOW_TIMES * (usual_s - BRISK_S))
    return bool(one.error) or one.tries > 1 or (one.ended or now) - one.began > slow_s


def usual_s(seen: Sequence[Seen], struck: float) -> float:
    return statistics.median([one.ended - one.began for one in seen if one.ended <= struck])


def is_calm(load: Load, since: float, usual: float) -> bool:
    """Enough answers in a row were undisturbed, and nobody waits long."""
    now = time.monotonic()
    if any(is_disturbed(one, now, usual) for one in list(load.under_way.values())):
        return False
    later = [one for one in list(load.seen) if one.ended > since]
    last = later[-STEADY:]
    return len(last) == STEADY and not any(is_disturbed(one, now, usual) for one in last)


def became(
    fault: Fault,
    seen: Sequence[Seen],
    right: Sequence[tuple[int, ...]],
    struck: float,
    repaired: float,
    rejoin_s: float,
) -> Became:
    answered = [one for one in seen if not one.error]
    took = [one.ended - one.began for one in seen]
    usual = usual_s(seen, struck)
    later = [one for one in seen if one.ended > struck]
    disturbed = [one.ended for one in later if is_disturbed(one, one.ended, usual)]
    before_repair = [ended for ended in disturbed if ended <= repaired]
    return Became(
        fault=fault,
        num_requests=len(seen),
        num_failed=len(seen) - len(answered),
        num_wrong=sum(one.tokens != right[one.number] for one in answered),
        num_retried=sum(one.tries > 1 for one in seen),
        num_disturbed=len(disturbed),
        num_reusing=sum(one.cached > 0 for one in answered),
        usual_s=usual,
        worst_s=max(took),
        recovery_s=max(before_repair, default=struck) - struck,
        rejoin_s=rejoin_s,
        first_error=next((one.error for one in seen if one.error), ""),
    )
