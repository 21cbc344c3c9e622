"""Blocks from one node's arena into another's, over UCX on loopback.

Two real nodes and a real Redis (their registry), an engine at each. A fetch is what an engine waits for:
from match (the peer is asked, holds, and sends) until load has answered, so every part is in our arena,
verified. Beside it, in turns and in the same run:

    perftest   `ucx_perftest` tag bandwidth, same message size, transport and settings, one process a side:
               no control messages, no checksums, always the same buffers
    bound      messages of 2 MiB between two bare processes, as nodes have them: not out of the processor's
               cache, and with XXH3 of each as it comes (`transfer_bound.py`)
    redis      GET of the same bytes from a redis-server on a Unix socket, one value a part, pipelined: what
               somebody would do by hand; nothing is verified

A block is one part. Fetches alternate between prompts, so that nothing is there already. CPU seconds are
those that the nodes use while a fetch is under way. A second pair of nodes has `wire = "aes-gcm"`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import harness
import transfer_bound
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


FULL = Sizes(rounds=9, fetch_bytes=128 << 20, latency_rounds=60, perftest_bytes=1 << 30)
QUICK = Sizes(rounds=2, fetch_bytes=32 << 20, latency_rounds=6, perftest_bytes=128 << 20)


class Bench:
    """Node `b` fetches what an engine of node `a` has stored."""

    def __init__(self, a: NodeProcess, b: NodeProcess, keys: Path, stack: ExitStack) -> None:
        self._a, self._b, self._stack = a, b, stack
        self._minter = Minter(keys)
        self._minter.sources = ("a",)
        self._number = 0
        self.num_missed = 0
        self.cpu_s = [0.0, 0.0]  # of owner and asker, while blocks were fetched
        self.num_bytes = 0

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
            before = [_cpu_s(node.pid) for node in (self._a, self._b)]
            began = time.perf_counter()
            located = second.locate(request, keys)
            took = time.perf_counter() - began
            after = [_cpu_s(node.pid) for node in (self._a, self._b)]
            second.release(request)
            if located.num_blocks == num_blocks:
                self.cpu_s = [
                    total + later - earlier
                    for total, later, earlier in zip(self.cpu_s, after, before, strict=True)
                ]
                self.num_bytes += num_blocks * second.part_bytes
                return took
            self.num_missed += 1  # the peer did not answer at once, and is not waited for
        raise RuntimeError(
            f"{num_blocks} blocks did not come: {located.num_blocks}, {located.reason}"
        )

    def _handle(self, engine: TinyEngine, request: str) -> str:
        return self._minter.handle(engine, request, RegistryState(), tenant=DEFAULT_TENANT)

    def cpu_per_gib(self) -> tuple[float, float]:
        """CPU seconds of owner and asker since the last time."""
        owner, asker = (seconds / (self.num_bytes / 2**30) for seconds in self.cpu_s)
        self.cpu_s, self.num_bytes = [0.0, 0.0], 0
        return owner, asker


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
    """GB/s of each side, a value a round."""
    count = sizes.fetch_bytes // part_bytes
    pair = bench.engines(part_bytes)
    bench.fetch(pair, count)  # connections, first touches
    bench.cpu_per_gib()
    found: dict[str, list[float]] = {"fetch": [], "perftest": [], "redis": []}
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


def _cpu_s(pid: int) -> float:
    """Of all threads that are there now."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9


def _ready(nodes: Sequence[NodeProcess]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not all(node.metrics()["epoch_lease_valid"] for node in nodes):
        assert time.monotonic() < until
        time.sleep(0.1)


def sealed_rates(bench: Bench, sizes: Sizes) -> list[float]:
    """GB/s, a value a round."""
    pair = bench.engines(LARGE)
    count = sizes.fetch_bytes // LARGE
    bench.fetch(pair, count)
    bench.cpu_per_gib()
    return [sizes.fetch_bytes / bench.fetch(pair, count) / 1e9 for _ in range(sizes.rounds)]


@contextmanager
def nodes_of(home: Path, redis: RedisServer, wire: str) -> Iterator[Bench]:
    """Two nodes of a fleet of their own."""
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(
                NodeProcess(
                    home / node,
                    node_id=node,
                    directory=redis.url,
                    keyring_dir=home / "keys",
                    ucx_net_devices=SETTINGS.net_devices,
                    wire=wire,
                    http="127.0.0.1:0",
                    host_bytes=HOST_BYTES,
                    epoch_lease_s=1.0,
                )
            )
            for node in ("a", "b")
        ]
        _ready(nodes)
        yield Bench(nodes[0], nodes[1], home / "keys", stack)


def main() -> None:
    args = harness.parse_arguments(__doc__ or "")
    sizes = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory(prefix="bench-transfer-") as name, ExitStack() as stack:
        home = Path(name)
        redis = stack.enter_context(RedisServer(home / "redis", appendonly="no"))
        with nodes_of(home / "plain", redis, "plain") as bench:
            large = measure(bench, redis, sizes, LARGE)
            # Large blocks first: an arena full of small ones has no room for them in one piece.
            owner, asker = bench.cpu_per_gib()
            one = {size: latency(bench, sizes, size) for size in (LARGE, SMALL)}
            small = measure(bench, redis, sizes, SMALL)
            owner_small, asker_small = bench.cpu_per_gib()
        with (
            RedisServer(home / "other", appendonly="no") as registry,
            nodes_of(home / "sealed", registry, "aes-gcm") as other,
        ):
            sealed = sealed_rates(other, sizes)
            owner_sealed, asker_sealed = other.cpu_per_gib()
        alone, verified = transfer_bound.measure(
            SETTINGS, size=LARGE, count=sizes.fetch_bytes // LARGE, rounds=sizes.rounds
        )
    figures = {
        "fetch_gbps": harness.median(large["fetch"]),
        "fetch_over_perftest": _ratio(large, "perftest"),
        "fetch_over_redis": _ratio(large, "redis"),
        "fetch_64k_gbps": harness.median(small["fetch"]),
        "fetch_64k_over_perftest": _ratio(small, "perftest"),
        "fetch_64k_over_redis": _ratio(small, "redis"),
        "latency_64k_us_p50": harness.median(one[SMALL]),
        "latency_2m_us_p50": harness.median(one[LARGE]),
        "bound_gbps": verified,
        "fetch_over_bound": harness.median(large["fetch"]) / verified,
        "bound_over_perftest": verified / harness.median(large["perftest"]),
        "unverified_over_perftest": alone / harness.median(large["perftest"]),
        "sealed_gbps": harness.median(sealed),
        "owner_cpu_s_per_gib": owner,
        "asker_cpu_s_per_gib": asker,
        "owner_cpu_s_per_gib_64k": owner_small,
        "asker_cpu_s_per_gib_64k": asker_small,
        "owner_cpu_s_per_gib_sealed": owner_sealed,
        "asker_cpu_s_per_gib_sealed": asker_sealed,
        "fetches_missed": bench.num_missed,
    }
    rows: dict[str, object] = {"2MiB": large, "64KiB": small, "sealed": sealed}
    rows["latency_us"] = {str(size): values for size, values in one.items()}
    harness.report("transfer", args, figures, rows)


def _ratio(found: dict[str, list[float]], other: str) -> float:
    """Median of the rounds' ratios: the sides took turns."""
    return harness.median(
        [ours / theirs for ours, theirs in zip(found["fetch"], found[other], strict=True)]
    )


if __name__ == "__main__":
    main()
