"""The SSD tier beside the disk it is on: rates, warm start, rebuild.

rates    records of 64 KiB, 256 KiB and 1 MiB through `SegmentTier`, headers included and checksums verified,
         eight in flight. Raw: the same payloads by plain O_DIRECT calls, as many threads as are in flight,
         one file, `fdatasync` every 64 MiB. Peers, just as durable and verified: one file a block (O_DIRECT),
         and values in LMDB. The same tier with `ssd_encryption` shows what that costs. The sides take turns,
         each on files written in the same round
open     from the start of a process (interpreter and imports) to the first hit that is loaded and verified,
         with every block indexed and every byte accounted for: a million records. The index is in the page
         cache in one figure, and dropped from it in the other. Files are holes but for the record that is
         read: opening looks at nothing else in them
rebuild  200,000 records of 64 KiB, written in full, and no index: every header is read and indexed, to the
         same first hit. Raw: the same pages read by as many threads, and nothing done with them. Peer: a walk
         over one file a block, by name, size and time (50,000 of them)
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
import numpy as np
import xxhash

from kvfabric.hashing import ROOT_PARENT, layout_fingerprint
from kvfabric.store.store import StoreLimits
from kvfabric.testing.store import TAG, make_layout
from kvfabric.tiers.base import ROW, Lineage, Location, PartIdentity, Rows
from kvfabric.tiers.file_ops import FileOps
from kvfabric.tiers.record_cipher import RecordCipher
from kvfabric.tiers.records import (
    PAGE_BYTES,
    FileHeader,
    RecordHeader,
    encode_file_header,
    encode_header,
    record_bytes,
)
from kvfabric.tiers.segment_file import path_of
from kvfabric.tiers.segment_index import SegmentIndex
from kvfabric.tiers.segments import SegmentTier
from kvfabric.types import DEFAULT_TENANT, BlockKey, Part

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
DEPTH = 8
SYNC_BYTES = 64 * MIB
SPILL_BYTES = StoreLimits(host_bytes=0, ssd_bytes=0, max_blocks=1).spill_bytes
SIZES = (64 * KIB, 256 * KIB, MIB)
MAIN_SIZE = MIB
"""What the figures are of: of 36 layers of an 8B model a block of 64 tokens has 9 MiB."""
SMALL = 64 * KIB
SEGMENT = 256 * MIB
RAW_SCANS = 16
PEER_ROUNDS = 2
FIRST_HIT = Path(__file__).with_name("first_hit.py")


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
        self._prepare()
        self._runner.run(self._tier.__aenter__())
        # Its first segment is there before anything is timed, as the raw side's file is.
        first = memoryview(mmap.mmap(-1, PAGE_BYTES))
        identity = identity_of(count, len(first), xxhash.xxh3_128_digest(first))
        self._runner.run(self._tier.write(identity, first))
        self._count = count
        self._places: dict[int, tuple[Location, PartIdentity]] = {}

    def _prepare(self) -> None:
        """Before it is entered."""

    def write(self, payloads: list[memoryview]) -> None:
        self._runner.run(self._write(payloads))

    async def _write(self, payloads: list[memoryview]) -> None:
        """As the store does: everything that is to go is handed over, so much at once at most."""
        room = asyncio.Semaphore(SPILL_BYTES // len(payloads[0]))
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


class EncryptedTier(Tier):
    """The same with `ssd_encryption`."""

    name = "encrypted"

    def _prepare(self) -> None:
        data_key = random.Random(1).randbytes(32)
        self._tier.encrypt_with(RecordCipher(lambda _tenant: data_key))


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
        if size == MAIN_SIZE and number < PEER_ROUNDS:
            sides += [EncryptedTier, Files, Lmdb]
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
        raw = taken[f"raw_{name.split('_')[1]}"][: len(times)]
        ratios = [theirs / ours for theirs, ours in zip(raw, times, strict=True)]
        row[f"{name}_over_raw"] = harness.median(ratios)
    return row


# ------------------------------------------------------------------ open and rebuild


LAYOUT = make_layout(part_bytes=SMALL)
RECORD = record_bytes(SMALL)
PER_FILE = (SEGMENT - PAGE_BYTES) // RECORD
CHAIN = 64
"""Blocks of a prompt."""


class Records:
    """What two kinds of directory hold: blocks of prompts of 64, zeros for payload."""

    def __init__(self, count: int, rng: random.Random) -> None:
        self.count = count
        self.keys = rng.randbytes(32 * count)
        self.payload = memoryview(bytes(SMALL))
        self.checksum = xxhash.xxh3_128_digest(self.payload)
        self.used_bytes = -(-count // PER_FILE) * PAGE_BYTES + count * RECORD
        self.capacity_bytes = (count // PER_FILE + 4) * SEGMENT
        self.lineage = Lineage(DEFAULT_TENANT, TAG, layout_fingerprint(LAYOUT), ())

    def key(self, number: int) -> BlockKey:
        return BlockKey(self.keys[32 * number : 32 * number + 32])

    def parent(self, number: int) -> BlockKey:
        return self.key(number - 1) if number % CHAIN else ROOT_PARENT

    @property
    def asked(self) -> int:
        """The first block of the last prompt: it hits without its parent."""
        return (self.count - 1) // CHAIN * CHAIN

    def files(self) -> Iterator[tuple[FileHeader, range]]:
        for number, first in enumerate(range(0, self.count, PER_FILE), 1):
            own = range(first, min(first + PER_FILE, self.count))
            yield FileHeader(os.urandom(16), number, SEGMENT), own

    def page(self, header: FileHeader, number: int) -> bytes:
        """The header page of a record."""
        identity = PartIdentity(
            part=Part(self.key(number), 0, 0),
            namespace_tag=TAG,
            tenant=DEFAULT_TENANT,
            layout_fingerprint=self.lineage.layout_fingerprint,
            parent=self.parent(number),
            block_index=number % CHAIN,
            incarnations=(),
            num_bytes=SMALL,
            checksum=self.checksum,
        )
        offset = PAGE_BYTES + number % PER_FILE * RECORD
        return encode_header(RecordHeader(header.file_id, offset, number + 1, identity))

    def rows(self, own: range) -> Rows:
        """Of the index."""
        rows, places = np.zeros(len(own), ROW), np.arange(own.start, own.stop)
        rows["offset"] = PAGE_BYTES + places % PER_FILE * RECORD
        rows["sequence"] = places + 1
        rows["num_bytes"] = SMALL
        rows["block_index"] = places % CHAIN
        rows["is_live"] = 1
        rows["key"] = np.frombuffer(self.keys, "V32")[own.start : own.stop]
        rows["parent"] = [np.void(self.parent(number)) for number in own]
        rows["checksum"] = np.void(self.checksum)
        return rows


def make_indexed(directory: Path, records: Records) -> None:
    """As a daemon leaves it; of the files only the record that is asked for is there."""
    directory.mkdir()
    index = SegmentIndex.create(directory, (64 * MIB) + records.capacity_bytes // 8, FileOps())
    for header, own in records.files():
        index.add_segment(header)
        index.load_rows([index.adopted(header.number, records.rows(own), [records.lineage])])
        with path_of(directory, header.number).open("wb") as file:
            os.ftruncate(file.fileno(), SEGMENT)
            os.pwrite(file.fileno(), encode_file_header(header), 0)
            if records.asked in own:
                page = records.page(header, records.asked)
                os.pwrite(file.fileno(), page, PAGE_BYTES + records.asked % PER_FILE * RECORD)
    index.raise_sequence(records.count)
    index.trust()
    index.close()


def make_files(directory: Path, records: Records) -> None:
    """Every record written in full, one after the other as the tier does; no index."""
    directory.mkdir()
    step = 4 * MIB // RECORD
    buffer = memoryview(mmap.mmap(-1, step * RECORD))
    for header, own in records.files():
        with open_direct(path_of(directory, header.number)) as fd:
            os.posix_fallocate(fd, 0, SEGMENT)
            buffer[:PAGE_BYTES] = encode_file_header(header)
            os.pwritev(fd, [buffer[:PAGE_BYTES]], 0)
            for first in range(own.start, own.stop, step):
                some = range(first, min(first + step, own.stop))
                for at, number in enumerate(some):
                    page = records.page(header, number)
                    buffer[at * RECORD : at * RECORD + PAGE_BYTES] = page
                    buffer[at * RECORD + PAGE_BYTES : (at + 1) * RECORD] = records.payload
                at = PAGE_BYTES + (first - own.start) * RECORD
                os.pwritev(fd, [buffer[: len(some) * RECORD]], at)
            os.fdatasync(fd)


@contextmanager
def open_direct(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def open_once(directory: Path, records: Records) -> float:
    """Seconds from the start of a process to its first verified hit."""
    key = records.key(records.asked).hex()
    numbers = map(str, (records.count, records.capacity_bytes, SEGMENT, SMALL))
    command = [sys.executable, str(FIRST_HIT), str(directory), key, *numbers]
    # Modules are compiled once, as those of an installed package are.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(directory.parent / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        took = time.perf_counter() - started
        child.wait(300)
    found, accounted, live = json.loads(line)
    assert found == records.count, f"{found} of {records.count} records"
    # An empty spare has its header.
    assert records.used_bytes <= accounted <= records.used_bytes + PAGE_BYTES
    assert live == records.count * RECORD
    return took


def measure_open(directory: Path, count: int, rounds: int, rng: random.Random) -> dict[str, float]:
    records, one = Records(count, rng), Records(1, rng)
    make_indexed(directory / "many", records)
    make_indexed(directory / "one", one)
    data = directory / "many" / "index" / "data.mdb"
    warm, cold, start = [], [], []
    open_once(directory / "one", one)  # from now on modules are compiled, and in the page cache
    for _ in range(rounds):
        start.append(open_once(directory / "one", one))
        warm.append(open_once(directory / "many", records))
        drop_cached(data)
        cold.append(open_once(directory / "many", records))
    row = {
        "open_records": count,
        "open_s": harness.median(warm),
        "open_cold_s": harness.median(cold),
        "open_one_record_s": harness.median(start),
        "index_bytes_per_record": data.stat().st_size / count,
    }
    shutil.rmtree(directory / "many")
    return row


def measure_rebuild(
    directory: Path, count: int, rounds: int, rng: random.Random
) -> dict[str, float]:
    records = Records(count, rng)
    make_files(directory / "tier", records)
    raw, rebuild = [], []
    for _ in range(rounds):
        raw.append(seconds(partial(read_pages, directory / "tier", records)))
        shutil.rmtree(directory / "tier" / "index", ignore_errors=True)
        rebuild.append(open_once(directory / "tier", records))
    shutil.rmtree(directory / "tier")
    return {
        "rebuild_records": count,
        "rebuild_s": harness.median(rebuild),
        "raw_headers_s": harness.median(raw),
    }


def read_pages(directory: Path, records: Records) -> None:
    """The header of every record, as many at once as the tier reads."""

    def lane(header: FileHeader, own: range) -> None:
        page = mmap.mmap(-1, PAGE_BYTES)
        with open_direct(path_of(directory, header.number)) as fd:
            for number in own:
                os.preadv(fd, [page], PAGE_BYTES + number % PER_FILE * RECORD)

    with ThreadPoolExecutor(RAW_SCANS) as pool:
        list(pool.map(lane, *zip(*records.files(), strict=True)))


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
    total, rounds = (64 * MIB, 1) if args.quick else (GIB, 5)
    many, written, walked = (5_000, 2_000, 5_000) if args.quick else (1_000_000, 200_000, 50_000)
    rows: list[dict[str, float]] = []
    with scratch() as directory:
        for size in SIZES:
            is_main = size == MAIN_SIZE
            turns, num_bytes = (rounds, total) if is_main else (min(rounds, 3), total // 4)
            row = measure_rates(directory, size, num_bytes, turns, rng)
            rows.append(row)
            print(json.dumps(row), flush=True)
        opened = measure_open(directory, many, rounds, rng)
        opened |= measure_rebuild(directory, written, min(rounds, 3), rng)
        opened |= {"walk_files": walked, "walk_s": measure_walk(directory / "walk", walked)}
        print(json.dumps(opened), flush=True)
    [main_row] = [row for row in rows if row["record_bytes"] == MAIN_SIZE]
    figures = {
        "read_over_raw": main_row["tier_read_over_raw"],
        "write_over_raw": main_row["tier_write_over_raw"],
        "encrypted_read_over_raw": main_row["encrypted_read_over_raw"],
        "encrypted_write_over_raw": main_row["encrypted_write_over_raw"],
        "open_s_per_million_records": opened["open_s"] * 1e6 / many,
        "rebuild_s_per_million_records": opened["rebuild_s"] * 1e6 / written,
    }
    harness.report("ssd", args, figures, [*rows, opened])


if __name__ == "__main__":
    main()
