"""The policy on a piece of a real trace, in virtual time: failures of routers that this one must not have."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import traffic
from kvfabric_router import policy
from kvfabric_router.policy import Candidate, Ranked
from router_offline import Options, Simulation
from simulated import EngineModel

pytestmark = pytest.mark.slow
NUM_REQUESTS = 600
ALL_TOKENS_PER_S = 8 * EngineModel().prefill_tokens_per_s


@pytest.fixture(scope="module")
def trace() -> list[traffic.Request]:
    return traffic.load("conversation")[:NUM_REQUESTS]


def figures(
    trace: Sequence[traffic.Request], name: str = "cost", *, load: float = 1.0, **options: Any
) -> dict[str, float]:
    offered = traffic.offer(
        trace, count=len(trace), seed=0, seeds=1, tokens_per_s=load * ALL_TOKENS_PER_S
    )
    return Simulation(offered, name, Options(**options)).run(len(trace) // 4)


def test_it_reuses_more_and_answers_sooner_than_taking_turns(
    trace: list[traffic.Request],
) -> None:
    """Every request of this trace shares block 0: nobody may get everything because of it."""
    ours, turns = figures(trace), figures(trace, "round_robin")
    assert ours["imbalance"] < 1.3
    assert ours["reused_share"] > 1.5 * turns["reused_share"]
    assert ours["ttft_ms_p95"] < 0.7 * turns["ttft_ms_p95"]


def test_rates_that_are_a_third_off_do_little_harm(trace: list[traffic.Request]) -> None:
    exact, wrong = figures(trace, load=1.3), figures(trace, load=1.3, rate_error=0.3)
    assert wrong["ttft_ms_mean"] < 1.4 * exact["ttft_ms_mean"]


def test_the_longest_prefix_alone_would_send_all_to_one_engine(
    trace: list[traffic.Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard taken out: without waits, and with ties at the first, one engine drowns."""

    def longest(candidates: Sequence[Candidate], draw: int) -> tuple[Ranked, ...]:
        turns = itertools.count()
        ranked = sorted(policy.costs(candidates), key=lambda r: (r.terms.prefill, next(turns)))
        return tuple(ranked)

    monkeypatch.setattr(policy, "by_cost", longest)
    assert figures(trace[:200])["imbalance"] > 3.0


def test_replicas_that_share_their_load_answer_sooner(trace: list[traffic.Request]) -> None:
    """Four of them, at the engines' real speed; the twin shares nothing."""

    def mean(**options: Any) -> float:
        return figures(trace, load=1.3, compression=1.0, replicas=4, **options)["ttft_ms_mean"]

    assert mean(share_s=0.25) < 0.9 * mean()
