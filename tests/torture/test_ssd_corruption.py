"""Proof 2: whatever is changed in the files of the SSD tier behind its back is detected, and never served.

The reader asks for what it stored, by the identity that the store keeps; a second one, which has lost its
index, finds out what there is from the files alone.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kvfabric.errors import CorruptBlock
from kvfabric.testing.segments import RECORD, make_tier, small_tier, write_parts
from kvfabric.testing.tiers import make_part, page_buffer
from kvfabric.tiers import segment_file, segment_groups
from kvfabric.tiers.base import Location, PartIdentity
from kvfabric.tiers.records import PAGE_BYTES, decode_header, record_bytes
from kvfabric.tiers.segment_file import path_of
from kvfabric.tiers.segments import SegmentTier
from tests.torture.scale import at_most, count, record

SECTOR = 512
SIZE = record_bytes(RECORD)
Places = dict[PartIdentity, Location]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups close at once."""
    monkeypatch.setattr(segment_groups, "GROUP_S", 0.0)


class Unverified(SegmentTier):
    """The twin: the header is compared, the payload is not."""

    def _verify(self, payload: memoryview, identity: PartIdentity) -> None:
        pass


class Reader:
    """Reads parts of a tier by the way every reader goes, without the event loop: thousands a second."""

    def __init__(self, tier: SegmentTier) -> None:
        self._tier = tier
        self._buffer = page_buffer(RECORD)

    def outcome(self, location: Location, identity: PartIdentity) -> str:
        """`right`, `detected` or `wrong`."""
        file = self._tier._directory.segments[location.file].file
        self._buffer[:] = bytes(len(self._buffer))
        try:
            self._tier._read(file, location.offset, identity, self._buffer)
        except CorruptBlock:
            return "detected"
        seed = identity.block_index
        return "right" if self._buffer[:RECORD] == make_part(seed, RECORD)[1] else "wrong"


class Patched:
    """A file with some bytes changed, for a while."""

    def __init__(self, path: Path, at: int, data: bytes) -> None:
        self._path, self._at, self._data = path, at, data
        self._before = b""

    def __enter__(self) -> None:
        with self._path.open("r+b") as file:
            file.seek(self._at)
            self._before = file.read(len(self._data))
            file.seek(self._at)
            file.write(self._data)

    def __exit__(self, *exc: object) -> None:
        with self._path.open("r+b") as file:
            file.seek(self._at)
            file.write(self._before)


def flipped(path: Path, at: int, mask: int) -> Patched:
    with path.open("rb") as file:
        file.seek(at)
        [byte] = file.read(1)
    return Patched(path, at, bytes([byte ^ mask]))


async def test_every_header_byte(tmp_path: Path) -> None:
    """Each byte of a record's header page, each with one bit at least: not one is served."""
    tries, served = 0, []
    async with small_tier(tmp_path) as tier:
        located = await write_parts(tier, range(2))
        (_, identity), reader = located, Reader(tier)
        location, path = located[identity], path_of(tmp_path, 1)
        masks = [1 << bit for bit in range(8)] if count(1, 8) == 8 else [0x10]
        for at in range(PAGE_BYTES):
            for mask in masks:
                with flipped(path, location.offset + at, mask):
                    tries += 1
                    if reader.outcome(location, identity) != "detected":
                        served.append((at, mask))
        assert reader.outcome(location, identity) == "right"
    record("2 header bits flipped", tries, f"{at_most(len(served), tries)} served")
    assert served == []


async def flip_payload(kind: type[SegmentTier], directory: Path, flips: int) -> int:
    """How many of so many random flips are served as wrong bytes."""
    rng, wrong = random.Random(flips), 0
    async with make_tier(directory, kind=kind) as tier:
        [(identity, location)] = (await write_parts(tier, range(1))).items()
        reader, path = Reader(tier), path_of(directory, 1)
        for _ in range(flips):
            at = location.offset + PAGE_BYTES + rng.randrange(RECORD)
            with flipped(path, at, 1 << rng.randrange(8)):
                outcome = reader.outcome(location, identity)
            wrong += outcome == "wrong"
            assert outcome in ("wrong", "detected")
    return wrong


