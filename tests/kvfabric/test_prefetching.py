"""Hints of a router to a real node: blocks are there before the engine asks, and nothing suffers for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from kvfabric.config import NodeConfig
from kvfabric.daemon import prefetching
from kvfabric.daemon.handlers import terms_for
from kvfabric.daemon.node import Node
from kvfabric.handle import MAX_HANDLE_CHARS
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.registry.state import TierQuota
from kvfabric.testing.engine import DEADLINE_S, TinyEngine, tiny_hello, wrong_blocks
from kvfabric.testing.minting import Minter, keys_of
from kvfabric.tls import Security, open_channel
from kvfabric.types import DEFAULT_TENANT, BlockKey, TenantId

pytestmark = pytest.mark.fleet

PART_BYTES = 64 << 10
HOST_BYTES = 64 << 20
NUM_SLOTS = HOST_BYTES // PART_BYTES
BLOCKS = 12
HOST, SSD = 0, 1


@dataclass
class Rig:
    node: Node
    engine: TinyEngine
    minter: Minter
    hints: Any
    num: int = 0
    tenants: dict[str, TenantId] = field(default_factory=dict)

    def name(self) -> str:
        self.num += 1
        return f"r{self.num}"

    def handle(self, request: str, tenant: str = DEFAULT_TENANT) -> str:
        state = self.node.registry.state
        of = self.tenants.get(tenant, DEFAULT_TENANT)
        return self.minter.handle(self.engine, request, state, tenant=of)

    async def open(
        self,
        prompt: str,
        num_blocks: int = BLOCKS,
        *,
        handle: str = "",
        tenant: str = DEFAULT_TENANT,
    ) -> tuple[str, list[BlockKey]]:
        request = self.name()
        made = handle or self.handle(request, tenant)
        opened = await asyncio.to_thread(
            self.engine.client.open_handle, request, made, deadline_s=DEADLINE_S
        )
        return request, keys_of(opened, prompt, num_blocks)

    async def keys(self, prompt: str, num_blocks: int = BLOCKS) -> list[BlockKey]:
        request, keys = await self.open(prompt, num_blocks)
        await asyncio.to_thread(self.engine.release, request)
        return keys

    async def use(self, prompt: str, num_blocks: int = BLOCKS, times: int = 2) -> None:
        """Store it, and have it found again, so that it is admitted to SSD."""
        for _ in range(times):
            request, keys = await self.open(prompt, num_blocks)
            await asyncio.to_thread(self.engine.store, request, keys)
            await asyncio.to_thread(self.engine.client.match, request, keys, deadline_s=DEADLINE_S)
            await asyncio.to_thread(self.engine.release, request)

    async def crowd_out(self) -> None:
        """All of the host tier is somebody else's now."""
        await self.node.store.seal()
        for number in range(NUM_SLOTS // 64 + 2):
            await self.use(f"crowd {self.num} {number}", 64)
        await self.node.store.seal()

    async def tiers(self, prompt: str, num_blocks: int = BLOCKS) -> list[int]:
        """Where an engine finds the prompt's blocks now."""
        request, keys = await self.open(prompt, num_blocks)
        matched = await asyncio.to_thread(
            self.engine.client.match, request, keys, deadline_s=DEADLINE_S
        )
        await asyncio.to_thread(self.engine.release, request)
        return list(matched.tiers)

    async def hint(self, *hints: tuple[str, list[BlockKey]]) -> pb.Prefetched:
        said = [pb.PrefetchHint(handle=handle, keys=b"".join(keys)) for handle, keys in hints]
        reply: pb.Prefetched = await self.hints.Prefetch(pb.PrefetchRequest(hints=said))
        return reply

    async def settled(self) -> None:
        """Every hint has brought what it brings."""
        await until(lambda: not self.node.prefetches or not self.node.prefetches._tasks)

    @property
    def num_promoted(self) -> int:
        return self.node.store.statistics().promotions


async def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < ends
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Rig]:
    config = NodeConfig(
        state_dir=directory,
        http="",
        host_bytes=HOST_BYTES,
        ssd_bytes=512 << 20,
        max_blocks=1 << 14,
    )
    async with Node(config) as node:
        hello = tiny_hello(part_bytes=PART_BYTES, window_bytes=16 << 20)
        engine = await asyncio.to_thread(TinyEngine.connect, config.socket_path, hello)
        channel = open_channel(
            f"unix:{config.admin_socket_path}", Security("router", None, True), []
        )
        stub = pb_grpc.NodeHintsStub(channel)  # type: ignore[no-untyped-call]
        try:
            yield Rig(node, engine, Minter(directory), stub)
        finally:
            await channel.close()
            await asyncio.to_thread(engine.client.close)


