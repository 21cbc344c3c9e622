"""The store's verbs: what is stored is what is read, and any doubt is a miss."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from kvfabric.errors import LocalProtocolError, RemoteProtocolError
from kvfabric.hashing import ROOT_PARENT
from kvfabric.protocol.messages import Located
from kvfabric.registry.state import RETIRED, RegistryState, TemplateVersion, Tenant
from kvfabric.store import copying, reading, runs, writing
from kvfabric.store.access import Access
from kvfabric.store.index import packed_keys
from kvfabric.store.store import BlockStore, RequestGrant, StoreLimits
from kvfabric.testing.store import (
    GRANT,
    PART_BYTES,
    SESSION,
    TAG,
    StoreRig,
    grant_of,
    make_keys,
    make_layout,
    part_bytes,
)
from kvfabric.tiers.arena import slot_bytes
from kvfabric.types import (
    DEFAULT_TENANT,
    PUBLIC_TENANT,
    BlockKey,
    Incarnation,
    MissReason,
    Segment,
    SessionId,
    TierName,
)

KEYS = make_keys(6)
INCARNATION = Incarnation(b"incarnation-0001")
SEGMENT = Segment("greeting", "v1", INCARNATION, 2 * 64)
TEMPLATE = TemplateVersion("greeting", "v1", INCARNATION, b"text")
WITH_TEMPLATE = replace(GRANT, segments=(SEGMENT,))
SERVING = RegistryState(templates=MappingProxyType({("greeting", "v1"): TEMPLATE}))
WITHDRAWN = RegistryState(
    version=1,
    templates=MappingProxyType({("greeting", "v1"): replace(TEMPLATE, state=RETIRED)}),
)


async def test_what_is_read_is_what_was_stored() -> None:
    async with StoreRig() as rig:
        assert await rig.put(KEYS) == 6
        assert await rig.get([*KEYS, *make_keys(1, seed=1)]) == [part_bytes(key) for key in KEYS]
        assert rig.match("again", [*KEYS, *make_keys(1, seed=1)]) == (6, "absent")


@pytest.mark.parametrize("num_bytes", [1, 4095, 4097, 300_000, 3 * copying.CHUNK_BYTES])
async def test_parts_of_any_size(num_bytes: int) -> None:
    layout = make_layout(part_bytes=num_bytes)
    limits = StoreLimits(host_bytes=16 << 20, max_blocks=16, lease_share=1.0)
    async with StoreRig(layout=layout, limits=limits) as rig:
        rig.arena.view[:] = b"\xff" * len(rig.arena.view)
        assert await rig.put(KEYS) == 6
        assert await rig.get(KEYS) == [part_bytes(key, 0, num_bytes) for key in KEYS]
        rig.match("r", KEYS)
        located = await rig.load("r", KEYS)
        [offset] = np.frombuffer(located.offsets[:8], dtype="<u8").tolist()
        padding = bytes(rig.arena.view[offset + num_bytes : offset + slot_bytes(num_bytes)])
        assert padding == bytes(len(padding))


async def test_a_block_is_ready_when_all_its_parts_are() -> None:
    layout = make_layout(num_parts=3)
    async with StoreRig(layout=layout) as rig:
        assert await rig.put(KEYS, shards=[0, 2]) == 6
        assert rig.match("early", KEYS) == (0, "absent")
        assert not rig.events.present
        rig.open("writer")
        rig.reserve("writer", KEYS, shard=1)
        assert rig.match("early", KEYS) == (0, "pending")
        rig.store.quiet(SESSION)
        assert await rig.put(KEYS, shards=[1]) == 6
        for shard in range(3):
            assert await rig.get(KEYS, shard=shard) == [part_bytes(key, shard) for key in KEYS]
        assert len(rig.events.present) == 6
        assert rig.store.statistics().stored_blocks == 6


async def test_the_first_of_two_writers_wins() -> None:
    async with StoreRig() as rig:
        rig.open("a")
        rig.open("b")
        first = rig.reserve("a", KEYS[:4])
        second = rig.reserve("b", KEYS)
        assert list(second.states) == [2, 2, 2, 2, 0, 0]
        assert sum((await rig.commit(second, KEYS)).states) == 2
        assert sum((await rig.commit(first, KEYS[:4])).states) == 4
        assert list(rig.reserve("a", KEYS).states) == [1] * 6
        assert await rig.get(KEYS) == [part_bytes(key) for key in KEYS]


async def test_a_child_is_stored_below_a_parent_that_is_known() -> None:
    async with StoreRig() as rig:
        assert rig.store.statistics().num_requests == 0
        rig.open("w")
        orphan = rig.reserve("w", KEYS[3:], parent=KEYS[2])
        assert (list(orphan.states), orphan.reason) == ([3] * 3, "no_parent")
        rig.reserve("w", KEYS[:3])
        assert list(rig.reserve("w", KEYS[3:], parent=KEYS[2]).states) == [0] * 3


async def test_aborting_gives_everything_back() -> None:
    async with StoreRig() as rig:
        rig.open("w")
        reserved = rig.reserve("w", KEYS)
        rig.store.abort(SESSION, reserved.reservation)
        rig.store.abort(SESSION, reserved.reservation)
        assert rig.store.statistics().reserved_bytes == 0
        assert rig.store._index.free_rows == rig.limits.max_blocks
        committed = await rig.commit(reserved, KEYS)
        assert sum(committed.states) == 0


async def test_a_reservation_may_be_committed_in_pieces() -> None:
    async with StoreRig() as rig:
        rig.open("w")
        reserved = rig.reserve("w", KEYS)
        for at in (3, 1, 1):
            rig.window[:PART_BYTES] = part_bytes(KEYS[at])
            index = np.array([at], dtype="<u4").tobytes()
            await rig.store.commit(SESSION, reserved.reservation, index, rig.window, bytes(8))
        rig.store.abort(SESSION, reserved.reservation)
        assert rig.store.statistics().num_blocks[TierName.HOST] == 2
        rig.store._residency.check()


@pytest.mark.parametrize(
    ("indexes", "offsets"),
    [([0, 0], [0, 4096]), ([6], [0]), ([0], [256 * 4096 - 1]), ([0], [1 << 63]), ([0], [0, 1])],
)
async def test_a_commit_out_of_bounds_is_a_protocol_error(
    indexes: list[int], offsets: list[int]
) -> None:
    async with StoreRig() as rig:
        rig.open("w")
        reserved = rig.reserve("w", KEYS)
        with pytest.raises(RemoteProtocolError):
            await rig.store.commit(
                SESSION,
                reserved.reservation,
                np.array(indexes, dtype="<u4").tobytes(),
                rig.window,
                np.array(offsets, dtype="<u8").tobytes(),
            )


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.match(SESSION, "r", bytes(31)),
        lambda s: s.reserve(SESSION, "r", ROOT_PARENT, KEYS[0] * 2, 0, 0),
        lambda s: s.reserve(SESSION, "r", bytes(31), KEYS[0], 0, 0),
        lambda s: s.reserve(SESSION, "r", ROOT_PARENT, KEYS[0], 0, 9),
        lambda s: s.confirm(SESSION, "r", KEYS[0], bytes(3), 0, 0),
    ],
)
async def test_malformed_vectors_are_protocol_errors(
    call: Callable[[BlockStore], object],
) -> None:
    async with StoreRig() as rig:
        rig.open("r")
        with pytest.raises(RemoteProtocolError):
            call(rig.store)


async def test_another_tenants_blocks_are_absent_even_under_the_same_key() -> None:
    async with StoreRig() as rig:
        await rig.put(KEYS)
        assert rig.match("spy", KEYS, grant_of("t-other")) == (0, "absent")
        refused = rig.reserve("spy", KEYS)
        assert (list(refused.states), refused.reason) == ([3] * 6, "no_parent")


async def test_public_blocks_are_shared_and_charged_to_the_public_namespace() -> None:
    async with StoreRig() as rig:
        mine, yours = (
            replace(grant_of(name), public_tag=b"public\0\0", public_blocks=4)
            for name in ("t-a", "t-b")
        )
        await rig.put(KEYS, grant=mine)
        assert rig.match("r", KEYS, yours) == (4, "absent")
        usage = {tenant.tenant: tenant.host_bytes for tenant in rig.store.statistics().tenants}
        assert usage[PUBLIC_TENANT] == 4 * PART_BYTES
        assert usage[mine.tenant] == 2 * PART_BYTES


# -- withdrawal, fences, opt-outs --------------------------------------------------------------------


async def test_a_withdrawn_template_is_not_served_and_comes_back_warm() -> None:
    async with StoreRig() as rig:
        rig.state = SERVING
        await rig.put(KEYS, grant=WITH_TEMPLATE)
        assert rig.match("r", KEYS, WITH_TEMPLATE)[0] == 6
        located = await rig.load("r", KEYS)
        rig.state = WITHDRAWN
        assert rig.match("r", KEYS, WITH_TEMPLATE) == (0, "withdrawn")
        assert (await rig.load("r", KEYS)).num_blocks == 0
        assert rig.confirm("r", KEYS, located) == 0
        # What the router grants now: everything before the template's text.
        before = replace(GRANT, cacheable_blocks=2)
        assert rig.match("new", KEYS, before) == (2, "withdrawn")
        rig.state = SERVING
        assert rig.match("r2", KEYS, WITH_TEMPLATE)[0] == 6


class Unfenced(Access):
    """The guard removed: nobody asks the registry."""

    def _fence(self, grant: RequestGrant) -> MissReason:
        return MissReason.NONE


async def test_without_the_fence_the_withdrawn_block_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvfabric.store.store.Access", Unfenced)
    async with StoreRig() as rig:
        rig.state = SERVING
        await rig.put(KEYS, grant=WITH_TEMPLATE)
        rig.state = WITHDRAWN
        assert rig.match("r", KEYS, WITH_TEMPLATE)[0] == 6


async def test_a_commit_is_refused_when_an_epoch_moved() -> None:
    async with StoreRig() as rig:
        grant = replace(GRANT, epochs=(("fabric", 0),))
        rig.open("w", grant)
        reserved = rig.reserve("w", KEYS)
        rig.state = RegistryState(version=1, epochs=MappingProxyType({"fabric": 1}))
        committed = await rig.commit(reserved, KEYS)
        assert (sum(committed.states), committed.reason) == (0, "fenced")
        assert rig.store.statistics().reserved_bytes == 0
        assert list(rig.reserve("w", KEYS).states) == [3] * 6


async def test_an_epoch_that_moves_while_bytes_are_copied_stores_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with StoreRig() as rig:
        rig.open("w", replace(GRANT, epochs=(("fabric", 0),)))
        reserved = rig.reserve("w", KEYS)
        moved = RegistryState(version=1, epochs=MappingProxyType({"fabric": 1}))
        # Asked once before the copy and once after it.
        answers = [moved, RegistryState()]
        monkeypatch.setattr(rig.store._writer._access, "_registry", lambda: answers.pop())
        committed = await rig.commit(reserved, KEYS)
        assert (sum(committed.states), committed.reason, answers) == (0, "fenced", [])
        assert rig.store.statistics().used_bytes[TierName.HOST] == 0
        assert rig.arena.free_bytes == rig.arena.size_bytes


async def test_without_an_epoch_lease_everything_misses() -> None:
    async with StoreRig() as rig:
        await rig.put(KEYS)
        rig.state = None
        assert rig.match("r", KEYS) == (0, "no_epoch_lease")
        assert rig.reserve("r", make_keys(2, seed=1)).reason == "no_epoch_lease"


async def test_opting_out_of_reading_or_storing() -> None:
    async with StoreRig() as rig:
        await rig.put(KEYS)
        assert rig.match("r", KEYS, replace(GRANT, no_read=True)) == (0, "no_read")
        rig.open("w", replace(GRANT, no_store=True))
        assert rig.reserve("w", make_keys(2, seed=1)).reason == "no_store"
        out = Tenant(DEFAULT_TENANT, "default", opted_out=True)
        rig.state = RegistryState(tenants=MappingProxyType({DEFAULT_TENANT: out}))
        assert rig.match("r2", KEYS) == (0, "no_read")
        assert rig.reserve("r2", make_keys(2, seed=1)).reason == "no_store"


async def test_blocks_older_than_the_tenants_limit_miss() -> None:
    async with StoreRig() as rig:
        limited = Tenant(DEFAULT_TENANT, "default", max_age_s=60.0)
        rig.state = RegistryState(tenants=MappingProxyType({DEFAULT_TENANT: limited}))
        await rig.put(KEYS)
        rig.clock.now += 60
        assert rig.match("r", KEYS)[0] == 6
        rig.clock.now += 1
        assert rig.match("r2", KEYS) == (0, "expired")


async def test_blocks_too_old_to_be_read_are_stored_anew() -> None:
    async with StoreRig() as rig:
        limited = Tenant(DEFAULT_TENANT, "default", max_age_s=60.0)
        rig.state = RegistryState(tenants=MappingProxyType({DEFAULT_TENANT: limited}))
        await rig.put(KEYS[:3])
        rig.clock.now += 40
        await rig.put(KEYS[3:], parent=KEYS[2])
        rig.clock.now += 30
        assert rig.match("r", KEYS) == (0, "expired")
        assert await rig.put(KEYS) == 3
        assert len(await rig.get(KEYS)) == 6
        # A part of a chain, below a parent that is only known because of it.
        rig.store._drop(int(rig.store._index.lookup(packed_keys(KEYS[4]))[0]))
        rig.clock.now += 31
        assert await rig.put(KEYS[5:], parent=KEYS[4]) == 1
        rig.store._residency.check()


async def test_beyond_what_is_cacheable_nothing_is_read_or_stored() -> None:
    async with StoreRig() as rig:
        rig.open("w", replace(GRANT, cacheable_blocks=4))
        reserved = rig.reserve("w", KEYS)
        assert (list(reserved.states), reserved.reason) == ([0] * 4 + [3] * 2, "withdrawn")
        assert list(rig.reserve("w", KEYS[4:], parent=KEYS[3]).states) == [3, 3]


# -- corruption ----------------------------------------------------------------------------------------


async def test_a_corrupt_part_is_found_by_the_reader_and_by_the_scrubber() -> None:
    async with StoreRig() as rig:
        await rig.put(KEYS)
        rig.match("r", KEYS)
        located = await rig.load("r", KEYS)
        offset = int(np.frombuffer(located.offsets, dtype="<u8")[3])
        rig.arena.view[offset + 7] ^= 1
        assert rig.copy(located) == [part_bytes(key) for key in KEYS[:3]]
        rig.store.release(SESSION, ["r"])
        assert await rig.store.scrub(1 << 20) == 1
        assert await rig.store.scrub(1 << 20) == 0
        assert rig.match("r", KEYS) == (3, "absent")
        assert rig.store.statistics().corrupt == 1
        rig.store._residency.check()


async def test_what_a_reader_doubts_is_looked_at_and_only_the_corrupt_goes() -> None:
    """A leased part that is corrupt here is taken out at once; one that is not stays, as does what the
    request does not lease."""
    async with StoreRig() as rig:
        await rig.put(KEYS)
        rig.match("r", KEYS[:4])
        located = await rig.load("r", KEYS[:4])
        offset = int(np.frombuffer(located.offsets, dtype="<u8")[3])
        rig.arena.view[offset + 7] ^= 1

        async def recheck(request_id: str, keys: Sequence[BlockKey]) -> int:
            return await rig.store.recheck(SESSION, request_id, b"".join(keys), 0, 0)

        assert await recheck("r", KEYS[:3]) == 0
        assert await recheck("stranger", KEYS) == 0
        assert await recheck("r", KEYS[4:]) == 0
        assert await recheck("r", KEYS) == 1
        assert rig.confirm("r", KEYS[:4], located) == 3
        rig.store.release(SESSION, ["r"])
        assert rig.match("again", KEYS) == (3, "absent")
        assert rig.store.statistics().corrupt == 1
        rig.store._residency.check()


async def test_without_the_checksum_the_corrupt_part_is_used() -> None:
    async with StoreRig() as rig:
        await rig.put(KEYS)
        rig.match("r", KEYS)
        located = await rig.load("r", KEYS)
        rig.arena.view[int(np.frombuffer(located.offsets, dtype="<u8")[3]) + 7] ^= 1
        copies = rig.copy(located, verify=False)
        assert len(copies) == 6
        assert copies[3] != part_bytes(KEYS[3])


async def test_scrubbing_goes_round_in_bounded_steps() -> None:
    async with StoreRig() as rig:
        await rig.put(KEYS)
        seen = []
        for _ in range(6):
            await rig.store.scrub(2 * PART_BYTES)
            seen.append(rig.store._scrubber._last_row)
        assert seen == [2, 4, 0, 2, 4, 0]


async def test_purging_strikes_a_templates_blocks_and_nothing_before() -> None:
    async with StoreRig() as rig:
        rig.state = SERVING
        await rig.put(KEYS, grant=WITH_TEMPLATE)
        assert await rig.store.purge([INCARNATION]) == 4
        assert rig.match("r", KEYS, WITH_TEMPLATE) == (2, "absent")
        assert len(rig.events.present) == 2
        rig.store._residency.check()


async def rig_with_template(rig: StoreRig) -> Located:
    """KEYS stored under a template, and where the last four of them, which are its blocks, lie."""
    rig.state = SERVING
    await rig.put(KEYS, grant=WITH_TEMPLATE)
    rig.match("reader", KEYS, WITH_TEMPLATE)
    return await rig.load("reader", KEYS)


def bytes_at(rig: StoreRig, located: Located) -> list[bytes]:
    return rig.copy(located, verify=False)[2:]


async def test_purged_bytes_are_zeroed() -> None:
    async with StoreRig() as rig:
        located = await rig_with_template(rig)
        rig.store.release(SESSION, ["reader"])
        await rig.store.purge([INCARNATION])
        assert bytes_at(rig, located) == [bytes(PART_BYTES)] * 4
        assert rig.arena.free_bytes == rig.arena.size_bytes - 2 * PART_BYTES
        rig.store._residency.check()


async def test_purged_bytes_are_zeroed_when_the_last_reader_is_done() -> None:
    async with StoreRig() as rig:
        located = await rig_with_template(rig)
        await rig.store.purge([INCARNATION])
        assert bytes_at(rig, located) == [part_bytes(key) for key in KEYS[2:]]
        rig.store.release(SESSION, ["reader"])
        assert rig.arena.free_bytes == rig.arena.size_bytes - 6 * PART_BYTES
        await rig.store._purger.wipe()
        assert bytes_at(rig, located) == [bytes(PART_BYTES)] * 4
        assert rig.arena.free_bytes == rig.arena.size_bytes - 2 * PART_BYTES
        rig.store._residency.check()


async def test_a_slot_written_anew_while_it_is_scrubbed_is_no_corruption() -> None:
    async with StoreRig() as rig:
        await rig.put(KEYS[:1])
        offset = int(np.frombuffer((await located_of(rig, KEYS[:1])).offsets, dtype="<u8")[0])
        rig.arena.view[offset] ^= 0xFF
        row = int(rig.store._index.lookup(packed_keys(KEYS[0]))[0])
        async with asyncio.TaskGroup() as group:
            scrubbing = group.create_task(rig.store.scrub(1 << 20))
            await asyncio.sleep(0)
            rig.store._drop(row)
            assert await rig.put(KEYS[:1]) == 1
        assert scrubbing.result() == 0
        assert rig.match("r", KEYS[:1])[0] == 1


async def located_of(rig: StoreRig, keys: list[BlockKey]) -> Located:
    rig.match("where", keys)
    located = await rig.load("where", keys)
    rig.store.release(SESSION, ["where"])
    return located


# -- bounds of one call ------------------------------------------------------------------------------


async def test_one_message_is_looked_at_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    async with StoreRig() as rig:
        await rig.put(KEYS)
        rig.match("all", KEYS)
        located = await rig.load("all", KEYS)
        monkeypatch.setattr(reading, "MAX_KEYS", 4)
        assert rig.match("r", KEYS) == (4, "too_many")
        assert rig.match("r", KEYS[:4]) == (4, "none")
        some = await rig.load("all", KEYS)
        assert (some.num_blocks, some.reason) == (4, "too_many")
        confirmed = rig.store.confirm(SESSION, "all", b"".join(KEYS), located.generations, 0, 0)
        assert (confirmed.num_blocks, confirmed.reason) == (4, "too_many")


async def test_what_one_reserve_may_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MAX_RESERVED", 4)
    async with StoreRig() as rig:
        rig.open("w")
        reserved = rig.reserve("w", KEYS)
        assert (list(reserved.states), reserved.reason) == ([0] * 4 + [3] * 2, "too_many")
        assert sum((await rig.commit(reserved, KEYS)).states) == 4
        assert list(rig.reserve("w", KEYS[4:], parent=KEYS[3]).states) == [0] * 2
        assert rig.store.statistics().refusals["too_many"] == 2


async def test_room_is_made_ahead_of_what_is_reserved_next() -> None:
    async with StoreRig(num_slots=256) as rig:
        await rig.put(make_keys(254))
        await rig.put(make_keys(2, seed=1))
        for _ in range(4):
            await asyncio.sleep(0)
        assert rig.store.statistics().num_blocks[TierName.HOST] == 252
        rig.store._residency.check()


async def test_a_snapshot_of_many_short_runs_comes_in_small_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "SNAPSHOT_RUNS", 2)
    async with StoreRig() as rig:
        for seed in range(5):
            await rig.put(make_keys(2, seed=seed))
        steps = list(rig.store.resident_runs(TierName.HOST, 1000))
        assert [len(step) for step in steps] == [2, 2, 1]
        keys = b"".join(run.keys for step in steps for run in step)
        assert {(TAG, keys[at : at + 8]) for at in range(0, len(keys), 8)} == rig.events.present


# -- cancellation, order of life ---------------------------------------------------------------------


async def test_a_cancelled_commit_stores_nothing_and_leaks_nothing() -> None:
    async with StoreRig() as rig:
        rig.open("w")
        await rig.put(make_keys(1, seed=1))
        before = rig.store.statistics()
        reserved = rig.reserve("w", KEYS)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(rig.commit(reserved, KEYS))
            await asyncio.sleep(0)
            task.cancel()
        rig.store.abort(SESSION, reserved.reservation)
        assert rig.store.statistics() == before
        assert rig.arena.free_bytes == rig.arena.size_bytes - PART_BYTES
        assert await rig.put(KEYS) == 6


@pytest.mark.parametrize("end", [BlockStore.end_rights, BlockStore.quiet])
async def test_rights_that_end_during_a_commit_store_nothing(
    end: Callable[[BlockStore, SessionId], None],
) -> None:
    async with StoreRig() as rig:
        rig.open("w")
        reserved = rig.reserve("w", KEYS)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(rig.commit(reserved, KEYS))
            await asyncio.sleep(0)
            end(rig.store, SESSION)
        assert sum(task.result().states) == 0
        assert rig.store.statistics().used_bytes[TierName.HOST] == 0
        assert rig.arena.free_bytes == rig.arena.size_bytes


async def test_unknown_sessions_and_requests_miss() -> None:
    async with StoreRig() as rig:
        await rig.put(KEYS)
        nobody = SessionId(b"not-there-at-all")
        assert rig.store.match(nobody, "r", b"".join(KEYS)).reason == "no_handle"
        assert rig.store.match(SESSION, "never", b"".join(KEYS)).reason == "no_handle"
        assert (await rig.load("never", KEYS)).reason == "no_handle"
        assert rig.reserve("never", KEYS).reason == "no_handle"
        rig.store.end_rights(nobody)
        rig.store.quiet(nobody)
        rig.store.release(nobody, ["r"])
        rig.store.abort(nobody, 1)


async def test_blocks_that_were_not_leased_are_not_located() -> None:
    async with StoreRig() as rig:
        await rig.put(KEYS)
        rig.match("r", KEYS[:2])
        located = await rig.load("r", KEYS)
        assert (located.num_blocks, located.reason) == (2, "absent")


async def test_before_the_arena_is_there_the_host_tier_misses() -> None:
    rig = StoreRig()
    with rig.arena:
        async with rig.store as store:
            store.open_session(SESSION, rig.layout)
            rig.open("r")
            assert store.match(SESSION, "r", KEYS[0]).reason == "tier_down"
            assert rig.reserve("r", KEYS).reason == "tier_down"
            store.attach_arena(rig.arena)
            assert list(rig.reserve("r", KEYS).states) == [0] * 6
            with pytest.raises(LocalProtocolError):
                store.attach_arena(rig.arena)


async def test_a_snapshot_says_what_the_events_said() -> None:
    async with StoreRig() as rig:
        await rig.put(KEYS)
        await rig.put(make_keys(3, seed=1), grant=grant_of("t-a"))
        slices = list(rig.store.resident_runs(TierName.HOST, 4))
        assert len(slices) == 3
        runs = [run for some in slices for run in some]
        assert runs[0].parent == bytes(8)
        assert runs[1].parent == KEYS[3][:8]
        found = {
            (run.namespace_tag, run.keys[at : at + 8])
            for run in runs
            for at in range(0, len(run.keys), 8)
        }
        assert found == rig.events.present
        assert list(rig.store.resident_runs(TierName.SSD, 4)) == []


async def test_statistics_name_what_happened() -> None:
    async with StoreRig(num_slots=4) as rig:
        await rig.put(KEYS[:4])
        await rig.get(KEYS)
        statistics = rig.store.statistics()
        assert statistics.hits[TierName.HOST] == 4
        assert statistics.misses[MissReason.ABSENT] == 2
        assert statistics.stored_bytes == 4 * PART_BYTES
        assert statistics.used_bytes[TierName.HOST] == statistics.capacity_bytes[TierName.HOST]
        await rig.put(make_keys(4, seed=1))
        assert rig.store.statistics().evictions == 4
        assert "4 blocks" in repr(rig.store)
