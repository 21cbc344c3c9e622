"""SSD tier: what only it promises. Its conformance to `Tier` is `TestConformance`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvfabric.errors import ConfigError, CorruptBlock, NoSpace, TransferError
from kvfabric.testing.segments import (
    MIB,
    RECORD,
    SMALL,
    Owner,
    bytes_on_disk,
    flip_bit,
    make_tier,
    readable,
    small_tier,
    write_parts,
)
from kvfabric.testing.tiers import (
    TierTests,
    make_identity,
    make_part,
    make_payload,
    page_buffer,
    read_back,
)
from kvfabric.tiers import direct_io, segment_groups, segment_reclaim, segment_recovery
from kvfabric.tiers.base import Location, PartIdentity
from kvfabric.tiers.file_ops import FileOps
from kvfabric.tiers.records import PAGE_BYTES, record_bytes
from kvfabric.tiers.segment_file import Appended, path_of
from kvfabric.tiers.segment_groups import Plan, plan_runs
from kvfabric.tiers.segment_index import Extent, SegmentIndex
from kvfabric.tiers.segments import (
    SegmentTier,
    default_segment_bytes,
)


class TestConformance(TierTests):
    def make_tier(self, directory: Path) -> SegmentTier:
        return make_tier(directory)

    def flip_payload_bit(self, directory: Path, location: Location, at: int) -> None:
        flip_bit(directory, location, PAGE_BYTES + at)

    def raw_payload(self, directory: Path, location: Location, num_bytes: int) -> bytes:
        with path_of(directory, location.file).open("rb") as file:
            return os.pread(file.fileno(), num_bytes, location.offset + PAGE_BYTES)


class TestBufferedConformance(TestConformance):
    """The same where O_DIRECT is not to be had."""

    def make_tier(self, directory: Path) -> SegmentTier:
        return make_tier(directory, ops=FileOps(direct=False))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups close at once: for tests that write one part after the other."""
    monkeypatch.setattr(segment_groups, "GROUP_S", 0.0)


# ------------------------------------------------------------------ never wrong bytes


async def wrong_bytes_from(kind: type[SegmentTier], directory: Path) -> bool:
    """Whether a tier of this kind returns a payload in which a bit was flipped on disk."""
    identity, payload = make_part(1)
    async with make_tier(directory, kind=kind) as tier:
        location = await tier.write(identity, payload)
        flip_bit(directory, location, PAGE_BYTES + 77)
        try:
            return await read_back(tier, location, identity) != bytes(payload)
        except CorruptBlock:
            return False


class Unverified(SegmentTier):
    """The twin without the guard."""

    def _verify(self, payload: memoryview, identity: PartIdentity) -> None:
        pass


async def test_checksum_is_what_keeps_wrong_bytes_out(tmp_path: Path) -> None:
    """A flipped bit is refused; the same tier without the checksum returns it."""
    assert not await wrong_bytes_from(SegmentTier, tmp_path / "guarded")
    assert await wrong_bytes_from(Unverified, tmp_path / "twin")


@pytest.mark.parametrize("at", [0, 9, 13, 20, 33, 40, 48, 100, 190, 4095])
async def test_spoilt_header_is_corrupt(tmp_path: Path, at: int, fast: None) -> None:
    """Any field of the header on disk, any bit: CorruptBlock, and the other parts still read."""
    async with make_tier(tmp_path) as tier:
        locations = await write_parts(tier, range(2))
        identity, other = locations
        flip_bit(tmp_path, locations[identity], at)
        with pytest.raises(CorruptBlock):
            await read_back(tier, locations[identity], identity)
        assert await read_back(tier, locations[other], other)
        assert tier.statistics().quarantined == 1
        assert await read_back(tier, locations[other], other)


