"""The SSD tier beside the disk it is on: rates, warm start, rebuild.

rates    records of 64 KiB, 256 KiB and 1 MiB through `SegmentTier`, headers included and checksums verified,
         eight in flight. Raw: the same payloads by plain O_DIRECT calls, as many threads as are in flight,
         one file, `fdatasync` every 64 MiB. Peers, just as durable and verified: one file a block (O_DIRECT),
         and values in LMDB. The sides take turns, each on files written in the same round
open     from the start of a process (interpreter and imports) to the first hit that is loaded and verified,
         with every block indexed and every byte accounted for. The index is in the page cache in one figure,
         and dropped from it in the other. Payloads are holes but for what is read: nobody else looks at them
rebuild  the same directory without its index: the headers of all records are read, at the distance that
         64 KiB records have, and indexed. Peer: a walk over one file a block, by name, size and time
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import harness
import lmdb
import xxhash

from kvfabric.events.stream import EventStream
from kvfabric.hashing import ROOT_PARENT, layout_fingerprint
from kvfabric.registry.state import RegistryState
from kvfabric.store.store import BlockStore, StoreLimits
from kvfabric.testing.store import GRANT, SESSION, TAG, make_keys, make_layout
from kvfabric.tiers.arena import Arena
from kvfabric.tiers.base import Location, PartIdentity
from kvfabric.tiers.records import (
    PAGE_BYTES,
    FileHeader,
    RecordHeader,
    encode_file_header,
    encode_header,
    record_bytes,
)
from kvfabric.tiers.segment_file import path_of
from kvfabric.tiers.segments import SegmentTier
from kvfabric.types import DEFAULT_TENANT, BlockKey, Part

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
DEPTH = 8
SYNC_BYTES = 64 * MIB
SIZES = (64 * KIB, 256 * KIB, MIB)
MAIN_SIZE = MIB
"""What the figures are of: of 36 layers of an 8B model a block of 64 tokens has 9 MiB."""
SMALL = 64 * KIB
SEGMENT = 256 * MIB


def identity_of(number: int, num_bytes: int, checksum: bytes) -> PartIdentity:
    return PartIdentity(
        part=Part(BlockKey(number.to_bytes(8, "little") * 4), 0, 0),
        namespace_tag=TAG,
        tenant=DEFAULT_TENANT,
        layout_fingerprint=bytes(32),
        parent=ROOT_PARENT,
        block_index=0,
        incarnations=(),
        num_bytes=num_bytes,
        checksum=checksum,
    )


def sums_of(payloads: list[memoryview]) -> list[bytes]:
    """Of each that is in flight, once: a part has its checksum when it leaves the arena."""
    return [xxhash.xxh3_128_digest(payload) for payload in payloads]


def buffers(size: int, rng: random.Random) -> list[memoryview]:
    """One for each record in flight, aligned as the arena's slots are."""
    made = []
    for _ in range(DEPTH):
        view = memoryview(mmap.mmap(-1, size))
        view[:] = rng.randbytes(size)
        made.append(view)
    return made


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# ------------------------------------------------------------------ the sides of a rate


class Side(Protocol):
    """Writes all records, and reads them in an order. Durable and, but for raw, verified."""

    name: str

    def write(self, payloads: list[memoryview]) -> None: ...

    def read(self, order: list[int], into: list[memoryview]) -> None: ...

    def close(self) -> None: ...


class Raw:
    """Plain O_DIRECT."""

    name = "raw"

    def __init__(self, directory: Path, size: int, count: int) -> None:
        self._size, self._count = size, count
        self._fd = os.open(directory / "raw", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, size * count)

    def write(self, payloads: list[memoryview]) -> None:
        step = SYNC_BYTES // self._size
        with ThreadPoolExecutor(DEPTH) as pool:
            for first in range(0, self._count, step):
                numbers = range(first, min(first + step, self._count))
                list(pool.map(partial(self._write_one, payloads), numbers))
                os.fdatasync(self._fd)

    def _write_one(self, payloads: list[memoryview], number: int) -> None:
        os.pwritev(self._fd, [payloads[number % DEPTH]], number * self._size)

    def read(self, order: list[int], into: list[memoryview]) -> None:
        def lane(at: int) -> None:
            for number in order[at::DEPTH]:
                os.preadv(self._fd, [into[at]], number * self._size)

        with ThreadPoolExecutor(DEPTH) as pool:
            list(pool.map(lane, range(DEPTH)))

    def close(self) -> None:
        os.close(self._fd)


