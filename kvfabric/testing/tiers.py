"""Conformance suite of `kvfabric.tiers.base.Tier`, and the parts it is tried with.

Subclass `TierTests` in a test module, say how a tier is opened and how its medium is reached behind its
back, and collect it with pytest (`asyncio_mode = "auto"`). Whatever shows that bytes survive or are
spoilt goes around the tier: it never vouches for itself.
"""

from __future__ import annotations

import asyncio
import mmap
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from kvfabric.errors import BlockError, ClosedError, CorruptBlock, LocalProtocolError
from kvfabric.tiers.base import Location, PartIdentity, Tier
from kvfabric.types import BlockKey, Part, TenantId

TENANTS = (TenantId("t-00000000000000aa"), TenantId("t-00000000000000bb"))
_PAGE = 4096


def page_buffer(num_bytes: int) -> memoryview:
    """Writable and page-aligned, its length rounded up to pages: like a slot of the arena."""
    return memoryview(mmap.mmap(-1, -(-num_bytes // _PAGE) * _PAGE))


def make_payload(seed: int, num_bytes: int) -> memoryview:
    """Page-aligned bytes that depend on the seed, exactly `num_bytes` of them."""
    buffer = page_buffer(num_bytes)[:num_bytes]
    buffer[:] = random.Random(seed).randbytes(num_bytes)
    return buffer


def make_identity(seed: int, payload: memoryview) -> PartIdentity:
    """The identity of part `seed`, with the checksum of `payload`."""
    random_bytes = random.Random(f"identity {seed}").randbytes
    return PartIdentity(
        part=Part(BlockKey(random_bytes(32)), seed % 3, seed % 2),
        namespace_tag=random_bytes(8),
        tenant=TENANTS[seed % 2],
        layout_fingerprint=random_bytes(32),
        parent=BlockKey(random_bytes(32)),
        block_index=seed,
        incarnations=tuple(random_bytes(16) for _ in range(seed % 4)),
        num_bytes=len(payload),
        checksum=xxhash.xxh3_128_digest(payload),
    )


def make_part(seed: int, num_bytes: int = 10_000) -> tuple[PartIdentity, memoryview]:
    payload = make_payload(seed, num_bytes)
    return make_identity(seed, payload), payload


async def read_back(tier: Tier, location: Location, identity: PartIdentity) -> bytes:
    buffer = page_buffer(identity.num_bytes)
    await tier.read_into(location, identity, buffer)
    return bytes(buffer[: identity.num_bytes])


def on_medium(directory: Path, raw: Mapping[int, bytes]) -> set[int]:
    """Which of these some file has."""
    files = [path.read_bytes() for path in directory.rglob("*") if path.is_file()]
    return {number for number, data in raw.items() if any(data in file for file in files)}


class TierTests(ABC):
    """What every tier owes its callers. The docstring of a test is the requirement.

    `is_plain`: payloads and checksums lie on the medium as they are.
    """

    is_plain = True

    def recorded(self, identity: PartIdentity) -> PartIdentity:
        """What `records` shows of a part."""
        return identity if self.is_plain else replace(identity, checksum=bytes(16))

    @abstractmethod
    def make_tier(self, directory: Path) -> Tier:
        """A tier on `directory`, not entered, with room for a few MiB."""

    @abstractmethod
    def flip_payload_bit(self, directory: Path, location: Location, at: int) -> None:
        """Spoil byte `at` of the payload at `location`, without the tier's knowledge or help."""

    @abstractmethod
    def raw_payload(self, directory: Path, location: Location, num_bytes: int) -> bytes:
        """What the medium holds at `location`, read without the tier."""

    @pytest.mark.parametrize("num_bytes", [1, 4095, 4096, 4097, 65_536, 100_001])
    async def test_read_returns_what_was_written(self, tmp_path: Path, num_bytes: int) -> None:
        """Any length reads back byte for byte, and nothing beyond the length is touched by padding."""
        identity, payload = make_part(1, num_bytes)
        async with self.make_tier(tmp_path) as tier:
            location = await tier.write(identity, payload)
            raw = self.raw_payload(tmp_path, location, num_bytes)
            assert (raw == bytes(payload)) == self.is_plain
            assert await read_back(tier, location, identity) == bytes(payload)

    async def test_buffers_may_be_unaligned_and_exact(self, tmp_path: Path) -> None:
        """Alignment is a matter of speed: any buffer that holds the part will do, and no byte more
        of it changes."""
        identity, payload = make_part(2, 5000)
        odd = memoryview(bytearray(5001))[1:]
        odd[:] = payload
        async with self.make_tier(tmp_path) as tier:
            location = await tier.write(identity, odd)
            target = bytearray(b"\xee" * 5003)
            await tier.read_into(location, identity, memoryview(target)[1:5001])
            assert target == b"\xee" + bytes(payload) + b"\xee\xee"

    async def test_sealed_parts_survive_reopening(self, tmp_path: Path) -> None:
        """What `write` returned for is listed after reopening, with identity and place, and reads."""
        parts = [make_part(seed, 3000 * (seed + 1)) for seed in range(6)]
        async with self.make_tier(tmp_path) as tier:
            locations = await asyncio.gather(*(tier.write(i, p) for i, p in parts))
            before = tier.statistics()
        async with self.make_tier(tmp_path) as tier:
            listed = dict(tier.records())
            assert listed == {
                self.recorded(i): at for (i, _), at in zip(parts, locations, strict=True)
            }
            for identity, payload in parts:
                location = listed[self.recorded(identity)]
                assert await read_back(tier, location, identity) == bytes(payload)
            after = tier.statistics()
        assert (after.records, after.live_bytes, after.tenant_live_bytes) == (
            before.records,
            before.live_bytes,
            before.tenant_live_bytes,
        )

    @pytest.mark.parametrize("at", [0, 4999, 9999])
    async def test_spoilt_payload_is_corrupt_and_quarantined(self, tmp_path: Path, at: int) -> None:
        """A single wrong bit is never returned: CorruptBlock, counted, and the part is gone."""
        identity, payload = make_part(3)
        async with self.make_tier(tmp_path) as tier:
            location = await tier.write(identity, payload)
            self.flip_payload_bit(tmp_path, location, at)
            with pytest.raises(CorruptBlock):
                await read_back(tier, location, identity)
            assert tier.statistics().quarantined == 1
            await tier.write(*make_part(4))  # whatever was pending is applied with it
            assert [i.part for i, _ in tier.records()] == [make_part(4)[0].part]
            assert tier.statistics().records == 1

    @pytest.mark.parametrize(
        "field",
        ["part", "namespace_tag", "tenant", "layout_fingerprint", "parent", "block_index",
         "incarnations", "num_bytes", "checksum"],
    )  # fmt: skip
    async def test_other_identity_is_refused(self, tmp_path: Path, field: str) -> None:
        """A part is returned to nobody who expects anything else than what was stored, in any field."""
        stored, payload = make_part(5)
        other, _ = make_part(6, 9_000)
        asked = replace(stored, **{field: getattr(other, field)})
        async with self.make_tier(tmp_path) as tier:
            location = await tier.write(stored, payload)
            with pytest.raises(CorruptBlock):
                await read_back(tier, location, asked)

    async def test_part_is_written_again_after_it_was_deleted(self, tmp_path: Path) -> None:
        """What is deleted may come anew, with other bytes; the earlier ones are dead."""
        identity, payload = make_part(7)
        newer = make_payload(8, 10_000)
        newer_identity = replace(identity, checksum=xxhash.xxh3_128_digest(newer))
        async with self.make_tier(tmp_path) as tier:
            first = await tier.write(identity, payload)
            live = tier.statistics().live_bytes
            tier.delete([first])
            second = await tier.write(newer_identity, newer)
            assert first != second
            assert list(tier.records()) == [(self.recorded(newer_identity), second)]
            assert await read_back(tier, second, newer_identity) == bytes(newer)
            statistics = tier.statistics()
        assert (statistics.records, statistics.live_bytes) == (1, live)
        assert statistics.tenant_dead_bytes == {identity.tenant: live}

    async def test_batches_say_what_records_say(self, tmp_path: Path) -> None:
        """Vectors and single records are the same, in the order in which they were written."""
        written = [make_part(seed, 5_000 + seed) for seed in range(9)]
        async with self.make_tier(tmp_path) as tier:
            for identity, payload in written:
                await tier.write(identity, payload)
            found = list(tier.records())
            places = [place for batch in tier.batches() for place in batch.places()]
            sequences = [s for batch in tier.batches() for s in batch.rows["sequence"].tolist()]
        assert [identity for identity, _ in found] == [self.recorded(one) for one, _ in written]
        assert places == [(identity.part, location) for identity, location in found]
        assert sequences == sorted(set(sequences))

    async def test_scrubbing_finds_what_nobody_read(self, tmp_path: Path) -> None:
        """A round verifies every part at rest; what is corrupt is told of, counted and gone."""
        parts = [make_part(seed) for seed in range(6)]
        async with self.make_tier(tmp_path) as tier:
            locations = [await tier.write(*part) for part in parts]
            self.flip_payload_bit(tmp_path, locations[4], 1234)
            records = 0
            corrupt: list[tuple[Part, Location]] = []
            while not (scrubbed := await tier.scrub(25_000)).is_round:
                records += scrubbed.records
                corrupt += scrubbed.corrupt
            assert records == 6
            assert corrupt == [(parts[4][0].part, locations[4])]
            await tier.write(*make_part(9))
            assert len(list(tier.records())) == 6
            assert tier.statistics().quarantined == 1
            assert not (await tier.scrub(1 << 30)).corrupt

    async def test_deleted_parts_are_gone_and_still_charged(self, tmp_path: Path) -> None:
        """`delete` forgets a part for good; its bytes turn from live to dead, to the same tenant."""
        kept, payload = make_part(10)
        gone, gone_payload = make_part(11)
        async with self.make_tier(tmp_path) as tier:
            await tier.write(kept, payload)
            location = await tier.write(gone, gone_payload)
            charged = tier.statistics().tenant_live_bytes[gone.tenant]
            tier.delete([location, Location(location.file + 7, 4096), location])
        async with self.make_tier(tmp_path) as tier:
            assert [identity for identity, _ in tier.records()] == [self.recorded(kept)]
            statistics = tier.statistics()
        assert statistics.tenant_live_bytes == {kept.tenant: charged}
        assert statistics.tenant_dead_bytes == {gone.tenant: charged}

    @pytest.mark.parametrize("destroys", [True, False])
    async def test_what_is_destroyed_leaves_no_byte(self, tmp_path: Path, destroys: bool) -> None:
        """Deleted long ago or live, no file has its bytes; others live on. What is only deleted is there:
        without `destroy` the first part of this test must fail."""
        parts = {seed: make_part(seed) for seed in range(1, 7)}
        struck = {parts[seed][0].namespace_tag for seed in (2, 5)}
        others = [1, 3, 4, 6]
        async with self.make_tier(tmp_path) as tier:
            locations = {seed: await tier.write(*part) for seed, part in parts.items()}
            raw = {
                seed: self.raw_payload(tmp_path, locations[seed], len(parts[seed][1]))
                for seed in (2, 5)
            }
            tier.delete([locations[2]])
            await tier.write(*make_part(102))
            if destroys:
                assert await tier.destroy(lambda lineage: lineage.namespace_tag in struck) > 0
                assert await tier.destroy(lambda lineage: lineage.namespace_tag in struck) == 0
            assert on_medium(tmp_path, raw) == (set() if destroys else {2, 5})
            await tier.write(*make_part(200))
        async with self.make_tier(tmp_path) as tier:
            left = {identity.part: (location, identity) for identity, location in tier.records()}
            for seed in others:
                location, identity = left[parts[seed][0].part]
                assert await read_back(tier, location, identity) == bytes(parts[seed][1])

    async def test_accounts_add_up(self, tmp_path: Path) -> None:
        """Live and dead bytes make up the used bytes, within the capacity, per tenant too."""
        async with self.make_tier(tmp_path) as tier:
            first, *_ = await asyncio.gather(
                *(tier.write(*make_part(seed, 5000 + seed)) for seed in range(4))
            )
            tier.delete([first])
            await tier.write(*make_part(9))
            s = tier.statistics()
        assert s.live_bytes + s.dead_bytes == s.used_bytes <= s.capacity_bytes
        assert sum(s.tenant_live_bytes.values()) == s.live_bytes
        assert sum(s.tenant_dead_bytes.values()) <= s.dead_bytes
        assert s.records == 4

    async def test_cancelled_write_lets_go_of_its_buffer(self, tmp_path: Path) -> None:
        """When CancelledError leaves `write`, nobody reads the payload and nothing of it is stored."""
        identity, payload = make_part(12, 1_000_000)
        async with self.make_tier(tmp_path) as tier:
            for turns in range(4):
                task = asyncio.get_running_loop().create_task(tier.write(identity, payload))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            payload[:] = bytes(len(payload))  # the buffer is ours again
            await tier.write(*make_part(13))
            assert [i for i, _ in tier.records()] == [self.recorded(make_part(13)[0])]

    async def test_malformed_calls_are_refused(self, tmp_path: Path) -> None:
        """A wrong length or an identity that cannot be recorded is the caller's error, at once."""
        identity, payload = make_part(14)
        async with self.make_tier(tmp_path) as tier:
            with pytest.raises(LocalProtocolError):
                await tier.write(identity, payload[:-1])
            with pytest.raises(LocalProtocolError):
                await tier.write(replace(identity, incarnations=(b"short",)), payload)
            location = await tier.write(identity, payload)
            with pytest.raises(LocalProtocolError):
                await tier.read_into(location, identity, page_buffer(4096))

    async def test_closed_tier_refuses(self, tmp_path: Path) -> None:
        """Use outside `async with` is a bug and says so."""
        identity, payload = make_part(15)
        tier = self.make_tier(tmp_path)
        with pytest.raises(ClosedError):
            await tier.write(identity, payload)
        async with tier:
            location = await tier.write(identity, payload)
        with pytest.raises(ClosedError):
            await read_back(tier, location, identity)
        assert not issubclass(ClosedError, BlockError)  # a bug must not look like a miss
