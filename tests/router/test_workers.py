"""Several workers behind one port: one account of the load, whoever of them ends."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from kvfabric_router.local_desk import LocalAttempt
from kvfabric_router.rates import Rates

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

pytestmark = pytest.mark.slow

KEY = "kvf-one"
ASK: dict[str, Any] = {"model": "reference", "prompt": "hello", "stream": True}


@asynccontextmanager
async def served(
    tmp_path: Path, num_engines: int = 1, *, workers: int = 2, **keys: Any
) -> AsyncIterator[tuple[Client, list[StandInEngine]]]:
    keyring_with(tmp_path, ["t-1"])
    state = registry_state([tenant("t-1", KEY)])
    async with engines(num_engines) as found:
        config = config_for(tmp_path, [e.url for e in found], workers=workers, **keys)
        async with client_of(config, state) as client:
            yield client, found


def pids(client: Client) -> set[int]:
    assert client.router.workers is not None
    return set(client.router.workers.processes)


async def send(client: Client, results: list[int | str]) -> None:
    """On a connection of its own, as from a client of its own."""
    try:
        async with (
            aiohttp.ClientSession() as http,
            http.post(
                client.router.url + "/v1/completions",
                json=ASK,
                headers={"Authorization": f"Bearer {KEY}"},
            ) as answer,
        ):
            raw = await answer.read()
            results.append(answer.status if b"[DONE]" in raw else "broken off")
    except aiohttp.ClientError:
        results.append("cut off")


async def most_at_one(tmp_path: Path) -> int:
    """16 requests at once over 8 engines that answer only when all are there: how many one engine gets."""
    async with served(tmp_path, 8, workers=3) as (client, found):
        for engine in found:
            engine.gate.clear()
        results: list[int | str] = []
        async with asyncio.TaskGroup() as group:
            for _ in range(16):
                group.create_task(send(client, results))
            await until(lambda: sum(len(engine.requests) for engine in found) == 16)
            counts = Counter({engine.url: len(engine.requests) for engine in found})
            for engine in found:
                engine.gate.set()
        assert results == [200] * 16
        await until(lambda: client.router.fleet.num_flights == 0)
        return max(counts.values())


async def test_workers_do_not_herd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _slow_engines(monkeypatch)
    assert await most_at_one(tmp_path) <= 3


async def test_workers_that_know_nothing_of_each_others_load_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard taken out: no request enters the account."""
    _slow_engines(monkeypatch)
    begun = LocalAttempt.begin

    def unseen(self: LocalAttempt) -> LocalAttempt:
        begun(self)
        self.flight._activity.flights.clear()
        return self

    monkeypatch.setattr(LocalAttempt, "begin", unseen)
    assert await most_at_one(tmp_path) > 3


def _slow_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request more is work worth spreading, and equal to the policy: ties fall to the first."""
    monkeypatch.setattr("kvfabric_router.rates.UNKNOWN", Rates(token_ms=5.0))
    monkeypatch.setattr("random.Random.getrandbits", lambda self, bits: 0)


async def test_a_killed_worker_is_replaced_and_the_others_serve(tmp_path: Path) -> None:
    async with served(tmp_path) as (client, [engine]):
        before, results = pids(client), list[int | str]()
        engine.gate.clear()
        async with asyncio.TaskGroup() as group:
            for _ in range(12):
                group.create_task(send(client, results))
            await until(lambda: len(engine.requests) == 12)
            links = dict(client.router.workers.processes)  # type: ignore[union-attr]
            killed = max(links, key=lambda pid: links[pid].num_calls)
            its_own = links[killed].num_calls
            os.kill(killed, signal.SIGKILL)
            await until(lambda: client.router.fleet.num_flights == 12 - its_own)
            engine.gate.set()
        assert Counter(results) == Counter({200: 12 - its_own, "cut off": its_own})
        await until(lambda: client.router.fleet.num_flights == 0)
        await send(client, results)
        assert results[-1] == 200  # by those that are left
        await until(lambda: len(pids(client)) == 2)
        assert len(pids(client) & before) == 1
        for _ in range(8):
            await send(client, results)
        assert results[-8:] == [200] * 8
        _, raw, _ = await client.get("/metrics")
        told = f'requests_total{{result="disconnected",tenant="t-1"}} {its_own}.0'
        assert told.encode() in raw


async def test_who_may_not_ask_hears_that_first(tmp_path: Path) -> None:
    async with served(tmp_path) as (client, [engine]):
        for body in (ASK, {**ASK, "prompt": "x" * (1 << 20)}, b"{"):
            assert (await client.post(body, key="kvf-other"))[0] == 401
        assert (await client.post(b"{", key=KEY))[0] == 400
        assert (await client.post({**ASK, "prompt": "x" * 3000}, key=KEY))[0] == 200
        assert (await client.post({**ASK, "model": "other"}, key=KEY))[0] == 404
        long = {**ASK, "prompt": "x" * (1 << 20)}  # read only after a word from the decider
        assert (await client.post(long, key=KEY))[1]["error"]["code"] == "context_length_exceeded"
        assert (await client.get("/v1/completions", KEY))[0] == 405
        assert (await client.get("/v1/models"))[0] == 401
        assert (await client.get("/v1/models", KEY))[1]["data"][0]["id"] == "reference"
        assert (await client.get("/nowhere"))[0] == 404
        assert len(engine.requests) == 1


async def test_any_worker_explains_what_another_did(tmp_path: Path) -> None:
    async with served(tmp_path) as (client, _):
        _, _, headers = await client.post(ASK, key=KEY)
        # Its worker has answered; that word may still be on its way to the process that decides.
        await until(lambda: client.router.fleet.num_flights == 0)
        for _ in range(4):
            async with (
                aiohttp.ClientSession() as http,
                http.get(
                    f"{client.router.url}/v1/explain/{headers['X-Request-Id']}",
                    headers={"Authorization": f"Bearer {KEY}"},
                ) as answer,
            ):
                told = await answer.json()
            assert told["actual"]["reuse_tokens"]["hbm"] == 16


async def test_a_change_is_acknowledged_only_when_workers_have_sent_what_is_older(
    tmp_path: Path,
) -> None:
    async with served(tmp_path) as (client, [engine]):
        registry = client.router.registry
        engine.gate.clear()
        results: list[int | str] = []
        async with asyncio.TaskGroup() as group:
            group.create_task(send(client, results))
            await engine.arrived.wait()
            await until(
                lambda: not registry._unsent
            )  # told when it was out, not when it was answered
            assert client.router.fleet.num_flights == 1
            engine.gate.set()
        assert results == [200]


async def test_it_stops_only_after_its_workers_ended_what_they_had(tmp_path: Path) -> None:
    results: list[int | str] = []
    async with asyncio.TaskGroup() as group, served(tmp_path) as (client, [engine]):
        engine.gate.clear()
        group.create_task(send(client, results))
        await engine.arrived.wait()
        asyncio.get_running_loop().call_later(0.3, engine.gate.set)
        running = pids(client)
    assert results == [200]
    for pid in running:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_end_with_the_process_that_decides(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvfabric", "router", "--listen", "127.0.0.1:0"]
    command += ["--state-dir", str(tmp_path), "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "ready" in line)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        watched = [os.pidfd_open(int(pid)) for pid in children]
        process.kill()
        process.wait()
        ended = [bool(select.select([descriptor], [], [], 10)[0]) for descriptor in watched]
    for descriptor in watched:
        os.close(descriptor)
    assert ended == [True, True]
