"""What a node gives its engine: lookups, loads and stores over the real socket, arena and window.

A real daemon in a process of its own, the real client here. Beside each rate, in the same run and in turns:
memcpy (one thread, one large copy: what this machine's memory gives a copy; also in pieces and with two
threads), and as a peer the simplest local store there is, one file a block on tmpfs.

    match   256 blocks of 16 KiB, a new request each time: lookup and lease
    load    2 MiB blocks: match, locate, copy arena -> engine buffers, verify, confirm
    store   2 MiB blocks: reserve, write the window, commit (copy and checksum in the daemon), pipelined
    small   16 KiB blocks, loaded and stored in requests of 1024
    large   a daemon filled with 1 M small blocks: memory of its index, stalls of its event loop while
            engines match, load, store (so that it evicts) and a router takes snapshots. Beside it, on each
            core, a process of the highest priority notes when even it was not run: such a gap is the
            machine's (a hypervisor's, on a shared one), and is taken off a stall that it lies in. The
            clients run at low priority: on few cores these rounds without a pause would otherwise show how
            the kernel shares a core, not how long the daemon holds its loop
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import harness
import numpy as np
import numpy.typing as npt

from kvfabric.client import NodeClient
from kvfabric.config import NodeConfig
from kvfabric.daemon.node import Node
from kvfabric.hashing import ROOT_PARENT, block_keys
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.protocol.messages import Located
from kvfabric.store.store import BlockStore
from kvfabric.testing.engine import BLOCK_TOKENS, DEADLINE_S, tiny_hello
from kvfabric.testing.processes import NodeProcess
from kvfabric.types import BlockKey, TierName

MIB = 1 << 20
LARGE_PART, SMALL_PART, INDEX_PART = 2 * MIB, 16 << 10, 4096
SMALL_REQUEST = 1024
RESERVED_BLOCKS = 256  # at a time, as an engine does for each chunk of a prefill
CHUNK_BLOCKS, CHUNKS_IN_FLIGHT = 4, 4  # of 2 MiB; smaller blocks in chunks of as many bytes
CLIENT_NICE = 10
ROUNDS, ROUND_S, QUICK_ROUND_S = 5, 20, 2
STALL_MS, GAP_S = 2.0, 0.0005
"""Shorter ones are not kept one by one."""

Bytes1D = npt.NDArray[np.uint8]
Rows = dict[str, dict[str, float]]


class Bench:
    """One engine connection, and the requests made over it."""

    def __init__(self, socket: Path, part_bytes: int, window_bytes: int) -> None:
        hello = tiny_hello(
            part_bytes=part_bytes, window_bytes=window_bytes, revision=f"bench {part_bytes}"
        )
        self.client = NodeClient.connect(socket, hello, deadline_s=DEADLINE_S)
        self.part_bytes = part_bytes
        self._requests = 0
        opened = self.client.open_handle("keys", "", deadline_s=DEADLINE_S)
        self._key = opened.namespace_key

    def keys(self, prompt: int, num_blocks: int) -> list[BlockKey]:
        tokens = np.arange(num_blocks * BLOCK_TOKENS, dtype="<u4")
        tokens[0] = prompt
        return block_keys(tokens, BLOCK_TOKENS, self._key)

    @contextlib.contextmanager
    def request(self) -> Iterator[str]:
        self._requests += 1
        name = f"r{self._requests}"
        self.client.open_handle(name, "", deadline_s=DEADLINE_S)
        try:
            yield name
        finally:
            self.client.release((name,), deadline_s=DEADLINE_S)

    def locate(self, name: str, keys: Sequence[BlockKey]) -> Located:
        matched = self.client.match(name, keys, deadline_s=DEADLINE_S)
        if matched.num_blocks != len(keys):
            raise RuntimeError(f"matched {matched.num_blocks} of {len(keys)}: {matched.reason}")
        return self.client.load(name, keys, group=0, shard=0, deadline_s=DEADLINE_S)

    def load(
        self,
        keys: Sequence[BlockKey],
        buffers: Sequence[memoryview],
        read: Callable[[Located, Sequence[memoryview]], int],
    ) -> None:
        """Match, locate, read, confirm; raises if a single block is missing or wrong."""
        with self.request() as name:
            located = self.locate(name, keys)
            good = read(located, buffers)
            confirmed = self.client.confirm(
                name, keys, located, group=0, shard=0, deadline_s=DEADLINE_S
            )
            if min(good, confirmed.num_blocks) != len(keys):
                raise RuntimeError(f"only {good} of {len(keys)} blocks were good")

    def store(self, keys: Sequence[BlockKey], source: Bytes1D, pool: ThreadPoolExecutor) -> None:
        """Reserve, write and commit in chunks, several of them under way."""
        chunk = max(1, CHUNK_BLOCKS * LARGE_PART // self.part_bytes)
        under_way: list[Future[None]] = []
        with self.request() as name:
            for first in range(0, len(keys), RESERVED_BLOCKS):
                some = keys[first : first + RESERVED_BLOCKS]
                parent = keys[first - 1] if first else ROOT_PARENT
                reserved = self.client.reserve(
                    name, parent, some, group=0, shard=0, deadline_s=DEADLINE_S
                )
                if any(reserved.states):
                    raise RuntimeError(f"not granted: {reserved.reason}")
                for begin in range(0, len(some), chunk):
                    if len(under_way) == CHUNKS_IN_FLIGHT:
                        under_way.pop(0).result()
                    indexes = range(begin, min(begin + chunk, len(some)))
                    start = self._write(source, first + begin, len(indexes))
                    under_way.append(
                        pool.submit(self._commit, reserved.reservation, indexes, start)
                    )
            for last in under_way:
                last.result()

    def _write(self, source: Bytes1D, first: int, count: int) -> int:
        num_bytes = count * self.part_bytes
        start = self.client.window.allocate(num_bytes)
        if start is None:
            raise RuntimeError("the window is too small")
        target = np.frombuffer(self.client.window.view(start, num_bytes), dtype=np.uint8)
        offset = first * self.part_bytes
        np.copyto(target, source[offset : offset + num_bytes])
        return start

    def _commit(self, reservation: int, indexes: range, start: int) -> None:
        offsets = [start + i * self.part_bytes for i in range(len(indexes))]
        committed = self.client.commit(reservation, indexes, offsets, deadline_s=DEADLINE_S)
        self.client.window.free(start)
        if sum(committed.states) != len(indexes):
            raise RuntimeError(f"not stored: {committed.reason}")


class Files:
    """The peer: one file a block on tmpfs, no index, no checksum, no tenant."""

    def __init__(self, directory: Path, part_bytes: int) -> None:
        self._directory = directory
        self._part_bytes = part_bytes

    def store(self, source: Bytes1D) -> None:
        for index in range(len(source) // self._part_bytes):
            first = index * self._part_bytes
            with (self._directory / str(index)).open("wb", buffering=0) as file:
                file.write(source[first : first + self._part_bytes].data)

    def load(self, buffers: Sequence[memoryview]) -> None:
        for index, buffer in enumerate(buffers):
            with (self._directory / str(index)).open("rb", buffering=0) as file:
                file.readinto(buffer)


def cut(buffer: Bytes1D, part_bytes: int) -> list[memoryview]:
    view = buffer.data
    return [view[i : i + part_bytes] for i in range(0, len(buffer), part_bytes)]


def copy_pieces(target: Bytes1D, source: Bytes1D, piece: int) -> None:
    for first in range(0, len(source), piece):
        np.copyto(target[first : first + piece], source[first : first + piece])


def copy_two_threads(target: Bytes1D, source: Bytes1D, pool: ThreadPoolExecutor) -> None:
    middle = len(source) // 2
    other = pool.submit(copy_pieces, target[middle:], source[middle:], LARGE_PART)
    copy_pieces(target[:middle], source[:middle], LARGE_PART)
    other.result()


def read_unverified(bench: Bench, pool: ThreadPoolExecutor) -> Callable[..., int]:
    """What `NodeClient.read` would be without checksums: the copies alone, shared by two threads."""
    arena = np.frombuffer(bench.client.arena, dtype=np.uint8)

    def read(located: Located, buffers: Sequence[memoryview]) -> int:
        offsets = np.frombuffer(located.offsets, dtype="<u8").tolist()
        order = iter(range(located.num_blocks))

        def some() -> None:
            for index in order:
                first = offsets[index]
                part = arena[first : first + located.part_bytes]
                np.copyto(np.frombuffer(buffers[index], dtype=np.uint8), part)

        other = pool.submit(some)
        some()
        other.result()
        return located.num_blocks

    return read


def bench_match(socket: Path, quick: bool, pool: ThreadPoolExecutor) -> Rows:
    bench = Bench(socket, SMALL_PART, 64 * MIB)
    keys = bench.keys(1, 256)
    bench.store(keys, np.ones(256 * SMALL_PART, dtype=np.uint8), pool)
    taken = []
    for _ in range(300 if quick else 5000):
        with bench.request() as name:
            started = time.perf_counter()
            matched = bench.client.match(name, keys, deadline_s=DEADLINE_S)
            taken.append((time.perf_counter() - started) * 1e6)
            if matched.num_blocks != len(keys):
                raise RuntimeError(f"matched {matched.num_blocks}: {matched.reason}")
    pings = harness.alternate(
        {"ping": lambda: bench.client.ping(deadline_s=DEADLINE_S)}, rounds=len(taken)
    )
    bench.client.close()
    return {
        "match 256 blocks": {f"us_p{p}": harness.percentile(taken, p) for p in (50, 90, 99)},
        "empty round trip": {
            f"us_p{p}": harness.percentile(pings["ping"], p) * 1e6 for p in (50, 90, 99)
        },
    }


def bench_large_blocks(
    socket: Path, quick: bool, pool: ThreadPoolExecutor, shared_memory: Path
) -> Rows:
    num_blocks = 24 if quick else 128
    num_bytes = num_blocks * LARGE_PART
    bench = Bench(socket, LARGE_PART, 128 * MIB)
    source = np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8)
    target = np.zeros(num_bytes, dtype=np.uint8)
    buffers = cut(target, LARGE_PART)
    prompts = itertools.count(1000)
    for _ in range(len(bench.client.arena) // num_bytes + 1):  # every page of the arena is in use
        bench.store(bench.keys(next(prompts), num_blocks), source, pool)
    keys = bench.keys(2, num_blocks)
    bench.store(keys, source, pool)
    bench.load(keys, buffers, bench.client.read)
    if not np.array_equal(source, target):
        raise RuntimeError("what was loaded is not what was stored")
    unverified = read_unverified(bench, pool)
    files = Files(shared_memory, LARGE_PART)
    files.store(source)

    def store() -> None:
        bench.store(bench.keys(next(prompts), num_blocks), source, pool)

    taken = harness.alternate(
        {
            "memcpy": lambda: np.copyto(target, source),
            "memcpy, 2 MiB pieces": lambda: copy_pieces(target, source, LARGE_PART),
            "memcpy, two threads": lambda: copy_two_threads(target, source, pool),
            "load": lambda: bench.load(keys, buffers, bench.client.read),
            "load, not verified": lambda: bench.load(keys, buffers, unverified),
            "store": store,
            "peer: load, file a block on tmpfs": lambda: files.load(buffers),
            "peer: store, file a block on tmpfs": lambda: files.store(source),
        },
        rounds=4 if quick else 25,
    )
    bench.client.close()
    return {
        name: {"gb_per_s": num_bytes / harness.median(times) / 1e9} for name, times in taken.items()
    }


def bench_small_blocks(
    socket: Path, quick: bool, pool: ThreadPoolExecutor, shared_memory: Path
) -> Rows:
    bench = Bench(socket, SMALL_PART, 64 * MIB)
    source = np.random.default_rng(0).integers(0, 256, SMALL_REQUEST * SMALL_PART, dtype=np.uint8)
    target = np.zeros_like(source)
    buffers = cut(target, SMALL_PART)
    keys = bench.keys(3, SMALL_REQUEST)
    bench.store(keys, source, pool)
    files = Files(shared_memory, SMALL_PART)
    files.store(source)
    prompts = itertools.count(1000)

    def store() -> None:
        bench.store(bench.keys(next(prompts), SMALL_REQUEST), source, pool)

    taken = harness.alternate(
        {
            "small: load": lambda: bench.load(keys, buffers, bench.client.read),
            "small: store": store,
            "peer: load, file a small block on tmpfs": lambda: files.load(buffers),
            "peer: store, file a small block on tmpfs": lambda: files.store(source),
        },
        rounds=10 if quick else 100,
    )
    bench.client.close()
    return {
        name: {"blocks_per_s": SMALL_REQUEST / harness.median(times)}
        for name, times in taken.items()
    }


# ---------------------------------------------------------------------- 1 M blocks


class LoopWatch:
    """Ticks every millisecond on a daemon's loop, and keeps

    `late_ms`  of the worst tick so far, how late it came
    `cpu_ms`   the longest stretch of processor time between two ticks
    `stalls`   when each tick was due and came that was late by `STALL_MS` or more, not counting what its
               thread waited for a core, as the kernel counts it, and by how many ms: the loop's own work,
               and waiting for threads that hold the interpreter
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._scheduling = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        self._due = self._cpu = self._waited = 0.0
        self.reset()
        self._tick()

    def reset(self) -> None:
        self.late_ms = self.cpu_ms = 0.0
        self.stalls: list[tuple[float, float, float]] = []

    def _tick(self) -> None:
        now, cpu = self._loop.time(), time.thread_time()
        waited = int(os.pread(self._scheduling, 64, 0).split()[1]) / 1e9
        if self._due:
            late = now - self._due
            self.late_ms = max(self.late_ms, late * 1e3)
            stall_ms = (late - (waited - self._waited)) * 1e3
            if stall_ms >= STALL_MS:
                self.stalls.append((self._due, now, stall_ms))
            self.cpu_ms = max(self.cpu_ms, (cpu - self._cpu) * 1e3)
        self._due, self._cpu, self._waited = now + 0.001, cpu, waited
        self._loop.call_at(self._due, self._tick)


