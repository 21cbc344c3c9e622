"""The GPU path: paged KV to the arena's memory and back, and what that makes of the time to the first token.

Random weights in the shape of Qwen3-8B (36 layers, 32 query and 8 KV heads of 128, bf16: 144 KiB a token, a
block of 64 tokens is one part of 9 MiB). Beside each rate, in the same run and in turns, one plain copy of as
many bytes between page-locked and device memory: the limit.

    h2d     arena -> pool as a load does it, verification included, but no node to ask: slots in any order
    d2h     pool -> window, as a save does it
    kernel  gather alone, for one region a page (this engine) and for 72 of a layer-major cache; torch's own
    ttft    the reference engine and a node: from submit to the first token, a hit in the node's host tier
            (HBM cache emptied before), recomputed without the node, and a miss that is stored
    decode  the step of four sequences while another prompt's blocks are saved all the time, against without

Other designs, for comparison: `save_other` (gathered by a kernel into buffers where pages are read in
place, and the reverse), `save_one_at_a_time` (a whole window, then the next) and `save_one_buffer` (gathered
by torch, then copied part by part). Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import mmap
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import xxhash
from kvfabric_engine.direct_load import DirectLoads, NodeCalls, parts_of
from kvfabric_engine.kernels import PagedRuns
from kvfabric_engine.lanes import Passed
from kvfabric_engine.layout import PoolShape, pages_as_bytes
from kvfabric_engine.pinning import ARENA_SLICE_BYTES, WINDOW_SLICE_BYTES
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.reference.model import Model
from kvfabric_engine.reference.sequence import Output
from kvfabric_engine.reference.weights import (
    LINEAR_GAIN,
    RMS_EPSILON,
    ROPE_THETA,
    LayerWeights,
    ModelShape,
    Rope,
    Weights,
)
from kvfabric_engine.staging import Fence, StagedMover, mover_for
from kvfabric_engine.testing import Pending, begin

from kvfabric.config import EngineConfig
from kvfabric.hashing import ROOT_PARENT
from kvfabric.protocol.messages import Confirmed, Located
from kvfabric.testing.processes import NodeProcess, until
from kvfabric.types import MissReason

Rows = dict[str, Any]
GIB = 1 << 30
MIB = 1 << 20
PAGE_TOKENS, BLOCK_TOKENS = 16, 64
WAIT_S = 120.0
REST_S = 0.5
SAVE_PIECES = 4
"""Of the window, as the connector saves by."""


class Sizes:
    """What a run measures; `--quick` shows that it runs."""

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self.layers = 4 if quick else 36
        self.hidden, self.intermediate, self.vocab = (
            (512, 1024, 1024) if quick else (4096, 12288, 151936)
        )
        self.heads, self.kv_heads = (8, 8) if quick else (32, 8)
        self.copies = [1024, 4096] if quick else [1024, 4096, 16384, 32768]
        self.prompts = [1024] if quick else [1024, 2048, 4096, 8192, 16384, 32768]
        self.missed = [1024] if quick else [4096, 16384]
        self.main = self.prompts[0] if quick else 16384
        self.rounds = 2 if quick else 7
        self.host_bytes = 2 * GIB if quick else 48 * GIB
        self.window_bytes = 64 * MIB if quick else 256 * MIB
        self.decode_steps = 16 if quick else 64


# --- copies -------------------------------------------------------------------------------------------------


def mapped(num_bytes: int) -> memoryview:
    """Fresh memory as an arena or a window has it: a memfd, mapped shared."""
    descriptor = os.memfd_create("bench")
    os.posix_fallocate(descriptor, 0, num_bytes)
    view = memoryview(mmap.mmap(descriptor, num_bytes))
    os.close(descriptor)
    return view


class Copies:
    """One shape of parts: a pool, an arena's memory full of random parts, a window, a plain pinned buffer."""

    def __init__(self, layers: int, num_tokens: int, window_bytes: int, seed: int) -> None:
        self.shape = PoolShape(
            num_tokens // PAGE_TOKENS, layers, PAGE_TOKENS, 8, 128, torch.bfloat16, BLOCK_TOKENS
        )
        self.size = self.shape.part_bytes
        self.num_parts = num_tokens // BLOCK_TOKENS
        self.pool = self.shape.create(torch.device("cuda"))
        self.rows = pages_as_bytes(self.pool)
        mover = mover_for(self.pool, self.shape)
        assert isinstance(mover, StagedMover)
        self.mover = mover
        self.reads_in_place = mover._in_place is not None
        self.other = StagedMover(
            PagedRuns([self.rows]),
            self.shape.pages_per_block,
            reads_in_place=not self.reads_in_place,
        )
        self.other._pinned = mover.pinned  # the driver locks a page once
        draw = random.Random(seed)
        k = self.shape.pages_per_block
        pages = draw.sample(range(self.shape.num_pages), self.shape.num_pages)
        self.blocks = [tuple(pages[n * k : (n + 1) * k]) for n in range(self.num_parts)]
        self.slots = draw.sample(range(self.num_parts), self.num_parts)
        self.total = self.num_parts * self.size
        self.device = torch.empty(self.total, dtype=torch.uint8, device="cuda")
        self.pinned = torch.empty(self.total, dtype=torch.uint8, pin_memory=True)
        self.device.random_(0, 256)
        self.arena = mapped(self.total)
        torch.frombuffer(self.arena, dtype=torch.uint8).copy_(self.device)
        self.window = mapped(window_bytes // self.size * self.size)
        # Whole parts a slice, for the designs that copy a part at once.
        self.slice_bytes = max(1, WINDOW_SLICE_BYTES // self.size) * self.size
        for start in range(0, len(self.window), self.slice_bytes):
            self.mover.pin(self.window[start : start + self.slice_bytes])
        landing = self.mover.landing(self.arena)
        assert landing is not None
        self.landing = landing
        begun = time.perf_counter()
        for start in range(0, self.total, ARENA_SLICE_BYTES):
            self.landing.pin(start, min(ARENA_SLICE_BYTES, self.total - start))
        self.pin_s_per_gib = (time.perf_counter() - begun) / (self.total / GIB)
        self.loads = DirectLoads(self.landing, self.arena)
        with ThreadPoolExecutor(8) as pool:
            self.checksums = list(pool.map(self._checksum, range(self.num_parts)))

    def _checksum(self, slot: int) -> bytes:
        return xxhash.xxh3_128_digest(self.arena[slot * self.size : (slot + 1) * self.size])

    def close(self) -> None:
        self.loads.close()
        for start in range(0, len(self.window), self.slice_bytes):
            self.mover.unpin(self.window[start : start + self.slice_bytes])

    def load(self, count: int, slots: Sequence[int]) -> None:
        """`count` blocks from these slots, as the connector does it."""
        located = Located(
            count,
            self.size,
            (np.array(slots[:count], "<u8") * self.size).astype("<u8").tobytes(),
            bytes(4 * count),
            b"".join(self.checksums[slot] for slot in slots[:count]),
            "",
        )
        calls = NodeCalls(
            lambda first, number: parts_of(located, first, first + number),
            lambda first, parts: Confirmed(parts.num_blocks, ""),
            lambda first, parts: (0, MissReason.TIER_DOWN),
            lambda first, number: None,
        )
        if self.loads.run(calls, self.blocks[:count], self.size) is not MissReason.NONE:
            raise RuntimeError("parts did not verify")

    def limit_in(self, count: int) -> None:
        self.device[: count * self.size].copy_(self.pinned[: count * self.size], non_blocking=True)
        torch.cuda.synchronize()

    def limit_out(self, count: int) -> None:
        self.pinned[: count * self.size].copy_(self.device[: count * self.size], non_blocking=True)
        torch.cuda.synchronize()

    def in_window(self, count: int, pieces: int = 1) -> Iterator[tuple[range, list[memoryview]]]:
        """Blocks [0, count) by as many as a piece of the window holds, and where each goes, in turns."""
        step = len(self.window) // self.size // pieces
        for turn, start in enumerate(range(0, count, step)):
            numbers = range(start, min(start + step, count))
            first = turn % pieces * step
            yield (
                numbers,
                [
                    self.window[(first + i) * self.size : (first + i + 1) * self.size]
                    for i in range(len(numbers))
                ],
            )

    def save(self, count: int) -> None:
        """A piece of the window is begun while the one before is on the bus, as the connector does it."""
        self._save(self.mover, count)

    def save_other(self, count: int) -> None:
        """Through a kernel and buffers where `save` does without them, and without where it does not."""
        self._save(self.other, count)

    def _save(self, mover: StagedMover, count: int) -> None:
        begun: Fence = Passed()
        for numbers, places in self.in_window(count, SAVE_PIECES):
            blocks = [self.blocks[number] for number in numbers]
            last, begun = begun, mover.begin_gather(blocks, places, after=mover.fence())
            last.wait()
        begun.wait()

    def save_one_at_a_time(self, count: int) -> None:
        """Each window waits for its own last DMA."""
        for numbers, places in self.in_window(count):
            blocks = [self.blocks[number] for number in numbers]
            self.mover.gather(blocks, places, after=self.mover.fence())

    def save_one_buffer(self, count: int) -> None:
        for numbers, places in self.in_window(count):
            pages = [page for number in numbers for page in self.blocks[number]]
            staged = self.rows.index_select(0, torch.tensor(pages).to("cuda"))
            for row, place in zip(staged.view(len(numbers), self.size), places, strict=True):
                torch.frombuffer(place, dtype=torch.uint8).copy_(row, non_blocking=True)
            torch.cuda.synchronize()

    def check(self, count: int) -> None:
        """Bit for bit: what was loaded is in the pool, and what is saved comes to the window."""
        self.rows.fill_(0xA5)
        self.load(count, self.slots)
        wanted = torch.frombuffer(self.arena, dtype=torch.uint8).view(self.num_parts, self.size)
        for numbers, places in self.in_window(count):
            blocks = [self.blocks[number] for number in numbers]
            self.mover.gather(blocks, places, after=self.mover.fence())
            for number, place in zip(numbers, places, strict=True):
                loaded = self.rows[list(self.blocks[number])].view(-1)
                expected = wanted[self.slots[number]].clone().cuda()
                saved = torch.frombuffer(place, dtype=torch.uint8).clone().cuda()
                if not torch.equal(loaded, expected) or not torch.equal(saved, expected):
                    raise RuntimeError(f"block {number} is not what was stored")


def measure_copies(layers: int, sizes: Sizes, seed: int) -> tuple[list[Rows], float]:
    """Rows by number of tokens, and seconds to page-lock a GiB of the arena."""
    copies = Copies(layers, sizes.copies[-1], sizes.window_bytes, seed)
    copies.check(min(copies.num_parts, 64))
    rows = []
    neighbours = list(range(copies.num_parts))
    for tokens in sizes.copies:
        count = tokens // BLOCK_TOKENS
        sides: dict[str, Callable[[], object]] = {
            "limit_in": lambda n=count: copies.limit_in(n),  # type: ignore[misc]
            "load": lambda n=count: copies.load(n, copies.slots),  # type: ignore[misc]
            "load_neighbours": lambda n=count: copies.load(n, neighbours),  # type: ignore[misc]
            "limit_out": lambda n=count: copies.limit_out(n),  # type: ignore[misc]
            "save": lambda n=count: copies.save(n),  # type: ignore[misc]
            "save_other": lambda n=count: copies.save_other(n),  # type: ignore[misc]
            "save_one_at_a_time": lambda n=count: copies.save_one_at_a_time(n),  # type: ignore[misc]
            "save_one_buffer": lambda n=count: copies.save_one_buffer(n),  # type: ignore[misc]
        }
        harness.alternate(sides, rounds=1)
        taken = harness.alternate(sides, rounds=sizes.rounds)
        gbps = {k: count * copies.size / harness.median(v) / 1e9 for k, v in taken.items()}
        row: Rows = {"layers": layers, "part_bytes": copies.size, "tokens": tokens}
        row["save_reads_in_place"] = copies.reads_in_place
        row |= {f"{name}_gb_per_s": round(value, 2) for name, value in gbps.items()}
        row["h2d_over_limit"] = round(gbps["load"] / gbps["limit_in"], 4)
        row["h2d_over_limit_neighbours"] = round(gbps["load_neighbours"] / gbps["limit_in"], 4)
        row["d2h_over_limit"] = round(gbps["save"] / gbps["limit_out"], 4)
        rows.append(row)
        print(json.dumps(row), flush=True)
    copies.check(min(copies.num_parts, 64))
    pinned = copies.pin_s_per_gib
    copies.close()
    return rows, pinned


def measure_kernel(sizes: Sizes) -> Rows:
    """GB/s read of the gather kernel and of torch's indexing, for page-major and layer-major KV."""
    num_pages, per_layer = 512, 2 * PAGE_TOKENS * 8 * 128 * 2
    whole = torch.zeros(num_pages, sizes.layers * per_layer, dtype=torch.uint8, device="cuda")
    split = torch.zeros(2 * sizes.layers, num_pages, per_layer // 2, dtype=torch.uint8).cuda()
    pages = torch.randperm(num_pages)[: num_pages // 2].cuda()
    out = torch.empty(len(pages) * whole.shape[1], dtype=torch.uint8, device="cuda")
    row: Rows = {}
    for name, regions in (("page_major", [whole]), ("layer_major", list(split))):
        paged = PagedRuns(regions)
        for way, uses_kernel in (("triton", True), ("torch", False)):
            paged.uses_kernel = uses_kernel and paged.uses_kernel
            seconds = _device_seconds(lambda p=paged: p.gather(pages, out))  # type: ignore[misc]
            row[f"gather_{name}_{way}_gb_per_s"] = round(len(out) / seconds / 1e9, 1)
    print(json.dumps(row), flush=True)
    return row


def _device_seconds(action: Callable[[], object]) -> float:
    for _ in range(3):
        action()
    taken = []
    for _ in range(20):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        first.record()
        action()
        last.record()
        last.synchronize()
        taken.append(first.elapsed_time(last) / 1000)
    return harness.median(taken)


# --- engine -------------------------------------------------------------------------------------------------


def engine_config(sizes: Sizes, socket: str) -> EngineConfig:
    longest = max(sizes.prompts)
    return EngineConfig(
        model="bench",
        node_socket=socket,
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=128,
        intermediate_size=sizes.intermediate,
        vocab_size=sizes.vocab,
        dtype="bfloat16",
        device="cuda",
        engine_block_tokens=PAGE_TOKENS,
        hbm_blocks=2 * longest // PAGE_TOKENS + 512,
        max_model_tokens=longest + 1024,
        window_bytes=sizes.window_bytes,
    )


def random_weights(config: EngineConfig, seed: int) -> Weights:
    """As the engine draws them, but on the device: 8 G numbers take a minute on the CPU."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int, std: float) -> torch.Tensor:
        numbers = torch.empty(*shape, dtype=torch.bfloat16, device="cuda")
        return numbers.normal_(0.0, std, generator=generator)

    def linear(fan_out: int, fan_in: int) -> torch.Tensor:
        return draw(fan_out, fan_in, std=LINEAR_GAIN / fan_in**0.5)

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16, device="cuda")

    c = config
    heads = c.num_heads + 2 * c.num_kv_heads
    layers = tuple(
        LayerWeights(
            attention_norm=ones(c.hidden_size),
            qkv=linear(heads * c.head_dim, c.hidden_size),
            qkv_bias=None,
            q_norm=ones(c.head_dim),
            k_norm=ones(c.head_dim),
            output=linear(c.hidden_size, c.num_heads * c.head_dim),
            mlp_norm=ones(c.hidden_size),
            gate_up=linear(2 * c.intermediate_size, c.hidden_size),
            down=linear(c.hidden_size, c.intermediate_size),
        )
        for _ in range(c.num_layers)
    )
    shape = ModelShape(
        num_layers=c.num_layers,
        hidden_size=c.hidden_size,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.intermediate_size,
        vocab_size=c.vocab_size,
        rms_epsilon=RMS_EPSILON,
        rope=Rope(ROPE_THETA),
        qkv_bias=False,
        qk_norm=True,
        tied=False,
        max_positions=0,
    )
    return Weights(
        shape,
        draw(c.vocab_size, c.hidden_size, std=1.0),
        layers,
        ones(c.hidden_size),
        linear(c.vocab_size, c.hidden_size),
        f"bench-{seed}-{c.num_layers}-{c.hidden_size}",
    )


class EngineBench:
    """The engine beside a node, and what is asked of it."""

    def __init__(self, engine: Engine, sizes: Sizes, seed: int) -> None:
        self.engine = engine
        self.sizes = sizes
        self._random = random.Random(seed)
        assert engine.connector is not None
        self.connector = engine.connector

    def prompt(self, num_tokens: int) -> list[int]:
        return self._random.choices(range(3, self.sizes.vocab), k=num_tokens)

    def first_token(self, prompt: Sequence[int], *, fabric: bool) -> tuple[float, Output]:
        """Seconds until the first token; the HBM cache is empty. Waits until all is saved."""
        done = threading.Event()
        self.engine.clear_prefix_cache()
        self.engine._post(done.set)
        done.wait(WAIT_S)
        begun = time.perf_counter()
        pending = begin(self.engine, prompt, max_tokens=1, handle="" if fabric else None)
        output = pending.next()
        taken = time.perf_counter() - begun
        until(lambda: self.connector.statistics().saving_bytes == 0, deadline_s=WAIT_S)
        until(lambda: self.engine.statistics().pool.used == 0, deadline_s=WAIT_S)
        return taken, output

    def ttft(self) -> list[Rows]:
        rows = []
        for tokens in self.sizes.prompts:
            prompt = self.prompt(tokens)
            begun = time.perf_counter()
            cold, _ = self.first_token(prompt, fabric=True)
            stored = time.perf_counter() - begun
            taken: dict[str, list[float]] = {"hit": [], "recompute": [], "load": []}
            host = set()
            for _ in range(self.sizes.rounds if tokens < 32768 else 3):
                seconds, output = self.first_token(prompt, fabric=True)
                taken["hit"].append(seconds)
                host.add(output.reused.host)
                taken["recompute"].append(self.first_token(prompt, fabric=False)[0])
            rates = self.engine.fetch_rates()
            row: Rows = {
                "tokens": tokens,
                "host_tokens": sorted(host),
                "hit_ms": _ms(taken["hit"]),
                "recompute_ms": _ms(taken["recompute"]),
                "first_ms": cold * 1e3,
                "stored_ms": stored * 1e3,
                "regret_ms": [round(1e3 * r.regret_s, 1) for r in self.engine.fetch_records()][-3:],
                "known_load_gb_per_s": {k: v / 1e9 for k, v in rates.bytes_per_s.items()},
                "known_prefill_ms": 1e3 * rates.prefill_s(0, tokens),
            }
            row["gain"] = row["recompute_ms"] / row["hit_ms"]
            rows.append(row)
            print(json.dumps(row), flush=True)
        return rows

    def misses(self) -> list[Rows]:
        """A prompt that nobody has, asked for and stored, against one that goes past the fabric.

        A GPU computes a few per cent slower right after a prefill than after a rest, and only the one side's
        blocks are saved after it: so both are measured right after a prefill, and both after a rest.
        """
        rows = []
        for tokens in self.sizes.missed:
            row: Rows = {"tokens": tokens}
            for state in ("busy", "rested"):
                taken: dict[bool, list[float]] = {True: [], False: []}
                for _ in range(self.sizes.rounds):
                    for fabric in (True, False):
                        if state == "busy":
                            self.first_token(self.prompt(tokens), fabric=False)
                        else:
                            time.sleep(REST_S)
                        prompt = self.prompt(tokens)
                        taken[fabric].append(self.first_token(prompt, fabric=fabric)[0])
                ratios = [a / b for a, b in zip(taken[True], taken[False], strict=True)]
                row[f"miss_ms_{state}"] = _ms(taken[True])
                row[f"none_ms_{state}"] = _ms(taken[False])
                row[f"miss_overhead_{state}"] = harness.median(ratios)
            rows.append(row)
            print(json.dumps(row), flush=True)
        return rows

    def decode(self) -> Rows:
        """Median step of four sequences, with and without a save going on all the time."""
        steps = self.sizes.decode_steps
        rounds = self.sizes.rounds
        count = 4 * rounds * steps + 16
        running = [
            begin(self.engine, self.prompt(512), max_tokens=count, handle=None) for _ in range(4)
        ]
        taken: dict[str, list[float]] = {"plain": [], "saving": []}
        with _Saver(self) as saver:
            _steps(running, 8)
            for _ in range(rounds):
                taken["plain"] += _steps(running, steps)[2:]
                saver.is_wanted.set()
                taken["saving"] += _steps(running, steps)[2:]
                saver.stop_saving()
                for pending in running:
                    pending.skip()  # what was answered meanwhile took no time
            saved_bytes, saving_s = saver.num_bytes, saver.seconds
        for pending in running:
            self.engine.abort(pending.name)
            pending.answer()
        row = {
            "step_ms": _ms(taken["plain"]),
            "step_saving_ms": _ms(taken["saving"]),
            "step_p99_ms": 1e3 * float(np.quantile(taken["plain"], 0.99)),
            "step_saving_p99_ms": 1e3 * float(np.quantile(taken["saving"], 0.99)),
            "save_slowdown": harness.median(taken["saving"]) / harness.median(taken["plain"]),
            "save_slowdown_mean": sum(taken["saving"]) / sum(taken["plain"]),
            "saved_gb_per_s": saved_bytes / max(saving_s, 1e-9) / 1e9,
        }
        print(json.dumps(row), flush=True)
        return row


class _Saver:
    """Saves blocks of prompts that nobody asked for, while it is wanted, from a thread of its own."""

    def __init__(self, bench: EngineBench) -> None:
        self._bench = bench
        self.is_wanted = threading.Event()
        self._is_idle = threading.Event()
        self._is_over = False
        self.num_bytes = 0
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Saver:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over = True
        self.is_wanted.set()
        self._thread.join()

    def stop_saving(self) -> None:
        """Returns when nothing is saved any more."""
        self._is_idle.clear()
        self.is_wanted.clear()
        self._is_idle.wait(WAIT_S)

    def _run(self) -> None:
        engine, connector = self._bench.engine, self._bench.connector
        k = engine.shape.pages_per_block
        num_blocks = min(64, engine.shape.num_pages // k)
        blocks = [tuple(range(n * k, (n + 1) * k)) for n in range(num_blocks)]
        prompts = [self._bench.prompt(num_blocks * BLOCK_TOKENS) for _ in range(4)]
        for number in itertools.count():
            if not self.is_wanted.is_set():
                self._is_idle.set()
                self.is_wanted.wait()
            if self._is_over:
                return
            name = f"save-{number}"
            tokens = [number + 3, *prompts[number % 4][1:]]
            opened = connector.open(name, "", "", tokens).result()
            assert opened.keys is not None
            keys = opened.keys.first(len(tokens))
            begun = time.perf_counter()
            fence = engine._mover.fence()
            saved = connector.save(name, ROOT_PARENT, keys, blocks[: len(keys)], fence).result()
            self.seconds += time.perf_counter() - begun
            self.num_bytes += saved.num_stored * engine.shape.part_bytes
            connector.release(name)


def _steps(running: Sequence[Pending], count: int) -> list[float]:
    """Seconds between tokens of the first sequence, all advancing together."""
    taken, last = [], time.perf_counter()
    for _ in range(count):
        for pending in running:
            pending.next()
        now = time.perf_counter()
        taken.append(now - last)
        last = now
    return taken


def _ms(seconds: Sequence[float]) -> float:
    return 1e3 * harness.median(seconds)


@contextlib.contextmanager
def engine_bench(sizes: Sizes, seed: int) -> Iterator[EngineBench]:
    """Node and engine, connected; the arena page-locked as far as it was in `WAIT_S`."""
    with tempfile.TemporaryDirectory(prefix="kvf-bench-") as folder:
        options: Rows = {"host_bytes": sizes.host_bytes, "window_bytes": sizes.window_bytes}
        with NodeProcess(Path(folder) / "node", **options) as node:
            config = engine_config(sizes, str(node.socket))
            model = Model(config, random_weights(config, seed))
            begun = time.perf_counter()
            with Engine(config, model) as engine:
                assert engine.connector is not None
                engine.connector.wait_connected(WAIT_S)
                started = time.perf_counter() - begun
                engine.connector.wait_pinned(WAIT_S)
                locked = time.perf_counter() - begun - started
                print(f"engine up in {started:.2f} s, arena page-locked after {locked:.2f} s more")
                yield EngineBench(engine, sizes, seed)


def measure_engine(sizes: Sizes, seed: int) -> tuple[Rows, dict[str, float]]:
    with engine_bench(sizes, seed) as bench:
        ttft, misses, decode = bench.ttft(), bench.misses(), bench.decode()
    main = next(row for row in ttft if row["tokens"] == sizes.main)
    figures = {
        "ttft_hit_host_ms": main["hit_ms"],
        "ttft_recompute_ms": main["recompute_ms"],
        "ttft_gain_16k": main["gain"],
        "save_slowdown": decode["save_slowdown"],
        "save_slowdown_mean": decode["save_slowdown_mean"],
        "miss_overhead": misses[-1]["miss_overhead_busy"],
    }
    return {"ttft": ttft, "miss": misses, "decode": decode}, figures


def measure_all_copies(sizes: Sizes, seed: int) -> tuple[Rows, dict[str, float]]:
    large, pin_s_per_gib = measure_copies(sizes.layers, sizes, seed)
    small, _ = measure_copies(4, sizes, seed)
    at = {row["tokens"]: row for row in large}[sizes.copies[-1] if sizes.quick else sizes.main]
    at_small = small[-1]
    figures = {
        "h2d_over_limit": at["h2d_over_limit"],
        "h2d_over_limit_1mib": at_small["h2d_over_limit"],
        "d2h_over_limit": at["d2h_over_limit"],
        "d2h_over_limit_1mib": at_small["d2h_over_limit"],
        "pin_s_per_gib": pin_s_per_gib,
    }
    return {"copies": large, "copies_1mib": small, "kernel": measure_kernel(sizes)}, figures


def hardware() -> str:
    return f"{torch.cuda.get_device_name()}, {harness.hardware()}"


def without_gpu(args: argparse.Namespace) -> int:
    print("bench_gpu measures nothing here: it needs a CUDA device")
    harness.report("gpu", argparse.Namespace(quick=True), {}, None)
    return 0 if args.quick else 1


def main() -> int:
    args = harness.parse_arguments(__doc__ or "")
    if not torch.cuda.is_available():
        return without_gpu(args)
    sizes = Sizes(quick=args.quick)
    copy_rows, copy_figures = measure_all_copies(sizes, args.seed)
    engine_rows, engine_figures = measure_engine(sizes, args.seed)
    figures = copy_figures | engine_figures
    harness.report("gpu", args, figures, copy_rows | engine_rows, on=hardware())
    return 0


if __name__ == "__main__":
    sys.exit(main())
