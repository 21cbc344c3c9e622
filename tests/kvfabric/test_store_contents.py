"""What a store hands to its successor: everything it holds comes back, and no right does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvfabric.errors import CapacityError, RemoteProtocolError
from kvfabric.store import contents as contents_module
from kvfabric.store.contents import Contents
from kvfabric.testing.store import (
    GRANT,
    PART_BYTES,
    SESSION,
    StoreRig,
    grant_of,
    make_keys,
    make_layout,
    part_bytes,
)
from kvfabric.tiers.arena import Arena
from kvfabric.tiers.write_budget import TenantBudgets
from kvfabric.types import TenantId, TierName

KEYS = make_keys(6)


class HeirRig(StoreRig):
    """Over the arena of another rig and what that held; both stay open."""

    def __init__(self, earlier: StoreRig, held: Contents, **options: object) -> None:
        super().__init__(layout=earlier.layout, limits=earlier.limits, **options)  # type: ignore[arg-type]
        self.arena.close()
        descriptor = earlier.arena.read_only_fd()
        with _closing(descriptor):
            self.arena = Arena.adopt(descriptor)
        self.clock = earlier.clock
        self.store._clock = earlier.clock
        self.store._leases._clock = earlier.clock
        self.held = held
        self.events.present = set(earlier.events.present)

    async def __aenter__(self) -> HeirRig:
        await self.store.__aenter__()
        self.store.attach_arena(self.arena)
        self.store.restore(self.held)
        return self


@contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    import os

    try:
        yield
    finally:
        os.close(descriptor)


async def hand_over(rig: StoreRig) -> Contents:
    await rig.store.freeze()
    held = rig.store.contents()
    return msgspec.msgpack.decode(msgspec.msgpack.encode(held), type=Contents)


def used(rig: StoreRig) -> object:
    statistics = rig.store.statistics()
    return (
        statistics.num_blocks[TierName.HOST],
        statistics.used_bytes[TierName.HOST],
        statistics.tenants,
        rig.arena.free_bytes,
    )


@pytest.mark.parametrize("num_parts", [1, 3])
async def test_contents_come_back_whole(num_parts: int) -> None:
    """Blocks of two tenants, one of them incomplete, keep bytes, charges, generations and age."""
    shards = tuple(range(num_parts))
    async with StoreRig(layout=make_layout(num_parts)) as rig:
        await rig.put(KEYS, shards=shards)
        await rig.put(make_keys(3, seed=1), grant=grant_of("acme"), shards=shards)
        await rig.put(make_keys(2, seed=2), shards=shards[:1])
        for shard in shards:
            assert len(await rig.get(KEYS[:4], shard=shard)) == 4
        before = used(rig)
        async with HeirRig(rig, await hand_over(rig)) as heir:
            assert used(heir) == before
            heir.store._residency.check()
            for shard in shards:
                assert await heir.get(KEYS, shard=shard) == [part_bytes(k, shard) for k in KEYS]
            assert len(await heir.get(make_keys(3, seed=1), grant=grant_of("acme"))) == 3
            assert heir.match("other", KEYS, grant_of("acme"))[0] == 0
            heir.store.release(SESSION, ["other"])
            longer = make_keys(9)
            assert await heir.put(longer[6:], parent=longer[5], shards=shards) == 3
            heir.store._residency.check()
            rows = heir.store._index.highest_row
            assert heir.store._index.stored_at.array[1:rows].min() > 0


async def test_a_full_heir_evicts_in_order_and_never_twice() -> None:
    async with StoreRig(num_slots=16) as rig:
        for seed in range(4):
            rig.clock.now += 1
            await rig.put(make_keys(4, seed=seed))
        async with HeirRig(rig, await hand_over(rig)) as heir:
            assert heir.arena.free_bytes == 0
            assert await heir.put(make_keys(4, seed=9)) == 4
            heir.store._residency.check()
            assert heir.match("old", make_keys(4, seed=0))[0] == 0, "the oldest went first"
            assert len(await heir.get(make_keys(4, seed=3))) == 4


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "guard removed"])
async def test_leases_come_back_as_draining_until_quiet(
    guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader of the earlier daemon may still copy: its blocks keep their slots however full the arena
    gets, its right is gone, and quiet frees them. Without the holds (the twin) they are written anew."""
    if not guarded:
        monkeypatch.setattr(contents_module, "_restore_session", _without_requests)
    async with StoreRig(num_slots=8) as rig:
        await rig.put(KEYS[:4])
        rig.match("r", KEYS[:4])
        located = await rig.load("r", KEYS[:4])
        async with HeirRig(rig, await hand_over(rig)) as heir:
            heir.clock.now += 1000
            statistics = heir.store.statistics()
            assert (statistics.draining_bytes == 4 * PART_BYTES) == guarded
            assert statistics.leased_bytes == 0
            heir.open("w")
            for seed in range(1, 6):
                await heir.put(make_keys(8, seed=seed))
            right = heir.copy(located, verify=False) == [part_bytes(key) for key in KEYS[:4]]
            assert right == guarded
            if guarded:
                assert heir.confirm("r", KEYS[:4], located) == 0
                assert heir.store.match(SESSION, "r", b"".join(KEYS[:4])).num_blocks == 0
                heir.store.end_rights(SESSION)
                heir.store.quiet(SESSION)
                statistics = heir.store.statistics()
                assert (statistics.draining_bytes, statistics.num_sessions) == (0, 0)
                heir.store._residency.check()


def _without_requests(entry, index, leases, rows) -> None:  # type: ignore[no-untyped-def]
    _RESTORE_SESSION(msgspec.structs.replace(entry, requests=()), index, leases, rows)


