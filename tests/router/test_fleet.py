"""What the router believes of its engines, and what it counts as theirs to do."""

from __future__ import annotations

import asyncio

import pytest
from kvfabric_router.desk import unless
from kvfabric_router.fleet import (
    FORGET_S,
    MAX_BACKOFF_S,
    PROBE_EVERY_S,
    Fleet,
    ProbeReport,
    SessionReport,
    base_url,
)
from kvfabric_router.flight import Sent
from kvfabric_router.identity import ModelIdentity
from kvfabric_router.policy import EngineView
from kvfabric_router.predicted import TOLD_S
from kvfabric_router.rates import Work

from kvfabric.hashing import block_keys
from kvfabric.types import NodeId

MODEL = ModelIdentity("revision-1", bytes(32), 16)
NODE = NodeId("n")
URL = "http://127.0.0.1:8100"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fleet(clock: Clock) -> Fleet:
    return Fleet(clock=clock)


def report(session: bytes = b"s", url: str = URL) -> SessionReport:
    return SessionReport(url, "engine-1", session, "m", MODEL, 1024)


def probed(fleet: Fleet, url: str = URL) -> None:
    fleet.probe_answered(url, ProbeReport("m", b"own", MODEL, "byte", 4096))


def only(fleet: Fleet) -> EngineView:
    (engine,) = fleet.view().engines
    return engine


def test_an_engine_takes_requests_once_it_answered(fleet: Fleet) -> None:
    fleet.configure([URL])
    assert fleet.view().engines == ()
    assert fleet.due() == (URL,)
    probed(fleet)
    assert only(fleet).session == b"own"


def test_a_node_and_the_configuration_may_name_the_same_engine(fleet: Fleet) -> None:
    fleet.configure(["127.0.0.1:8100/"])
    fleet.announce(NODE, [report()])
    probed(fleet)
    assert only(fleet).session == b"s"
    assert only(fleet).node_id == NODE
    assert base_url("127.0.0.1:8100/") == URL


def test_a_request_that_fails_excludes_until_a_probe_is_answered(
    fleet: Fleet, clock: Clock
) -> None:
    fleet.configure([URL])
    probed(fleet)
    fleet.due()
    fleet.failed(URL)
    assert fleet.view().engines == ()
    assert fleet.due() == ()
    clock.now += 0.5
    assert fleet.due() == (URL,)
    probed(fleet)
    assert len(fleet.view().engines) == 1


def test_probes_of_a_dead_engine_get_rarer(fleet: Fleet, clock: Clock) -> None:
    fleet.configure([URL])
    probed(fleet)
    fleet.failed(URL)
    waits = []
    for _ in range(8):
        waits.append(fleet.next_probe_in())
        clock.now += fleet.next_probe_in()
        assert fleet.due() == (URL,)
        fleet.probe_failed(URL)
    assert waits == sorted(waits)
    assert waits[-1] == MAX_BACKOFF_S


def test_one_late_probe_excludes_nobody_and_two_do(fleet: Fleet) -> None:
    fleet.configure([URL])
    probed(fleet)
    fleet.probe_failed(URL)
    assert len(fleet.view().engines) == 1
    fleet.probe_failed(URL)
    assert fleet.view().engines == ()


def test_healthy_engines_are_probed_now_and_then(fleet: Fleet, clock: Clock) -> None:
    fleet.configure([URL])
    fleet.due()
    probed(fleet)
    assert fleet.next_probe_in() == PROBE_EVERY_S
    clock.now += PROBE_EVERY_S
    assert fleet.due() == (URL,)


def test_a_session_that_ends_stops_requests_until_the_engine_answers(fleet: Fleet) -> None:
    fleet.announce(NODE, [report()])
    fleet.due()
    probed(fleet)
    fleet.announce(NODE, [])
    assert fleet.view().engines == ()
    assert fleet.due() == (URL,)
    probed(fleet)
    assert only(fleet).node_id is None


def test_of_two_sessions_at_one_endpoint_the_engine_says_which_is_its_own(fleet: Fleet) -> None:
    """A node may see an engine start anew before it saw the earlier one end."""
    fleet.configure([URL])
    for order in ((b"own", b"old"), (b"old", b"own")):
        fleet.announce(NODE, [])
        probed(fleet)
        fleet.announce(NODE, [report(session) for session in order])
        assert only(fleet).session == b"own"


