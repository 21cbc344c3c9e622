"""Four nodes, four engines, two routers and a Redis on machines of their own, of which one fails under load.

Answers are those of an engine alone, token for token; no request fails that one healthy engine could have
served; only the death of a router is a client's concern, and then of one retry. Then all is as before.

Twins, on the same fleet, with one guard taken out while it runs: peers are waited for, engines that failed
are asked again, clients ask one router only. Of Redis: `test_partition.py`, with leases that never end.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from kvfabric.demo import checks
from kvfabric.testing.netns import why_not
from kvfabric.testing.processes import until
from tests.torture.fleet_faults import HOWS, KINDS, SLOW, Became, Fault, repair, strike, suffer
from tests.torture.fleet_lab import NODES, NUM_NODES, NUM_ROUTERS, Lab, Load, Prompts, prompts
from tests.torture.scale import FULL, at_most, count, record

pytestmark = [pytest.mark.slow, pytest.mark.fleet, pytest.mark.alone]

ROUNDS = count(1, 5, "KVFABRIC_TORTURE_FLEET")
NUM_PROMPTS, NUM_COLD = count(25, 80), 25
"""Of the trace; of each twin, one more than a multiple of the engines: round robin moves on by one."""

TWIN_S = 4.0
IDLE_S = 2.0
"""What was said before is acknowledged by then: nothing is left to be sent again, which would be refused."""

FAULTS: dict[str, tuple[str, ...]] = (
    {kind: (*HOWS, *([SLOW] if kind == "node" else [])) for kind in KINDS}
    if FULL
    else {"node": ("lost", SLOW), "redis": ("cut off",)}
)
"""By kind. In CI, beside what the twins try."""

SLOW_NUMBER = 1
ROUND_ROBIN = 1
"""The router that spreads requests."""

AT_ONCE_S, PROBES_S, CLIENT_S = 4.0, 20.0, 24.0
"""Recovery at most: where deadlines of the fabric end the wait; where two probes of the routers have to fail,
or all is computed until Redis is back; where the client's own patience ends it."""

USUAL_S = 0.3
"""At most, of an answer on an idle machine of two cores."""

_CHANGES = {"node": ("waits_for_peers",), "router": ("asks_the_dead",)}


@dataclass(frozen=True)
class Fleet:
    """`asked`: the trace, and other prompts that each twin begins with cold; `right`: their answers."""

    lab: Lab
    asked: list[Prompts]
    right: list[list[tuple[int, ...]]]

    def suffers(self, fault: Fault, *, prompts: int = 0, for_s: float = 0.0, **load: Any) -> Became:
        clients = Load(self.lab, self.asked[prompts], **load)
        return suffer(self.lab, fault, clients, self.right[prompts], for_s=for_s)

    def suffers_twice(self, fault: Fault, **options: Any) -> tuple[Became, Became]:
        """As it is, which must hold, and with the guards out, for a while."""
        found = self.suffers(fault, prompts=1, **options)
        holds(found, self)
        self.lab.switch.touch()
        try:
            return found, self.suffers(fault, prompts=2, for_s=TWIN_S, **options)
        finally:
            self.lab.switch.unlink()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    if reason := why_not():
        pytest.skip(reason)
    with Lab(tmp_path_factory.mktemp("lab"), changes=_CHANGES, slow=(f"node{SLOW_NUMBER}",)) as lab:
        lab.wait_well()
        asked = [prompts(NUM_PROMPTS), *(prompts(NUM_COLD, other=other) for other in (1, 2))]
        right = lab.reference(asked)
        yield Fleet(lab, asked, right)


@pytest.mark.parametrize("kind", FAULTS)
def test_whoever_fails_the_answers_are_the_same(fleet: Fleet, kind: str) -> None:
    chance = random.Random(7)
    for how in FAULTS[kind]:
        found = []
        for _ in range(ROUNDS):
            most = NUM_ROUTERS if kind == "router" else NUM_NODES
            number = SLOW_NUMBER if how == SLOW else chance.randrange(most)
            found.append(fleet.suffers(Fault(kind, how, number)))
            holds(found[-1], fleet)
        publish(found)