async def test_payload_flips(tmp_path: Path) -> None:
    """Random bits of a payload: none is served; without the checksum every one is."""
    flips = count(10_000, 200_000)
    wrong = await flip_payload(SegmentTier, tmp_path / "guarded", flips)
    record("2 payload bits flipped", flips, f"{at_most(wrong, flips)} served")
    assert wrong == 0
    assert await flip_payload(Unverified, tmp_path / "twin", 100) == 100


async def test_every_truncation(tmp_path: Path) -> None:
    """The file cut at each sector: what lies before is right, what does not is detected; also when the
    tier opens it so, and when it has only the file."""
    tries, wrong = 0, 0
    async with small_tier(tmp_path / "a") as tier:
        located = await write_parts(tier, range(3))
    whole = path_of(tmp_path / "a", 1).read_bytes()
    end = PAGE_BYTES + 3 * SIZE
    step = count(8, 1) * SECTOR
    for cut in range(0, end, step):
        directory = tmp_path / "cut"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(tmp_path / "a", directory)
        path_of(directory, 1).write_bytes(whole[:cut])
        for lost_index in (False, True):
            if lost_index:
                shutil.rmtree(directory / "index")
            async with small_tier(directory) as tier:
                reader, listed = Reader(tier), dict(tier.records())
                for identity, location in located.items():
                    tries += 1
                    complete = location.offset + SIZE <= cut
                    if identity not in listed:
                        wrong += complete
                    else:
                        outcome = reader.outcome(location, identity)
                        wrong += outcome != ("right" if complete else "detected")
    record("2 truncations", tries, f"{at_most(wrong, tries)} served or lost wrongly")
    assert wrong == 0


async def swap(kind: type[SegmentTier], directory: Path, num_records: int) -> tuple[int, int]:
    """Each intact record in the place of each other one: (tries, how many were served)."""
    tries, served = 0, 0
    async with make_tier(directory, kind=kind) as tier:
        located = await write_parts(tier, range(num_records))
        reader, path = Reader(tier), path_of(directory, 1)
        raw = path.read_bytes()
        for identity, location in located.items():
            for other, source in located.items():
                with Patched(path, location.offset, raw[source.offset : source.offset + SIZE]):
                    if other == identity:
                        assert reader.outcome(location, identity) == "right"
                        continue
                    tries += 2
                    served += reader.outcome(location, identity) != "detected"
                    served += reader.outcome(location, other) != "detected"
    return tries, served


async def test_swapped_records(tmp_path: Path) -> None:
    tries, served = await swap(SegmentTier, tmp_path, count(4, 60))
    record("2 swapped records", tries, f"{at_most(served, tries)} served")
    assert served == 0


async def test_swapped_records_are_not_found_without_an_index(tmp_path: Path) -> None:
    async with small_tier(tmp_path) as tier:
        (first, second, _) = (await write_parts(tier, range(3))).values()
    path = path_of(tmp_path, 1)
    raw = path.read_bytes()
    with path.open("r+b") as file:
        for location, other in ((first, second), (second, first)):
            file.seek(location.offset)
            file.write(raw[other.offset : other.offset + SIZE])
    shutil.rmtree(tmp_path / "index")
    async with small_tier(tmp_path) as tier:
        assert list(tier.records()) == []


async def take_from_others(
    kind: type[SegmentTier], directory: Path, num_records: int
) -> tuple[int, int]:
    """Another tenant's intact record of the same block and bytes, in the same file: (tries, how many
    were served) of copies in the place of one's own, and of places asked for under the wrong owner."""
    tries, served = 0, 0
    async with make_tier(directory, kind=kind) as tier:
        reader, path = Reader(tier), path_of(directory, 1)
        for seed in range(num_records):
            mine, payload = make_part(seed, RECORD)
            owner = make_part(seed + num_records, RECORD)[0].tenant
            theirs = replace(mine, tenant=owner, namespace_tag=b"theirs!!")
            at, elsewhere = await tier.write(mine, payload), await tier.write(theirs, payload)
            copy = path.read_bytes()[elsewhere.offset : elsewhere.offset + SIZE]
            served += reader.outcome(elsewhere, mine) != "detected"
            served += reader.outcome(at, theirs) != "detected"
            with Patched(path, at.offset, copy):
                served += reader.outcome(at, mine) != "detected"
                served += reader.outcome(at, theirs) != "detected"
            tries += 4
    return tries, served