async def serve_watched(state_dir: Path, num_blocks: int) -> None:
    """A node that answers lines on standard input: `reset` and `report`."""
    config = NodeConfig(
        state_dir=state_dir,
        http="",
        host_bytes=num_blocks * INDEX_PART,
        ssd_bytes=0,
        max_blocks=num_blocks + num_blocks // 16,
    )
    async with Node(config) as node:
        await answer_lines(node.store)


async def answer_lines(store: BlockStore) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    watch = LoopWatch()
    print("{}", flush=True)
    while line := await reader.readline():
        if line.strip() == b"reset":
            watch.reset()
        statistics = store.statistics()
        answer = {
            "late_ms": watch.late_ms,
            "cpu_ms": watch.cpu_ms,
            "stalls": watch.stalls,
            "index_bytes_per_block": statistics.index_bytes_per_block,
            "num_blocks": statistics.num_blocks[TierName.HOST],
            "evictions": statistics.evictions,
        }
        print(json.dumps(answer), flush=True)


def watch_core(core: int) -> None:
    """Answers lines as `answer_lines` does, with the gaps of this core: (from, to), monotonic seconds."""
    os.sched_setaffinity(0, {core})
    with contextlib.suppress(
        PermissionError
    ):  # then gaps are also what others of our priority took
        os.nice(-20)
    print("{}", flush=True)
    gaps: list[tuple[float, float]] = []
    before = time.monotonic()
    while True:
        asked = select.select([sys.stdin], [], [], GAP_S)[0]
        now = time.monotonic()
        if now - before > 2 * GAP_S:
            gaps.append((before, now))
        if asked:
            if not sys.stdin.readline():
                return
            print(json.dumps({"gaps": gaps}), flush=True)
            gaps, now = [], time.monotonic()
        before = now


