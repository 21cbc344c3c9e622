"""A flood of prompts that nobody repeats, by one tenant, beside a real trace by another on its floor."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from types import MappingProxyType

import pytest

from kvfabric.demo.slice import SliceRequest, load
from kvfabric.registry.state import RegistryState, Tenant, TierQuota
from kvfabric.store.lease import RequestGrant
from kvfabric.store.store import StoreLimits
from kvfabric.testing.store import PART_BYTES, SESSION, StoreRig, grant_of, make_keys
from kvfabric.types import BlockKey, TenantId

VICTIM, FLOODER = TenantId("t-victim"), TenantId("t-flood")
FLOOR_SLOTS = 192
TIER_SLOTS = 240
"""So that an equal share, which a tenant has without a floor too, is less than the floor."""
FLOOD_BLOCKS = 32
FLOODS_A_REQUEST = 2
TRACE = load()


def chain(request: SliceRequest) -> list[BlockKey]:
    """Keys of a request's prompt: each stands for its block of the log and all before it."""
    keys: list[BlockKey] = []
    parent = b""
    for block in request.blocks:
        parent = blake2b(parent + b"%d" % block, digest_size=32).digest()
        keys.append(BlockKey(parent))
    return keys


async def serve(rig: StoreRig, name: str, keys: list[BlockKey], grant: RequestGrant) -> int:
    """One request as an engine makes it: match, store the rest, release; how many blocks were reused."""
    found, _ = rig.match(name, keys, grant)
    rest = keys[found:]
    if rest:
        parent = keys[found - 1] if found else BlockKey(bytes(32))
        reserved = rig.reserve(name, rest, parent=parent)
        if reserved.reservation:
            await rig.commit(reserved, rest)
    rig.store.release(SESSION, [name])
    return found


async def hit_rate(*, slots: int, floor: int, flood: bool) -> float:
    """Of the trace's blocks, which share was reused."""
    return (await replayed(slots=slots, floor=floor, flood=flood))[0]


async def replayed(
    *, slots: int, floor: int, flood: bool, strict: bool = False
) -> tuple[float, int]:
    """(share of the trace's blocks that was reused, bytes that its tenant has in the end)."""
    limits = StoreLimits(
        host_bytes=slots * PART_BYTES, max_blocks=4096, lease_share=1.0, strict_partition=strict
    )
    async with StoreRig(limits=limits) as rig:
        tenants = {VICTIM: Tenant(VICTIM, VICTIM, host=TierQuota(floor_bytes=floor * PART_BYTES))}
        tenants[FLOODER] = Tenant(FLOODER, FLOODER)
        rig.state = replace(RegistryState(version=1), tenants=MappingProxyType(tenants))
        seed = hits = total = 0
        for number, request in enumerate(TRACE):
            keys = chain(request)
            hits += await serve(rig, f"v{number}", keys, grant_of(VICTIM))
            total += len(keys)
            for _ in range(FLOODS_A_REQUEST if flood else 0):
                seed += 1
                unique = make_keys(FLOOD_BLOCKS, seed)
                assert await serve(rig, f"f{seed}", unique, grant_of(FLOODER)) == 0
        (usage,) = [one for one in rig.store.statistics().tenants if one.tenant == VICTIM]
        return hits / total, usage.host_bytes


async def test_a_flood_takes_nothing_from_a_floor() -> None:
    alone = await hit_rate(slots=FLOOR_SLOTS, floor=0, flood=False)
    wide = await hit_rate(slots=8 * TIER_SLOTS, floor=0, flood=False)
    assert 0.1 < alone < wide - 0.05, "the floor is tight for this trace"
    flooded = await hit_rate(slots=TIER_SLOTS, floor=FLOOR_SLOTS, flood=True)
    assert flooded > alone - 0.02
    twin = await hit_rate(slots=TIER_SLOTS, floor=0, flood=True)
    assert twin < alone - 0.02, "without the floor it takes"


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "twin"])
async def test_in_a_strict_partition_a_flood_takes_no_room(strict: bool) -> None:
    """The rate may differ by a little: in what order a tenant's own blocks go is learnt from all traffic."""
    (calm, before), (flooded, after) = [
        await replayed(slots=TIER_SLOTS, floor=FLOOR_SLOTS // 2, flood=flood, strict=strict)
        for flood in (False, True)
    ]
    assert (before == after) == strict
    assert (abs(calm - flooded) < 0.02) == strict