async def test_a_hinted_prompt_is_there_when_its_engine_asks(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.use("p")
        await rig.use("not hinted")
        await rig.crowd_out()
        keys, name = await rig.keys("p"), rig.name()
        handle = rig.handle(name)
        reply = await rig.hint((handle, keys))
        assert (reply.num_begun, reply.num_refused) == (1, 0)
        await rig.settled()
        assert rig.num_promoted == BLOCKS
        assert rig.node.store.statistics().leased_bytes == BLOCKS * PART_BYTES
        opened = await asyncio.to_thread(
            rig.engine.client.open_handle, name, handle, deadline_s=DEADLINE_S
        )
        assert keys_of(opened, "p", BLOCKS) == keys
        matched = await asyncio.to_thread(
            rig.engine.client.match, name, keys, deadline_s=DEADLINE_S
        )
        assert list(matched.tiers) == [HOST] * BLOCKS
        found = await asyncio.to_thread(rig.engine.load, name, keys)
        assert (len(found), wrong_blocks(keys, found)) == (BLOCKS, 0)
        await asyncio.to_thread(rig.engine.release, name)
        assert rig.node.prefetches is not None
        assert rig.node.prefetches.counts["used"] == 1
        assert rig.node.store.statistics().leased_bytes == 0
        assert await rig.tiers("not hinted") == [SSD] * BLOCKS


async def test_an_engine_that_is_faster_waits_for_nothing_twice(tmp_path: Path) -> None:
    """Hint and load at once: each part is read once; a hint for what was asked already does nothing."""
    async with running(tmp_path) as rig:
        await rig.use("p")
        await rig.crowd_out()
        keys = await rig.keys("p")
        name = rig.name()
        handle = rig.handle(name)
        await asyncio.to_thread(rig.engine.client.open_handle, name, handle, deadline_s=DEADLINE_S)
        _, found = await asyncio.gather(
            rig.hint((handle, keys)), asyncio.to_thread(rig.engine.load, name, keys)
        )
        assert (len(found), wrong_blocks(keys, found)) == (BLOCKS, 0)
        await rig.settled()
        assert rig.num_promoted == BLOCKS
        again = await rig.hint((handle, keys))
        assert (again.num_begun, again.num_refused) == (0, 0)


async def _bad_hints(rig: Rig) -> int:
    """Hints that a handle does not allow; how many blocks they brought all the same."""
    engine = rig.engine
    stranger = await asyncio.to_thread(
        TinyEngine.connect, rig.node.config.socket_path, tiny_hello(revision="another")
    )
    await rig.use("p")
    await rig.crowd_out()
    keys = await rig.keys("p")
    good = rig.handle(rig.name())
    rig.engine = stranger
    for_stranger = rig.handle(rig.name())
    rig.engine = engine
    gone = rig.minter.handle(
        _session_of_nobody(engine), rig.name(), rig.node.registry.state, tenant=DEFAULT_TENANT
    )
    flipped = good[:-2] + ("AA" if good[-2:] != "AA" else "BB")
    bad = [
        (flipped, keys),  # not signed by a key in force
        ("", keys),
        ("A" * (MAX_HANDLE_CHARS + 1), keys),
        (gone, keys),  # for a session that is not here
        (for_stranger, keys),  # another model: other namespace
        (rig.handle(rig.name(), "other"), keys),  # another tenant's
        (good, []),
    ]
    before = rig.num_promoted
    reply = await rig.hint(*bad)
    assert reply.num_begun + reply.num_refused == len(bad)
    await rig.settled()
    await asyncio.to_thread(stranger.client.close)
    return rig.num_promoted - before


def _session_of_nobody(engine: TinyEngine) -> Any:
    class Client:
        session = b"nobody's session"

    return TinyEngine(Client(), engine.hello)  # type: ignore[arg-type]


async def _other_tenant(rig: Rig) -> None:
    keyring = Keyring.create_or_open(rig.node.config.keyring_path)
    made, _ = await rig.node.registry.create_tenant("other", TierQuota(), TierQuota())
    keyring.add_tenant(made.tenant_id)
    rig.tenants["other"] = made.tenant_id


async def test_a_hint_brings_only_what_its_handle_allows(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await _other_tenant(rig)
        assert await _bad_hints(rig) == 0
        # And with its own handle the same keys come.
        assert (await rig.hint((rig.handle(rig.name()), await rig.keys("p")))).num_begun == 1
        await rig.settled()
        assert rig.num_promoted == BLOCKS


async def test_without_lineages_a_hint_brings_other_tenants_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: the rights of a hint are the default tenant's, whatever its handle says."""

    def careless(services: Any, session: Any, opened: Any) -> Any:
        return replace(terms_for(services, session, opened), tenant=DEFAULT_TENANT)

    monkeypatch.setattr(prefetching, "terms_for", careless)
    async with running(tmp_path) as rig:
        await _other_tenant(rig)
        assert await _bad_hints(rig) == BLOCKS


async def _overdo(rig: Rig) -> tuple[int, int]:
    """The host tier is full of what engines use; then hints for a lot that nobody will ask for. Of the blocks
    in use (how many, how many went)."""
    num_wrong = 40
    for number in range(num_wrong):
        await rig.use(f"wrong {number}", 16)
    await rig.crowd_out()
    hot = [(f"hot {number}", 64) for number in range(NUM_SLOTS // 64)]
    for _ in range(3):
        for prompt, count in hot:
            await rig.use(prompt, count)
    before = [await rig.tiers(prompt, count) for prompt, count in hot]
    leased, keys = await rig.open(hot[0][0], 8)
    matched = await asyncio.to_thread(rig.engine.client.match, leased, keys, deadline_s=DEADLINE_S)
    begun = 0
    for number in range(num_wrong):
        name = rig.name()
        wrong = await rig.keys(f"wrong {number}", 16)
        begun += (await rig.hint((rig.handle(name), wrong))).num_begun
        await rig.settled()
    assert begun
    located = await asyncio.to_thread(
        rig.engine.client.load, leased, keys, group=0, shard=0, deadline_s=DEADLINE_S
    )
    assert located.num_blocks == matched.num_blocks == 8  # what is leased stays, whatever is hinted
    await asyncio.to_thread(rig.engine.release, leased)
    after = [await rig.tiers(prompt, count) for prompt, count in hot]
    there = sum(tiers.count(HOST) for tiers in before)
    return there, there - sum(tiers.count(HOST) for tiers in after)


async def test_wrong_hints_push_out_next_to_nothing_that_is_in_use(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        num_hot, num_gone = await _overdo(rig)
        assert num_hot > NUM_SLOTS * 0.9
        assert num_gone <= NUM_SLOTS * prefetching.HINT_SHARE


async def test_without_a_budget_wrong_hints_push_out_what_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin."""
    monkeypatch.setattr(prefetching, "HINT_SHARE", 1.0)
    async with running(tmp_path) as rig:
        _, num_gone = await _overdo(rig)
        assert num_gone > NUM_SLOTS * (1 / 32)


async def test_hints_let_go_for_a_request_that_finds_no_budget_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetching, "HINT_SHARE", 1.0)
    async with running(tmp_path) as rig:
        for number in range(8):
            await rig.use(f"p{number}")
        await rig.crowd_out()
        await rig.use("mine", 64)
        for number in range(8):
            await rig.hint((rig.handle(rig.name()), await rig.keys(f"p{number}")))
        await rig.settled()
        held = rig.node.store.statistics().leased_bytes
        room = int(HOST_BYTES * 0.1)
        assert held + 64 * PART_BYTES > room
        assert await rig.tiers("mine", 64) == [HOST] * 64


async def test_an_unused_hint_lets_go_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetching, "HOLD_S", 0.2)
    async with running(tmp_path) as rig:
        await rig.use("p")
        await rig.crowd_out()
        await rig.hint((rig.handle(rig.name()), await rig.keys("p")))
        await rig.settled()
        assert rig.num_promoted == BLOCKS
        await until(lambda: rig.node.store.statistics().leased_bytes == 0)
        assert rig.node.prefetches is not None
        assert rig.node.prefetches.counts["unused"] == 1
        assert repr(rig.node.prefetches).endswith(f"0 hints, 0 of {HOST_BYTES // 32} bytes>")


async def test_a_withdrawal_ends_what_hints_hold(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.use("p")
        await rig.crowd_out()
        await rig.hint((rig.handle(rig.name()), await rig.keys("p")))
        await rig.settled()
        assert rig.node.store.statistics().leased_bytes
        await rig.node.registry.invalidate("tenant", "default", "", purge=False)
        await until(lambda: rig.node.store.statistics().leased_bytes == 0)
