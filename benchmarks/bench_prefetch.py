"""What a router's hint wins: from an engine's first question until a prompt's bytes are in host memory.

A node with an SSD tier, an engine of blocks of 1 MiB, prompts that are on SSD and nowhere else. `plain`: the
engine asks, and its blocks are read then. `lead_N`: a hint came N ms before, as much as the way to the
engine, its tokenizer and what it has to finish first may take. Raw: the same bytes by O_DIRECT, eight in
flight. The sides take turns, each with prompts of its own that nobody read before. `wrong`: an engine's plain
load while another prompt, which nobody asks for, is hinted at the same moment. No peer has it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import harness

from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.registry.state import RegistryState
from kvfabric.testing.engine import TinyEngine, tiny_hello
from kvfabric.testing.minting import Minter
from kvfabric.testing.processes import NodeProcess, until
from kvfabric.types import DEFAULT_TENANT, BlockKey

MIB = 1 << 20
DEADLINE_S = 30.0
DEPTH = 8
LEADS_MS = (0, 25, 50, 100, 200)


class Rig:
    """One node, one engine, and the way for hints."""

    def __init__(self, node: NodeProcess, hints: Any, num_blocks: int) -> None:
        self.node, self.hints, self.num_blocks = node, hints, num_blocks
        hello = tiny_hello(part_bytes=MIB, window_bytes=128 * MIB)
        self.engine = TinyEngine.connect(node.socket, hello)
        self.minter = Minter(node.state_dir)
        self._num = 0

    def handle(self) -> tuple[str, str]:
        self._num += 1
        name = f"r{self._num}"
        made = self.minter.handle(self.engine, name, RegistryState(), tenant=DEFAULT_TENANT)
        return name, made

    def put(self, prompt: str) -> list[BlockKey]:
        """Stored, and used once more: admitted to SSD."""
        for _ in range(2):
            name, handle = self.handle()
            keys = self.engine.open(name, prompt, self.num_blocks, handle)
            self.engine.store(name, keys)
            self.engine.client.match(name, keys, deadline_s=DEADLINE_S)
            self.engine.release(name)
        return keys

    def on_ssd(self) -> float:
        return self.node.metrics().get('tier_blocks{tier="ssd"}', 0.0)

    def hint(self, keys: list[BlockKey]) -> tuple[str, str]:
        name, handle = self.handle()
        said = pb.PrefetchHint(handle=handle, keys=b"".join(keys))
        reply = self.hints.Prefetch(pb.PrefetchRequest(hints=[said]))
        assert reply.num_begun == 1, reply
        return name, handle

    def ready_ms(self, keys: list[BlockKey], name: str, handle: str) -> tuple[float, float]:
        """(milliseconds, share of blocks that were in host memory when it asked)."""
        began = time.perf_counter()
        self.engine.client.open_handle(name, handle, deadline_s=DEADLINE_S)
        matched = self.engine.client.match(name, keys, deadline_s=DEADLINE_S)
        located = self.engine.client.load(name, keys, group=0, shard=0, deadline_s=DEADLINE_S)
        took = (time.perf_counter() - began) * 1e3
        assert located.num_blocks == self.num_blocks, located.reason
        self.engine.release(name)
        return took, matched.tiers.count(0) / self.num_blocks


def raw_ms(path: Path, num_blocks: int, at: int) -> float:
    """`num_blocks` MiB of a file of a process that never read them."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffers = [mmap.mmap(-1, MIB) for _ in range(DEPTH)]
    began = time.perf_counter()

    def read(number: int) -> None:
        os.preadv(descriptor, [buffers[number % DEPTH]], (at * num_blocks + number) * MIB)

    with ThreadPoolExecutor(DEPTH) as pool:
        list(pool.map(read, range(num_blocks)))
    took = (time.perf_counter() - began) * 1e3
    os.close(descriptor)
    return took


def prepared(rig: Rig, num_prompts: int, num_others: int) -> list[list[BlockKey]]:
    """Prompts that are on SSD only: as much else has come since as host memory holds."""
    prompts = [rig.put(f"p{number}") for number in range(num_prompts)]
    until(lambda: rig.on_ssd() >= num_prompts * rig.num_blocks, deadline_s=120)
    for number in range(num_others):
        rig.put(f"other {number}")
    before = -1.0
    while rig.on_ssd() != before:  # what is still being written would be in the way of reads
        before = rig.on_ssd()
        time.sleep(0.5)
    return prompts


def measure(
    rig: Rig, raw: Path, rounds: int, prompts: list[list[BlockKey]]
) -> dict[str, list[float]]:
    """Milliseconds by side; and as SIDE_in_host which share was there when the engine asked."""
    taken: dict[str, list[float]] = {}

    def load(side: str, keys: list[BlockKey], named: tuple[str, str]) -> None:
        took, share = rig.ready_ms(keys, *named)
        taken.setdefault(f"{side}_ms", []).append(took)
        taken.setdefault(f"{side}_in_host", []).append(share)
        time.sleep(0.05)

    for number in range(rounds):
        taken.setdefault("raw_ms", []).append(raw_ms(raw, rig.num_blocks, number))
        load("plain", prompts.pop(), rig.handle())
        for lead in LEADS_MS:
            keys = prompts.pop()
            named = rig.hint(keys)
            time.sleep(lead / 1e3)
            load(f"lead_{lead}", keys, named)
    for _ in range(rounds):  # last: until they are given up they leave less for others
        load("plain", prompts.pop(), rig.handle())
        rig.hint(prompts.pop())
        load("wrong", prompts.pop(), rig.handle())
    return taken


def main() -> None:
    args = harness.parse_arguments(__doc__ or "")
    num_blocks, rounds = (8, 2) if args.quick else (32, 8)
    num_prompts = (len(LEADS_MS) + 4) * rounds
    # Hints may bring a thirty-second of the host tier, and one of them half of that.
    num_others = 64
    host = num_others * num_blocks * MIB
    ssd = 2 * (num_prompts + num_others) * num_blocks * MIB
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        raw = Path(name) / "raw"
        with raw.open("wb") as file:
            for _ in range(rounds * num_blocks):
                file.write(os.urandom(MIB))
            file.flush()
            os.fsync(file.fileno())
        node = NodeProcess(Path(name) / "node", http="127.0.0.1:0", host_bytes=host, ssd_bytes=ssd)
        with node, grpc.insecure_channel(f"unix:{node.state_dir}/admin.sock") as channel:
            rig = Rig(node, pb_grpc.NodeHintsStub(channel), num_blocks)  # type: ignore[no-untyped-call]
            prompts = prepared(rig, num_prompts, num_others + 8)
            taken = measure(rig, raw, rounds, prompts)
            rig.engine.client.close()
    figures = {name: harness.median(values) for name, values in taken.items()}
    figures |= {"prompt_mib": num_blocks}
    figures["lead_100_over_plain"] = figures["lead_100_ms"] / figures["plain_ms"]
    figures["wrong_over_plain"] = figures["wrong_ms"] / figures["plain_ms"]
    for key, value in figures.items():
        print(f"{key:24} {value:10.3f}")
    harness.report("prefetch", args, figures, taken)


if __name__ == "__main__":
    main()
