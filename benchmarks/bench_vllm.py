"""What the fabric gives vLLM on the CPU, beside no external cache and LMCache's multi-process mode.

Sides with the same vLLM, checkpoint, prompts and thread binding:

    none          no external cache
    lmcache       `lmcache server` and LMCacheMPConnector, LRU, chunks of 256 tokens, else as they come
    lmcache_shm   the same with `--shm-name`: bytes go through shared memory, not as pickles over the socket
    fabric        a node and the one flag

Two engine processes of each side with a cache; the second has the other core. A pair is one new prompt on
every side, in turns:

    cold    time to first token of a prompt that nobody holds; one token is asked for
    store   from when the prompt's last token was computed until the second engine's lookup finds the prompt;
            `after_answer`: from when the caller had the answer. On a CPU LMCache stores within the step, and
            the first token waits for that: the first formula counts it, the second does not
    hbm     time to first token of the same prompt from vLLM's own cache
    load    the same after vLLM's own cache was emptied, so that it comes from outside

A prompt is 2,048 tokens and one more, so that a hit is the same 2,048 tokens from everywhere and each side
computes one. Every hit is checked to be one, and its answer compared with that of `none` token by token.

Runs in the environment of `make .venv-lmcache`; the node runs in `.venv`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
from vllm_process import (
    BLOCK_TOKENS,
    FABRIC,
    QUIET,
    START_S,
    VOCAB,
    EngineProcess,
    Row,
    environment_of,
    write_checkpoint,
)

from kvfabric.testing.processes import NodeProcess, until

ENVIRONMENT = ".venv-lmcache"
GIB = 1 << 30
LMCACHE = {
    "kv_connector": "LMCacheMPConnector",
    "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
CACHES = ("fabric", "lmcache", "lmcache_shm")


@dataclass(frozen=True)
class Sizes:
    quick: bool

    @property
    def layers(self) -> int:
        return 2 if self.quick else 12

    @property
    def hidden(self) -> int:
        return 128 if self.quick else 1024

    @property
    def kv_heads(self) -> int:
        return 2 if self.quick else 8

    @property
    def prompt_tokens(self) -> int:
        """Those that a hit finds; the prompt has one more."""
        return 512 if self.quick else 2048

    @property
    def caches(self) -> tuple[str, ...]:
        return CACHES[:2] if self.quick else CACHES

    @property
    def pairs(self) -> int:
        return 2 if self.quick else 7

    @property
    def loads(self) -> int:
        """Of each prompt on each side, after as many hits in HBM."""
        return 1 if self.quick else 3

    @property
    def cache_bytes(self) -> int:
        return GIB if self.quick else 2 * GIB

    @property
    def kv_bytes(self) -> int:
        return self.prompt_tokens * self.layers * self.kv_heads * 64 * 2 * 4


@contextlib.contextmanager
def lmcache_server(sizes: Sizes, folder: Path, *, shared_memory: bool) -> Iterator[int]:
    """`lmcache server` with its memory allocated at the start; its port."""
    port, http, prometheus = free_ports(3)
    log = folder / f"lmcache-server-{port}.log"
    command = [str(Path(sys.executable).with_name("lmcache")), "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--http-port", str(http), "--prometheus-port", str(prometheus)]
    command += ["--chunk-size", "256", "--eviction-policy", "LRU", "--no-l1-use-lazy"]
    command += ["--l1-size-gb", str(sizes.cache_bytes // GIB)]
    command += ["--supported-transfer-mode", "engine_driven"]  # what its connector does on a CPU
    if shared_memory:
        command += ["--shm-name", f"kvf_bench_{port}"]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=os.environ | QUIET, stdout=output, stderr=subprocess.STDOUT
        )

    def is_up() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"lmcache server ended:\n{log.read_text()[-4000:]}")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", http)) == 0

    try:
        until(is_up, deadline_s=START_S)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@dataclass(frozen=True)
class Side:
    """`second` finds in the same cache what `first` stored; `none` has neither."""

    name: str
    first: EngineProcess
    second: EngineProcess | None


@contextlib.contextmanager
def started_sides(sizes: Sizes, seed: int, folder: Path) -> Iterator[list[Side]]:
    checkpoint = write_checkpoint(
        folder / "model",
        layers=sizes.layers,
        hidden=sizes.hidden,
        kv_heads=sizes.kv_heads,
        seed=seed,
    )
    arguments: Row = {
        "model": str(checkpoint),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": sizes.prompt_tokens + BLOCK_TOKENS,
        "max_num_batched_tokens": sizes.prompt_tokens + BLOCK_TOKENS,  # a prompt is one step
        "max_num_seqs": 4,
        "num_gpu_blocks_override": 4 * sizes.prompt_tokens // BLOCK_TOKENS,
        "seed": 0,
    }
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(
            NodeProcess(
                folder / "node",
                python=str(harness.ROOT / ".venv" / "bin" / "python"),
                host_bytes=sizes.cache_bytes,
            )
        )

        def lmcache(*, shared_memory: bool) -> Row:
            server = lmcache_server(sizes, folder, shared_memory=shared_memory)
            port = stack.enter_context(server)
            extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
            return {"kv_transfer_config": LMCACHE | {"kv_connector_extra_config": extra}}

        transfers: dict[str, Row] = {"none": {}, "fabric": {"kv_transfer_config": FABRIC}}
        for name in sizes.caches[1:]:
            transfers[name] = lmcache(shared_memory=name == "lmcache_shm")

        def start(name: str, core: int) -> EngineProcess:
            environment = environment_of(node.socket, core)
            engine = EngineProcess(
                f"{name}-{core}", arguments | transfers[name], folder, environment
            )
            return stack.enter_context(engine)

        sides = []
        for name in ("none", *sizes.caches):
            first = start(name, 1)
            second = start(name, 0) if name != "none" else None
            sides.append(Side(name, first, second))
            if not sizes.quick:  # two at a time: there are two cores
                wait_ready(sides[-1:])
        if sizes.quick:
            wait_ready(sides)
        yield sides


def wait_ready(sides: Sequence[Side]) -> None:
    for side in sides:
        for engine in (side.first, side.second):
            if engine is not None:
                engine.wait_ready()


class Measurement:
    """Pairs, and what became of the answers."""

    def __init__(self, sizes: Sizes, sides: Sequence[Side]) -> None:
        self._sizes = sizes
        self._sides = sides
        self.rows: list[Row] = []
        self.num_answers = self.num_differing = 0
        self._right: dict[int, list[int]] = {}

    def pair(self, number: int, tokens: Sequence[int], *, keep: bool = True) -> None:
        """One prompt on every side; the side that begins changes."""
        start = number % len(self._sides)
        answers: dict[str, list[list[int]]] = {}
        row: Row = {"pair": number}
        for side in [*self._sides[start:], *self._sides[:start]]:
            row[side.name], answers[side.name] = self._measure(side, tokens)
        if keep:
            self.rows.append(row)
            self._compare(number, answers)
            print(json.dumps(row), flush=True)

    def _measure(self, side: Side, tokens: Sequence[int]) -> tuple[Row, list[list[int]]]:
        side.first.do("drop_hbm")
        cold = side.first.ask(tokens, 1)
        row: Row = {"cold_ms": 1e3 * cold["first"]}
        self._expect(side, "cold", cold, 0)
        if side.second is not None:
            seen = side.second.do(
                "wait_match", tokens=tokens, num_tokens=self._sizes.prompt_tokens, deadline_s=30
            )
            if seen["found"] < self._sizes.prompt_tokens:
                raise RuntimeError(f"{side.name} holds only {seen['found']} tokens after 30 s")
            row |= {
                "store_ms": 1e3 * (seen["at"] - cold["computed"]),
                "store_after_answer_ms": 1e3 * (seen["at"] - cold["ended"]),
                "lookups": seen["looked"],
                "lookup_ms": 1e3 * seen["each"],
            }
        hbm, load, answers = [], [], []
        for _ in range(self._sizes.loads):
            hit = side.first.ask(tokens)
            self._expect(side, "hbm", hit, self._sizes.prompt_tokens)
            hbm.append(1e3 * hit["first"])
            answers.append(hit["token_ids"])
            if side.second is not None:
                side.first.do("drop_hbm")
                hit = side.first.ask(tokens)
                self._expect(side, "load", hit, self._sizes.prompt_tokens)
                load.append(1e3 * hit["first"])
                answers.append(hit["token_ids"])
        row |= {"hbm_ms": hbm, "load_ttft_ms": load}
        if side.second is not None:
            hit = side.second.ask(tokens)
            self._expect(side, "second engine", hit, self._sizes.prompt_tokens)
            row["second_ttft_ms"] = 1e3 * hit["first"]
            answers.append(hit["token_ids"])
            side.second.do("drop_hbm")
        return row, answers

    def _expect(self, side: Side, what: str, answer: Row, cached: int) -> None:
        if answer["cached"] != cached:
            raise RuntimeError(
                f"{side.name}, {what}: {answer['cached']} tokens were cached, not {cached}"
            )

    def _compare(self, number: int, answers: dict[str, list[list[int]]]) -> None:
        right = answers["none"][0]
        if right in self._right.values():
            raise RuntimeError("two prompts have one answer: it would not show wrong KV")
        self._right[number] = right
        for name, some in answers.items():
            for answer in some:
                self.num_answers += 1
                if answer != right:
                    self.num_differing += 1
                    at = next(i for i in range(len(right)) if answer[i] != right[i])
                    print(f"pair {number}, {name}: another token at {at}")

    def figures(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name in self._sizes.caches:
            load = self._all(name, "load_ttft_ms")
            figures[f"load_ms_{name}"] = harness.median(load) - harness.median(
                self._all(name, "hbm_ms")
            )
            for what in ("store_ms", "store_after_answer_ms"):
                figures[f"{what}_{name}"] = harness.median([r[name][what] for r in self.rows])
        for what in ("load", "store"):
            figures[f"{what}_speedup_over_lmcache"] = (
                figures[f"{what}_ms_lmcache"] / figures[f"{what}_ms_fabric"]
            )
        for name in self._sizes.caches:
            key = "cold_over_none" + ("" if name == "fabric" else f"_{name}")
            figures[key] = harness.median(
                [row[name]["cold_ms"] / row["none"]["cold_ms"] for row in self.rows]
            )
        for name in ("none", *self._sizes.caches):
            figures[f"ttft_cold_ms_{name}"] = harness.median(
                [row[name]["cold_ms"] for row in self.rows]
            )
            figures[f"ttft_hbm_ms_{name}"] = harness.median(self._all(name, "hbm_ms"))
        figures["answers"] = self.num_answers
        figures["answers_differing"] = self.num_differing
        return figures

    def _all(self, name: str, what: str) -> list[float]:
        return [value for row in self.rows for value in row[name][what]]


def missing() -> str:
    """What this environment lacks, if anything."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM"
    try:
        importlib.metadata.version("lmcache")
    except importlib.metadata.PackageNotFoundError:
        return "LMCache"
    return ""


def main() -> int:
    args = harness.parse_arguments(__doc__ or "")
    if lacks := missing():
        print(
            f"bench_vllm measures nothing here: no {lacks}; it runs as {ENVIRONMENT}/bin/python "
            f"benchmarks/bench_vllm.py after `make {ENVIRONMENT}`"
        )
        harness.report("vllm", argparse.Namespace(quick=True), {}, None)
        return 0
    sizes = Sizes(args.quick)
    prompts = random.Random(args.seed)
    with (
        tempfile.TemporaryDirectory(prefix="kvf-bench-") as folder,
        started_sides(sizes, args.seed, Path(folder)) as sides,
    ):
        measurement = Measurement(sizes, sides)
        for number in range(-1, sizes.pairs):  # one before the first, to warm up
            tokens = [*prompts.choices(range(3, VOCAB), k=sizes.prompt_tokens), 3]
            measurement.pair(number, tokens, keep=number >= 0)
    harness.report("vllm", args, measurement.figures(), measurement.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
