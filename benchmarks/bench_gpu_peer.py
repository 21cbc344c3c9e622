"""KV out of the HBM of another engine of the host: GPU to GPU, checked where it lands.

Two engine processes at one node, a GPU each, with pools in the shape of Qwen3-8B (36 layers, 8 KV heads of
128, bf16: a page of 16 tokens is 2.25 MiB, a block of 64 tokens one part of 9 MiB). The lender fills its pool
and saves; the borrower loads the same blocks again and again, as an engine does (locate, gather over NVLink,
checksums on the device, confirm, spread over pages in any order). Beside each load, in turns and in the same
run:

    copy        one plain copy of as many bytes from GPU to GPU within one process: the limit
    buffered    the same load for an engine whose pages must hold verified bytes only: by landing buffers
    arena       the same load with the lender's pool not mapped: DMA from the node's arena, over PCIe

Needs two CUDA devices (with one, the same GPU lends to itself, which says nothing of NVLink).
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch
from kvfabric_engine.connector import Connector
from kvfabric_engine.layout import PoolShape, pages_as_bytes
from kvfabric_engine.options import ConnectorOptions, Deadlines
from kvfabric_engine.pool_events import PoolEvents
from kvfabric_engine.shared_pools import create_shared
from kvfabric_engine.staging import mover_for

from kvfabric.client.pools import borrow
from kvfabric.hashing import ROOT_PARENT
from kvfabric.testing.processes import NodeProcess, until
from kvfabric.types import BlockKey

GIB, MIB = 1 << 30, 1 << 20
BLOCK_TOKENS = 64
WAIT_S = 120.0
RELEASED_S = 0.1
"""Until the node has heard of it: leased bytes are bounded."""


class Sizes:
    """`batches`: blocks loaded at once."""

    def __init__(self, *, quick: bool) -> None:
        self.layers = 4 if quick else 36
        self.batches = [1, 28] if quick else [1, 2, 7, 28, 114, 228, 456]
        self.rounds = 3 if quick else 9
        self.host_bytes = 1 * GIB if quick else 48 * GIB  # a tenth may be leased
        self.window_bytes = 64 * MIB if quick else 256 * MIB

    @property
    def num_blocks(self) -> int:
        return max(self.batches)


class Engine:
    """As much of one as moves KV: a pool on `device` and a connector."""

    def __init__(self, socket: str, device: torch.device, sizes: Sizes) -> None:
        torch.cuda.set_device(device)
        pages = sizes.num_blocks * 4
        self.shape = PoolShape(pages, sizes.layers, 16, 8, 128, torch.bfloat16, BLOCK_TOKENS)
        self.pool, shared = create_shared(self.shape, device)
        self.rows = pages_as_bytes(self.pool)
        mover = mover_for(self.pool, self.shape, shared)
        self.connector = Connector(
            ConnectorOptions(
                node_socket=socket,
                engine_id=f"engine-{device.index}",
                endpoint="",
                model="bench",
                model_revision="bench",
                window_bytes=sizes.window_bytes,
                deadlines=Deadlines(load_s=WAIT_S, save_s=WAIT_S),
            ),
            layout=self.shape.block_layout(rope="none", packing="bench"),
            mover=mover,
            events=PoolEvents(),
            on_thread=lambda: torch.cuda.set_device(device),
        )
        self.mover = mover
        self.connector.start()
        assert self.connector.wait_connected(WAIT_S)
        assert self.connector.wait_pinned(WAIT_S)
        draw = random.Random(device.index)
        order = draw.sample(range(pages), pages)
        self.blocks = [tuple(order[4 * n : 4 * n + 4]) for n in range(sizes.num_blocks)]

    def keys(self, request: str, num_blocks: int) -> list[BlockKey]:
        prompt = random.Random(0).choices(range(1000), k=num_blocks * BLOCK_TOKENS)
        opened = self.connector.open(request, "", "", prompt).result(WAIT_S)
        assert opened.keys is not None, opened
        return list(opened.keys.first(len(prompt)))


def lend(socket: str, sizes: Sizes) -> None:
    """The lender's process: until its input ends."""
    engine = Engine(socket, torch.device("cuda", 0), sizes)
    connector = engine.connector
    engine.rows.random_(0, 256)
    until(lambda: connector._saves.lends, deadline_s=WAIT_S)
    keys = engine.keys("lender", sizes.num_blocks)
    fence = engine.mover.fence()
    saved = connector.save("lender", ROOT_PARENT, keys, engine.blocks, fence).result(WAIT_S)
    assert saved.num_stored == len(keys), saved
    connector.release("lender")
    sums = [int(engine.rows[list(pages)].view(torch.int64).sum()) for pages in engine.blocks]
    print(" ".join(map(str, sums)), flush=True)
    sys.stdin.read()
    connector.close()


