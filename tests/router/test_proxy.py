"""Answers pass through, broken engines are replaced while nobody saw a byte, clients may go away.

All of it from one process and from several workers behind one port: who asks sees no difference.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from kvfabric_router.desk import Fault
from kvfabric_router.proxy import MAX_ATTEMPTS

from tests.router.standin import (
    USAGE,
    StandInEngine,
    client_of,
    config_for,
    engines,
    events,
    keyring_with,
    registry_state,
    until,
)

ASK: dict[str, Any] = {"model": "reference", "prompt": "hello"}
STREAM: dict[str, Any] = {**ASK, "stream": True}


@pytest.fixture
async def pair() -> AsyncIterator[list[StandInEngine]]:
    async with engines(2) as found:
        yield found


@pytest.fixture(
    autouse=True, params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["alone", "workers"]
)
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    number: int = request.param
    monkeypatch.setenv("KVFABRIC_TEST_WORKERS", str(number))
    return number


def served(tmp_path: Path, found: list[StandInEngine], **keys: Any) -> Any:
    keyring_with(tmp_path)
    urls = [engine.url for engine in found]
    number = int(os.environ["KVFABRIC_TEST_WORKERS"])
    return client_of(config_for(tmp_path, urls, workers=number, **keys), registry_state())


async def test_an_answer_passes_through(tmp_path: Path, pair: list[StandInEngine]) -> None:
    async with served(tmp_path, pair[:1]) as client:
        status, body, headers = await client.post(ASK)
        assert (status, body["choices"][0]["text"], body["usage"]) == (200, "ab", USAGE)
        assert headers["x-kvfabric-engine"] == pair[0].url
        assert headers["X-Request-Id"] == pair[0].headers[0]["X-Request-Id"]


async def test_a_chat_goes_to_the_chat_path(tmp_path: Path, pair: list[StandInEngine]) -> None:
    async with served(tmp_path, pair[:1]) as client:
        body = {"model": "reference", "messages": [{"role": "user", "content": "hi"}]}
        assert (await client.post(body, path="/v1/chat/completions"))[0] == 200
        assert pair[0].requests[0]["messages"] == body["messages"]


async def test_a_client_may_not_name_its_own_request(
    tmp_path: Path, pair: list[StandInEngine]
) -> None:
    async with served(tmp_path, pair[:1]) as client:
        _, _, headers = await client.post(ASK, headers={"X-Request-Id": "mine"})
        assert headers["X-Request-Id"] != "mine"
        assert pair[0].headers[0]["X-Request-Id"] == headers["X-Request-Id"]


async def test_the_clients_key_does_not_reach_the_engine(
    tmp_path: Path, pair: list[StandInEngine]
) -> None:
    async with served(tmp_path, pair[:1]) as client:
        await client.post(ASK, key="kvf-secret", headers={"Cookie": "a=b"})
        assert not {"Authorization", "Cookie"} & set(pair[0].headers[0])


async def test_a_stream_passes_piece_by_piece(tmp_path: Path, pair: list[StandInEngine]) -> None:
    pair[0].gate.clear()
    async with served(tmp_path, pair[:1]) as client, client.open(STREAM) as answer:
        assert answer.content_type == "text/event-stream"
        first = await answer.content.readuntil(b"\n\n")
        assert [e["choices"][0]["text"] for e in events(first)] == ["a"]
        pair[0].gate.set()
        rest = list(events(await answer.read()))
        assert rest[0]["choices"][0]["text"] == "b"
        # Usage was asked for by the router alone, so the client does not see it.
        assert rest[1:] == [b"[DONE]"]


async def test_usage_is_streamed_to_who_asks_for_it(
    tmp_path: Path, pair: list[StandInEngine]
) -> None:
    async with served(tmp_path, pair[:1]) as client:
        body = {**STREAM, "stream_options": {"include_usage": True}}
        _, raw, _ = await client.post(body)
        assert list(events(raw))[2]["usage"] == USAGE


@pytest.mark.parametrize("status", [400, 404, 422, 500])
async def test_an_engines_own_error_is_passed_on_and_not_tried_again(
    tmp_path: Path, pair: list[StandInEngine], status: int
) -> None:
    for engine in pair:
        engine.status = status
    async with served(tmp_path, pair) as client:
        found, body, _ = await client.post(ASK)
        assert found == status
        assert body["error"]["message"] == "engine says no"
        assert len(pair[0].requests) + len(pair[1].requests) == 1


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_a_busy_engine_is_passed_by(
    tmp_path: Path, pair: list[StandInEngine], status: int
) -> None:
    pair[0].status = status
    async with served(tmp_path, pair, policy="round_robin") as client:
        assert [(await client.post(ASK))[0] for _ in range(2)] == [200, 200]
        assert len(pair[0].requests) == 1
        assert len(client.router.fleet.view().engines) == 2


async def test_if_all_are_busy_the_client_is_told_when_to_come_back(
    tmp_path: Path, pair: list[StandInEngine]
) -> None:
    for engine in pair:
        engine.status = 429
    async with served(tmp_path, pair) as client:
        status, body, headers = await client.post(ASK)
        assert (status, headers["Retry-After"]) == (429, "1")
        assert body["error"]["message"] == "engine says no"


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_an_engine_that_breaks_before_the_first_byte_is_replaced(
    tmp_path: Path, pair: list[StandInEngine], body: dict[str, Any]
) -> None:
    pair[0].break_after = 0
    async with served(tmp_path, pair, policy="round_robin") as client:
        for _ in range(2):
            status, answer, headers = await client.post(body)
            assert status == 200
            assert headers["x-kvfabric-engine"] == pair[1].url
            assert b"error" not in (answer if isinstance(answer, bytes) else b"")
        await until(lambda: client.router.fleet.num_flights == 0)


async def test_an_engine_that_is_gone_is_replaced_and_excluded(
    tmp_path: Path, pair: list[StandInEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfabric_router.fleet.BACKOFF_S", 0.005)
    async with served(tmp_path, pair, policy="round_robin") as client:
        await pair[0].stop()
        statuses = [(await client.post(ASK))[0] for _ in range(4)]
        assert statuses == [200] * 4
        assert [e.endpoint for e in client.router.fleet.view().engines] == [pair[1].url]
        await pair[0].start()
        await until(lambda: len(client.router.fleet.view().engines) == 2)


async def test_an_engine_that_breaks_after_the_first_byte_is_not_replaced(
    tmp_path: Path, pair: list[StandInEngine]
) -> None:
    for engine in pair:
        engine.break_after = 1
    async with served(tmp_path, pair) as client:
        status, raw, _ = await client.post(STREAM)
        assert status == 200
        first, last = events(raw)
        assert first["choices"][0]["text"] == "a"
        assert last["error"]["code"] == "engine_lost"
        assert len(pair[0].requests) + len(pair[1].requests) == 1
        await until(lambda: client.router.fleet.num_flights == 0)


async def test_an_answer_that_only_names_the_end_has_not_ended(
    tmp_path: Path, pair: list[StandInEngine]
) -> None:
    """A stream that just stops after the text `[DONE]` is broken off, and says so."""
    pair[0].texts = ("data: [DONE]",)
    pair[0].says_done = False
    async with served(tmp_path, pair[:1]) as client:
        _, raw, _ = await client.post(STREAM)
        assert list(events(raw))[-1]["error"]["code"] == "engine_lost"


@pytest.mark.parametrize("workers", [1], indirect=True)  # what is patched is in this process
async def test_replaying_after_the_first_byte_would_be_seen(
    tmp_path: Path, pair: list[StandInEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard removed: if a broken stream counted as lost, its start would come twice."""
    from kvfabric_router import proxy

    async def again(response: Any) -> Any:
        raise proxy._Failed(Fault.LOST, "guard removed")

    monkeypatch.setattr(proxy, "_break_off", again)
    for engine in pair:
        engine.break_after = 1
    async with served(tmp_path, pair) as client, asyncio.TaskGroup() as group:
        asking = group.create_task(client.post(STREAM))
        await until(lambda: len(pair[0].requests) + len(pair[1].requests) > 1)
        asking.cancel()


