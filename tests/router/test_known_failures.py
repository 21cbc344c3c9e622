"""What routers in front of prefix caches are known to get wrong: a test for each, and beside it the same
test with the guard taken out.

A real router over real sockets. What depends on a node's word or on an engine's death has a real node daemon
and simulated engines as processes; the rest has stand-ins that do exactly as told.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest
from kvfabric_router import app, fleet, policy
from kvfabric_router.app import Router, running
from kvfabric_router.dispatch import Planner
from kvfabric_router.flight import Flight
from kvfabric_router.links import Links
from kvfabric_router.nodes import NodeLink
from kvfabric_router.policy import Candidate, Ranked
from kvfabric_router.predicted import Predicted
from kvfabric_router.probes import Prober
from simulated import MODEL, EngineModel

from kvfabric.config import RouterConfig
from kvfabric.events.index import Holder, NodeFeed
from kvfabric.events.stream import EventStream
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol.messages import BlockRun, EngineEvents
from kvfabric.testing.processes import NodeProcess
from kvfabric.types import BlockKey, NodeId, TierName
from tests.router.simulation import SimulatedEngines, many_descriptors
from tests.router.standin import (
    Client,
    StandInEngine,
    client_of,
    config_for,
    engines,
    events,
    give_lease,
    keyring_with,
    registry_state,
    until,
)
from tests.router.test_nodes import node_part

pytestmark = pytest.mark.slow

BLOCK = EngineModel().block_tokens
ASK: dict[str, Any] = {"model": "reference", "prompt": "hello"}
STREAM: dict[str, Any] = {**ASK, "stream": True}


# ---------------------------------------------------------------------- a node, engines and a router


@dataclass(frozen=True, slots=True)
class Answer:
    engine: str
    prompt_tokens: int
    cached_tokens: int
    request_id: str


@dataclass(frozen=True, slots=True)
class Simulation:
    """A router in this process, in front of a node daemon and simulated engines."""

    router: Router
    engines: SimulatedEngines
    http: aiohttp.ClientSession

    async def ask(self, prompt: str) -> Answer:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 1}
        async with self.http.post(f"{self.router.url}/v1/completions", json=body) as answer:
            told = await answer.json()
            assert answer.status == 200, told
            usage = told["usage"]
            return Answer(
                answer.headers["x-kvfabric-engine"],
                usage["prompt_tokens"],
                usage["prompt_tokens_details"]["cached_tokens"],
                answer.headers["X-Request-Id"],
            )

    async def promised(self, answer: Answer) -> int:
        """Tokens that the router thought would be reused."""
        url = f"{self.router.url}/v1/explain/{answer.request_id}"
        async with self.http.get(url) as told:
            return int((await told.json())["selected_tokens"])


@contextlib.contextmanager
def node_and_engines(
    directory: Path, number: int, *, compression: float = 8.0
) -> Iterator[SimulatedEngines]:
    with (
        NodeProcess(directory, log_level="warning") as node,
        SimulatedEngines(number, node=node.socket, compression=compression) as found,
    ):
        yield found


@contextlib.asynccontextmanager
async def routed(directory: Path, found: SimulatedEngines) -> AsyncIterator[Simulation]:
    config = RouterConfig(listen="127.0.0.1:0", state_dir=directory, log_level="warning")
    async with running(config) as router, aiohttp.ClientSession() as http:
        await until(lambda: len(router.fleet.view().engines) == len(found.urls))
        await until(lambda: router.registry.usable() is not None)
        yield Simulation(router, found, http)


def text(seed: object, num_blocks: int) -> str:
    return Random(str(seed)).randbytes(BLOCK * num_blocks // 2).hex()


# ---------------------------------------------------------------------- everyone shares block 0


def longest_first(candidates: Sequence[Candidate], draw: int) -> tuple[Ranked, ...]:
    """Longest prefix, and the first of equals: what sends a whole trace to one worker."""
    ranked = sorted(policy.costs(candidates), key=lambda r: r.terms.prefill)
    return tuple(ranked)


async def imbalance(directory: Path, *, num_requests: int) -> float:
    """Work of the busiest of 8 engines over the mean, for prompts that all begin with the same block and
    come a little faster than they are answered.
    """
    work: dict[str, int] = defaultdict(int)
    with node_and_engines(directory, 8, compression=2.0) as found:
        async with routed(directory, found) as simulation, asyncio.TaskGroup() as group:

            async def one(number: int) -> None:
                prompt = text("all", 1) + text(number // 2, 2) + text(("own", number), 1) + "?"
                answer = await simulation.ask(prompt)
                work[answer.engine] += answer.prompt_tokens - answer.cached_tokens

            for number in range(num_requests):
                group.create_task(one(number))
                await asyncio.sleep(0.006)
    return max(work.values()) * 8 / sum(work.values())


async def test_a_block_that_everybody_shares_overloads_nobody(tmp_path: Path) -> None:
    assert await imbalance(tmp_path, num_requests=300) < 1.3


async def test_by_the_longest_prefix_alone_it_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "by_cost", longest_first)
    assert await imbalance(tmp_path, num_requests=60) > 2.0


# ---------------------------------------------------------------------- equal costs


async def shares(directory: Path) -> list[int]:
    """Requests of each of 4 equal and idle engines, from several routers that all have just started."""
    keyring_with(directory)
    asked: Counter[str] = Counter()
    async with engines(4) as found:
        for _ in range(8):
            config = config_for(directory, [one.url for one in found])
            async with client_of(config, registry_state()) as client:
                for number in range(20):
                    _, _, headers = await client.post({**ASK, "prompt": f"question {number}"})
                    asked[headers["x-kvfabric-engine"]] += 1
        return sorted(asked[one.url] for one in found)


async def test_equals_are_chosen_at_random(tmp_path: Path) -> None:
    found = await shares(
        tmp_path
    )  # of 160; fewer than 20 or more than 65 of 40 happen once in 10,000 runs
    assert found[0] >= 20
    assert found[-1] <= 65


async def test_the_first_of_equals_would_get_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Planner, "_draw", lambda self, call: 0)
    assert await shares(tmp_path) == [0, 0, 0, 160]


# ---------------------------------------------------------------------- an engine restarts cold


async def test_an_engine_that_restarts_is_known_to_be_cold(tmp_path: Path) -> None:
    with node_and_engines(tmp_path, 1) as found:
        async with routed(tmp_path, found) as simulation:
            prompt = text("warm", 8) + "?"
            await simulation.ask(prompt)
            await until(lambda: simulation.router.index.statistics().num_blocks >= 8)
            warm = await simulation.ask(prompt)
            assert warm.cached_tokens == await simulation.promised(warm) == 8 * BLOCK
            await asyncio.to_thread(found.restart, 0)
            await until(lambda: simulation.router.fleet.counts()["taking"] == 1)
            cold = await simulation.ask(prompt)
            assert cold.cached_tokens == await simulation.promised(cold) == 0


async def promised_after_restart(directory: Path) -> int:
    """By an engine that no node speaks for: what it was sent is all that is known of it."""
    keyring_with(directory)
    async with (
        engines() as (one,),
        client_of(config_for(directory, [one.url]), registry_state()) as client,
    ):
        body = {**ASK, "prompt": "x" * 100}
        await client.post(body)
        assert await _promised(client, await client.post(body)) == 96
        await one.stop()
        one.session = b"t" * 16
        await one.start()
        await client.post({**ASK, "prompt": "y"})
        await until(lambda: client.router.fleet.counts()["taking"] == 1)
        return await _promised(client, await client.post(body))


async def _promised(client: Client, answered: tuple[int, Any, Any]) -> int:
    _, told, _ = await client.get(f"/v1/explain/{answered[2]['X-Request-Id']}")
    return int(told["selected_tokens"])


async def test_an_engine_without_a_node_that_restarts_is_known_to_be_cold(tmp_path: Path) -> None:
    assert await promised_after_restart(tmp_path) == 0


async def test_what_was_sent_before_would_be_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Predicted, "forget", lambda self, endpoint: None)
    assert await promised_after_restart(tmp_path) == 96


# ---------------------------------------------------------------------- an engine hangs after accepting


async def answered_while_one_hangs(
    directory: Path, monkeypatch: pytest.MonkeyPatch, *, within_s: float
) -> int:
    """Of 20 requests to 2 engines, one of them a stopped process: its kernel takes connections on."""
    monkeypatch.setattr(app, "Prober", lambda *parts: Prober(*parts, timeout_s=0.3))
    monkeypatch.setattr(fleet, "PROBE_EVERY_S", 0.2)
    with node_and_engines(directory, 2) as found:
        async with routed(directory, found) as simulation:

            async def is_answered(number: int) -> bool:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(within_s):
                        await simulation.ask(text(number, 1))
                        return True
                return False

            found.send(0, signal.SIGSTOP)
            try:
                return sum(await asyncio.gather(*map(is_answered, range(20))))
            finally:
                found.send(0, signal.SIGCONT)


async def test_who_waits_for_an_engine_that_hangs_is_answered_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await answered_while_one_hangs(tmp_path, monkeypatch, within_s=15.0) == 20


async def test_if_nobody_gave_it_up_they_would_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flight, "give_up", lambda self: None)
    assert await answered_while_one_hangs(tmp_path, monkeypatch, within_s=3.0) < 20


# ---------------------------------------------------------------------- disconnects mid-stream


async def left_after_disconnects(directory: Path) -> int:
    """Requests that are still accounted for when 400 clients went away in their streams."""
    keyring_with(directory)
    async with engines(2) as found:
        for one in found:
            one.gate.clear()
        config = config_for(directory, [one.url for one in found])
        async with client_of(config, registry_state()) as client:

            async def one_client(number: int) -> None:
                body = {**STREAM, "prompt": f"{number} " + "x" * 40}
                async with client.open(body) as answer:
                    await answer.content.readuntil(b"\n\n")

            async with asyncio.TaskGroup() as group:
                for number in range(400):
                    group.create_task(one_client(number))
            # What the engines did for them has ended too.
            await until(lambda: sum(one.num_running for one in found) == 0)
            assert sum(one.num_cancelled for one in found) == 400
            with contextlib.suppress(TimeoutError):
                await until(lambda: client.router.fleet.num_flights == 0, within_s=1)
            views = client.router.fleet.view().engines
            return round(sum(one.num_waiting + one.num_decoding for one in views))


async def test_four_hundred_disconnects_leave_nothing_in_the_account(tmp_path: Path) -> None:
    assert await left_after_disconnects(tmp_path) == 0


async def test_an_account_kept_by_answers_alone_would_leak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual way: the counter goes down where an answer ends."""
    leave = Flight.__exit__

    def only_answers(self: Flight, kind: Any, exc: Any, tb: Any) -> None:
        if kind is None:
            leave(self, kind, exc, tb)

    monkeypatch.setattr(Flight, "__exit__", only_answers)
    assert await left_after_disconnects(tmp_path) == 400