_RESTORE_SESSION = contents_module._restore_session


async def test_detached_slots_stay_set_apart() -> None:
    """A block that was discarded while it was read: its slot drains on, and is zeroed if it must be."""
    async with StoreRig(num_slots=8) as rig:
        await rig.put(KEYS[:4])
        rig.match("r", KEYS[:4])
        located = await rig.load("r", KEYS[:4])
        rows = rig.store._index.lookup(np.frombuffer(b"".join(KEYS[:4]), np.uint64).reshape(-1, 4))
        rig.store._drop(int(rows[3]))
        rig.store._drop(int(rows[2]), wipe=True)
        async with HeirRig(rig, await hand_over(rig)) as heir:
            heir.store._residency.check()
            assert heir.store.statistics().draining_bytes >= 4 * PART_BYTES
            assert await heir.put(make_keys(2, seed=1)) == 2
            assert heir.copy(located, verify=False) == [part_bytes(key) for key in KEYS[:4]]
            heir.store.release(SESSION, ["r"])
            await heir.store._purger.wipe()
            assert heir.store.statistics().draining_bytes == 0
            heir.store._residency.check()
            assert heir.copy(located, verify=False)[2] == bytes(PART_BYTES)


async def test_a_request_without_leases_keeps_its_grant() -> None:
    async with StoreRig() as rig:
        await rig.put(KEYS)
        rig.open("r", replace(GRANT, epochs=()))
        async with HeirRig(rig, await hand_over(rig)) as heir:
            assert heir.store.match(SESSION, "r", b"".join(KEYS)).num_blocks == 6


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "guard removed"])
async def test_a_reservation_of_before_never_names_one_of_after(guarded: bool) -> None:
    """Numbers go on: a commit that was under way when the daemon changed stores nothing. Counted anew (the
    twin), it fills another reservation of its session, and other bytes stand under those keys."""
    async with StoreRig() as rig:
        rig.open("r")
        stale = rig.reserve("r", KEYS[:2])
        held = await hand_over(rig)
        if not guarded:
            held = msgspec.structs.replace(held, num_reservations=0)
        async with HeirRig(rig, held) as heir:
            assert heir.store.statistics().reserved_bytes == 0
            others = make_keys(2, seed=1)
            heir.open("r")
            fresh = heir.reserve("r", others)
            assert (fresh.reservation != stale.reservation) == guarded
            states = (await heir.commit(stale, KEYS[:2])).states
            assert (states == b"\0\0") == guarded
            located = await _locate(heir, others)
            wrong = heir.copy(located) != [part_bytes(key) for key in others[: located.num_blocks]]
            assert wrong != guarded


async def _locate(rig: StoreRig, keys):  # type: ignore[no-untyped-def]
    rig.match("l", keys)
    return await rig.load("l", keys)


async def test_an_index_that_is_too_small_refuses() -> None:
    async with StoreRig() as rig:
        await rig.put(make_keys(20))
        held = await hand_over(rig)
        rig.limits = replace(rig.limits, max_blocks=16)
        heir = HeirRig(rig, held)
        with pytest.raises(CapacityError, match="16 blocks"):
            async with heir:
                pass
        await heir.store.__aexit__(None, None, None)
        heir.arena.close()


@pytest.mark.parametrize("column", ["pages", "parents", "ordinals", "checksums", "keys"])
async def test_contents_that_contradict_themselves_are_refused(column: str) -> None:
    async with StoreRig() as rig:
        await rig.put(KEYS)
        held = await hand_over(rig)
        value = getattr(held, column)
        wrong = {
            "pages": value[:4] * (len(value) // 4),
            "parents": b"\xff" * len(value),
            "ordinals": b"\x09" * len(value),
        }.get(column, value[:-1])
        heir = HeirRig(rig, msgspec.structs.replace(held, **{column: wrong}))
        with pytest.raises(RemoteProtocolError):
            async with heir:
                pass
        await heir.store.__aexit__(None, None, None)
        heir.arena.close()


async def test_a_thawed_store_goes_on(tmp_path: Path) -> None:
    async with StoreRig() as rig:
        await rig.put(KEYS)
        await hand_over(rig)
        rig.store.thaw()
        assert await rig.get(KEYS) == [part_bytes(key) for key in KEYS]
        rig.store._residency.check()


async def test_what_tenants_may_still_write_to_ssd_is_handed_over() -> None:
    """Neither full again nor empty, of a tenant that the heir hears of before or after."""
    now = 1000.0
    async with StoreRig() as rig:
        rig.state = None
        budgets = rig.store._residency.write_budgets = TenantBudgets(lambda: now)
        budgets.configure({})
        budgets.configure({TenantId("t-1"): 24 * 4096, TenantId("t-2"): 24 * 4096})
        assert budgets.take(TenantId("t-1"), 3000)
        held = await hand_over(rig)
        now += 1
        for is_known in (False, True):
            async with StoreRig() as heir:
                heir.state = None  # nobody else tells of tenants
                of_heir = heir.store._residency.write_budgets = TenantBudgets(lambda: now)
                if is_known:
                    of_heir.configure(dict.fromkeys((TenantId("t-1"), TenantId("t-2")), 24 * 4096))
                heir.store.restore(held)
                of_heir.configure({TenantId("t-1"): 24 * 4096, TenantId("t-2"): 24 * 4096})
                left = {tenant: level.left for tenant, level in of_heir.levels().items()}
                assert left == {"t-1": pytest.approx(1096 + 4096 / 3600), "t-2": 4096}
