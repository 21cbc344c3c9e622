"""Load against a real HTTP server: open and closed loop, and failures that become answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from kvfabric.demo import replay
from kvfabric.demo.processes import free_addresses
from kvfabric.demo.replay import Answer, Client, Job


@dataclass
class _Server:
    """Answers like an engine; what it does wrong depends on the first token of the prompt."""

    url: str = ""
    in_flight: int = 0
    most_in_flight: int = 0
    keys: list[str] = field(default_factory=list)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.keys.append(request.headers["Authorization"])
        if body["prompt"][0] == 400:
            return web.json_response({"error": {"message": "no"}}, status=400)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await _send(response, {"choices": [{"text": "a", "token_ids": body["prompt"][:1]}]})
        await asyncio.sleep(0.01)
        self.in_flight -= 1
        if body["prompt"][0] != 500:  # 500: cut off before usage and end
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}
            await _send(response, {"choices": [], "usage": usage})
            await response.write(b"data: [DONE]\n\n")
        return response


async def _send(response: web.StreamResponse, event: object) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@pytest.fixture
async def server() -> AsyncIterator[_Server]:
    state = _Server()
    app = web.Application()
    app.add_routes([web.post("/v1/completions", state.complete)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    state.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield state
    await runner.cleanup()


def _jobs(*first_tokens: int) -> list[Job]:
    return [Job(i, "amber", (token, 7)) for i, token in enumerate(first_tokens)]


async def test_closed_loop_keeps_so_many_in_flight(server: _Server) -> None:
    """Never more than asked for, that many when there are enough, answers in the order of the jobs."""
    done: list[Answer] = []
    async with Client(server.url, {"amber": "kvf-1"}, 4) as client:
        answers = await replay.closed_loop(client, _jobs(*range(10, 18)), 3, done.append)
    assert server.most_in_flight == 3
    assert [answer.token_ids for answer in answers] == [(i,) for i in range(10, 18)]
    assert all(answer.succeeded for answer in answers)
    assert len(done) == 8
    assert set(server.keys) == {"Bearer kvf-1"}


async def test_open_loop_waits_for_arrivals_not_for_answers(server: _Server) -> None:
    """All that arrive together are sent together."""
    async with Client(server.url, {"amber": "kvf-1"}, 4) as client:
        answers = await replay.open_loop(
            client, _jobs(*range(10, 15)), [0.0] * 5, lambda answer: None
        )
    assert server.most_in_flight == 5
    assert all(0 < answer.ttft_s <= answer.total_s for answer in answers)


async def test_failures_become_answers(server: _Server) -> None:
    """A refusal, a stream that ends early, a server that is not there: none succeeded, none raised."""
    async with Client(server.url, {"amber": "kvf-1"}, 4) as client:
        refused, cut, good = await replay.closed_loop(
            client, _jobs(400, 500, 10), 3, lambda _: None
        )
    assert (refused.status, refused.succeeded) == (400, False)
    assert "no" in refused.error
    assert (cut.status, cut.succeeded) == (200, False)
    assert good.succeeded
    nowhere = f"http://{free_addresses(1)[0]}"
    async with Client(nowhere, {"amber": "kvf-1"}, 4) as client:
        answer = await client.complete(_jobs(10)[0])
    assert (answer.status, answer.succeeded) == (0, False)
    assert "Connect" in answer.error
