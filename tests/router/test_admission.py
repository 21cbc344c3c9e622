"""A request waits at the router while engines have enough to do; one that would wait too long is refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from kvfabric_router.admission import Admission
from kvfabric_router.flight import Sent
from kvfabric_router.local_desk import LocalAttempt
from kvfabric_router.rates import Work

from kvfabric.keyring import Keyring
from tests.router.standin import (
    Client,
    StandInEngine,
    client_of,
    config_for,
    engines,
    keyring_with,
    registry_state,
    tenant,
    until,
)

ASK: dict[str, Any] = {"model": "reference", "prompt": "x" * 64, "stream": True}
KEYS = {"t-1": "kvf-one", "t-2": "kvf-two"}
OBJECTIVE = "x-kvfabric-ttft-objective-ms"


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return keyring_with(tmp_path, KEYS)


@asynccontextmanager
async def one_engine(tmp_path: Path) -> AsyncIterator[tuple[Client, StandInEngine]]:
    state = registry_state([tenant(name, key) for name, key in KEYS.items()])
    async with (
        engines() as [engine],
        client_of(config_for(tmp_path, [engine.url]), state) as client,
    ):
        yield client, engine


def busy(client: Client, engine: StandInEngine, work_ms: float = 60_000.0) -> contextlib.ExitStack:
    """The engine computes one prompt and has the next, as the router sees it."""
    stack = contextlib.ExitStack()
    for part_ms in (work_ms - 1.0, 1.0):
        stack.enter_context(client.router.fleet.flight(engine.url, Sent(Work(1000), part_ms)))
    return stack


def admission(client: Client) -> Admission[LocalAttempt]:
    return client.router.desk.admission


async def test_a_request_waits_for_room_and_goes_when_there_is(
    tmp_path: Path, keyring: Keyring
) -> None:
    async with one_engine(tmp_path) as (client, engine), asyncio.TaskGroup() as group:
        with busy(client, engine):
            asked = group.create_task(client.post(ASK, key=KEYS["t-1"]))
            await until(lambda: admission(client).num_held == 1)
            assert engine.requests == []
        status, _, _ = await asked
        assert status == 200
        assert admission(client).num_held == 0


async def test_tenants_take_turns_when_many_wait(tmp_path: Path, keyring: Keyring) -> None:
    async with one_engine(tmp_path) as (client, engine), asyncio.TaskGroup() as group:
        order = []

        async def ask(name: str) -> None:
            await client.post({**ASK, "prompt": "y" * 3_000}, key=KEYS[name])
            order.append(name)

        with busy(client, engine):
            for number in range(8):
                group.create_task(ask("t-1"))
                await until(lambda n=number: admission(client).num_held == n + 1)  # type: ignore[misc]
            for number in range(2):
                group.create_task(ask("t-2"))
                await until(lambda n=number: admission(client).num_held == n + 9)  # type: ignore[misc]
        await until(lambda: len(order) == 10)
        assert "t-2" in order[:3]
        assert order.index("t-2", order.index("t-2") + 1) < 7


async def test_a_client_that_goes_away_waits_no_more(tmp_path: Path, keyring: Keyring) -> None:
    async with one_engine(tmp_path) as (client, engine):
        with busy(client, engine):
            async with asyncio.TaskGroup() as group:
                asked = group.create_task(client.post(ASK, key=KEYS["t-1"]))
                await until(lambda: admission(client).num_held == 1)
                asked.cancel()
            await until(lambda: admission(client).num_held == 0)
        assert engine.requests == []
        assert client.router.fleet.num_flights == 0


async def test_an_objective_out_of_reach_is_refused_at_once(
    tmp_path: Path, keyring: Keyring
) -> None:
    async with one_engine(tmp_path) as (client, engine), asyncio.TaskGroup() as group:
        with busy(client, engine, 5_000.0):
            asked = {
                objective: group.create_task(
                    client.post(ASK, key=KEYS["t-1"], headers={OBJECTIVE: objective})
                )
                for objective in ("2000", "60000")
            }
            status, body, headers = await asked["2000"]
            assert status == 503
            assert body["error"]["code"] == "objective_unreachable"
            assert 1 <= int(headers["Retry-After"]) <= 6
            await until(lambda: admission(client).num_held == 1)
        assert (await asked["60000"])[0] == 200


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf"])
async def test_an_objective_that_is_none_is_named(
    tmp_path: Path, keyring: Keyring, value: str
) -> None:
    async with one_engine(tmp_path) as (client, _):
        status, body, _ = await client.post(ASK, key=KEYS["t-1"], headers={OBJECTIVE: value})
        assert status == 400
        assert OBJECTIVE in body["error"]["message"]


async def test_all_that_find_room_go_in_one_turn_of_the_loop(
    tmp_path: Path, keyring: Keyring
) -> None:
    """One a turn is a queue that grows without end on a busy machine, before engines that do nothing."""
    async with one_engine(tmp_path) as (client, engine), asyncio.TaskGroup() as group:
        with busy(client, engine):
            asking = [group.create_task(client.post(ASK, key=KEYS["t-1"])) for _ in range(3)]
            await until(lambda: admission(client).num_held == 3)
        await asyncio.sleep(0)
        assert (admission(client).num_held, client.router.fleet.num_flights) == (0, 3)
        assert [(await task)[0] for task in asking] == [200] * 3


@pytest.fixture
def short_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Admission.__init__

    def init(self: Admission[LocalAttempt], *args: Any, **fields: Any) -> None:
        made(self, *args, **fields, max_held=2)

    monkeypatch.setattr(Admission, "__init__", init)


@pytest.mark.usefixtures("short_queue")
async def test_a_full_queue_says_when_to_come_again(tmp_path: Path, keyring: Keyring) -> None:
    async with one_engine(tmp_path) as (client, engine), asyncio.TaskGroup() as group:
        with busy(client, engine):
            waiting = [group.create_task(client.post(ASK, key=KEYS["t-1"])) for _ in range(2)]
            await until(lambda: admission(client).num_held == 2)
            status, body, headers = await client.post(ASK, key=KEYS["t-1"])
            assert (status, body["error"]["code"]) == (429, "overloaded")
            assert int(headers["Retry-After"]) >= 1
            # Another tenant gets the place of the newest of those.
            other = group.create_task(client.post(ASK, key=KEYS["t-2"]))
            await until(lambda: any(task.done() for task in waiting))
        assert sorted([(await task)[0] for task in waiting]) == [200, 429]
        assert (await other)[0] == 200


async def test_answers_in_one_piece_hold_an_engine_only_for_their_prompts(
    tmp_path: Path, keyring: Keyring
) -> None:
    """Their first token is never seen: what was predicted of it counts, not the whole answer."""
    async with one_engine(tmp_path) as (client, engine), asyncio.TaskGroup() as group:
        engine.gate.clear()
        body = {**ASK, "stream": False}
        asked = [group.create_task(client.post(body, key=KEYS["t-1"])) for _ in range(8)]
        await until(lambda: len(engine.requests) == 8)
        engine.gate.set()
        assert [(await task)[0] for task in asked] == [200] * 8