async def test_no_more_than_a_few_engines_are_tried(tmp_path: Path) -> None:
    async with engines(MAX_ATTEMPTS + 1) as found:
        for engine in found:
            engine.break_after = 0
        async with served(tmp_path, found) as client:
            status, body, headers = await client.post(ASK)
            assert status == 503
            assert body["error"]["code"] == "no_engine"
            assert "Retry-After" in headers
            assert sum(len(engine.requests) for engine in found) == MAX_ATTEMPTS


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_a_client_that_goes_away_cancels_its_request(
    tmp_path: Path, pair: list[StandInEngine], body: dict[str, Any]
) -> None:
    pair[0].gate.clear()
    async with served(tmp_path, pair[:1]) as client:
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(client.post(body))
            await pair[0].arrived.wait()
            assert client.router.fleet.num_flights == 1
            asking.cancel()
        await asyncio.wait_for(pair[0].cancelled.wait(), 5)
        await until(lambda: client.router.fleet.num_flights == 0)
        _, raw, _ = await client.get("/metrics")
        assert b'requests_total{result="disconnected",tenant="default"} 1.0' in raw


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_an_engine_that_takes_too_long_is_a_504_or_an_error_event(
    tmp_path: Path, pair: list[StandInEngine], body: dict[str, Any]
) -> None:
    pair[0].gate.clear()
    async with served(tmp_path, pair[:1], request_timeout_s=0.1) as client:
        status, answer, _ = await client.post(body)
        if body is ASK:
            assert (status, answer["error"]["code"]) == (504, "timeout")
        else:
            assert status == 200
            assert list(events(answer))[-1]["error"]["code"] == "engine_lost"
        await until(lambda: client.router.fleet.num_flights == 0)


async def test_who_waits_for_an_engine_that_stopped_answering_is_moved(
    tmp_path: Path, pair: list[StandInEngine]
) -> None:
    """A stopped process keeps its connections open: only unanswered probes tell."""
    pair[0].gate.clear()
    async with served(tmp_path, pair, policy="round_robin") as client:
        async with asyncio.TaskGroup() as group:
            asking = [group.create_task(client.post(ASK)) for _ in range(2)]
            await pair[0].arrived.wait()
            client.router.fleet.probe_failed(pair[0].url)
            client.router.fleet.probe_failed(pair[0].url)
        assert [task.result()[0] for task in asking] == [200, 200]