# ---------------------------------------------------------------------- events lost, duplicated, reordered


class Unreliable(EventStream):
    """Loses, repeats and swaps batches of its subscribers, until `is_reliable`."""

    def __init__(self, *, boot_id: bytes) -> None:
        super().__init__(boot_id=boot_id)
        self.rng = Random(6)
        self.is_reliable = False
        self.faults: Counter[str] = Counter()

    async def subscribe(self, boot_id: bytes, from_sequence: int) -> AsyncIterator[pb.EventBatch]:
        held: pb.EventBatch | None = None
        async for batch in super().subscribe(boot_id, from_sequence):
            fault = (
                "" if self.is_reliable else self.rng.choice(["lost", "twice", "swapped", "", ""])
            )
            self.faults[fault] += 1
            if fault == "swapped" and held is None:
                held = batch
                continue
            if fault != "lost":
                yield batch
            if fault == "twice":
                yield batch
            if held is not None:
                yield held
                held = None


TAG = b"tag-0001"
KEYS = [BlockKey(bytes([number]) * 32) for number in range(1, 65)]


async def wrong_blocks(directory: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of an engine about which the router is wrong when the storm is over and it had time."""
    monkeypatch.setattr("tests.router.test_nodes.EventStream", Unreliable)
    async with engines() as (engine,), node_part(directory) as node:
        stream = node.events
        assert isinstance(stream, Unreliable)
        node.join(engine)
        config = RouterConfig(listen="127.0.0.1:0", state_dir=directory, log_level="error")
        async with running(config) as router:
            await until(lambda: len(router.fleet.view().engines) == 1)
            held: set[BlockKey] = set()
            for _ in range(300):
                stored = set(stream.rng.sample(KEYS, 8)) - held
                removed = set(stream.rng.sample(KEYS, 8)) & held
                held = (held | stored) - removed
                _publish(stream, engine, stored, removed)
                await asyncio.sleep(0.001)
            assert min(stream.faults[fault] for fault in ("lost", "twice", "swapped")) > 20
            stream.is_reliable = True
            _publish(stream, engine, {KEYS[0]} - held, set())
            held.add(KEYS[0])
            holder = Holder(NodeId("n1"), TierName.HBM, engine.session)

            def wrong() -> int:
                found = router.index.match(TAG, KEYS).get(holder, [False] * len(KEYS))
                told = {key for key, is_there in zip(KEYS, found, strict=True) if is_there}
                return len(told ^ held)

            with contextlib.suppress(TimeoutError):
                await until(lambda: not wrong(), within_s=2)
            return wrong()


def _publish(
    stream: EventStream, engine: StandInEngine, stored: set[BlockKey], removed: set[BlockKey]
) -> None:
    def runs(keys: set[BlockKey]) -> tuple[BlockRun, ...]:
        return (BlockRun(TAG, bytes(8), b"".join(key[:8] for key in keys)),) if keys else ()

    stream.engine_events(engine.session, EngineEvents(runs(stored), runs(removed), cleared=False))
    stream.flush()


async def test_lost_repeated_and_swapped_events_leave_the_index_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await wrong_blocks(tmp_path, monkeypatch) == 0


async def test_without_numbers_on_the_batches_it_would_be_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = NodeFeed.watch

    def any_order(self: NodeFeed, batch: pb.EventBatch) -> bool:
        if self.needs_snapshot:
            return counted(self, batch)
        self._boot_id, self._next = batch.boot_id, batch.sequence + 1
        self._take(batch)
        return True

    monkeypatch.setattr(NodeFeed, "watch", any_order)
    assert await wrong_blocks(tmp_path, monkeypatch) > 0


# ---------------------------------------------------------------------- a router restarts


async def reused_first(directory: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens that the first request reuses at a router that started anew and says that it is ready."""
    serve = NodeLink._take_snapshots

    async def slowly(self: NodeLink, stub: Any, feed: NodeFeed) -> None:
        await asyncio.sleep(0.5)
        await serve(self, stub, feed)

    prompt = text("before", 4) + "?"
    with node_and_engines(directory, 4) as found:
        async with routed(directory, found) as simulation:
            await simulation.ask(prompt)
            await until(lambda: simulation.router.index.statistics().num_blocks >= 4)
        monkeypatch.setattr(NodeLink, "_take_snapshots", slowly)
        async with routed(directory, found) as simulation:
            url = f"{simulation.router.url}/readyz"
            async with asyncio.timeout(5):
                while (await simulation.http.get(url)).status != 200:  # noqa: ASYNC110 - over HTTP
                    await asyncio.sleep(0.01)
            answer = await simulation.ask(prompt)
            assert await simulation.promised(answer) in (0, answer.cached_tokens)
            return await simulation.promised(answer)


async def test_a_router_that_restarts_is_ready_when_it_knows_the_fleet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await reused_first(tmp_path, monkeypatch) == 4 * BLOCK


async def test_ready_without_a_snapshot_it_would_be_blind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Links, "are_known", property(lambda self: True))
    assert await reused_first(tmp_path, monkeypatch) == 0


