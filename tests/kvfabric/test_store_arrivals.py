"""Blocks that somebody else sends into slots: promised, waited for, late, failed, withdrawn meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from kvfabric.errors import PeerClosed
from kvfabric.store.copying import checksum
from kvfabric.store.store import RequestGrant
from kvfabric.testing.store import (
    GRANT,
    PART_BYTES,
    SESSION,
    StoreRig,
    make_keys,
    make_layout,
    part_bytes,
)
from kvfabric.tiers.arena import PAGE_BYTES, Slots
from kvfabric.types import DEFAULT_TENANT, PUBLIC_TENANT, BlockKey, MissReason, TierName


class Sender:
    """Fills slots when told to. `ended`: it will not touch them any more."""

    def __init__(self, rig: StoreRig, keys: Sequence[BlockKey]) -> None:
        self.go = asyncio.Event()
        self.error: Exception | None = None
        self._rig, self._keys = rig, keys

    async def fill(self, slots: Slots) -> bytes:
        await self.go.wait()
        if self.error is not None:
            raise self.error
        sums = []
        for key, page in zip(self._keys, slots.first_pages.tolist(), strict=True):
            start = page * PAGE_BYTES
            memory = self._rig.store.arena_memory()[start : start + PART_BYTES]
            memory[:] = part_bytes(key)
            sums.append(checksum(memory))
        return b"".join(sums)


@asynccontextmanager
async def sending(
    rig: StoreRig,
    keys: Sequence[BlockKey],
    *,
    deadline_s: float = 60.0,
    grant: RequestGrant = GRANT,
) -> AsyncIterator[tuple[Sender, asyncio.Task[tuple[bool, str]]]]:
    """`keys` on their way under a request of their own."""
    rig.open("fetch", grant)
    reserved = rig.reserve("fetch", keys)
    assert set(reserved.states) == {0}
    sender = Sender(rig, keys)
    async with asyncio.TaskGroup() as group:
        receiving = rig.store.receive(
            SESSION, reserved.reservation, sender.fill, deadline_s=deadline_s
        )
        task = group.create_task(receiving)
        await asyncio.sleep(0)
        yield sender, task
        sender.go.set()
    rig.store.release(SESSION, ["fetch"])


async def test_what_comes_is_promised_and_loaded_once_it_is_there() -> None:
    async with StoreRig() as rig, asyncio.TaskGroup() as group:
        keys = make_keys(5)
        async with sending(rig, keys) as (sender, received):
            rig.open("get")
            matched = rig.store.match(SESSION, "get", b"".join(keys))
            assert (matched.num_blocks, set(matched.tiers)) == (5, {2})
            load = group.create_task(rig.load("get", keys))
            await asyncio.sleep(0.02)
            assert not load.done()
            sender.go.set()
            located = await load
            assert await received == (True, "")
        assert rig.copy(located) == [part_bytes(key) for key in keys]
        assert rig.confirm("get", keys, located) == 5
        assert rig.store.statistics().hits[TierName.PEER] == 5
        rig.store.release(SESSION, ["get"])
        assert await rig.get(keys) == [part_bytes(key) for key in keys]
        rig.store._residency.check()


async def test_after_what_is_here_and_with_all_parts_only() -> None:
    async with StoreRig(layout=make_layout(2)) as rig:
        keys = make_keys(4)
        await rig.put(keys[:2], shards=(0, 1))
        rig.open("fetch")
        reserved = rig.reserve("fetch", keys[2:], parent=keys[1])
        sender = Sender(rig, keys[2:])
        async with asyncio.TaskGroup() as group:
            group.create_task(
                rig.store.receive(SESSION, reserved.reservation, sender.fill, deadline_s=60.0)
            )
            await asyncio.sleep(0)
            assert rig.match("get", keys) == (2, MissReason.PENDING)  # shard 1 is not on its way
            rig.store.release(SESSION, ["get"])
            sender.go.set()
        rig.store.release(SESSION, ["fetch"])
        rig.store._residency.check()


async def test_what_does_not_come_is_a_miss_of_those_who_were_promised_it() -> None:
    async with StoreRig() as rig, asyncio.TaskGroup() as group:
        keys = make_keys(3)
        rig.open("fetch")
        reserved = rig.reserve("fetch", keys)
        sender = Sender(rig, keys)
        sender.error = PeerClosed("gone")
        receiving = group.create_task(_failing(rig, reserved.reservation, sender))
        await asyncio.sleep(0)
        assert rig.match("get", keys)[0] == 3
        load = group.create_task(rig.load("get", keys))
        await asyncio.sleep(0)
        sender.go.set()
        await receiving
        located = await load
        assert located.num_blocks == 0
        rig.store.release(SESSION, ["get", "fetch"])
        statistics = rig.store.statistics()
        assert statistics.used_bytes[TierName.HOST] == 0
        assert rig.match("again", keys)[0] == 0
        rig.store.release(SESSION, ["again"])
        rig.store._residency.check()


async def _failing(rig: StoreRig, reservation: int, sender: Sender) -> None:
    with pytest.raises(PeerClosed):
        await rig.store.receive(SESSION, reservation, sender.fill, deadline_s=60.0)


async def test_late_is_a_miss_at_once_and_its_slots_drain_until_the_sender_has_ended() -> None:
    async with StoreRig() as rig:
        keys = make_keys(3)
        async with sending(rig, keys, deadline_s=0.05) as (sender, received):
            assert rig.match("get", keys)[0] == 3
            located = await rig.load("get", keys)  # waits for the deadline, not for the sender
            assert (located.num_blocks, located.reason) == (0, MissReason.TOO_SLOW)
            assert not received.done()
            assert rig.store.statistics().draining_bytes == 3 * PART_BYTES
            rig.store._residency.check()
            rig.store.release(SESSION, ["get"])
            assert rig.match("next", keys) == (0, MissReason.PENDING)
            rig.store.release(SESSION, ["next"])
            sender.go.set()
            assert await received == (True, "")  # late, and good all the same
        assert rig.store.statistics().draining_bytes == 0
        assert await rig.get(keys) == [part_bytes(key) for key in keys]
        rig.store._residency.check()


async def test_late_blocks_of_a_public_prefix_drain_on_its_own_account() -> None:
    grant = replace(GRANT, public_blocks=2, public_tag=b"public\0\0")
    async with StoreRig() as rig:
        keys = make_keys(5)
        async with sending(rig, keys, deadline_s=0.01, grant=grant) as (_, received):
            await asyncio.sleep(0.05)
            accounts = {one.tenant: one for one in rig.store._host.accounts}
            assert accounts[PUBLIC_TENANT].detached == 2 * PART_BYTES
            assert accounts[DEFAULT_TENANT].detached == 3 * PART_BYTES
            assert not any(one.reserved for one in accounts.values())
            rig.store._residency.check()
        assert (await received)[0]
        assert accounts[PUBLIC_TENANT].ready == 2 * PART_BYTES
        assert not any(one.detached or one.reserved for one in accounts.values())
        rig.store._residency.check()


async def test_an_epoch_that_moved_meanwhile_keeps_it_out() -> None:
    async with StoreRig() as rig:
        keys = make_keys(3)
        async with sending(rig, keys) as (sender, received):
            assert rig.match("get", keys)[0] == 3
            state, rig.state = rig.state, None
            sender.go.set()
            assert await received == (False, MissReason.NO_EPOCH_LEASE)
            rig.state = state
            assert (await rig.load("get", keys)).num_blocks == 0
        rig.store.release(SESSION, ["get"])
        assert rig.match("again", keys)[0] == 0
        rig.store.release(SESSION, ["again"])
        rig.store._residency.check()
