"""Blocks from one node's arena into another's, over UCX on loopback.

Two real nodes and a real Redis (their registry), an engine at each. A fetch is what an engine waits for:
from match (the peer is asked, holds, and sends) until load has answered, so every part is in our arena,
verified. Beside it, in turns and in the same run:

    perftest   `ucx_perftest` tag bandwidth, same message size, transport and settings, one process a side:
               no control messages, no checksums, always the same buffers
    redis      GET of the same bytes from a redis-server on a Unix socket, one value a part, pipelined: what
               somebody would do by hand; nothing is verified

A block is one part. Fetches alternate between prompts, so that nothing is there already.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import harness
from redis import Redis

from kvfabric.registry.state import RegistryState
from kvfabric.testing.engine import DEADLINE_S, TinyEngine, tiny_hello
from kvfabric.testing.minting import Minter
from kvfabric.testing.processes import NodeProcess
from kvfabric.testing.redis import RedisServer
from kvfabric.transfer.ucx import Settings
from kvfabric.types import DEFAULT_TENANT

LARGE, SMALL = 2 << 20, 64 << 10
HOST_BYTES = 2 << 30
SETTINGS = Settings("lo")
RESERVED_BLOCKS = 256  # at a time, as an engine does
_TRIES = 20


@dataclass(frozen=True)
class Sizes:
    """`fetch_bytes`: at once."""

    rounds: int
    fetch_bytes: int
    latency_rounds: int
    perftest_bytes: int


FULL = Sizes(rounds=9, fetch_bytes=128 << 20, latency_rounds=60, perftest_bytes=2 << 30)
QUICK = Sizes(rounds=2, fetch_bytes=32 << 20, latency_rounds=6, perftest_bytes=256 << 20)


class Bench:
    """Node `b` fetches what an engine of node `a` has stored."""

    def __init__(self, a: NodeProcess, b: NodeProcess, keys: Path, stack: ExitStack) -> None:
        self._a, self._b, self._stack = a, b, stack
        self._minter = Minter(keys)
        self._minter.sources = ("a",)
        self._number = 0
        self.num_missed = 0

    def engines(self, part_bytes: int) -> tuple[TinyEngine, TinyEngine]:
        hello = tiny_hello(
            part_bytes=part_bytes, window_bytes=128 << 20, revision=f"rev-{part_bytes}"
        )
        pair = [TinyEngine.connect(node.socket, hello) for node in (self._a, self._b)]
        for engine in pair:
            self._stack.callback(engine.client.close)
        return pair[0], pair[1]

    def fetch(self, pair: tuple[TinyEngine, TinyEngine], num_blocks: int) -> float:
        """Seconds of one fetch of a prompt that only `a` has. Raises RuntimeError if it does not come."""
        first, second = pair
        self._number += 1
        prompt, request = f"prompt-{self._number}", f"r{self._number}"
        keys = first.open(request, prompt, num_blocks, self._handle(first, request))
        step = min(RESERVED_BLOCKS, (64 << 20) // first.part_bytes)
        for at in range(0, num_blocks, step):
            parent = {"parent": keys[at - 1]} if at else {}
            stored = first.store(request, keys[at : at + step], **parent)
            assert stored == len(keys[at : at + step]), (stored, self._number, at)
        first.release(request)
        for _ in range(_TRIES):
            keys = second.open(request, prompt, num_blocks, self._handle(second, request))
            began = time.perf_counter()
            located = second.locate(request, keys)
            took = time.perf_counter() - began
            second.release(request)
            if located.num_blocks == num_blocks:
                return took
            self.num_missed += 1  # the peer did not answer at once, and is not waited for
        raise RuntimeError(
            f"{num_blocks} blocks did not come: {located.num_blocks}, {located.reason}"
        )

    def _handle(self, engine: TinyEngine, request: str) -> str:
        return self._minter.handle(engine, request, RegistryState(), tenant=DEFAULT_TENANT)

    def cpu_s(self) -> tuple[float, float]:
        return _cpu_s(self._a.pid), _cpu_s(self._b.pid)


def perftest(num_bytes: int, iterations: int) -> float:
    """GB/s (of 1e9 bytes) that `ucx_perftest` reports."""
    package = Path(sys.prefix) / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    home = package / "libucx"
    options = {f"UCX_{name}": value for name, value in SETTINGS.options({}).items()}
    environment = {
        **os.environ,
        **options,
        "LD_LIBRARY_PATH": str(home / "lib"),
        "UCX_WARN_UNUSED_ENV_VARS": "n",
    }
    from kvfabric.demo.processes import free_addresses

    port = free_addresses(1)[0].rpartition(":")[2]
    command = [str(home / "bin" / "ucx_perftest"), "-p", port]
    test = ["-t", "tag_bw", "-s", str(num_bytes), "-n", str(iterations), "-w", "50", "-f"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(100):
                done = subprocess.run(
                    [*command, "127.0.0.1", *test],
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                if done.returncode == 0:
                    break
                time.sleep(0.05)
        finally:
            server.terminate()
    numbers = re.findall(
        r"^\s+\d+\s+[\d.]+\s+[\d.]+\s+[\d.]+\s+([\d.]+)", done.stdout, re.MULTILINE
    )
    return float(numbers[-1]) * 1.048576e6 / 1e9  # it counts MiB


@contextmanager
def redis_values(redis: RedisServer, num_bytes: int, count: int) -> Iterator[Callable[[], float]]:
    with Redis(unix_socket_path=str(redis.socket)) as client:
        names = [f"part-{num_bytes}-{i}" for i in range(count)]
        for name in names:
            client.set(name, os.urandom(num_bytes))

        def get() -> float:
            began = time.perf_counter()
            with client.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.get(name)
                values = pipe.execute()
            took = time.perf_counter() - began
            assert sum(map(len, values)) == num_bytes * count
            return took

        yield get
        client.delete(*names)


def measure(
    bench: Bench, redis: RedisServer, sizes: Sizes, part_bytes: int
) -> dict[str, list[float]]:
    """GB/s of each side, a value a round, and CPU seconds per GiB of both nodes."""
    count = sizes.fetch_bytes // part_bytes
    pair = bench.engines(part_bytes)
    bench.fetch(pair, count)  # connections, first touches
    found: dict[str, list[float]] = {"fetch": [], "perftest": [], "redis": [], "cpu": []}
    with redis_values(redis, part_bytes, count) as get:
        for _ in range(sizes.rounds):
            found["fetch"].append(sizes.fetch_bytes / bench.fetch(pair, count) / 1e9)
            found["perftest"].append(perftest(part_bytes, sizes.perftest_bytes // part_bytes))
            found["redis"].append(sizes.fetch_bytes / get() / 1e9)
    return found


def latency(bench: Bench, sizes: Sizes, part_bytes: int) -> list[float]:
    """Microseconds until one block is here."""
    pair = bench.engines(part_bytes)
    bench.fetch(pair, 1)
    return [bench.fetch(pair, 1) * 1e6 for _ in range(sizes.latency_rounds)]


def cpu_per_gib(bench: Bench, sizes: Sizes) -> tuple[float, float]:
    """CPU seconds of owner and asker, the storing of the same bytes at the owner taken off."""
    pair = bench.engines(LARGE)
    count = sizes.fetch_bytes // LARGE
    rounds = sizes.rounds
    stored = _stored_cpu(bench, pair[0], count, rounds)
    before = bench.cpu_s()
    for _ in range(rounds):
        bench.fetch(pair, count)
    after = bench.cpu_s()
    gib = rounds * sizes.fetch_bytes / 2**30
    return (after[0] - before[0] - stored) / gib, (after[1] - before[1]) / gib


def _stored_cpu(bench: Bench, engine: TinyEngine, count: int, rounds: int) -> float:
    before = bench.cpu_s()[0]
    for number in range(rounds):
        request = f"stored-{number}"
        keys = engine.open(request, request, count, bench._handle(engine, request))
        step = (64 << 20) // LARGE
        for at in range(0, count, step):
            parent = {"parent": keys[at - 1]} if at else {}
            engine.store(request, keys[at : at + step], **parent)
        engine.release(request)
    return bench.cpu_s()[0] - before


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _ready(nodes: Sequence[NodeProcess]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not all(node.metrics()["epoch_lease_valid"] for node in nodes):
        assert time.monotonic() < until
        time.sleep(0.1)


def main() -> None:
    args = harness.parse_arguments(__doc__ or "")
    sizes = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory(prefix="bench-transfer-") as name, ExitStack() as stack:
        home = Path(name)
        redis = stack.enter_context(RedisServer(home / "redis", appendonly="no"))
        nodes = [
            NodeProcess(
                home / node,
                node_id=node,
                directory=redis.url,
                keyring_dir=home / "keys",
                ucx_net_devices=SETTINGS.net_devices,
                http="127.0.0.1:0",
                host_bytes=HOST_BYTES,
                epoch_lease_s=1.0,
            )
            for node in ("a", "b")
        ]
        for node in nodes:
            stack.enter_context(node)
        _ready(nodes)
        bench = Bench(nodes[0], nodes[1], home / "keys", stack)
        large = measure(bench, redis, sizes, LARGE)
        # Large blocks first: an arena full of small ones has no room for them in one piece.
        owner, asker = cpu_per_gib(bench, sizes)
        one = {size: latency(bench, sizes, size) for size in (LARGE, SMALL)}
        small = measure(bench, redis, sizes, SMALL)
    figures = {
        "fetch_gbps": harness.median(large["fetch"]),
        "fetch_over_perftest": _ratio(large, "perftest"),
        "fetch_over_redis": _ratio(large, "redis"),
        "fetch_64k_gbps": harness.median(small["fetch"]),
        "fetch_64k_over_perftest": _ratio(small, "perftest"),
        "fetch_64k_over_redis": _ratio(small, "redis"),
        "latency_64k_us_p50": harness.median(one[SMALL]),
        "latency_2m_us_p50": harness.median(one[LARGE]),
        "owner_cpu_s_per_gib": owner,
        "asker_cpu_s_per_gib": asker,
        "fetches_missed": bench.num_missed,
    }
    rows = {"2MiB": large, "64KiB": small, "latency_us": {str(k): v for k, v in one.items()}}
    harness.report("transfer", args, figures, rows)


def _ratio(found: dict[str, list[float]], other: str) -> float:
    """Median of the rounds' ratios: the sides took turns."""
    return harness.median(
        [ours / theirs for ours, theirs in zip(found["fetch"], found[other], strict=True)]
    )


if __name__ == "__main__":
    main()
