"""The cost policy prefers what makes answers fast for everyone, and spreads what is equal."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from kvfabric_router.identity import ModelIdentity
from kvfabric_router.policy import (
    Candidate,
    EngineView,
    PeerLink,
    Reuse,
    by_cost,
    cost,
    reuse_of,
    round_robin,
    sources_of,
    with_peers,
)
from kvfabric_router.rates import Rates, fetch_prior
from msgspec.structs import replace

from kvfabric.events.index import Holder
from kvfabric.types import NodeId, TierName

MODEL = ModelIdentity("revision-1", bytes(32), 16)
NODE = NodeId("n")


def engine(name: str, **fields: object) -> EngineView:
    rates = fetch_prior((1 << 20) / 16, Rates(answer_ms=0.01))
    view = EngineView(name, name, "m", NODE, name.encode(), MODEL, rates=rates)
    return replace(view, **fields)


def first(*candidates: Candidate) -> str:
    return by_cost(candidates, 1)[0].candidate.engine.endpoint


def test_reuse_is_preferred_among_idle_engines() -> None:
    assert first(
        Candidate(engine("a"), 1000), Candidate(engine("b"), 1000, Reuse(hbm_tokens=900))
    ) == ("b")


def test_hbm_is_preferred_to_host_and_host_to_ssd() -> None:
    tiers = [Reuse(hbm_tokens=960), Reuse(host_tokens=960), Reuse(ssd_tokens=960), Reuse()]
    costs = [cost(Candidate(engine("a"), 1000, reuse)).total for reuse in tiers]
    assert costs == sorted(costs)
    assert len(set(costs)) == 4


def test_a_disk_slower_than_computing_does_not_attract() -> None:
    """Bytes that take longer to fetch than to compute make the holder the dearer engine."""
    fast = fetch_prior((1 << 20) / 16, Rates(token_ms=0.001))
    holder = Candidate(engine("holder", rates=fast), 1600, Reuse(ssd_tokens=1600 - 16))
    assert first(holder, Candidate(engine("other", rates=fast), 1600)) == "other"


def test_a_long_queue_outweighs_reuse() -> None:
    busy = engine("busy", waiting_ms=5000.0, num_waiting=4)
    assert first(Candidate(busy, 1000, Reuse(hbm_tokens=500)), Candidate(engine("idle"), 1000)) == (
        "idle"
    )


def test_uncached_work_is_weighed_with_the_queue_it_joins() -> None:
    """Two queues as long in time: what is uncached goes to the one with fewer requests to delay."""
    many = Candidate(engine("many", waiting_ms=100.0, num_waiting=10), 1000)
    few = Candidate(engine("few", waiting_ms=130.0, num_waiting=1), 1000)
    assert first(many, few) == "few"
    # The guard removed: without that term the crowded engine looks cheaper.
    assert cost(many).total - cost(many).others < cost(few).total - cost(few).others


def test_running_answers_make_an_engine_dearer() -> None:
    assert first(Candidate(engine("a", num_decoding=3), 100), Candidate(engine("b"), 100)) == "b"


def test_a_faster_engine_is_preferred() -> None:
    quick = engine("quick", rates=Rates(token_ms=0.1))
    assert first(Candidate(engine("slow"), 1000), Candidate(quick, 1000)) == "quick"


def test_ties_are_broken_at_random() -> None:
    candidates = [Candidate(engine(name), 1000) for name in "abcd"]
    rng = Random(7)
    chosen = [
        by_cost(candidates, rng.getrandbits(32))[0].candidate.engine.endpoint for _ in range(400)
    ]
    assert all(60 < chosen.count(name) < 140 for name in "abcd")


def test_the_ranking_names_every_candidate_with_its_terms() -> None:
    candidates = [
        Candidate(engine("a", waiting_ms=50.0, num_waiting=1), 100),
        Candidate(engine("b"), 100, Reuse(host_tokens=64)),
    ]
    ranked = by_cost(candidates, 1)
    assert [r.candidate.engine.endpoint for r in ranked] == ["b", "a"]
    assert ranked[1].terms.wait == 50.0
    assert ranked[1].terms.prefill == 50.0
    # Its 50 ms for the one who waits there; the 32 ms that `b` need not compute for half a one more.
    assert ranked[1].terms.others == 50.0 * 1 + 32.0 * 0.5
    assert ranked[0].terms.fetch > 0


def test_nobody_to_choose_from_is_an_empty_ranking() -> None:
    assert by_cost([], 1) == ()
    assert round_robin([], 3) == ()


def test_round_robin_takes_each_in_its_turn() -> None:
    candidates = [Candidate(engine(name), 10) for name in "ba"]
    turns = [round_robin(candidates, turn)[0].candidate.engine.endpoint for turn in range(4)]
    assert turns == ["a", "b", "a", "b"]


def present(bits: str) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.array([bit == "1" for bit in bits])


def reused(
    engine: EngineView,
    held: dict[Holder, np.ndarray[tuple[int], np.dtype[np.bool_]]],
    num_blocks: int,
    predicted: str = "",
) -> Reuse:
    sent = present(predicted) if predicted else None
    return reuse_of(engine, held, sent, num_blocks=num_blocks, block_tokens=16)


def test_what_was_sent_there_fills_what_the_node_has_not_told_yet() -> None:
    a = engine("a")
    held = {Holder(NODE, TierName.HBM, a.session): present("1000")}
    assert reused(a, held, 4, "0110") == Reuse(hbm_tokens=3 * 16)


def test_without_a_node_what_was_sent_there_is_an_approximation() -> None:
    alone = engine("a", node_id=None)
    assert reused(alone, {}, 4, "1100") == Reuse(hbm_tokens=2 * 16, is_approximate=True)


def test_reuse_counts_hbm_first_and_the_node_from_there() -> None:
    a = engine("a")
    held = {
        Holder(NODE, TierName.HBM, a.session): present("11000000"),
        Holder(NODE, TierName.HOST): present("01110100"),
        Holder(NODE, TierName.SSD): present("00001000"),
    }
    assert reused(a, held, 8) == Reuse(2 * 16, 3 * 16, 16)


def test_reuse_ends_at_the_first_gap_of_all_tiers() -> None:
    held = {Holder(NODE, TierName.HOST): present("10111")}
    assert reused(engine("a"), held, 5).tokens == 16


def test_a_head_missing_in_hbm_is_no_reuse_of_hbm() -> None:
    a = engine("a")
    held = {Holder(NODE, TierName.HBM, a.session): present("0111")}
    assert reused(a, held, 4) == Reuse()


def test_another_engines_hbm_and_another_nodes_host_are_not_reused() -> None:
    held = {
        Holder(NODE, TierName.HBM, b"b"): present("111"),
        Holder(NodeId("other"), TierName.HOST): present("111"),
    }
    assert reused(engine("a"), held, 3) == Reuse()


def test_an_engine_without_a_node_reuses_nothing_that_is_known() -> None:
    held = {Holder(NODE, TierName.HOST): present("111")}
    assert reused(engine("a", node_id=None), held, 3).tokens == 0


HELD = {
    Holder(NODE, TierName.HOST): present("1000"),
    Holder(NodeId("more"), TierName.HOST): present("1110"),
    Holder(NodeId("most"), TierName.HOST): present("1111"),
    Holder(NodeId("third"), TierName.HOST): present("1100"),
    Holder(NodeId("gap"), TierName.HOST): present("0111"),
    Holder(NodeId("hbm"), TierName.HBM, b"s"): present("1111"),
}
TOKEN_BYTES = (1 << 20) / 16


def links(**bytes_per_ms: float) -> dict[NodeId, PeerLink]:
    return {NodeId(name): PeerLink("zone", rate) for name, rate in bytes_per_ms.items()}


def peers_of(view: EngineView, to: dict[NodeId, PeerLink], own: Reuse | None = None) -> Reuse:
    """Of a prompt of 5 blocks of 16 tokens."""
    candidate = Candidate(view, 80, own or Reuse(host_tokens=16))
    return with_peers(candidate, HELD, to, block_tokens=16)


def test_what_a_peer_holds_counts_as_the_links_rate_says() -> None:
    slow = engine("a", block_bytes=1 << 20, rates=Rates(token_ms=1.0, host_ms=0.01))
    every = dict.fromkeys(("more", "most", "third", "gap", "hbm"), 1e6)
    found = peers_of(slow, links(**every))
    assert (found.peer, found.peer_tokens, found.tokens) == ("most", 48, 64)
    terms = cost(Candidate(slow, 80, found))
    assert terms.prefill == pytest.approx(16.0)
    assert terms.fetch == pytest.approx(0.01 * 64 + 48 * TOKEN_BYTES / 1e6)
    # A slow way to the one with the most: the other saves more.
    found = peers_of(slow, links(more=1e6, most=TOKEN_BYTES / 0.9))
    assert (found.peer, found.peer_tokens) == ("more", 32)


def test_nothing_is_fetched_that_is_computed_faster() -> None:
    fast = engine("a", block_bytes=1 << 20, rates=Rates(token_ms=0.05, host_ms=0.01))
    own = Reuse(host_tokens=16)
    assert peers_of(fast, links(most=1e6)) == own  # 66 us a token over the link, 50 to compute
    assert peers_of(fast, links(most=2e6)).peer_tokens == 48
    assert sources_of(HELD, links(most=1e6), own, block_tokens=16) == ()
    # The guard removed: taken for as good as one's own, such a peer makes the prompt dearer.
    fetched = replace(own, peer_tokens=48, peer_ms=TOKEN_BYTES / 1e6)
    assert cost(Candidate(fast, 80, fetched)).total > cost(Candidate(fast, 80, own)).total


def test_who_cannot_fetch_has_no_peers() -> None:
    slow = engine("a", block_bytes=1 << 20, rates=Rates(token_ms=1.0))
    own = Reuse(host_tokens=16)
    assert peers_of(slow, {}) == own
    assert peers_of(replace(slow, session=b""), links(most=1e6)) == own
    assert peers_of(replace(slow, block_bytes=0), links(most=1e6)) == own
    assert peers_of(slow, links(most=1e6), Reuse(hbm_tokens=64)) == Reuse(hbm_tokens=64)


def test_the_engine_whose_node_has_a_good_link_is_chosen() -> None:
    """Neither has the prompt, both are idle."""
    near = engine("near", block_bytes=1 << 20, rates=Rates(token_ms=1.0, host_ms=0.01))
    far = replace(near, endpoint="far")
    candidates = [
        Candidate(one, 80, peers_of(one, links(most=rate), Reuse()))
        for one, rate in ((near, 1e6), (far, 1e5))
    ]
    assert first(*candidates) == "near"
    assert candidates[1].reuse.peer_tokens == 64  # slower, and still better than computing


def test_the_chosen_peer_is_named_first_and_one_more() -> None:
    to = links(more=1e6, most=1e6, third=1e6)
    reuse = Reuse(host_tokens=16, peer_tokens=32, peer="more")
    assert sources_of(HELD, to, reuse, block_tokens=16) == ("more", "most")
    assert sources_of(HELD, links(most=1e6), replace(reuse, peer="most"), block_tokens=16) == (
        "most",
    )
    assert sources_of(HELD, to, Reuse(host_tokens=16), block_tokens=16) == ()