async def test_truncated_file_is_corrupt(tmp_path: Path, fast: None) -> None:
    """What a file that lost its end does not hold any more is a miss, also after reopening."""
    async with make_tier(tmp_path) as tier:
        first, second = await write_parts(tier, range(2))
        locations = dict(tier.records())
        os.truncate(path_of(tmp_path, 1), locations[second].offset + 2 * PAGE_BYTES)
        assert await read_back(tier, locations[first], first)
        with pytest.raises(CorruptBlock, match="ends"):
            await read_back(tier, locations[second], second)
    async with make_tier(tmp_path) as tier:
        assert await readable(tier) == [0]


async def test_file_of_another_life_is_not_read(tmp_path: Path, fast: None) -> None:
    """A file put in another's place keeps its own id: nothing in it passes for the other's."""
    for name in ("a", "b"):
        async with make_tier(tmp_path / name) as tier:
            locations = await write_parts(tier, range(1))
    shutil.copy(path_of(tmp_path / "a", 1), path_of(tmp_path / "b", 1))
    [(identity, location)] = locations.items()
    async with make_tier(tmp_path / "b") as tier:
        with pytest.raises(CorruptBlock, match="belongs to"):
            await read_back(tier, location, identity)


# ------------------------------------------------------------------ what survives


async def test_lost_index_is_rebuilt_from_the_files(tmp_path: Path, fast: None) -> None:
    """Without its index the tier finds every sealed part again, in every file, newest version."""
    async with small_tier(tmp_path) as tier:
        located = await write_parts(tier, range(7))
        newer = make_payload(99, RECORD)
        old_identity, _ = make_part(3, RECORD)
        tier.delete([located[old_identity]])
        newer_identity = replace(make_identity(3, newer), part=old_identity.part)
        await tier.write(newer_identity, newer)
        before, listed = tier.statistics(), dict(tier.records())
    shutil.rmtree(tmp_path / "index")
    async with small_tier(tmp_path) as tier:
        after = tier.statistics()
        assert dict(tier.records()) == listed
        location = listed[newer_identity]
        assert await read_back(tier, location, newer_identity) == bytes(newer)
        await tier.write(*make_part(50, RECORD))  # never behind records it may not have found
        assert dict(tier.records())[make_part(50, RECORD)[0]].file not in {
            location.file for location in listed.values()
        }
    assert after.tenant_live_bytes == before.tenant_live_bytes
    assert after.tenant_dead_bytes == before.tenant_dead_bytes


@pytest.mark.parametrize("damage", ["cut", "garbage", "zeros", "empty", "doubted", "entry"])
async def test_damaged_index_is_rebuilt(tmp_path: Path, damage: str, fast: None) -> None:
    """However the index is damaged, the tier opens with every part, and right bytes."""
    async with make_tier(tmp_path) as tier:
        await write_parts(tier, range(6))
    data = tmp_path / "index" / "data.mdb"
    raw = bytearray(data.read_bytes())
    match damage:
        case "cut":
            data.write_bytes(raw[: 4 * PAGE_BYTES])
        case "garbage":
            data.write_bytes(b"\x5a" * len(raw))
        case "zeros":
            data.write_bytes(bytes(len(raw)))
        case "empty":
            data.write_bytes(b"")
        case "doubted":  # the process died reading it
            (tmp_path / "index.doubted").touch()
        case "entry":
            key = make_part(2, RECORD)[0].part.key
            at = raw.find(key)
            while at >= 0:  # every copy, old pages of the tree included
                raw[at + 45] ^= 1
                at = raw.find(key, at + 46)
            data.write_bytes(raw)
    async with make_tier(tmp_path) as tier:
        assert await readable(tier) == list(range(6))
    async with make_tier(tmp_path) as tier:
        assert await readable(tier) == list(range(6))
    assert not (tmp_path / "index.doubted").exists()


OPEN_CHILD = """
import asyncio, sys, time
from pathlib import Path
from kvfabric.tiers.segments import SegmentTier

async def main():
    async with SegmentTier(Path(sys.argv[1]), capacity_bytes=32 << 20, clock=time.monotonic) as tier:
        print(len(list(tier.records())))

asyncio.run(main())
"""