class Tier:
    """What is measured."""

    name = "tier"

    def __init__(self, directory: Path, size: int, count: int) -> None:
        self._runner = asyncio.Runner()
        capacity = (count * record_bytes(size) // SEGMENT + 3) * SEGMENT
        self._tier = SegmentTier(
            directory / "tier",
            capacity_bytes=capacity,
            segment_bytes=SEGMENT,
            clock=time.monotonic,
        )
        self._runner.run(self._tier.__aenter__())
        self._count = count
        self._places: dict[int, tuple[Location, PartIdentity]] = {}

    def write(self, payloads: list[memoryview]) -> None:
        self._runner.run(self._write(payloads))

    async def _write(self, payloads: list[memoryview]) -> None:
        """As the store does: everything that is to go is handed over, 64 MiB at most."""
        room = asyncio.Semaphore(SYNC_BYTES // len(payloads[0]))
        sums = sums_of(payloads)

        async def one(number: int) -> None:
            payload = payloads[number % DEPTH]
            identity = identity_of(number, len(payload), sums[number % DEPTH])
            self._places[number] = (await self._tier.write(identity, payload), identity)
            room.release()

        async with asyncio.TaskGroup() as group:
            for number in range(self._count):
                await room.acquire()
                group.create_task(one(number))

    def read(self, order: list[int], into: list[memoryview]) -> None:
        self._runner.run(self._read(order, into))

    async def _read(self, order: list[int], into: list[memoryview]) -> None:
        async def lane(at: int) -> None:
            for number in order[at::DEPTH]:
                location, identity = self._places[number]
                await self._tier.read_into(location, identity, into[at])

        async with asyncio.TaskGroup() as group:
            for at in range(DEPTH):
                group.create_task(lane(at))

    def close(self) -> None:
        self._runner.run(self._tier.__aexit__(None, None, None))
        self._runner.close()


class Files:
    """Peer: one file a block, its checksum beside it in memory."""

    name = "files"

    def __init__(self, directory: Path, size: int, count: int) -> None:
        self._directory, self._count = directory / "files", count
        self._directory.mkdir()
        self._sums: dict[int, bytes] = {}

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:08x}"

    def write(self, payloads: list[memoryview]) -> None:
        with ThreadPoolExecutor(DEPTH) as pool:
            list(pool.map(partial(self._write_one, payloads), range(self._count)))
        sums = sums_of(payloads)
        self._sums = {number: sums[number % DEPTH] for number in range(self._count)}
        fd = os.open(self._directory, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

    def _write_one(self, payloads: list[memoryview], number: int) -> None:
        payload = payloads[number % DEPTH]
        fd = os.open(self._path(number), os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        os.pwritev(fd, [payload], 0)
        os.fdatasync(fd)
        os.close(fd)

    def read(self, order: list[int], into: list[memoryview]) -> None:
        def lane(at: int) -> None:
            for number in order[at::DEPTH]:
                fd = os.open(self._path(number), os.O_RDONLY | os.O_DIRECT)
                os.preadv(fd, [into[at]], 0)
                os.close(fd)
                assert xxhash.xxh3_128_digest(into[at]) == self._sums[number]

        with ThreadPoolExecutor(DEPTH) as pool:
            list(pool.map(lane, range(DEPTH)))

    def close(self) -> None:
        pass


class Lmdb:
    """Peer: values in LMDB. It reads through the page cache, which is dropped before."""

    name = "lmdb"

    def __init__(self, directory: Path, size: int, count: int) -> None:
        self._size, self._count = size, count
        self._path = directory / "lmdb"
        self._env = lmdb.open(
            str(self._path), map_size=4 * size * count + GIB, max_readers=64, readahead=False
        )
        self._sums: dict[int, bytes] = {}

    def write(self, payloads: list[memoryview]) -> None:
        step, sums = SYNC_BYTES // self._size, sums_of(payloads)
        self._sums = {number: sums[number % DEPTH] for number in range(self._count)}
        for first in range(0, self._count, step):
            with self._env.begin(write=True) as txn:
                for number in range(first, min(first + step, self._count)):
                    txn.put(number.to_bytes(8, "big"), payloads[number % DEPTH])

    def read(self, order: list[int], into: list[memoryview]) -> None:
        drop_cached(self._path / "data.mdb")

        def lane(at: int) -> None:
            for number in order[at::DEPTH]:
                with self._env.begin(buffers=True) as txn:
                    value = txn.get(number.to_bytes(8, "big"))
                    assert value is not None
                    into[at][:] = value
                assert xxhash.xxh3_128_digest(into[at]) == self._sums[number]

        with ThreadPoolExecutor(DEPTH) as pool:
            list(pool.map(lane, range(DEPTH)))

    def close(self) -> None:
        self._env.close()


def drop_cached(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def measure_rates(
    directory: Path, size: int, total: int, rounds: int, rng: random.Random
) -> dict[str, float]:
    """GB/s of each side, and the medians of its ratio to the raw side of the same round."""
    count = total // size
    payloads, into = buffers(size, rng), buffers(size, rng)
    order = list(range(count))
    taken: dict[str, list[float]] = {}
    for number in range(rounds):
        sides: list[Callable[[Path, int, int], Side]] = [Raw, Tier]
        if size == MAIN_SIZE:
            sides += [Files, Lmdb]
        for make in sides if number % 2 else reversed(sides):
            place = directory / "side"
            place.mkdir()
            side = make(place, size, count)
            rng.shuffle(order)
            try:
                taken.setdefault(f"{side.name}_write", []).append(
                    seconds(partial(side.write, payloads))
                )
                taken.setdefault(f"{side.name}_read", []).append(
                    seconds(partial(side.read, order, into))
                )
            finally:
                side.close()
                shutil.rmtree(place)
    row: dict[str, float] = {"record_bytes": size, "records": count}
    for name, times in taken.items():
        row[f"{name}_gb_per_s"] = count * size / harness.median(times) / 1e9
        raw = taken[f"raw_{name.split('_')[1]}"]
        ratios = [theirs / ours for theirs, ours in zip(raw, times, strict=True)]
        row[f"{name}_over_raw"] = harness.median(ratios)
    return row


# ------------------------------------------------------------------ open and rebuild


def make_directory(directory: Path, num_records: int) -> tuple[BlockKey, int]:
    """Segments of 64 KiB records as the tier writes them, with holes for all payloads but the last.

    Returns the last key and the bytes that the tier must account for.
    """
    directory.mkdir(parents=True)
    layout = make_layout(part_bytes=SMALL)
    size = record_bytes(SMALL)
    keys, used, per_file = make_keys(num_records), 0, (SEGMENT - PAGE_BYTES) // size
    payload = memoryview(bytes(SMALL))
    checksum = xxhash.xxh3_128_digest(payload)
    for number, first in enumerate(range(0, num_records, per_file), 1):
        header = FileHeader(os.urandom(16), number, SEGMENT)
        own = range(first, min(first + per_file, num_records))
        with path_of(directory, number).open("wb") as file:
            os.ftruncate(file.fileno(), SEGMENT)
            os.pwrite(file.fileno(), encode_file_header(header), 0)
            for at, index in enumerate(own):
                identity = PartIdentity(
                    part=Part(keys[index], 0, 0),
                    namespace_tag=TAG,
                    tenant=DEFAULT_TENANT,
                    layout_fingerprint=layout_fingerprint(layout),
                    parent=keys[index - 1] if index % 64 else ROOT_PARENT,
                    block_index=index % 64,
                    incarnations=(),
                    num_bytes=SMALL,
                    checksum=checksum,
                )
                offset = PAGE_BYTES + at * size
                page = encode_header(RecordHeader(header.file_id, offset, index + 1, identity))
                os.pwrite(file.fileno(), page, offset)
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        used += PAGE_BYTES + len(own) * size
    first_of_chain = num_records - 1 - (num_records - 1) % 64
    return keys[first_of_chain], used


async def first_hit(directory: Path, key: BlockKey, num_records: int, capacity: int) -> None:
    """What a node does until an engine has a verified block in its hands; prints what is accounted for."""
    events = EventStream(boot_id=bytes(16))
    tier = SegmentTier(
        directory, capacity_bytes=capacity, segment_bytes=SEGMENT, clock=time.monotonic
    )
    layout = make_layout(part_bytes=SMALL)
    limits = StoreLimits(host_bytes=64 * MIB, ssd_bytes=capacity, max_blocks=2 * num_records)
    arena = Arena.create(limits.host_bytes)
    async with (
        tier,
        BlockStore(
            limits=limits,
            registry=RegistryState,
            clock=time.monotonic,
            events=events,
            ssd=tier,
        ) as store,
    ):
        store.attach_arena(arena)
        store.open_session(SESSION, layout)
        store.open_request(SESSION, "r", GRANT)
        assert store.match(SESSION, "r", key).num_blocks == 1
        located = await store.load(SESSION, "r", key, 0, 0)
        offset = int.from_bytes(located.offsets[:8], "little")
        data = arena.view[offset : offset + SMALL]
        assert xxhash.xxh3_128_digest(data) == located.checksums[:16]
        assert store.confirm(SESSION, "r", key, located.generations, 0, 0).num_blocks == 1
        s = tier.statistics()
        print(json.dumps([s.records, s.used_bytes, s.live_bytes]), flush=True)
        data.release()
    arena.close()


def open_once(directory: Path, key: BlockKey, num_records: int, used: int) -> float:
    """Seconds from the start of a process to its first verified hit."""
    capacity = (num_records * record_bytes(SMALL) // SEGMENT + 3) * SEGMENT
    arguments = [str(directory), key.hex(), str(num_records), str(capacity)]
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, __file__, "--open", *arguments], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        took = time.perf_counter() - started
        child.wait(300)
    records, accounted, live = json.loads(line)
    files = -(-used // SEGMENT)
    assert records == num_records, f"{records} of {num_records} records"
    assert used <= accounted <= used + PAGE_BYTES  # an empty spare has its header
    assert live == used - files * PAGE_BYTES
    return took


def measure_open(directory: Path, num_records: int, rounds: int) -> dict[str, float]:
    key, used = make_directory(directory / "tier", num_records)
    rebuild = [open_once(directory / "tier", key, num_records, used)]
    warm, cold = [], []
    for _ in range(rounds):
        warm.append(open_once(directory / "tier", key, num_records, used))
        drop_cached(directory / "tier" / "index" / "data.mdb")
        cold.append(open_once(directory / "tier", key, num_records, used))
    empty = (directory / "empty", *make_directory(directory / "empty", 1))
    start = harness.median([open_once(empty[0], empty[1], 1, empty[2]) for _ in range(3)])
    for _ in range(rounds - 1):
        shutil.rmtree(directory / "tier" / "index")
        rebuild.append(open_once(directory / "tier", key, num_records, used))
    index_bytes = (directory / "tier" / "index" / "data.mdb").stat().st_size
    shutil.rmtree(directory / "tier")
    return {
        "records": num_records,
        "open_s": harness.median(warm),
        "open_cold_s": harness.median(cold),
        "open_one_record_s": start,
        "rebuild_s": harness.median(rebuild),
        "index_bytes_per_record": index_bytes / num_records,
    }


def measure_walk(directory: Path, num_files: int) -> float:
    """Peer: seconds to learn of so many files, one a block, by name, size and time."""
    directory.mkdir()
    for number in range(num_files):
        os.close(os.open(directory / f"{number:016x}", os.O_CREAT | os.O_WRONLY, 0o600))
    found = {}

    def walk() -> None:
        for entry in os.scandir(directory):
            status = entry.stat()
            found[entry.name] = (status.st_size, status.st_mtime)

    took = seconds(walk)
    assert len(found) == num_files
    shutil.rmtree(directory)
    return took


@contextmanager
def scratch() -> Iterator[Path]:
    """On the disk that is measured: where TMPDIR is."""
    directory = Path(tempfile.mkdtemp(prefix="kvfabric-bench-ssd-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def main() -> None:
    args = harness.parse_arguments(__doc__)
    rng = random.Random(args.seed)
    total, rounds = (64 * MIB, 1) if args.quick else (512 * MIB, 5)
    num_records = 5_000 if args.quick else 250_000
    rows: list[dict[str, float]] = []
    with scratch() as directory:
        for size in SIZES:
            row = measure_rates(directory, size, total, rounds, rng)
            rows.append(row)
            print(json.dumps(row), flush=True)
        opened = measure_open(directory, num_records, 1 if args.quick else 3)
        opened["walk_files_s"] = measure_walk(directory / "walk", num_records)
        print(json.dumps(opened), flush=True)
    [main_row] = [row for row in rows if row["record_bytes"] == MAIN_SIZE]
    millions = num_records / 1e6
    figures = {
        "read_over_raw": main_row["tier_read_over_raw"],
        "write_over_raw": main_row["tier_write_over_raw"],
        "open_s_per_million_records": opened["open_s"] / millions,
        "rebuild_s_per_million_records": opened["rebuild_s"] / millions,
    }
    harness.report("ssd", args, figures, [*rows, opened])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--open"]:
        place, hex_key, count, capacity = sys.argv[2:]
        asyncio.run(
            first_hit(Path(place), BlockKey(bytes.fromhex(hex_key)), int(count), int(capacity))
        )
    else:
        main()