async def test_record_of_another_tenant(tmp_path: Path) -> None:
    tries, served = await take_from_others(SegmentTier, tmp_path, count(2, 40))
    record("2 records of another tenant", tries, f"{at_most(served, tries)} served")
    assert served == 0


async def take_from_another_node(
    kind: type[SegmentTier], directory: Path, num_files: int
) -> tuple[int, int]:
    """The same parts at the same offsets of files with the same numbers, written by another node: (tries,
    how many were served)."""
    tries, served = 0, 0
    for name in ("mine", "theirs"):
        async with small_tier(directory / name, kind=kind, files=num_files + 2) as tier:
            located = await write_parts(tier, range(4 * num_files))
    for number in range(1, num_files + 1):
        foreign = path_of(directory / "theirs", number)
        shutil.copy(foreign, path_of(directory / "mine", number))
        shutil.copy(foreign, path_of(directory / "mine", 0x9000 + number))
    async with small_tier(directory / "mine", kind=kind, files=num_files + 2) as tier:
        reader = Reader(tier)
        for identity, location in located.items():
            tries += 1
            served += reader.outcome(location, identity) != "detected"
    assert not list((directory / "mine").glob("seg-00009*"))
    return tries, served


async def test_segments_of_another_node(tmp_path: Path) -> None:
    tries, served = await take_from_another_node(SegmentTier, tmp_path, count(1, 250))
    record("2 records in segment files of another node", tries, f"{at_most(served, tries)} served")
    assert served == 0
    # Under a number that is not its own it is no segment of a node that has only files either.
    mine = tmp_path / "mine"
    shutil.rmtree(mine / "index")
    for path in mine.glob("seg-*"):
        path.unlink()
    shutil.copy(path_of(tmp_path / "theirs", 1), path_of(mine, 0x99))
    async with small_tier(mine) as tier:
        assert list(tier.records()) == []


async def test_without_what_a_header_says_others_records_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of the last three: neither header nor payload is compared."""
    monkeypatch.setattr(segment_file, "verify_header", lambda page, *_: decode_header(page))
    assert await swap(Unverified, tmp_path / "swapped", 3) == (12, 12)
    assert await take_from_others(Unverified, tmp_path / "tenant", 2) == (8, 8)
    assert await take_from_another_node(Unverified, tmp_path / "node", 1) == (4, 4)


async def test_index_rows(tmp_path: Path) -> None:
    """A row of the index with any byte changed is no row: the tier rebuilds, and serves what the records
    say."""
    async with small_tier(tmp_path / "a") as tier:
        located = await write_parts(tier, range(3))
    data = (tmp_path / "a" / "index" / "data.mdb").read_bytes()
    key = next(iter(located)).part.key
    found = data.find(key)
    starts = []
    while found >= 0:  # old pages of the tree have copies
        starts.append(found - 48)
        found = data.find(key, found + 1)
    assert starts
    tries, wrong = 0, 0
    for at in range(0, 136, count(17, 1)):
        directory = tmp_path / "b"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(tmp_path / "a", directory)
        spoilt = bytearray(data)
        for start in starts:
            spoilt[start + at] ^= 0x20
        (directory / "index" / "data.mdb").write_bytes(spoilt)
        async with small_tier(directory) as tier:
            reader = Reader(tier)
            tries += 1
            outcomes = {reader.outcome(place, one) for one, place in located.items()}
            wrong += dict(tier.records()) != located or outcomes != {"right"}
    record(
        "2 bytes of a row of the index changed", tries, f"{at_most(wrong, tries)} served or lost"
    )
    assert wrong == 0