@pytest.mark.slow
async def test_index_that_kills_its_reader_does_so_once(tmp_path: Path, fast: None) -> None:
    """LMDB is mapped memory: damage inside may end the process. The next start rebuilds, at the latest."""
    async with make_tier(tmp_path) as tier:
        await write_parts(tier, range(6))
    data = tmp_path / "index" / "data.mdb"
    raw = data.read_bytes()
    data.write_bytes(raw[: 2 * PAGE_BYTES] + b"\xa5" * (len(raw) - 2 * PAGE_BYTES))
    run_child(OPEN_CHILD, tmp_path, check=False)
    assert run_child(OPEN_CHILD, tmp_path).stdout == "6\n"


async def test_rebuild_stops_at_the_first_invalid_record(tmp_path: Path, fast: None) -> None:
    """A spoilt header costs the rest of its file, not the other files; a file without a header goes."""
    async with small_tier(tmp_path) as tier:
        locations = await write_parts(tier, range(9))
    [first, second, *_] = locations.values()
    flip_bit(tmp_path, second, 0)
    flip_bit(tmp_path, Location(3, 0), 0)
    shutil.rmtree(tmp_path / "index")
    async with small_tier(tmp_path) as tier:
        assert await readable(tier) == [0, 4, 5, 6, 7]
    assert first.file == second.file == 1
    assert not path_of(tmp_path, 3).exists()


async def test_missing_file_costs_its_parts_only(tmp_path: Path, fast: None) -> None:
    async with small_tier(tmp_path) as tier:
        await write_parts(tier, range(6))
    path_of(tmp_path, 1).unlink()
    async with small_tier(tmp_path) as tier:
        assert await readable(tier) == [4, 5]
        assert len(dict(tier.records())) == tier.statistics().records == 2


async def test_reopening_goes_on_in_the_same_segment(tmp_path: Path, fast: None) -> None:
    """A restart costs no space: the segment that was being filled is filled further."""
    for seed in range(3):
        async with small_tier(tmp_path) as tier:
            await write_parts(tier, range(seed, seed + 1))
    async with small_tier(tmp_path) as tier:
        assert {location.file for _, location in tier.records()} == {1}
        assert tier.statistics().file_bytes == 2 * SMALL


def listed(tier: SegmentTier) -> list[int]:
    return sorted(identity.block_index for identity, _ in tier.records())


