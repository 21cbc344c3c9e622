"""Replicas of the router tell each other their load: what counts of it, how long, and no herd of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from kvfabric_router import shared_load
from kvfabric_router.app import Router, running
from kvfabric_router.fleet import Fleet, ProbeReport
from kvfabric_router.flight import Sent
from kvfabric_router.hold import has_room
from kvfabric_router.policy import Candidate, EngineView, by_cost
from kvfabric_router.rates import Rates, Work
from kvfabric_router.shared_load import FORGET_S, EngineLoad, LoadReport, SharedLoad

from kvfabric.config import RouterConfig
from kvfabric.errors import CapacityError, ConfigError
from kvfabric.registry.router_load import KEPT_S, MAX_ROUTERS, MAX_ROW_BYTES, RouterLoads
from kvfabric.testing.processes import NodeProcess
from kvfabric.testing.redis import RedisServer
from tests.router.standin import StandInEngine, engines, until

NUM_REPLICAS, NUM_ENGINES = 4, 8
PROMPT = 1000


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def told(replica: str, number: int, *loads: EngineLoad) -> LoadReport:
    return LoadReport(replica, number, loads)


def view(name: str = "http://e0") -> EngineView:
    return EngineView(name, name, "m", rates=Rates(token_ms=1.0))


def shared(clock: Clock) -> SharedLoad:
    return SharedLoad(clock)


# ---------------------------------------------------------------------- what counts, and how long


def test_what_others_have_at_an_engine_counts_as_ahead_of_us() -> None:
    clock = Clock()
    load = shared(clock)
    busy = EngineLoad("http://e0", 800.0, 2, 3, 400.0, 1)
    load.hear([told("a", 1, busy), told("b", 1, busy)])
    seen = load.seen(view())
    assert (seen.waiting_ms, seen.num_waiting, seen.num_decoding) == (1600.0, 4, 6)
    assert (seen.held_ms, seen.num_held, seen.background_ms) == (800.0, 2, 1600.0)
    assert not has_room(seen)


def test_what_was_told_fades_with_its_age() -> None:
    clock = Clock()
    load = shared(clock)
    load.hear([told("a", 1, EngineLoad("http://e0", 1000.0, 2))])
    seen = []
    for _ in range(3):
        seen.append(load.seen(view()).waiting_ms)
        clock.now += 1.0
    assert seen[0] == 1000.0
    assert 50.0 < seen[1] < 200.0
    assert seen[2] < 30.0


def test_who_falls_silent_and_who_ended_are_forgotten() -> None:
    clock = Clock()
    load = shared(clock)
    load.hear([told("a", 1, EngineLoad("http://e0", 1000.0, 2))])
    clock.now += FORGET_S - 0.5
    load.hear([told("a", 1, EngineLoad("http://e0", 1000.0, 2))])  # the same again: no news
    assert load.num_others == 1
    clock.now += 1.0
    assert load.num_others == 0
    assert load.seen(view()) == view()


def test_our_own_words_are_not_heard() -> None:
    load = shared(Clock())
    report = load.report([EngineLoad("http://e0", 1000.0, 2), EngineLoad("http://e1")])
    assert [one.endpoint for one in report.engines] == ["http://e0"]
    load.hear([report])
    assert load.num_others == 0


# ---------------------------------------------------------------------- no herd


def fleets(clock: Clock) -> list[Fleet]:
    found = []
    for _ in range(NUM_REPLICAS):
        fleet = Fleet(clock=clock)
        for number in range(NUM_ENGINES):
            fleet.configure([f"http://e{number}"])
            fleet.probe_answered(f"http://e{number}", ProbeReport("m"))
        found.append(fleet)
    return found


def choose(fleet: Fleet, draw: int) -> str:
    """As the router does; and the request is there from then on."""
    candidates = [Candidate(engine, PROMPT) for engine in fleet.view().engines]
    best = by_cost(candidates, draw)[0]
    endpoint = best.candidate.engine.endpoint
    fleet.flight(endpoint, Sent(Work(PROMPT), best.terms.own_work)).__enter__()
    return endpoint


def chosen_by_stale_data(age_s: float, each: int) -> Counter[str]:
    """Every replica heard, `age_s` ago, that all engines but the first are busy."""
    clock = Clock()
    replicas = fleets(clock)
    busy = [EngineLoad(f"http://e{number}", 2000.0, 3) for number in range(1, NUM_ENGINES)]
    for fleet in replicas:
        fleet.shared.hear([told(f"r{number}", 1, *busy) for number in range(NUM_REPLICAS - 1)])
    clock.now += age_s
    found: Counter[str] = Counter()
    for turn in range(each):
        for number, fleet in enumerate(replicas):
            found[choose(fleet, 7919 * turn + 31 * number)] += 1
    return found


def test_replicas_with_stale_data_do_not_all_go_to_the_same_engine() -> None:
    found = chosen_by_stale_data(2.0, each=4)
    assert len(found) == NUM_ENGINES
    assert max(found.values()) <= 2 * sum(found.values()) / NUM_ENGINES
    # What is told just now is believed: that engine is really the one with room.
    assert chosen_by_stale_data(0.0, each=1) == {"http://e0": NUM_REPLICAS}


def test_believing_stale_data_makes_a_herd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: nothing fades."""
    monkeypatch.setattr(shared_load, "FADE_S", 1e9)
    found = chosen_by_stale_data(2.0, each=4)
    assert found["http://e0"] > 0.5 * sum(found.values())


