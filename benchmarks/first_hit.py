"""What a node does until an engine has a verified block in its hands; `bench_ssd.py` takes the time.

Arguments: directory, key of the block, records there, capacity and segment in bytes, bytes of a part. Prints
what is accounted for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path

import xxhash

from kvfabric.events.stream import EventStream
from kvfabric.registry.state import RegistryState
from kvfabric.store.store import BlockStore, StoreLimits
from kvfabric.testing.store import GRANT, SESSION, make_layout
from kvfabric.tiers.arena import Arena
from kvfabric.tiers.segments import SegmentTier
from kvfabric.types import BlockKey


async def main() -> None:
    directory, key = Path(sys.argv[1]), BlockKey(bytes.fromhex(sys.argv[2]))
    num_records, capacity, segment, part = map(int, sys.argv[3:])
    events = EventStream(boot_id=bytes(16))
    tier = SegmentTier(
        directory, capacity_bytes=capacity, segment_bytes=segment, clock=time.monotonic
    )
    limits = StoreLimits(
        host_bytes=64 << 20,
        ssd_bytes=capacity,
        max_blocks=2 * num_records,
        ssd_scrub_bytes_per_s=0,  # files may be holes
    )
    arena = Arena.create(limits.host_bytes)
    store = BlockStore(
        limits=limits, registry=RegistryState, clock=time.monotonic, events=events, ssd=None
    )
    # In the order in which a node starts and stops.
    async with contextlib.AsyncExitStack() as tiers, store:
        await tiers.enter_async_context(tier)
        await store.attach_ssd(tier)
        store.attach_arena(arena)
        store.open_session(SESSION, make_layout(part_bytes=part))
        store.open_request(SESSION, "r", GRANT)
        assert store.match(SESSION, "r", key).num_blocks == 1
        located = await store.load(SESSION, "r", key, 0, 0)
        offset = int.from_bytes(located.offsets[:8], "little")
        data = arena.view[offset : offset + part]
        assert xxhash.xxh3_128_digest(data) == located.checksums[:16]
        assert store.confirm(SESSION, "r", key, located.generations, 0, 0).num_blocks == 1
        s = tier.statistics()
        print(json.dumps([s.records, s.used_bytes, s.live_bytes]), flush=True)
        data.release()
    arena.close()


if __name__ == "__main__":
    asyncio.run(main())