@pytest.mark.parametrize("kept", [0, segment_recovery.KEPT_BYTES])
async def test_what_is_listed_first_is_as_things_stand(
    tmp_path: Path, kept: int, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recovery keeps what it read for the one who asks first: of files in which nothing changed since."""
    monkeypatch.setattr(segment_recovery, "KEPT_BYTES", kept)
    async with small_tier(tmp_path) as tier:
        places = list((await write_parts(tier, range(5))).values())
    async with small_tier(tmp_path) as tier:
        tier.delete([places[0]])
        await write_parts(tier, range(10, 11))
        assert {place.file for place in places} == {1, 2}
        assert listed(tier) == [1, 2, 3, 4, 10]
        assert listed(tier) == [1, 2, 3, 4, 10]


async def test_what_recovery_read_is_not_read_again(tmp_path: Path, fast: None) -> None:
    async with small_tier(tmp_path) as tier:
        await write_parts(tier, range(5))
    async with small_tier(tmp_path) as tier:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(SegmentIndex, "live", lambda *_: pytest.fail("read again"))
            assert listed(tier) == [0, 1, 2, 3, 4]
        assert listed(tier) == [0, 1, 2, 3, 4]  # nothing is kept any more, and the index asked


async def test_stray_files_are_removed(tmp_path: Path, fast: None) -> None:
    """A segment that the index does not know was being made or reclaimed when the process died."""
    async with small_tier(tmp_path) as tier:
        await write_parts(tier, range(1))
    shutil.copy(path_of(tmp_path, 1), path_of(tmp_path, 77))
    (tmp_path / "seg-notes.kvf").write_text("not ours")
    async with small_tier(tmp_path) as tier:
        assert await readable(tier) == [0]
    assert not path_of(tmp_path, 77).exists()
    assert (tmp_path / "seg-notes.kvf").exists()


CHILD = """
import asyncio, sys, time
from pathlib import Path
from kvfabric.testing.tiers import make_part
from kvfabric.tiers.segments import SegmentTier

async def main():
    directory, first = Path(sys.argv[1]), int(sys.argv[2])
    async with SegmentTier(directory, capacity_bytes=1 << 26, clock=time.monotonic) as tier:
        async def write(lane):
            for seed in range(first + lane, first + 100_000, 4):
                await tier.write(*make_part(seed, 20_000))
                print(seed, flush=True)
        async with asyncio.TaskGroup() as group:
            for lane in range(4):
                group.create_task(write(lane))

asyncio.run(main())
"""


def acknowledged_before_kill(directory: Path, first: int, count: int) -> list[int]:
    """Seeds whose write a child reported as sealed before it was killed in the midst of writing."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(directory), str(first)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        seeds = [int(child.stdout.readline()) for _ in range(count)]
        child.kill()
        return seeds + [int(line) for line in child.stdout if line.endswith("\n")]


@pytest.mark.slow
async def test_what_was_sealed_survives_sigkill(tmp_path: Path) -> None:
    """Whatever `write` returned for before the process was killed reads back after each restart."""
    sealed: set[int] = set()
    for cycle in range(4):
        sealed |= set(acknowledged_before_kill(tmp_path, cycle * 1000, 9 + 10 * cycle))
        if cycle == 2:
            shutil.rmtree(tmp_path / "index")
        async with make_tier(tmp_path, capacity_bytes=64 * MIB) as tier:
            found = await readable(tier, 20_000)
            assert sealed <= set(found)
            assert tier.statistics().quarantined == 0
    assert len(sealed) >= 80


class CommitsFirst(SegmentTier):
    """The twin that commits its index before the data is on disk."""

    async def _make_durable(self, plan: Plan) -> list[Extent]:
        decided = await self._commit_index(plan)
        await self._write_data(plan)
        await self._sync_data(plan)
        return decided


async def corrupt_after_stop(kind: type[SegmentTier], directory: Path) -> int:
    """Parts that the index lists but the files do not hold, when I/O ends with the data's write."""

    class Stopped(kind):  # type: ignore[valid-type, misc]
        async def _write_data(self, plan: Plan) -> None:
            raise TransferError("the disk went away")

    async with make_tier(directory, kind=Stopped) as tier:
        with pytest.raises(TransferError):
            await tier.write(*make_part(1))
    async with make_tier(directory) as tier:
        for identity, location in list(tier.records()):
            with pytest.raises(CorruptBlock):
                await read_back(tier, location, identity)
        return tier.statistics().quarantined


async def test_index_never_names_what_is_not_on_disk(tmp_path: Path) -> None:
    """Data first, index second; the other order leaves an entry without a record."""
    assert await corrupt_after_stop(SegmentTier, tmp_path / "right") == 0
    assert await corrupt_after_stop(CommitsFirst, tmp_path / "twin") == 1


# ------------------------------------------------------------------ space


async def test_oldest_segment_gives_way(tmp_path: Path, fast: None) -> None:
    """Capacity is never exceeded: whole segments go, oldest first, and the parts are announced."""
    owner = Owner()
    async with small_tier(tmp_path, files=4, owner=owner) as tier:
        for seed in range(20):
            await write_parts(tier, range(seed, seed + 1))
            assert bytes_on_disk(tmp_path) <= tier.statistics().capacity_bytes == 4 * SMALL
        assert await readable(tier) == list(range(8, 20))
    assert [[make_part(seed)[0].part for seed in range(at, at + 4)] for at in (0, 4)] == owner.gone
    async with small_tier(tmp_path, files=4) as tier:
        assert await readable(tier) == list(range(8, 20))


async def test_a_reclaimed_segment_of_many_parts_is_told_of_in_slices(
    tmp_path: Path, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_reclaim, "_DROPPED", 3)
    owner = Owner()
    async with small_tier(tmp_path, files=4, owner=owner) as tier:
        for seed in range(13):
            await write_parts(tier, range(seed, seed + 1))
    assert [len(parts) for parts in owner.gone] == [3, 1]
    told = [part for parts in owner.gone for part in parts]
    assert told == [make_part(seed)[0].part for seed in range(4)]


async def test_two_segments_are_enough(tmp_path: Path, fast: None) -> None:
    """The smallest tier: one segment is filled, the other is the spare."""
    async with small_tier(tmp_path, files=2) as tier:
        for seed in range(11):
            await write_parts(tier, range(seed, seed + 1))
            assert seed in await readable(tier)
            assert tier.statistics().file_bytes <= 2 * SMALL


async def test_group_larger_than_a_segment_is_written(tmp_path: Path) -> None:
    """Twelve parts at once go through segments of four; all are sealed, none is lost."""
    async with small_tier(tmp_path, files=5) as tier:
        await asyncio.gather(*(tier.write(*make_part(seed, RECORD)) for seed in range(12)))
        assert await readable(tier) == list(range(12))


async def test_smaller_capacity_drops_the_oldest_at_opening(tmp_path: Path, fast: None) -> None:
    async with small_tier(tmp_path, files=5) as tier:
        await write_parts(tier, range(12))
    async with small_tier(tmp_path, files=2) as tier:
        assert tier.statistics().file_bytes <= 2 * SMALL
        assert await readable(tier) == [8, 9, 10, 11]
        await write_parts(tier, range(12, 14))
        assert tier.statistics().file_bytes <= 2 * SMALL


async def test_dead_bytes_stay_charged_until_their_segment_goes(tmp_path: Path, fast: None) -> None:
    async with small_tier(tmp_path, files=3) as tier:
        located = await write_parts(tier, range(4))
        tier.delete([*located.values()])
        await write_parts(tier, range(4, 8))
        charged = tier.statistics()
        assert sum(charged.tenant_dead_bytes.values()) == 4 * record_bytes(RECORD)
        await write_parts(tier, range(8, 13))
        assert tier.statistics().tenant_dead_bytes == {}


async def test_reader_keeps_a_reclaimed_segment(tmp_path: Path, fast: None) -> None:
    """A read that began before its segment was reclaimed ends with the right bytes; one that begins
    after it fails."""
    go, reading = threading.Event(), threading.Event()

    class SlowReads(SegmentTier):
        def _verify(self, payload: memoryview, identity: PartIdentity) -> None:
            reading.set()
            go.wait(10)
            super()._verify(payload, identity)

    tier = make_tier(tmp_path, kind=SlowReads, capacity_bytes=3 * SMALL, segment_bytes=SMALL)
    async with tier, asyncio.TaskGroup() as group:
        [(identity, location)] = (await write_parts(tier, range(1))).items()
        read = group.create_task(read_back(tier, location, identity))
        await asyncio.to_thread(reading.wait, 10)
        await write_parts(tier, range(1, 14))
        assert not path_of(tmp_path, location.file).exists()
        go.set()
        assert await read == bytes(make_part(0, RECORD)[1])
        with pytest.raises(TransferError, match="reclaimed"):
            await read_back(tier, location, identity)


async def test_part_that_fits_no_segment_is_refused(tmp_path: Path) -> None:
    async with small_tier(tmp_path) as tier:
        with pytest.raises(NoSpace, match="does not fit"):
            await tier.write(*make_part(1, SMALL))


FULL_CHILD = """
import asyncio, resource, sys, time
from dataclasses import replace
from pathlib import Path
from kvfabric.errors import NoSpace
from kvfabric.testing.tiers import make_part, read_back
from kvfabric.tiers import segment_groups, segments

segment_groups.GROUP_S = 0.0
directory, what = Path(sys.argv[1]), sys.argv[2]
sealed = []

def limit(num_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))

async def write(tier, seed):
    identity, payload = make_part(seed, 4096)
    identity = replace(identity, incarnations=(bytes(16),) * 200)  # for an index that grows fast
    location = await tier.write(identity, payload)
    sealed.append((location, identity, bytes(payload)))

async def main():
    async with segments.SegmentTier(
        directory, capacity_bytes=16 << 20, segment_bytes=256 << 10, clock=time.monotonic,
    ) as tier:
        if what == "index":
            await asyncio.gather(*(write(tier, seed) for seed in range(100)))
            limit((directory / "index" / "data.mdb").stat().st_size)
        else:
            limit(100_000)
        failed = 0
        for seed in range(1000, 1300):
            try:
                await write(tier, seed)
            except NoSpace as exc:
                print("NoSpace", exc)
                failed += 1
                if failed == 2:
                    break
        limit(resource.RLIM_INFINITY)
        await write(tier, 2000)
        for location, identity, payload in sealed:
            assert await read_back(tier, location, identity) == payload
        assert tier.statistics().records == len(sealed)
        print("recovered")

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["seg-", "index"])
def test_full_disk_is_no_space_until_there_is_room(tmp_path: Path, what: str) -> None:
    """A disk that takes no more, for a segment or for the index, fails the write with NoSpace and
    harms nothing that was sealed; when it has room again the tier writes again."""
    lines = run_child(FULL_CHILD, tmp_path, what).stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("NoSpace") and what in line for line in lines[:2]), lines
    assert lines[2] == "recovered"


def run_child(
    code: str, *arguments: object, check: bool = True
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=check,
        timeout=60,
    )


async def test_failed_group_leaves_no_hole(tmp_path: Path, fast: None) -> None:
    """A disk that is full in the midst of the data fails that group alone; the next one takes its
    place, so that a rebuild finds what came after."""
    async with make_tier(tmp_path) as tier:
        await write_parts(tier, range(1))
        full = os.open("/dev/full", os.O_RDWR)
        with (
            replaced(tier._directory.segments[1].file._fd, full),
            pytest.raises(NoSpace, match="ENOSPC"),
        ):
            await tier.write(*make_part(1, RECORD))
        os.close(full)
        await write_parts(tier, range(2, 4))
    shutil.rmtree(tmp_path / "index")
    async with make_tier(tmp_path) as tier:
        assert await readable(tier) == [0, 2, 3]


async def test_failing_disk_is_a_transfer_error(tmp_path: Path, fast: None) -> None:
    """An error of the disk is no verdict on the part: it is not quarantined, and reads again later."""
    async with make_tier(tmp_path) as tier:
        [(identity, location)] = (await write_parts(tier, range(1))).items()
        directory = os.open(tmp_path, os.O_RDONLY)
        with (
            replaced(tier._directory.segments[1].file._fd, directory),
            pytest.raises(TransferError),
        ):
            await read_back(tier, location, identity)
        os.close(directory)
        assert await readable(tier) == [0]
        assert tier.statistics().quarantined == 0


@contextlib.contextmanager
def replaced(fd: int, other: int) -> Iterator[None]:
    """Let a descriptor of the tier lead to another file for a while."""
    kept = os.dup(fd)
    os.dup2(other, fd)
    try:
        yield
    finally:
        os.dup2(kept, fd)
        os.close(kept)


async def test_deletion_waits_for_an_index_that_fails(tmp_path: Path, fast: None) -> None:
    """A deletion whose commit failed is tried again with the next group, in its order."""

    class FailsOnce(SegmentTier):
        failures = 1

        async def _commit_index(self, plan: Plan) -> list[Extent]:
            if plan.forgets and self.failures:
                self.failures -= 1
                raise TransferError("the disk went away")
            return await super()._commit_index(plan)

    async with make_tier(tmp_path, kind=FailsOnce) as tier:
        located = await write_parts(tier, range(2))
        tier.delete([located[make_part(0, RECORD)[0]]])
        with pytest.raises(TransferError):
            await tier.write(*make_part(2, RECORD))
        await tier.write(*make_part(3, RECORD))
        assert await readable(tier) == [1, 3]


async def test_damaged_entry_of_the_index_costs_its_own_part_only(
    tmp_path: Path, fast: None
) -> None:
    """A deletion that the index cannot carry out is given up: it must not fail all writes after it."""
    async with make_tier(tmp_path) as tier:
        [(_, location)] = (await write_parts(tier, range(1))).items()
        with (
            tier._directory.index._transaction() as (txn, tables),
            txn.cursor(db=tables.extents) as cursor,
        ):
            cursor.first()
            key, row = cursor.item()
            cursor.delete()
            cursor.put(key, row[:-9] + bytes(9))
        tier.delete([location])
        with contextlib.suppress(CorruptBlock):
            await write_parts(tier, range(1, 2))  # may be of one group with the deletion
        await write_parts(tier, range(2, 3))


@pytest.mark.parametrize("state", ["indexed", "not indexed"])
async def test_unreadable_file_costs_its_parts_only(tmp_path: Path, state: str, fast: None) -> None:
    """A segment that does not open, here because it is no file, is given up; others are served, and
    new ones get other names than what could not be removed."""
    async with small_tier(tmp_path) as tier:
        await write_parts(tier, range(6))
    path_of(tmp_path, 1).unlink()
    path_of(tmp_path, 1).mkdir()
    path_of(tmp_path, 9).mkdir()
    if state == "not indexed":
        shutil.rmtree(tmp_path / "index")
    async with small_tier(tmp_path) as tier:
        assert await readable(tier) == [4, 5]
        await write_parts(tier, range(10, 20))
        assert 19 in await readable(tier)


async def test_no_descriptor_left_is_a_transfer_error(tmp_path: Path, fast: None) -> None:
    """EMFILE when a segment is to be made fails the write; with descriptors again it succeeds."""
    async with make_tier(tmp_path) as tier:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            with pytest.raises(TransferError, match="EMFILE"):
                await tier.write(*make_part(1, RECORD))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await tier.write(*make_part(2, RECORD))
        assert await readable(tier) == [2]


# ------------------------------------------------------------------ groups, cancellation, ownership


async def test_parts_written_together_are_committed_together(tmp_path: Path) -> None:
    """A hundred writes cost a few commits, not a hundred."""
    async with make_tier(tmp_path) as tier:
        await asyncio.gather(*(tier.write(*make_part(seed, 5000)) for seed in range(100)))
        statistics = tier.statistics()
    assert statistics.sealed_writes == 100
    assert statistics.group_commits <= 2


async def test_leaving_seals_what_was_accepted(tmp_path: Path) -> None:
    """Closing waits for no timer and loses no write."""
    async with asyncio.TaskGroup() as group:
        async with make_tier(tmp_path) as tier:
            writes = [group.create_task(tier.write(*make_part(seed))) for seed in range(3)]
            await asyncio.sleep(0)
        assert all(write.done() for write in writes)
    async with make_tier(tmp_path) as tier:
        assert await readable(tier, 10_000) == [0, 1, 2]


@pytest.mark.parametrize("stage", ["_write_data", "_sync_data", "_commit_index"])
async def test_write_cancelled_in_its_group_waits_and_stores_nothing(
    tmp_path: Path, stage: str, fast: None
) -> None:
    """Cancelled at any stage, `write` ends after the I/O on its buffer did; the part is dropped."""
    go, reached = asyncio.Event(), asyncio.Event()

    class Gated(SegmentTier):
        pass

    async def gated(self: SegmentTier, plan: Plan) -> object:
        reached.set()
        await go.wait()
        return await getattr(SegmentTier, stage)(self, plan)

    setattr(Gated, stage, gated)
    identity, payload = make_part(1)
    async with make_tier(tmp_path, kind=Gated) as tier, asyncio.TaskGroup() as group:
        write = group.create_task(tier.write(identity, payload))
        await reached.wait()
        for _ in range(3):  # impatient, too
            write.cancel()
            await asyncio.sleep(0)
            assert not write.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await write
        await tier.write(*make_part(2))
        assert [i for i, _ in tier.records()] == [make_part(2)[0]]
        assert tier.statistics().records == 1


async def test_read_cancelled_waits_for_its_thread(tmp_path: Path, fast: None) -> None:
    """A cancelled read gives its buffer back only when no thread writes into it any more."""
    go, reading = threading.Event(), threading.Event()

    class SlowReads(SegmentTier):
        def _verify(self, payload: memoryview, identity: PartIdentity) -> None:
            reading.set()
            go.wait(10)

    async with make_tier(tmp_path, kind=SlowReads) as tier, asyncio.TaskGroup() as group:
        [(identity, location)] = (await write_parts(tier, range(1))).items()
        read = group.create_task(tier.read_into(location, identity, page_buffer(RECORD)))
        await asyncio.to_thread(reading.wait, 10)
        read.cancel()
        await asyncio.sleep(0)
        assert not read.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await read


async def test_second_daemon_is_refused(tmp_path: Path) -> None:
    """One directory, one daemon; the first is not disturbed."""
    async with make_tier(tmp_path) as tier:
        with pytest.raises(ConfigError, match="in use by another"):
            async with make_tier(tmp_path):
                pass
        location = await tier.write(*make_part(1))
        assert await read_back(tier, location, make_part(1)[0])


@pytest.mark.parametrize(
    ("capacity_bytes", "segment_bytes"), [(MIB, MIB), (MIB, 5000), (MIB, 4096), (4096, 0)]
)
async def test_impossible_sizes_are_refused(
    tmp_path: Path, capacity_bytes: int, segment_bytes: int
) -> None:
    with pytest.raises(ConfigError):
        async with make_tier(tmp_path, capacity_bytes=capacity_bytes, segment_bytes=segment_bytes):
            pass


async def test_unusable_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="SSD directory"):
        async with make_tier(tmp_path / "file" / "ssd"):
            pass


async def test_statistics_say_whether_the_page_cache_is_bypassed(tmp_path: Path) -> None:
    for direct in (True, False):
        async with make_tier(tmp_path / str(direct), ops=FileOps(direct=direct)) as tier:
            await tier.write(*make_part(1))
            assert tier.statistics().direct is direct
            assert "1 records" in repr(tier)


def test_refused_o_direct_falls_back_visibly() -> None:
    """procfs refuses O_DIRECT with EINVAL, as some file systems do."""
    fd, direct = direct_io.open_file(FileOps(), Path("/proc/self/comm"), os.O_RDWR)
    os.close(fd)
    assert not direct


async def test_rates_count_time_under_way_once(tmp_path: Path) -> None:
    """Two reads side by side take the time of one: bytes over seconds is the tier's rate."""
    times = iter(range(100))
    tier = SegmentTier(
        tmp_path,
        capacity_bytes=MIB,
        clock=lambda: float(next(times)),
    )
    async with tier:
        identity, payload = make_part(1)
        location = await tier.write(identity, payload)
        await asyncio.gather(*(read_back(tier, location, identity) for _ in range(2)))
        s = tier.statistics()
    assert (s.write_bytes, s.write_s, s.read_bytes, s.read_s) == (10_000, 1.0, 20_000, 1.0)


def test_runs_are_bounded_and_keep_their_order() -> None:
    payload = make_payload(0, 1 << 20)
    identity = make_identity(0, payload)
    records = [
        Appended(index * record_bytes(len(payload)), index, identity, payload)
        for index in range(20)
    ]
    runs = list(plan_runs(records))
    assert [record for run in runs for record in run] == records
    assert [len(run) for run in runs] == [3, 3, 3, 3, 3, 3, 2]
    assert list(plan_runs([])) == []


@pytest.mark.parametrize(
    ("capacity", "segment"),
    [(64 * MIB, 8 * MIB), (4 << 30, 256 * MIB), (64 << 30, 256 * MIB), (1 << 40, 4 << 30)],
)
def test_default_segments_are_neither_few_nor_many(capacity: int, segment: int) -> None:
    assert default_segment_bytes(capacity) == segment