class Watched:
    """A process that watches: `serve_watched` or `watch_core`."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, __file__, *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def take_snapshots(admin_socket: Path, stop: threading.Event) -> int:
    """What a router does when it starts: the whole of what the node holds, again and again."""
    taken = 0
    with grpc.insecure_channel(f"unix:{admin_socket}") as channel:
        stub = pb_grpc.NodeEventsStub(channel)  # type: ignore[no-untyped-call]
        while not stop.is_set():
            batches = stub.Snapshot(pb.SnapshotRequest())
            taken += sum(batch.snapshot_end for batch in batches)
    return taken


def work_on(
    bench: Bench,
    prompts: list[list[BlockKey]],
    pool: ThreadPoolExecutor,
    fresh: Iterator[int],
    seconds: float,
) -> dict[str, int]:
    """Match and load random prompts and store new ones, with numbers from `fresh`, for so long."""
    source = np.zeros(len(prompts[0]) * INDEX_PART, dtype=np.uint8)
    pick = np.random.default_rng(0)
    ends, done = time.monotonic() + seconds, {"matches": 0, "stores": 0}
    while time.monotonic() < ends:
        for _ in range(8):
            keys = prompts[int(pick.integers(len(prompts)))][:256]
            with bench.request() as name:
                found = bench.client.match(name, keys, deadline_s=DEADLINE_S).num_blocks
                if found:
                    bench.client.load(name, keys[:found], group=0, shard=0, deadline_s=DEADLINE_S)
            done["matches"] += 1
        bench.store(bench.keys(next(fresh), len(prompts[0])), source, pool)
        done["stores"] += 1
    return done


_WORST = (
    "loop_stall_ms_max",
    "loop_stall_with_gaps_ms_max",
    "loop_late_ms_max",
    "loop_busy_ms_max",
    "core_gap_ms_max",
)


def bench_index(quick: bool, pool: ThreadPoolExecutor) -> Rows:
    prompt_blocks = 1024
    num_blocks = (64 if quick else 977) * prompt_blocks
    with tempfile.TemporaryDirectory() as directory:
        node = Watched("--serve", directory, str(num_blocks))
        cores = [Watched("--core", str(core)) for core in sorted(os.sched_getaffinity(0))]
        os.nice(CLIENT_NICE)  # before the pool has threads: they inherit it
        bench = Bench(Path(directory) / "node.sock", INDEX_PART, 64 * MIB)
        source = np.zeros(prompt_blocks * INDEX_PART, dtype=np.uint8)
        prompts = [bench.keys(n, prompt_blocks) for n in range(num_blocks // prompt_blocks)]
        started = time.perf_counter()
        for keys in prompts:
            bench.store(keys, source, pool)
        fill_s = time.perf_counter() - started
        filled = node.ask("report")
        rounds = {}
        seconds = QUICK_ROUND_S if quick else ROUND_S
        work = partial(work_on, bench, prompts, pool, itertools.count(1_000_000), seconds)
        for number in range(1 if quick else ROUNDS):
            rounds[f"large index, round {number + 1}"] = watch_round(
                node, cores, work, pool, Path(directory) / "admin.sock"
            )
        bench.client.close()
        for watched in (node, *cores):
            watched.close()
        return {
            "large index": {
                "num_blocks": filled["num_blocks"],
                "fill_blocks_per_s": len(prompts) * prompt_blocks / fill_s,
                "index_bytes_per_block": filled["index_bytes_per_block"],
                **{name: max(row[name] for row in rounds.values()) for name in _WORST},
            },
            **rounds,
        }


def watch_round(
    node: Watched,
    cores: Sequence[Watched],
    work: Callable[[], dict[str, int]],
    pool: ThreadPoolExecutor,
    admin_socket: Path,
) -> dict[str, float]:
    """What the loop and the cores saw while engines worked and a router took snapshots."""
    for core in cores:
        core.ask("reset")
    before = node.ask("reset")
    stop = threading.Event()
    snapshots = pool.submit(take_snapshots, admin_socket, stop)
    try:
        done = work()
    finally:
        stop.set()
    row = node.ask("report")
    gaps = [gap for core in cores for gap in core.ask("report")["gaps"]]
    own = [ms - overlap_ms(gaps, due, came) for due, came, ms in row["stalls"]]
    return {
        "loop_stall_ms_max": max(own, default=STALL_MS),
        "loop_stall_with_gaps_ms_max": max((ms for *_, ms in row["stalls"]), default=STALL_MS),
        "loop_late_ms_max": row["late_ms"],
        "loop_busy_ms_max": row["cpu_ms"],
        "core_gap_ms_max": max(((end - begin) * 1e3 for begin, end in gaps), default=0.0),
        "evictions": row["evictions"] - before["evictions"],
        "snapshots": snapshots.result(),
        **done,
    }


def overlap_ms(gaps: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """The longest that a single gap lies in [begin, end]."""
    return 1e3 * max([0.0, *(min(end, to) - max(begin, since) for since, to in gaps)])


def main() -> None:
    args = harness.parse_arguments(__doc__ or "")
    rows: Rows = {}
    host_bytes = (1 if args.quick else 3) << 30
    pool = ThreadPoolExecutor(8)
    with (
        pool,
        tempfile.TemporaryDirectory() as state_dir,
        NodeProcess(Path(state_dir), host_bytes=host_bytes, max_blocks=1 << 18) as node,
    ):
        for bench in (bench_large_blocks, bench_small_blocks):
            with tempfile.TemporaryDirectory(dir="/dev/shm") as shared_memory:
                rows |= bench(node.socket, args.quick, pool, Path(shared_memory))
        rows |= bench_match(node.socket, args.quick, pool)
    with ThreadPoolExecutor(8) as pool:
        rows |= bench_index(args.quick, pool)
    for name, row in rows.items():
        print(f"{name:42}", "  ".join(f"{key} {value:,.4g}" for key, value in row.items()))
    memcpy = rows["memcpy"]["gb_per_s"]
    figures = {
        "match_256_blocks_us_p50": rows["match 256 blocks"]["us_p50"],
        "match_256_blocks_us_p99": rows["match 256 blocks"]["us_p99"],
        "load_over_memcpy": rows["load"]["gb_per_s"] / memcpy,
        "load_unverified_over_memcpy": rows["load, not verified"]["gb_per_s"] / memcpy,
        "store_over_memcpy": rows["store"]["gb_per_s"] / memcpy,
        "blocks_per_s": rows["small: load"]["blocks_per_s"],
        "store_blocks_per_s": rows["small: store"]["blocks_per_s"],
        "index_bytes_per_block": rows["large index"]["index_bytes_per_block"],
        **{name: rows["large index"][name] for name in _WORST},
        "memcpy_gb_per_s": memcpy,
        "peer_tmpfs_load_over_memcpy": rows["peer: load, file a block on tmpfs"]["gb_per_s"]
        / memcpy,
        "peer_tmpfs_store_over_memcpy": rows["peer: store, file a block on tmpfs"]["gb_per_s"]
        / memcpy,
        "peer_tmpfs_blocks_per_s": rows["peer: load, file a small block on tmpfs"]["blocks_per_s"],
        "peer_tmpfs_store_blocks_per_s": rows["peer: store, file a small block on tmpfs"][
            "blocks_per_s"
        ],
    }
    harness.report("node", args, figures, rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        asyncio.run(serve_watched(Path(sys.argv[2]), int(sys.argv[3])))
    elif sys.argv[1:2] == ["--core"]:
        watch_core(int(sys.argv[2]))
    else:
        main()