# ---------------------------------------------------------------------- over the registry


def test_rows_are_kept_for_a_moment_and_bounded() -> None:
    clock = Clock()
    loads = RouterLoads(clock)
    assert loads.exchange("a", b"1") == []
    assert loads.exchange("b", b"2") == [b"1"]
    assert loads.exchange("a", b"3") == [b"2"]
    clock.now += KEPT_S
    assert loads.exchange("c", b"4") == []
    for number in range(MAX_ROUTERS - 1):
        loads.exchange(f"r{number}", b"")
    with pytest.raises(CapacityError):
        loads.exchange("one more", b"")
    for name, row in (("", b""), ("x" * 100, b""), ("x", bytes(MAX_ROW_BYTES + 1))):
        with pytest.raises(ConfigError):
            loads.exchange(name, row)


async def _each_sees_what_the_other_has(one: Router, other: Router, engine: StandInEngine) -> None:
    await until(lambda: len(one.fleet.view().engines) == len(other.fleet.view().engines) == 1)
    endpoint = engine.url
    flight = one.fleet.flight(endpoint, Sent(Work(4000), 2000.0))
    with flight:
        await until(lambda: other.fleet.view().engines[0].background_ms > 100.0)
        assert other.fleet.shared.num_others == 1
        assert one.fleet.view().engines[0].background_ms == 0.0
    await until(lambda: other.fleet.view().engines[0].background_ms == 0.0)


@pytest.mark.slow
@pytest.mark.fleet
async def test_routers_of_one_node_share_their_load(tmp_path: Path) -> None:
    with NodeProcess(tmp_path):
        async with engines() as (engine,):
            config = RouterConfig(
                listen="127.0.0.1:0",
                state_dir=tmp_path,
                engines=(engine.url,),
                log_level="warning",
            )
            async with running(config) as one, running(config) as other:
                await _each_sees_what_the_other_has(one, other, engine)


@pytest.mark.slow
@pytest.mark.fleet
async def test_routers_of_a_directory_share_their_load_and_outlive_it(tmp_path: Path) -> None:
    with (
        RedisServer(tmp_path / "redis") as redis,
        NodeProcess(tmp_path / "node", directory=redis.url),
    ):
        async with engines() as (engine,):
            configs = [
                RouterConfig(
                    listen="127.0.0.1:0",
                    state_dir=tmp_path / name,
                    directory=redis.url,
                    engines=(engine.url,),
                    log_level="error",
                )
                for name in ("r1", "r2")
            ]
            async with running(configs[0]) as one, running(configs[1]) as other:
                await _each_sees_what_the_other_has(one, other, engine)
                await asyncio.to_thread(redis.kill)
                await until(lambda: other.fleet.shared.num_others == 0, within_s=FORGET_S + 2)
                assert len(other.fleet.view().engines) == 1
