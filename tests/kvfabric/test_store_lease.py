"""Rights end by time; memory is freed by proof."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from kvfabric.errors import Overloaded, RemoteProtocolError
from kvfabric.protocol.messages import Located
from kvfabric.registry.state import RegistryState, TemplateVersion
from kvfabric.store import lease
from kvfabric.store.lease import LeaseBook, Request
from kvfabric.store.store import StoreLimits
from kvfabric.testing.store import (
    GRANT,
    PART_BYTES,
    SESSION,
    StoreRig,
    make_keys,
    make_layout,
    part_bytes,
)
from kvfabric.types import Incarnation, Segment, SessionId

KEYS = make_keys(4)


async def rig_with_chain(rig: StoreRig) -> Located:
    """KEYS are stored, matched and located for request "reader"."""
    await rig.put(KEYS)
    assert rig.match("reader", KEYS)[0] == 4
    return await rig.load("reader", KEYS)


async def press(rig: StoreRig) -> None:
    """Store chains as long as the arena, so that everything that can go does."""
    for seed in range(1, 4):
        await rig.put(make_keys(8, seed=seed))


async def test_matching_again_renews_and_counts_nothing_twice() -> None:
    async with StoreRig() as rig:
        await rig_with_chain(rig)
        rig.clock.now += 20
        assert rig.match("reader", KEYS)[0] == 4
        rig.clock.now += 20
        located = await rig.load("reader", KEYS)
        assert rig.confirm("reader", KEYS, located) == 4
        assert rig.store.statistics().leased_bytes == 4 * PART_BYTES
        rig.store.release(SESSION, ["reader", "reader", "unknown"])
        assert rig.store.statistics().leased_bytes == 0


async def test_a_longer_match_extends_the_lease() -> None:
    async with StoreRig() as rig:
        await rig.put(KEYS)
        assert rig.match("reader", KEYS[:2])[0] == 2
        assert rig.match("reader", KEYS)[0] == 4
        assert (await rig.load("reader", KEYS)).num_blocks == 4


async def test_the_deadline_ends_the_right_and_not_the_memory() -> None:
    async with StoreRig(num_slots=8) as rig:
        located = await rig_with_chain(rig)
        rig.clock.now += rig.limits.lease_s
        assert rig.store.statistics().draining_bytes == 4 * PART_BYTES
        assert rig.store.statistics().leased_bytes == 0
        assert rig.match("reader", KEYS) == (0, "deadline")
        assert (await rig.load("reader", KEYS)).reason == "deadline"
        assert rig.confirm("reader", KEYS, located) == 0
        await press(rig)
        assert rig.copy(located, verify=False) == [part_bytes(key) for key in KEYS]
        rig.store.release(SESSION, ["reader"])
        assert rig.store.statistics().draining_bytes == 0
        await press(rig)
        assert rig.match("late", KEYS)[0] < 4


class ForgetfulLeases(LeaseBook):
    """The guard removed: a deadline frees memory."""

    def _lapse(self, request: Request) -> None:
        super()._lapse(request)
        rows, request.rows = request.rows, request.rows[:0]
        self._drop_lapsed(rows)
        self._residency.unhold(rows)


async def test_without_draining_a_late_reader_sees_wrong_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvfabric.store.store.LeaseBook", ForgetfulLeases)
    async with StoreRig(num_slots=8) as rig:
        located = await rig_with_chain(rig)
        rig.clock.now += rig.limits.lease_s
        await press(rig)
        assert rig.copy(located, verify=False) != [part_bytes(key) for key in KEYS]


async def test_lost_connections_end_rights_and_quiet_frees() -> None:
    async with StoreRig(num_slots=8) as rig:
        located = await rig_with_chain(rig)
        rig.store.end_rights(SESSION)
        assert rig.store.match(SESSION, "reader", b"".join(KEYS)).reason == "no_handle"
        assert rig.store.statistics().draining_bytes == 4 * PART_BYTES
        other = SessionId(b"another session!")
        rig.store.open_session(other, rig.layout)
        rig.store.open_request(other, "r", GRANT)
        # Bytes do not change: others may read them while the lost engine might.
        assert rig.store.match(other, "r", b"".join(KEYS)).num_blocks == 4
        rig.store.end_rights(other)
        rig.store.quiet(other)
        assert rig.copy(located, verify=False) == [part_bytes(key) for key in KEYS]
        rig.store.quiet(SESSION)
        statistics = rig.store.statistics()
        assert (statistics.draining_bytes, statistics.num_sessions) == (0, 0)


async def test_a_session_that_comes_back_without_proof_keeps_its_old_bytes_draining() -> None:
    async with StoreRig(num_slots=8) as rig:
        await rig_with_chain(rig)
        rig.store.end_rights(SESSION)
        rig.store.open_session(SESSION, rig.layout)
        assert rig.match("reader", KEYS) == (0, "deadline")
        assert rig.match("new", KEYS)[0] == 4
        statistics = rig.store.statistics()
        assert (statistics.leased_bytes, statistics.draining_bytes) == (4 * PART_BYTES, 0)
        rig.store.release(SESSION, ["new"])
        assert rig.store.statistics().draining_bytes == 4 * PART_BYTES


async def test_discarded_while_leased_drains_until_release() -> None:
    async with StoreRig(num_slots=8) as rig:
        located = await rig_with_chain(rig)
        for row in rig.store._index.lookup(_words()).tolist():
            rig.store._drop(row)
        assert rig.match("other", KEYS)[0] == 0
        await press(rig)
        assert rig.copy(located, verify=False) == [part_bytes(key) for key in KEYS]
        assert rig.confirm("reader", KEYS, located) == 0
        assert rig.store.statistics().draining_bytes >= 4 * PART_BYTES
        rig.store.release(SESSION, ["reader"])
        assert rig.store.statistics().draining_bytes == 0
        rig.store._residency.check()


def _words() -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    return np.frombuffer(b"".join(KEYS), dtype=np.uint64).reshape(-1, 4)


async def test_a_reservation_past_its_deadline_stores_nothing_and_is_not_charged() -> None:
    async with StoreRig() as rig:
        rig.open("w")
        reserved = rig.reserve("w", KEYS)
        assert rig.store.statistics().reserved_bytes == 4 * PART_BYTES
        rig.clock.now += rig.limits.reservation_s
        committed = await rig.commit(reserved, KEYS)
        assert (sum(committed.states), committed.reason) == (0, "deadline")
        assert rig.store.statistics().reserved_bytes == 0
        assert rig.match("w", KEYS)[0] == 0
        assert list(rig.reserve("w", KEYS).states) == [0] * 4


async def test_an_overdue_reservation_gives_way_to_the_next_writer() -> None:
    async with StoreRig() as rig:
        rig.open("w")
        rig.reserve("w", KEYS)
        assert list(rig.reserve("w", KEYS).states) == [2] * 4
        rig.clock.now += rig.limits.reservation_s
        assert list(rig.reserve("w", KEYS).states) == [0] * 4


async def test_a_session_has_one_layout() -> None:
    async with StoreRig() as rig:
        rig.store.open_session(SESSION, rig.layout)
        with pytest.raises(RemoteProtocolError):
            rig.store.open_session(SESSION, make_layout(num_parts=2))


async def test_requests_that_are_never_released_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lease, "MAX_REQUESTS", 2)
    async with StoreRig() as rig:
        rig.open("one")
        rig.open("two")
        rig.open("two")
        with pytest.raises(Overloaded):
            rig.open("three")


async def test_draining_bytes_use_up_the_budget_of_leased_ones() -> None:
    limits = StoreLimits(host_bytes=40 * PART_BYTES, max_blocks=64, lease_share=0.1)
    async with StoreRig(limits=limits) as rig:
        await rig_with_chain(rig)
        rig.clock.now += limits.lease_s
        await rig.put(make_keys(2, seed=1))
        assert rig.match("next", make_keys(2, seed=1)) == (0, "lease_budget")
        rig.store.release(SESSION, ["reader"])
        assert rig.match("next", make_keys(2, seed=1))[0] == 2


async def test_the_budget_is_the_tenants_however_many_templates_its_prompt_has() -> None:
    limits = StoreLimits(host_bytes=40 * PART_BYTES, max_blocks=64, lease_share=0.1)
    async with StoreRig(limits=limits) as rig:
        version = TemplateVersion("t", "1", Incarnation(bytes(16)), b"")
        rig.state = RegistryState(templates=MappingProxyType({("t", "1"): version}))
        grant = replace(GRANT, segments=(Segment("t", "1", version.incarnation, 3 * 64),))
        keys = make_keys(6, seed=1)
        assert await rig.put(keys, grant=grant) == 6
        assert rig.match("r", keys, grant) == (4, "lease_budget")


async def test_a_sweep_ends_a_bounded_number_of_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SWEEP_RIGHTS", 2)
    async with StoreRig(num_slots=64) as rig:
        chains = [make_keys(1, seed=at) for at in range(3)]
        for at, keys in enumerate(chains):
            await rig.put(keys)
            rig.match(f"r{at}", keys)
        rig.clock.now += rig.limits.lease_s / 2
        rig.match("r0", chains[0])  # renewed: it stays
        rig.clock.now += rig.limits.lease_s / 2
        # In turn: each chain's reservation, which ended with its commit, and its lease.
        draining = [rig.store.statistics().draining_bytes for _ in chains]
        assert draining == [0, PART_BYTES, 2 * PART_BYTES]
        assert rig.store.statistics().leased_bytes == PART_BYTES