def holds(one: Became, fleet: Fleet) -> None:
    told = f"{one}\n{fleet.lab.logs()}"
    assert one.num_failed == one.num_wrong == 0, told
    assert one.num_reusing > 0, told
    # On a busy machine all takes longer.
    assert one.recovery_s <= bound_s(one.fault) * max(1.0, one.usual_s / USUAL_S), told
    if one.fault.kind != "router":
        assert one.num_retried == 0, told


def bound_s(fault: Fault) -> float:
    if fault.kind != "redis" and (fault.how == "killed" or fault.kind == "node"):
        return AT_ONCE_S
    return CLIENT_S if fault.kind == "router" else PROBES_S


def publish(found: list[Became]) -> None:
    recovery = [one.recovery_s for one in found]
    rejoin = [one.rejoin_s for one in found]
    requests = sum(one.num_requests for one in found)
    fault = found[0].fault
    record(
        f"fleet. {fault.kind} {fault.how}, under load",
        requests,
        f"{at_most(0, requests)} requests failed or answered otherwise; "
        f"{sum(one.num_retried for one in found)} went to the other router; recovered after "
        f"{statistics.median(recovery):.1f} s (worst {max(recovery):.1f}), joined again "
        f"{statistics.median(rejoin):.1f} s after the repair; tried {len(found)} times",
    )


def test_a_router_that_only_listens_notices_that_a_machine_is_gone(fleet: Fleet) -> None:
    """No connection is closed and nobody says anything, before and after. The twin is the other router."""
    lab = fleet.lab
    lab.kill("router1")
    lab.start("router1", "only_listens")
    lab.wait_well()
    time.sleep(IDLE_S)
    strike(lab, "node0", "lost")
    repair(lab, "node0", "lost")
    until(lambda: "router0" in lab.listeners("node0"), deadline_s=30)
    time.sleep(IDLE_S)
    assert lab.listeners("node0") == {"router0"}
    lab.kill("router1")
    lab.start("router1")
    lab.wait_well()


# ---------------------------------------------------------------------- twins


def test_peers_are_not_waited_for(fleet: Fleet) -> None:
    """Of prompts that were computed in turn at each engine, and are asked for at the next one."""
    fault = Fault("node", "paused", 1)
    found, without = fleet.suffers_twice(fault, begins_at=ROUND_ROBIN)
    assert without.num_disturbed > found.num_disturbed + NUM_COLD // 10, (found, without)


def test_engines_that_failed_are_not_asked_again(fleet: Fleet) -> None:
    """Neither by the request that found out, nor by others."""
    found, without = fleet.suffers_twice(Fault("engine", "killed", 1), concurrency=8)
    assert without.num_retried > 0, (found, without)


def test_clients_ask_the_other_router(fleet: Fleet) -> None:
    fault = Fault("router", "killed", 1)
    found = fleet.suffers(fault)
    holds(found, fleet)
    assert found.num_retried > 0
    without = fleet.suffers(fault, fails_over=False, for_s=TWIN_S)
    assert without.num_failed > 0, (found, without)


# ---------------------------------------------------------------------- after all of it


def test_nothing_is_left(fleet: Fleet) -> None:
    """No lease, no slot that somebody may write; no part was loaded as something else than was stored."""

    def is_quiet() -> bool:
        metrics = [fleet.lab.metrics(name) for name in NODES]
        left = ("node_leased_bytes", "node_draining_bytes")
        return all(found and not any(found[name] for name in left) for found in metrics)

    until(is_quiet, deadline_s=60)
    check = checks.loads_equal_stores("loads", fleet.lab.audits())
    assert check.passed, check.seen
    # And there was something to be wrong: each node that was not started anew says so for itself.
    fetched = 'node_transfers_total{result="fetched_blocks"}'
    assert sum(fleet.lab.metrics(name).get(fetched, 0) for name in NODES) > 0