class Borrower:
    """Loads, in turns with what stands beside them."""

    def __init__(self, socket: str, sizes: Sizes, sums: list[int]) -> None:
        self.device = torch.device("cuda", torch.cuda.device_count() - 1)
        self.engine = Engine(socket, self.device, sizes)
        self._socket, self._sums, self._number = socket, sums, 0
        direct = self.engine.connector._loads.direct
        assert direct is not None
        self._pools = direct.landing.borrowed
        until(lambda: len(self._pools.owners) == 1, deadline_s=WAIT_S)
        self._owners = tuple(self._pools.owners)
        size = sizes.num_blocks * self.engine.shape.part_bytes
        self._far = torch.empty(size, dtype=torch.uint8, device="cuda:0")
        self._near = torch.empty(size, dtype=torch.uint8, device=self.device)

    def map(self, *, borrowed: bool) -> None:
        """Have the lender's pool mapped or not. No load is running."""
        connector = self.engine.connector
        self._pools.renew(
            self._owners if borrowed else (),
            lambda name: borrow(self._socket, connector.session, name, deadline_s=WAIT_S),
        )

    def load(self, num_blocks: int, *, in_place: bool) -> tuple[float, int]:
        """Seconds of a load from the moment it begins, and how many blocks came out of the lender's pool."""
        self._number += 1
        name, connector = f"r{self._number}", self.engine.connector
        keys = self.engine.keys(name, num_blocks)
        matched = connector.match(name, keys).result(WAIT_S)
        assert matched.num_blocks == num_blocks, matched
        torch.cuda.synchronize(self.device)
        blocks = self.engine.blocks[:num_blocks]
        loaded = connector.load(name, keys, blocks, in_place=in_place).result(WAIT_S)
        connector.release(name)
        time.sleep(RELEASED_S)
        assert loaded.num_blocks == num_blocks, loaded
        assert loaded.num_stale == 0, loaded
        return loaded.seconds, loaded.num_borrowed

    def check(self, num_blocks: int) -> None:
        """What was loaded is what the lender has; then it is wiped."""
        rows = self.engine.rows
        for pages, expected in zip(self.engine.blocks[:num_blocks], self._sums, strict=False):
            assert int(rows[list(pages)].view(torch.int64).sum()) == expected
        rows.zero_()
        torch.cuda.synchronize(self.device)

    def copy_s(self, num_bytes: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        self._near[:num_bytes].copy_(self._far[:num_bytes], non_blocking=True)
        end.record()
        end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1000


def measure(one: Borrower, sizes: Sizes) -> list[dict[str, Any]]:
    rows = []
    for count in sizes.batches:
        num_bytes = count * one.engine.shape.part_bytes
        taken: dict[str, list[float]] = {"borrowed": [], "buffered": [], "arena": [], "copy": []}
        for turn in range(sizes.rounds + 1):
            one.map(borrowed=True)
            seconds, came = one.load(count, in_place=True)
            assert came == count
            one.check(count)
            buffered, came = one.load(count, in_place=False)
            assert came == count
            one.check(count)
            one.map(borrowed=False)
            beside, came = one.load(count, in_place=True)
            assert came == 0
            one.check(count)
            copied = one.copy_s(num_bytes)
            if turn:  # the first compiles kernels
                taken["borrowed"].append(seconds)
                taken["buffered"].append(buffered)
                taken["arena"].append(beside)
                taken["copy"].append(copied)
        rate = {name: num_bytes / harness.median(seen) / 1e9 for name, seen in taken.items()}
        rows.append({"mib": num_bytes / MIB, **{f"{name}_gb_s": rate[name] for name in rate}})
        print(
            f"{num_bytes / MIB:7.0f} MiB: borrowed {rate['borrowed']:6.1f} GB/s, by buffers "
            f"{rate['buffered']:6.1f}, arena {rate['arena']:5.1f}, plain copy {rate['copy']:6.1f}",
            flush=True,
        )
    return rows


def main() -> int:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--lender", help="run as the lender, at this node's socket")
    args = harness.parse_arguments(__doc__ or "", [options])
    sizes = Sizes(quick=args.quick)
    if args.lender:
        lend(args.lender, sizes)
        return 0
    if not torch.cuda.is_available():
        print("bench_gpu_peer measures nothing here: it needs CUDA devices")
        harness.report("gpu_peer", argparse.Namespace(quick=True), {}, None)
        return 0 if args.quick else 1
    with (
        tempfile.TemporaryDirectory() as state,
        NodeProcess(Path(state), host_bytes=sizes.host_bytes) as node,
    ):
        command = [sys.executable, __file__, "--lender", str(node.socket)]
        command += ["--quick"] if args.quick else []
        lender = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert lender.stdout is not None
        assert lender.stdin is not None
        try:
            sums = [int(word) for word in lender.stdout.readline().split()]
            one = Borrower(str(node.socket), sizes, sums)
            rows = measure(one, sizes)
            one.engine.connector.close()
        finally:
            lender.stdin.close()
            lender.wait(WAIT_S)
    whole = rows[-1]
    batch = next((row for row in rows if round(row["mib"]) == 63), whole)
    figures = {
        "gpu_peer_over_copy": whole["borrowed_gb_s"] / whole["copy_gb_s"],
        "gpu_peer_gb_s": whole["borrowed_gb_s"],
        "gpu_peer_buffered_over_copy": whole["buffered_gb_s"] / whole["copy_gb_s"],
        "gpu_peer_over_arena": whole["borrowed_gb_s"] / whole["arena_gb_s"],
        "gpu_peer_64m_gb_s": batch["borrowed_gb_s"],
        "gpu_peer_64m_over_copy": batch["borrowed_gb_s"] / batch["copy_gb_s"],
        "gpu_copy_64m_gb_s": batch["copy_gb_s"],
        "gpu_copy_gb_s": whole["copy_gb_s"],
    }
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    harness.report("gpu_peer", args, figures, rows, on=f"{len(names)} x {names[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