def test_an_engine_knows_its_session_better_than_its_node(fleet: Fleet) -> None:
    """Until the node tells of the new session, the engine's word counts; then the node's."""
    fleet.announce(NODE, [report(b"old")])
    probed(fleet)
    assert only(fleet).session == b"old"
    fleet.session_moved(URL, ProbeReport("m", b"new", MODEL, "byte", 4096))
    assert only(fleet).session == b"new"
    fleet.announce(NODE, [report(b"new")])
    assert (only(fleet).session, only(fleet).node_id) == (b"new", NODE)


def test_an_engine_that_comes_back_has_its_new_session(fleet: Fleet) -> None:
    fleet.announce(NODE, [report(b"s1")])
    probed(fleet)
    fleet.announce(NODE, [report(b"s2")])
    assert only(fleet).session == b"s2"


def test_a_lost_node_leaves_its_engines_serving(fleet: Fleet) -> None:
    fleet.announce(NODE, [report()])
    probed(fleet)
    fleet.node_lost(NODE)
    assert only(fleet).node_id is None
    fleet.announce(NODE, [])  # the node is back before the engine's session is
    assert only(fleet).node_id is None
    fleet.announce(NODE, [report(b"s2")])
    assert only(fleet).node_id == NODE


def test_what_nobody_names_and_does_not_answer_is_forgotten(fleet: Fleet, clock: Clock) -> None:
    fleet.announce(NODE, [report()])
    fleet.configure(["http://127.0.0.1:8200"])
    fleet.announce(NODE, [])
    fleet.probe_failed(URL)
    clock.now += FORGET_S + 1
    assert fleet.due() == ("http://127.0.0.1:8200",)
    assert fleet.counts() == {"taking": 0, "excluded": 1}


def sent(computed: int, work_ms: float = 1.0) -> Sent:
    return Sent(Work(computed), work_ms)


def test_flights_are_counted_while_their_block_runs(fleet: Fleet, clock: Clock) -> None:
    fleet.configure([URL])
    probed(fleet)
    with (
        fleet.flight(URL, sent(0, 100.0)),
        fleet.flight(URL, sent(0, 50.0)) as second,
    ):
        assert only(fleet).num_waiting == 2
        assert only(fleet).waiting_ms == 150.0
        clock.now += 0.04  # the engine is at the first one
        assert only(fleet).waiting_ms == pytest.approx(110.0)
        clock.now += 1.0  # it takes longer than predicted: what waits behind it still does
        assert only(fleet).waiting_ms == 50.0
        second.stream_event()
        assert (only(fleet).num_waiting, only(fleet).num_decoding) == (1, 1)
    assert fleet.num_flights == 0
    assert only(fleet).waiting_ms == 0.0


def test_a_flight_that_raises_is_counted_no_more(fleet: Fleet) -> None:
    fleet.configure([URL])
    probed(fleet)
    with pytest.raises(ZeroDivisionError), fleet.flight(URL, sent(1, 1)):
        raise ZeroDivisionError
    assert fleet.num_flights == 0


def test_the_prefill_rate_is_learned_from_first_bytes(fleet: Fleet, clock: Clock) -> None:
    fleet.configure([URL])
    probed(fleet)
    with fleet.flight(URL, sent(1000, 1)) as flight:
        clock.now += 0.2
        flight.stream_event()
    assert only(fleet).rates.token_ms == pytest.approx(0.2, rel=0.1)


def test_time_in_the_queue_is_not_taken_for_slowness(fleet: Fleet, clock: Clock) -> None:
    fleet.configure([URL])
    probed(fleet)
    with (
        fleet.flight(URL, sent(1000, 1)) as first,
        fleet.flight(URL, sent(1000, 1)) as second,
    ):
        clock.now += 0.2
        first.stream_event()
        clock.now += 0.2
        second.stream_event()
    assert only(fleet).rates.token_ms == pytest.approx(0.2, rel=0.1)


def test_a_new_engine_counts_as_slow_as_the_others(fleet: Fleet, clock: Clock) -> None:
    """Otherwise it would get everything until it was measured."""
    other = "http://127.0.0.1:8200"
    fleet.configure([URL, other])
    probed(fleet)
    probed(fleet, other)
    for _ in range(4):
        with fleet.flight(URL, sent(1000, 1)) as flight:
            clock.now += 1.0
            flight.stream_event()
    assert [e.rates.token_ms for e in fleet.view().engines] == [pytest.approx(1.0, rel=0.2)] * 2