# ---------------------------------------------------------------------- 1,000 streams at once


async def open_at_once(directory: Path, *, num_awaited: int) -> int:
    """Of 1,000 streams that nobody ends before all began, how many begin; those that did end whole."""
    keyring_with(directory)
    with many_descriptors(8_192):
        async with engines(2) as found:
            for one in found:
                one.gate.clear()
            config = config_for(directory, [one.url for one in found])
            router = running(config)
            connector = aiohttp.TCPConnector(limit=0)
            session = aiohttp.ClientSession(connector=connector)
            began: set[int] = set()

            async def one_client(number: int) -> list[Any]:
                body = {**STREAM, "prompt": f"{number}"}
                url = f"{served.url}/v1/completions"
                async with http.post(url, json=body) as answer:
                    assert answer.status == 200
                    first = await answer.content.readuntil(b"\n\n")
                    began.add(number)
                    return list(events(first + await answer.content.read()))

            async with router as served, session as http, asyncio.TaskGroup() as group:
                await until(lambda: served.fleet.counts()["taking"] == 2)
                give_lease(served, registry_state())
                asking = [group.create_task(one_client(number)) for number in range(1_000)]
                with contextlib.suppress(TimeoutError):
                    await until(lambda: len(began) >= num_awaited, within_s=60)
                await asyncio.sleep(0.5 if num_awaited < 1_000 else 0.0)
                num_began = len(began)
                for one in found:
                    one.gate.set()
                whole = await asyncio.gather(*asking)
            assert all(told[-1] == b"[DONE]" for told in whole)
            assert {told[0]["choices"][0]["text"] for told in whole} == {"a"}
            return num_began


async def test_a_thousand_streams_run_at_once(tmp_path: Path) -> None:
    assert await open_at_once(tmp_path, num_awaited=1_000) == 1_000


async def test_with_a_client_library_as_it_comes_they_would_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 connections in all is what it allows unasked; the others would wait for their first byte."""
    unlimited = aiohttp.TCPConnector
    own: list[None] = []

    def limited(limit: int = 100) -> aiohttp.TCPConnector:
        own.append(None)
        return unlimited(limit=100 if len(own) == 1 else limit)

    monkeypatch.setattr(aiohttp, "TCPConnector", limited)
    assert await open_at_once(tmp_path, num_awaited=90) <= 100
