"""When a prompt is computed at one engine for another, and when not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from kvfabric_router import pairing, policy
from kvfabric_router.journal import _bare
from kvfabric_router.pairing import Lags, Way
from kvfabric_router.policy import Candidate, EngineView, Ranked, Reuse
from kvfabric_router.rates import Rates
from msgspec.structs import replace

from kvfabric.types import NodeId

RATES = Rates(token_ms=0.5, host_ms=0.01)
PROMPT = 2000
BLOCKS = 1984


def engine(name: str, serves: str = "both", **fields: Any) -> EngineView:
    return EngineView(
        endpoint=f"http://{name}",
        engine_id=name,
        model_name="m",
        node_id=NodeId(f"node-{name}"),
        session=name.encode(),
        serves=serves,
        rates=fields.pop("rates", RATES),
        **fields,
    )


def way(first: EngineView, second: EngineView) -> Way | None:
    return Way(BLOCKS, 0.05)


def ranked(
    *engines: EngineView, way_of: pairing.WayOf = way, reuse: dict[str, Reuse] | None = None
) -> tuple[Ranked, ...]:
    alone = [Candidate(e, PROMPT, (reuse or {}).get(e.engine_id, Reuse())) for e in engines]
    return policy.choose("cost", pairing.candidates(alone, way_of, Lags()), 0)


def chosen(*engines: EngineView, **options: Any) -> tuple[str, str | None]:
    """(who answers, who computes the prompt if another does)."""
    best = ranked(*engines, **options)[0].candidate
    return best.engine.engine_id, best.prefill.engine.engine_id if best.prefill else None


PREFILL, DECODE = engine("p", "prefill"), engine("d", "decode")
BUSY = replace(DECODE, num_decoding=4)


def test_apart_where_answers_would_wait() -> None:
    """Four answers would stand still for a second each: computing elsewhere costs a hand-off instead."""
    assert chosen(PREFILL, BUSY) == ("d", "p")


def test_on_one_where_nobody_would() -> None:
    assert chosen(PREFILL, DECODE) == ("d", None)


def test_on_one_that_has_most_of_it() -> None:
    """The rest is computed sooner than it would be handed over."""
    has = {"d": Reuse(hbm_tokens=BLOCKS)}
    assert chosen(PREFILL, BUSY, reuse=has) == ("d", None)
    assert chosen(PREFILL, BUSY, reuse={"p": Reuse(hbm_tokens=BLOCKS)}) == ("d", "p")


def test_a_slow_way_is_not_taken() -> None:
    def slow(first: EngineView, second: EngineView) -> Way:
        return Way(BLOCKS, 5.0)

    assert chosen(PREFILL, BUSY, way_of=slow) == ("d", None)
    assert chosen(PREFILL, BUSY, way_of=lambda first, second: None) == ("d", None)


def test_a_crowded_prefill_engine_is_not_waited_for() -> None:
    crowded = replace(PREFILL, waiting_ms=20_000.0, num_waiting=20)
    assert chosen(crowded, BUSY) == ("d", None)


def test_the_emptier_of_two() -> None:
    """Of two for prompts the one that is done sooner, of two for answers the one with fewer."""
    assert chosen(PREFILL, engine("q", "prefill", waiting_ms=500.0), BUSY) == ("d", "p")
    other = engine("e", "decode", num_decoding=2)
    assert chosen(PREFILL, BUSY, other) == ("e", "p")


def test_without_a_prefill_engine_each_computes_its_own() -> None:
    assert chosen(BUSY) == ("d", None)
    assert all(one.candidate.prefill is None for one in ranked(BUSY, engine("e", "decode")))


def test_a_prefill_engine_answers_if_there_is_no_other() -> None:
    assert chosen(PREFILL) == ("p", None)


def test_engines_for_both_are_never_paired_with_each_other() -> None:
    """And cost what they cost without any of this."""
    found = ranked(engine("a", num_decoding=9), engine("b"))
    assert [one.candidate.prefill for one in found] == [None, None]
    assert [one.terms.stall for one in found] == [0.0, 0.0]


def test_an_engine_for_both_may_have_one_for_prompts_beside_it() -> None:
    assert chosen(PREFILL, engine("b", num_decoding=4)) == ("b", "p")


def test_other_policies_pair_nothing() -> None:
    alone = [Candidate(e, PROMPT) for e in (PREFILL, BUSY)]
    assert [c.engine.engine_id for c in pairing.answering(alone)] == ["d"]


def test_what_is_hidden_costs_nothing() -> None:
    """The way of all blocks takes 0.12 s and the prefill a second: the last chunk's way is what is left."""
    (pair,) = (r for r in ranked(PREFILL, BUSY) if r.candidate.prefill is not None)
    last = BLOCKS * (0.05 + RATES.host_ms) / 2  # two chunks of at most 1,024 tokens
    tail = (PROMPT - BLOCKS) * RATES.token_ms
    assert pair.terms.handoff == pytest.approx(pairing.MESSAGES_MS + last + tail, rel=0.01)
    assert pair.terms.first_token == pytest.approx(
        PROMPT * RATES.token_ms + pair.terms.handoff, rel=0.01
    )


def test_lags_are_learned() -> None:
    (pair,) = (r.candidate for r in ranked(PREFILL, BUSY) if r.candidate.prefill is not None)
    lags = Lags()
    expected = pairing.handoff_ms(pair, 1e9) - pairing.tail_ms(pair)
    for _ in range(30):
        lags.saw(pair, 3 * expected + pairing.tail_ms(pair))
    assert lags.of(PREFILL, BUSY) == pytest.approx(3, rel=0.02)
    assert lags.of(PREFILL, DECODE) == lags.of(PREFILL, BUSY)  # by their nodes
    assert lags.of(BUSY, PREFILL) == 1.0
    lags.saw(pair, 1e6)  # one that says little
    assert lags.of(PREFILL, BUSY) < 6


def test_how_long_it_is_waited_for() -> None:
    (pair,) = (r for r in ranked(PREFILL, BUSY) if r.candidate.prefill is not None)
    assert pairing.wait_ms(pair.terms) == int(pairing.WAIT_FACTOR * pair.terms.first_token)
    quick = replace(pair.terms, prefill=1.0, handoff=1.0)
    assert pairing.wait_ms(quick) == pairing.WAIT_LEAST_MS
    assert pairing.wait_ms(replace(quick, wait=1e9)) == pairing.WAIT_MOST_MS


def test_a_recorded_choice_is_made_again() -> None:
    """A journal keeps of a pair all that the choice was made by."""
    candidates = [one.candidate for one in ranked(PREFILL, BUSY, engine("e", "decode"))]
    kept = msgspec.json.decode(
        msgspec.json.encode([_bare(c) for c in candidates]), type=list[Candidate]
    )
    again = [one.candidate for one in policy.choose("cost", kept, 0)]
    assert [_names(c) for c in again] == [_names(c) for c in candidates]


def _names(candidate: Candidate) -> tuple[str, str]:
    return candidate.engine.engine_id, candidate.computing.engine.engine_id
