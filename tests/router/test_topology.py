"""Links between nodes: what kind each is, and how fast by what was measured where."""

from __future__ import annotations

from statistics import median

import pytest
from kvfabric_router.fleet import Fleet, ProbeReport, SessionReport
from kvfabric_router.identity import ModelIdentity
from kvfabric_router.policy import PeerLink
from kvfabric_router.rates import UNMEASURED, NodeRates, RateLearner, Rates, Work
from kvfabric_router.topology import DEFAULTS, LinkClass, Place, Topology, class_of

from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.types import NodeId

A, B, C, D = (NodeId(name) for name in "abcd")


def told(*rates: tuple[str, str, float], num: int = 5) -> list[pb.Rate]:
    return [
        pb.Rate(tier=tier, peer=peer, bytes_per_s=rate, num_sights=num)
        for tier, peer, rate in rates
    ]


@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [
        (Place(b"m", "r", "z"), Place(b"m", "x", "y"), LinkClass.HOST),
        (Place(b"m", "r", "z"), Place(b"n", "r", "z"), LinkClass.RACK),
        (Place(b"m", "r", "z"), Place(b"n", "s", "z"), LinkClass.ZONE),
        (Place(b"m", "r", "z"), Place(b"n", "r", "y"), LinkClass.FAR),
        (Place(), Place(), LinkClass.ZONE),  # nobody says anything: not near, and not far
        (Place(b"", "", "z"), Place(b"", "", ""), LinkClass.FAR),
    ],
)
def test_what_two_places_share_is_the_kind_of_their_link(
    one: Place, other: Place, kind: LinkClass
) -> None:
    assert class_of(one, other) == class_of(other, one) == kind


def fleet_of_four() -> Topology:
    topology = Topology()
    for node, rack in ((A, "1"), (B, "1"), (C, "2"), (D, "2")):
        topology.placed(node, Place(node.encode(), rack, "z", exchanges=True))
    return topology


def test_a_link_is_as_measured_else_as_its_kind_else_as_a_slow_one() -> None:
    topology = fleet_of_four()
    assert topology.links_of(A)[B] == PeerLink("rack", DEFAULTS[LinkClass.RACK], "default")
    topology.measured(A, told(("peer", "b", 4e9), ("peer", "c", 1e9)))
    topology.measured(B, told(("peer", "d", 3e9)))
    assert topology.links_of(A) == {
        B: PeerLink("rack", 4e6, "link"),
        C: PeerLink("zone", 1e6, "link"),
        D: PeerLink("zone", median([1e6, 3e6]), "class"),
    }
    assert topology.links_of(C)[D] == PeerLink("rack", 4e6, "class")


def test_one_sight_is_no_measurement() -> None:
    topology = fleet_of_four()
    topology.measured(A, told(("peer", "b", 1e3), num=1))
    assert topology.links_of(A)[B].basis == "default"


def test_only_nodes_that_exchange_blocks_have_links() -> None:
    topology = fleet_of_four()
    topology.placed(B, Place(b"b", "1", "z", exchanges=False))
    assert set(topology.links_of(A)) == {C, D}
    assert topology.links_of(B) == {}
    assert topology.links_of(None) == topology.links_of(NodeId("unknown")) == {}


def test_a_lost_node_is_nobodys_peer_and_what_it_measured_is_forgotten() -> None:
    topology = fleet_of_four()
    topology.measured(A, told(("peer", "b", 4e9), ("host", "", 5e9)))
    topology.lost(A)
    assert A not in topology.links_of(B)
    assert topology.links_of(C)[D].basis == "default"
    assert topology.rates_of(A) is UNMEASURED


def test_no_news_is_no_change() -> None:
    topology = fleet_of_four()
    topology.measured(A, told(("host", "", 5e9), ("ssd", "", 1e9)))
    topology.measured(A, [])
    assert topology.rates_of(A) == NodeRates(5e6, 1e6)


# ---------------------------------------------------------------------- what they do to the cost

TOKEN_BYTES = 4096


def seen_by_fleet(*rates: tuple[str, str, float]) -> Rates:
    now = 0.0
    fleet = Fleet(clock=lambda: now)
    model = ModelIdentity("m", bytes(32), 16)
    report = SessionReport("http://e", "e", b"s" * 16, "m", model, TOKEN_BYTES * 16)
    fleet.announce(A, [report])
    fleet.probe_answered("http://e", ProbeReport("m", session=b"s" * 16))
    fleet.topology.placed(A, Place())
    fleet.topology.measured(A, told(*rates))
    now = 1.0
    (view,) = fleet.view().engines
    return view.rates


def test_rates_that_a_node_measured_reach_its_engines() -> None:
    found = seen_by_fleet(("host", "", 8e9), ("ssd", "", 2e9))
    assert found.host_ms == pytest.approx(TOKEN_BYTES / 8e6)
    assert found.ssd_ms == pytest.approx(TOKEN_BYTES / 2e6 + found.host_ms)
    unmeasured = seen_by_fleet()
    assert unmeasured.host_ms != found.host_ms


def test_an_engines_own_timings_correct_what_its_node_measured() -> None:
    """The node sees no scatter into HBM; an engine that is slower at that teaches so."""
    learner = RateLearner()
    learner.node_measured(TOKEN_BYTES, NodeRates(host=8e6, ssd=2e6))
    for number in range(200):
        host = 512 * (1 + number % 7)
        computed = 64 + 32 * (number % 5)
        took = 0.5 * computed + 0.002 * host
        learner.saw_prefill(Work(computed, host=host), 0, took)
    assert learner.rates.host_ms == pytest.approx(0.002, rel=0.1)
    assert learner.rates.ssd_ms == pytest.approx(TOKEN_BYTES / 2e6 + TOKEN_BYTES / 8e6, rel=0.1)


def test_time_on_a_link_is_no_work_of_the_engine() -> None:
    def learned(peer_ms: float) -> Rates:
        learner = RateLearner()
        for number in range(200):
            peer, computed = 256 * (number % 4), 128 + 64 * (number % 3)
            took = 0.5 * computed + 0.001 * peer + 0.05 * peer
            learner.saw_prefill(Work(computed, peer=peer, peer_ms=peer_ms), 0, took)
        return learner.rates

    assert learned(0.05).token_ms == pytest.approx(0.5, rel=0.1)
    assert learned(0.05).host_ms == pytest.approx(0.001, abs=0.002)
    # The twin: without the link's rate its time is taken for the host tier's.
    assert learned(0.0).host_ms > 0.03
