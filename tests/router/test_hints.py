"""Hints from a running router to a real node: sent at the moment of choice, and never waited for."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from kvfabric_router.app import Router, running
from kvfabric_router.hints import MAX_MESSAGE_BYTES, Hint, messages
from kvfabric_router.nodes import MAX_HINTS

from kvfabric.config import RouterConfig
from kvfabric.testing.engine import DEADLINE_S, TinyEngine, tiny_hello, tokens_of
from kvfabric.testing.processes import NodeProcess
from kvfabric.types import NodeId
from tests.router.standin import engines, until

pytestmark = pytest.mark.fleet

NUM_BLOCKS = 8
PART_BYTES = 64 << 10


@dataclass
class Rig:
    """A node with an SSD tier and one engine, whose HTTP is a stand-in's, behind a router."""

    node: NodeProcess
    router: Router
    tiny: TinyEngine
    http: aiohttp.ClientSession

    async def metric(self, name: str) -> float:
        return (await asyncio.to_thread(self.node.metrics)).get(name, 0.0)

    async def until_metric(self, name: str, wanted: Callable[[float], bool]) -> None:
        ends = time.monotonic() + DEADLINE_S
        while not wanted(await self.metric(name)):
            assert time.monotonic() < ends, (name, await self.metric(name))
            await asyncio.sleep(0.02)

    def store(self, prompt: str, num_blocks: int) -> None:
        """And use again: what is used twice goes to SSD."""
        for turn in range(2):
            name = f"put {prompt} {turn}"
            keys = self.tiny.open(name, prompt, num_blocks)
            self.tiny.store(name, keys)
            self.tiny.client.match(name, keys, deadline_s=DEADLINE_S)
            self.tiny.release(name)

    async def ask(self, prompt: str, num_blocks: int) -> float:
        """Seconds until a prompt that goes a little further is answered."""
        tokens = [*tokens_of(prompt, num_blocks), 1, 2, 3]
        began = time.monotonic()
        body = {"model": "tiny", "prompt": tokens}
        async with self.http.post(f"{self.router.url}/v1/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
        return time.monotonic() - began

    def hints(self, result: str) -> float:
        counter: Any = self.router.metrics.hints.labels(result=result)
        return float(counter._value.get())


@asynccontextmanager
async def rig_in(directory: Path, *, ssd_bytes: int = 256 << 20) -> AsyncIterator[Rig]:
    config = RouterConfig(listen="127.0.0.1:0", state_dir=directory, log_level="warning")
    node = NodeProcess(directory, http="127.0.0.1:0", host_bytes=32 << 20, ssd_bytes=ssd_bytes)
    with node:
        async with (
            engines() as (engine,),
            running(config) as router,
            aiohttp.ClientSession() as http,
        ):
            engine.is_fabric, engine.checks_session, engine.model = False, False, "tiny"
            hello = tiny_hello(part_bytes=PART_BYTES, window_bytes=16 << 20)
            tiny = TinyEngine.connect(node.socket, replace(hello, endpoint=engine.url))
            try:
                await until(lambda: any(e.session for e in router.fleet.view().engines))
                await until(lambda: router.registry.usable() is not None)
                yield Rig(node, router, tiny, http)
            finally:
                tiny.client.close()


async def test_a_chosen_node_begins_before_its_engine_asks(tmp_path: Path) -> None:
    async with rig_in(tmp_path) as rig:
        await asyncio.to_thread(rig.store, "p", NUM_BLOCKS)
        await rig.until_metric("ssd_writes_total", lambda number: number >= NUM_BLOCKS)
        for number in range(10):
            await asyncio.to_thread(rig.store, f"crowd {number}", 64)
        before = await rig.metric("blocks_promoted_total")
        await rig.ask("p", NUM_BLOCKS)  # by an engine that never asks its node at all
        await rig.until_metric(
            "blocks_promoted_total", lambda number: number == before + NUM_BLOCKS
        )
        await until(lambda: rig.hints("begun") == 1)


async def test_what_host_memory_has_needs_no_hint(tmp_path: Path) -> None:
    async with rig_in(tmp_path) as rig:
        await asyncio.to_thread(rig.store, "p", NUM_BLOCKS)
        await until(lambda: rig.router.index.statistics().num_blocks >= NUM_BLOCKS)
        await rig.ask("p", NUM_BLOCKS)
        await rig.ask("q", NUM_BLOCKS)
        await until(lambda: rig.hints("begun") == 1)  # of `q` only
        assert await rig.metric("blocks_promoted_total") == 0


async def test_a_node_with_nowhere_to_bring_blocks_from_gets_none(tmp_path: Path) -> None:
    async with rig_in(tmp_path, ssd_bytes=0) as rig:
        await rig.ask("p", NUM_BLOCKS)
        await asyncio.sleep(0.1)
        assert [rig.hints(result) for result in ("begun", "refused", "failed")] == [0, 0, 0]


async def test_no_request_waits_for_a_node_that_does_not_answer_hints(tmp_path: Path) -> None:
    async with rig_in(tmp_path) as rig:
        await rig.ask("first", NUM_BLOCKS)
        await until(lambda: rig.hints("begun") == 1)
        rig.node.send(signal.SIGSTOP)
        try:
            times = [await rig.ask(f"p{number}", NUM_BLOCKS) for number in range(10)]
            assert sorted(times)[5] < 0.1
            # Nor do hints gather without bound, nor is the link given up for it.
            (link,) = [link for link, _ in rig.router.links._links.values()]
            for number in range(2 * MAX_HINTS):
                link.hint(Hint(link.node_id, "handle", bytes([number]) * 32))
            assert rig.hints("dropped") >= MAX_HINTS
            await until(lambda: rig.hints("failed") >= 10)
            assert link.connected
        finally:
            rig.node.send(signal.SIGCONT)


def test_what_gathers_goes_together() -> None:
    size = MAX_MESSAGE_BYTES // 4
    waiting = deque(Hint(NodeId("n"), f"h{n}", bytes(size)) for n in range(9))
    waiting.append(Hint(NodeId("n"), "huge", bytes(2 * MAX_MESSAGE_BYTES)))
    assert [len(some) for some in messages(waiting)] == [4, 4, 1, 1]
    assert not waiting
