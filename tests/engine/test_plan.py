"""Fetch or recompute: what is cheaper by the measured rates is done, and rates follow what happens."""

from __future__ import annotations

import pytest
from kvfabric_engine.plan import (
    PROBE_BYTES,
    FetchPlan,
    Planner,
    PrefixMatch,
    Prompt,
    Rates,
    choose,
    fit_prefill,
    plan_fetch,
)

from kvfabric.types import MissReason, TierName

HOST, SSD = TierName.HOST, TierName.SSD
MIB = 1 << 20
# An 8B model on one H100: 64 tokens are 9 MiB; 16k tokens take 0.66 s.
RATES = Rates(0.001, {HOST: 50e9, SSD: 1.9e9}, step_s=0.01, token_s=2.2e-5, pair_s=2.2e-9)


def prompt(num_tokens: int = 16384, num_cached: int = 0) -> Prompt:
    return Prompt(num_tokens, num_cached, (num_tokens - 1) // 64, 64, 9 * MIB)


def match(*tiers: TierName) -> PrefixMatch:
    return PrefixMatch(len(tiers), tiers, MissReason.NONE)


def test_everything_beyond_hbm_is_fetched() -> None:
    """Without rates: from the first block that HBM lacks to the last that may be used."""
    assert plan_fetch(match(*[HOST] * 5), num_cached=2, num_usable=4) == FetchPlan(2, 2)
    assert plan_fetch(match(HOST), num_cached=2, num_usable=4) == FetchPlan(2, 0)


def test_fast_tier_is_fetched_whole_and_slow_one_is_recomputed() -> None:
    """Host RAM beats computing, a slow disk does not; the estimate is that of the better one."""
    fast = choose(match(*[HOST] * 255), prompt(), RATES)
    assert fast.plan == FetchPlan(0, 255)
    assert fast.estimate_s < 0.1 < fast.other_s
    slow = choose(match(*[SSD] * 255), prompt(), RATES)
    assert slow.plan == FetchPlan(0, 0)
    assert slow.estimate_s == pytest.approx(RATES.prefill_s(0, 16384))
    assert slow.estimate_s < slow.other_s


def test_hit_is_cut_where_a_slow_tier_begins() -> None:
    """The blocks in RAM are loaded, those on disk behind them computed."""
    mixed = choose(match(*[HOST] * 100, *[SSD] * 100), prompt(), RATES)
    assert mixed.plan == FetchPlan(0, 100)


def test_a_slow_block_is_fetched_for_the_fast_ones_behind_it() -> None:
    """What follows a cut is lost, so one slow block in front of many fast ones is worth its time."""
    held_up = choose(match(SSD, *[HOST] * 100), prompt(), RATES)
    assert held_up.plan == FetchPlan(0, 101)


def test_short_hit_is_not_worth_its_overhead() -> None:
    """What a load takes before its first byte counts too."""
    slow_start = Rates(0.05, {HOST: 50e9}, step_s=0.01, token_s=2.2e-5)
    assert choose(match(HOST), prompt(128), slow_start).plan.num_blocks == 0


def test_unmeasured_tier_is_tried_with_little() -> None:
    """At most PROBE_BYTES of a tier that nobody measured: then its rate is known."""
    rates = Rates(0.001, {HOST: 50e9}, step_s=0.01, token_s=2.2e-5, pair_s=2.2e-9)
    first = choose(match(*[HOST] * 3, *[SSD] * 100), prompt(), rates)
    assert first.plan.num_blocks == 3 + PROBE_BYTES // (9 * MIB)


def test_planner_that_may_not_cut_fetches_all() -> None:
    """On the CPU everything is fetched, and what it would have saved is recorded."""
    choice = Planner(RATES, may_cut=False).choose(match(*[SSD] * 255), prompt())
    assert choice.plan == FetchPlan(0, 255)
    assert choice.other_blocks == 0
    assert choice.estimate_s > choice.other_s


def test_rates_follow_what_happens() -> None:
    """A disk twice as fast as known is believed after some loads; a busy GPU slows prefill."""
    planner = Planner(RATES, may_cut=True)
    for _ in range(20):
        planner.loaded([SSD] * 100, 9 * MIB, 100 * 9 * MIB / 3.8e9 + 0.001)
        planner.computed(0, 16384, 2 * RATES.prefill_s(0, 16384))
    assert planner.rates.bytes_per_s[SSD] == pytest.approx(3.8e9, rel=0.01)
    assert planner.rates.bytes_per_s[HOST] == 50e9
    assert planner.rates.prefill_s(0, 16384) == pytest.approx(
        2 * RATES.prefill_s(0, 16384), rel=0.01
    )
    assert planner.choose(match(*[SSD] * 255), prompt()).plan.num_blocks == 255
    planner.loaded([SSD, HOST], 9 * MIB, 1.0)  # whose time it was nobody knows
    assert planner.rates.bytes_per_s[HOST] == 50e9


def test_a_tier_left_out_is_tried_again() -> None:
    """One bad measurement does not shut a tier out for ever."""
    bad = Rates(0.001, {HOST: 1e9}, step_s=0.01, token_s=2.2e-5, pair_s=2.2e-9)
    planner = Planner(bad, may_cut=True)
    counts = [planner.choose(match(*[HOST] * 255), prompt()).plan.num_blocks for _ in range(60)]
    assert counts[0] == 0
    assert counts[-1] == 255


def test_regret_is_measured_against_the_other_choice() -> None:
    """Positive when the alternative would have been over sooner, as far as was known."""
    planner = Planner(RATES, may_cut=True)
    choice = planner.choose(match(*[HOST] * 255), prompt())
    planner.record(choice, offered_blocks=255, loaded_blocks=255, outcome_s=choice.other_s + 0.5)
    planner.record(choice, offered_blocks=255, loaded_blocks=255, outcome_s=choice.estimate_s)
    late, good = planner.records
    assert late.regret_s == pytest.approx(0.5)
    assert good.regret_s < 0


def test_prefill_is_fitted() -> None:
    """From a few lengths the rest follows; noise makes no part of it negative."""
    lengths = (256, 1024, 4096)
    fitted = fit_prefill(Rates(), [(n, RATES.prefill_s(0, n)) for n in lengths])
    assert fitted.prefill_s(0, 16384) == pytest.approx(RATES.prefill_s(0, 16384), rel=1e-6)
    flat = fit_prefill(Rates(), [(256, 0.02), (1024, 0.01), (4096, 0.03)])
    assert min(flat.step_s, flat.token_s, flat.pair_s) >= 0
