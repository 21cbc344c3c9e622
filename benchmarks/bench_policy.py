"""Which blocks are kept: two request logs against the store's own policy, LRU, ARC and a clairvoyant.

`fabric` is the production code (`kvfabric.store.replay`): index, queues, ghosts, quotas and slots of a node,
with everything but bytes. Beside it, over the same requests in the same order:

* `lru`: leaf LRU: the least recently used block without a child in the tier goes.
* `lru_plain`: as vLLM does it: a queue by last use, the tail of a prompt freed before its head.
* `arc`: Megiddo and Modha's ARC, whose victim is the least recently used leaf of the list it chose.
* `clairvoyant`: knows the log, and evicts the leaf whose next use is farthest. It bounds nothing exactly:
  it stores every block, and with prefixes to keep the farthest leaf need not be the best one.

A hit is a leading block of a prompt that the tier holds when the request comes. Capacities are shares of a
log's distinct full blocks. `ssd_bytes_written`: the others write each block through, the fabric at its
second use.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import numpy as np
import numpy.typing as npt
from peer_policies import Arc, Clairvoyant, Lru, PlainLru

from kvfabric.store.replay import Replay

TRACES = harness.ROOT / "benchmarks" / "traces"
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
QUICK_SHARES, QUICK_REQUESTS = (0.02, 0.1), 2_000
TOKEN_BYTES = 144 * 1024
"""KV of a token of Qwen3-8B."""
GROWTH = 3.5e-5
"""Of the same model's prefill on an H100, see `kvfabric.store.cost`."""


@dataclass(frozen=True, slots=True)
class Trace:
    name: str
    block_tokens: int
    prompts: list[list[int]]
    num_distinct: int


def read_traces(folder: Path, limit: int | None) -> Iterator[Trace]:
    """Full blocks of each request, in order of arrival, ids counted from 0 as they appear."""
    for name, tokens, at, ids, length in (
        ("mooncake_conversation", 512, "timestamp", "hash_ids", "input_length"),
        ("rtp_llm_online", 1024, "ts", "bh", "il"),
    ):
        with gzip.open(folder / f"{name}.jsonl.gz") as lines:
            rows = sorted((json.loads(line) for line in lines), key=lambda row: float(row[at]))
        numbers: dict[object, int] = {}
        prompts = [
            [numbers.setdefault(one, len(numbers)) for one in row[ids][: row[length] // tokens]]
            for row in rows[:limit]
        ]
        yield Trace(name, tokens, prompts, len(numbers))


# ---------------------------------------------------------------------- rows


def _saved(trace: Trace, hits: Iterable[int]) -> tuple[float, float]:
    """(hit blocks over all, saved over all of the compute, if a token costs GROWTH more with each before)."""
    per_block = 1 + GROWTH * trace.block_tokens * np.arange(1 + max(map(len, trace.prompts)))
    costs = np.append(0.0, np.cumsum(per_block))
    pairs = list(zip(hits, (len(prompt) for prompt in trace.prompts), strict=True))
    saved, all_cost = (sum(costs[pair[which]] for pair in pairs) for which in (0, 1))
    return sum(hit for hit, _ in pairs) / sum(length for _, length in pairs), saved / all_cost


def _row(
    trace: Trace, capacity: int, policy: str, hits: Iterable[int], written: int
) -> dict[str, float | str]:
    hit, saved = _saved(trace, hits)
    return {
        "trace": trace.name,
        "capacity": capacity,
        "policy": policy,
        "hit": hit,
        "compute_saved": saved,
        "ssd_bytes_written": written * trace.block_tokens * TOKEN_BYTES,
    }


def replay(
    trace: Trace, capacity: int, keys: npt.NDArray[np.uint64], growth: float
) -> tuple[list[int], int]:
    """(hits of each request, blocks that would have been written to SSD)."""
    with Replay(capacity_blocks=capacity, block_tokens=trace.block_tokens, growth=growth) as node:
        hits = [node.request(keys[prompt]) for prompt in trace.prompts]
        return hits, len(node.admitted)


def measure(trace: Trace, capacity: int, seed: int) -> Iterator[dict[str, float | str]]:
    source = np.random.default_rng(seed)
    keys = source.integers(0, 1 << 63, size=(trace.num_distinct, 4), dtype=np.uint64)
    for policy, growth in (("fabric", 0.0), ("fabric, by cost", GROWTH)):
        hits, admitted = replay(trace, capacity, keys, growth)
        yield _row(trace, capacity, policy, hits, admitted)
    size = trace.num_distinct
    for policy, tier, written in (
        ("lru", Lru(capacity, size), size),
        ("lru_plain", PlainLru(capacity), size),
        ("arc", Arc(capacity, size), size),
        ("clairvoyant", Clairvoyant(capacity, size, trace.prompts), 0),
    ):
        hits = [tier.serve(prompt) for prompt in trace.prompts]
        yield _row(trace, capacity, policy, hits, written)


def figures(rows: Sequence[dict[str, float | str]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    by_run: dict[tuple[object, object], dict[object, dict[str, float | str]]] = {}
    for row in rows:
        by_run.setdefault((row["trace"], row["capacity"]), {})[row["policy"]] = row
    for run in by_run.values():
        ours, cost, least, arc_, best = (
            run[name] for name in ("fabric", "fabric, by cost", "lru", "arc", "clairvoyant")
        )
        hit, base, top = float(ours["hit"]), float(least["hit"]), float(best["hit"])
        for name, value in (
            ("lru", hit / base),
            ("arc", hit / float(arc_["hit"])),
            ("gap", (hit - base) / (top - base)),
            ("ssd", float(ours["ssd_bytes_written"]) / float(least["ssd_bytes_written"])),
            ("saved", float(cost["compute_saved"]) / float(least["compute_saved"])),
            ("by_cost", float(cost["compute_saved"]) / float(ours["compute_saved"])),
        ):
            values.setdefault(name, []).append(value)
    mean = {name: sum(some) / len(some) for name, some in values.items()}
    return {
        "hit_over_lru_min": min(values["lru"]),
        "hit_over_lru_mean": mean["lru"],
        "gap_to_optimum_closed_mean": mean["gap"],
        "ssd_writes_over_write_through": mean["ssd"],
        "hit_over_arc_min": min(values["arc"]),
        "hit_over_arc_mean": mean["arc"],
        "compute_saved_over_lru_mean": mean["saved"],
        "compute_saved_by_cost_over_not_mean": mean["by_cost"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--traces", type=Path, default=TRACES, metavar="DIR")
    args = harness.parse_arguments(__doc__ or "", [parser])
    rows: list[dict[str, float | str]] = []
    for trace in read_traces(args.traces, QUICK_REQUESTS if args.quick else None):
        for share in QUICK_SHARES if args.quick else SHARES:
            for row in measure(trace, int(share * trace.num_distinct), args.seed):
                rows.append(row)
                print(
                    f"{row['trace']:22} {row['capacity']:6} {row['policy']:16} "
                    f"hit {row['hit']:.4f} saved {row['compute_saved']:.4f}",
                    flush=True,
                )
    harness.report("policy", args, figures(rows), rows)


if __name__ == "__main__":
    main()
