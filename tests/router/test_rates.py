"""An engine's rates are learned from its own timings, whatever it is like."""

from __future__ import annotations

from random import Random

import pytest
from kvfabric_router.rates import RateLearner, Rates, Work, fetch_prior, typical

TRUE = Rates(token_ms=0.03, context_ms=2e-6, answer_ms=0.001, host_ms=0.002)


def taught(true: Rates, sights: int = 200, noise: float = 0.1) -> RateLearner:
    rng = Random(3)
    learner = RateLearner()
    for _ in range(sights):
        work = Work(
            computed=min(int(rng.lognormvariate(8, 1)), 60_000),
            hbm=rng.choice([0, 0, 2_000, 8_000]),
            host=rng.choice([0, 0, 4_000]),
        )
        decoding = rng.randrange(10)
        took = true.prefill_ms(work) + true.decode_ms(work, decoding) + true.fetch_ms(work)
        learner.saw_prefill(work, decoding, took * rng.lognormvariate(0, noise))
    return learner


def test_rate_and_curvature_are_learned() -> None:
    rates = taught(TRUE).rates
    for work in (Work(500), Work(20_000), Work(2_000, hbm=30_000), Work(2_000, host=8_000)):
        expected = TRUE.prefill_ms(work) + TRUE.fetch_ms(work)
        assert rates.prefill_ms(work) + rates.fetch_ms(work) == pytest.approx(expected, rel=0.15)
    assert rates.context_ms == pytest.approx(TRUE.context_ms, rel=0.3)
    # Without curvature a long prompt would look a third cheaper than it is.
    assert TRUE.prefill_ms(Work(20_000)) > 1.3 * 20_000 * TRUE.token_ms


def test_running_answers_slow_a_prefill_as_much_as_they_were_seen_to() -> None:
    rates = taught(TRUE).rates
    assert rates.decode_ms(Work(1_000), 8) == pytest.approx(8.0, rel=0.5)
    assert taught(Rates(token_ms=0.03)).rates.decode_ms(Work(1_000), 8) < 1.0


def test_a_few_sights_are_enough_to_be_right_within_a_third() -> None:
    assert taught(Rates(token_ms=0.03), 4, 0.0).rates.token_ms == pytest.approx(0.03, rel=0.35)


def test_an_engine_that_changes_is_learned_anew() -> None:
    learner = taught(Rates(token_ms=0.03), noise=0.0)
    for _ in range(200):
        learner.saw_prefill(Work(2_000), 0, 2_000 * 0.09)
    assert learner.rates.prefill_ms(Work(2_000)) == pytest.approx(180.0, rel=0.1)


def test_one_wild_sight_changes_little() -> None:
    learner = taught(Rates(token_ms=0.03), noise=0.0)
    for _ in range(4):
        learner.saw_prefill(Work(2_000), 0, 1e6)
    assert learner.rates.prefill_ms(Work(2_000)) < 2 * 60.0


def test_nothing_is_ever_negative() -> None:
    learner = RateLearner()
    for took in (0.0, 0.0, 5.0, 0.0):
        learner.saw_prefill(Work(1_000, hbm=500), 3, took)
    rates = learner.rates
    assert min(rates.token_ms, rates.latency_ms, rates.context_ms, rates.answer_ms) >= 0.0
    assert rates.prefill_ms(Work(10)) > 0


def test_what_was_never_fetched_keeps_its_prior() -> None:
    learner = RateLearner()
    learner.prior(fetch_prior(1024.0, Rates()))
    before = learner.rates
    for _ in range(20):
        learner.saw_prefill(Work(1_000), 0, 30.0)
    assert learner.rates.host_ms == pytest.approx(before.host_ms)
    assert learner.rates.ssd_ms == pytest.approx(before.ssd_ms)
    assert before.ssd_ms > before.host_ms > 0


def test_the_typical_engine_is_the_median() -> None:
    some = [Rates(token_ms=value) for value in (0.1, 0.2, 9.0)]
    assert typical(some).token_ms == 0.2
    assert typical([]) == Rates()


def test_a_step_of_an_answer_is_learned() -> None:
    learner = RateLearner()
    for _ in range(50):
        learner.saw_answer(100, 700.0)
    assert learner.rates.step_ms == pytest.approx(7.0, rel=0.01)


def test_latency_is_not_taken_for_slowness() -> None:
    """An engine that is often idle is as fast as it is; what the way there takes is told apart."""
    rng = Random(5)
    learner = RateLearner()
    for _ in range(600):
        computed, was_idle = rng.randrange(100, 8_000), rng.random() < 0.7
        learner.saw_prefill(Work(computed), 0, computed * 0.02 + 50.0 * was_idle, was_idle=was_idle)
    assert learner.rates.token_ms == pytest.approx(0.02, rel=0.15)
    assert learner.rates.latency_ms == pytest.approx(50.0, rel=0.3)