def test_an_engine_that_said_nothing_yet_may_serve_any_model(fleet: Fleet) -> None:
    """Until it did, an unknown model is no reason for a 404."""
    fleet.configure([URL])
    assert fleet.knows_model("anything")
    probed(fleet)
    assert fleet.knows_model("m")
    assert not fleet.knows_model("anything")


def test_the_decode_rate_is_learned_from_tokens_not_from_events(fleet: Fleet, clock: Clock) -> None:
    """An engine may send many tokens in one event."""
    fleet.configure([URL])
    probed(fleet)
    for _ in range(50):
        with fleet.flight(URL, sent(16)) as flight:
            flight.stream_event()
            clock.now += 0.5
            flight.stream_event()
            flight.answered(None, completion_tokens=101)
    assert only(fleet).rates.step_ms == pytest.approx(5.0, rel=0.01)


def test_what_the_engine_computed_teaches_not_what_was_predicted(
    fleet: Fleet, clock: Clock
) -> None:
    fleet.configure([URL])
    probed(fleet)
    for _ in range(20):
        with fleet.flight(URL, sent(1000)) as flight:
            clock.now += 0.4
            flight.stream_event()
            flight.answered(Work(computed=2000, hbm=0), completion_tokens=1)
    assert only(fleet).rates.token_ms == pytest.approx(0.2, rel=0.05)


def test_blocks_on_their_way_count_until_the_node_told(fleet: Fleet, clock: Clock) -> None:
    fleet.announce(NODE, [report()])
    probed(fleet)
    keys = block_keys(list(range(64)), 16, bytes(32))
    with fleet.flight(URL, Sent(Work(64), 1.0, keys)) as flight:
        clock.now += 60.0
        assert fleet.predicted.of(keys)[URL].all()
        flight.stream_event()
    clock.now += TOLD_S - 0.1
    assert fleet.predicted.of(keys)[URL].all()
    clock.now += 0.2
    assert fleet.predicted.of(keys) == {}
    assert len(fleet.predicted) == 0


def test_blocks_of_a_failed_request_are_not_there(fleet: Fleet) -> None:
    fleet.configure([URL])
    probed(fleet)
    keys = block_keys(list(range(64)), 16, bytes(32))
    with (
        pytest.raises(ZeroDivisionError),
        fleet.flight(URL, Sent(Work(64), 1.0, keys)),
    ):
        raise ZeroDivisionError
    assert fleet.predicted.of(keys) == {}


@pytest.mark.parametrize("actual", [800, 0])
def test_an_engine_that_keeps_falling_short_is_learned_anew(fleet: Fleet, actual: int) -> None:
    fleet.announce(NODE, [report()])
    probed(fleet)
    for _ in range(16):
        with fleet.flight(URL, Sent(Work(200, hbm=800), 1.0)) as flight:
            flight.stream_event()
            flight.answered(Work(1000 - actual, hbm=actual), completion_tokens=1)
    assert (NODE in fleet.distrusted and fleet.distrusted[NODE].is_set()) == (actual == 0)


async def test_who_waits_for_a_dead_engine_is_released(fleet: Fleet) -> None:
    fleet.configure([URL])
    probed(fleet)
    with fleet.flight(URL, sent(1, 1)) as flight:

        async def wait() -> None:
            async with unless(flight.when_lost):
                await asyncio.Event().wait()

        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(asyncio.wait_for(_raises_timeout(wait), 5))
            await asyncio.sleep(0)
            fleet.failed(URL)
            await asyncio.sleep(0)
            assert not waiting.done()  # one broken request is no proof
            fleet.probe_failed(URL)
        assert await waiting
        assert await _raises_timeout(wait)


async def _raises_timeout(wait) -> bool:  # type: ignore[no-untyped-def]
    with pytest.raises(TimeoutError):
        await wait()
    return True


def test_a_model_has_the_name_under_which_it_is_served(fleet: Fleet) -> None:
    """vLLM tells its node the path of the weights, and clients another name."""
    fleet.announce(NODE, [SessionReport(URL, "engine-1", b"s", "/weights/m", MODEL, 1024)])
    probed(fleet)
    assert only(fleet).model_name == "m"
    assert fleet.knows_model("m")
    assert not fleet.knows_model("/weights/m")
