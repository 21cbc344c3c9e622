"""The router's index of who holds which block, beside the one that ships with NVIDIA Dynamo.

    make .venv-routers && .venv-routers/bin/python benchmarks/bench_index.py [--quick]

Blocks come as nodes tell of them: prompts of 256 blocks, each held by one of 8 engines. Asked is who holds a
prompt that one engine has wholly, at 1 and 10 million blocks (`--quick`: 100 thousand and 1 million). The raw
limit is 256 look-ups in a dict of the same keys, which has no holders in it. The peer is
`dynamo.llm.RadixTree` of ai-dynamo-runtime, in-process, at both sizes: it is filled by JSON events.
"""

from __future__ import annotations

import importlib
import json
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import harness
import numpy as np

from kvfabric.events.index import FleetIndex
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.types import BlockKey

PROMPT_BLOCKS = 256
NUM_ENGINES = 8
TAG = b"name-tag"
_ROUNDS = 300


def prompt(number: int) -> bytes:
    """Keys of one prompt, 8 bytes each."""
    return np.random.default_rng(number).bytes(8 * PROMPT_BLOCKS)


def filled(num_blocks: int) -> FleetIndex:
    """An index that heard of so many blocks. It is not told beforehand how many will come."""
    index = FleetIndex(capacity=1 << 16)
    for first in range(0, num_blocks // PROMPT_BLOCKS, 32):
        numbers = range(first, min(first + 32, num_blocks // PROMPT_BLOCKS))
        runs = [
            pb.Run(
                kind=pb.STORED,
                tier=pb.HBM,
                namespace_tag=TAG,
                keys=prompt(number),
                engine=bytes([number % NUM_ENGINES]) * 16,
            )
            for number in numbers
        ]
        index.apply("node", pb.EventBatch(runs=runs))
    return index


def block_keys(number: int) -> list[BlockKey]:
    keys = prompt(number)
    return [BlockKey(keys[i : i + 8].ljust(32, b"\0")) for i in range(0, len(keys), 8)]


def median_us(ask: Callable[[int], object], num_prompts: int) -> float:
    """Of asking for prompts spread over all that are there."""
    taken = []
    for turn in range(_ROUNDS):
        began = time.perf_counter()
        ask(turn * 7919 % num_prompts)
        taken.append((time.perf_counter() - began) * 1e6)
    return harness.median(taken)


def asked(keys_of: Callable[[int], Any], num_prompts: int) -> dict[int, Any]:
    return {n: keys_of(n) for n in {turn * 7919 % num_prompts for turn in range(_ROUNDS)}}


def measure_ours(num_blocks: int) -> dict[str, float]:
    num_prompts = num_blocks // PROMPT_BLOCKS
    index = filled(num_blocks)
    keys = asked(block_keys, num_prompts)
    for number in list(keys)[:20]:
        [present] = index.match(TAG, keys[number]).values()
        assert present.all()
    statistics = index.statistics()
    return {
        "num_blocks": statistics.num_blocks,
        "match_us": median_us(lambda n: index.match(TAG, keys[n]), num_prompts),
        "bytes_per_block": statistics.num_bytes / statistics.num_blocks,
    }


def measure_dict(num_blocks: int) -> float:
    num_prompts = num_blocks // PROMPT_BLOCKS
    table = dict.fromkeys(
        key
        for number in range(num_prompts)
        for key in np.frombuffer(prompt(number), "<u8").tolist()
    )
    keys = asked(lambda n: np.frombuffer(prompt(n), "<u8").tolist(), num_prompts)
    return median_us(lambda n: [key in table for key in keys[n]], num_prompts)


def measure_peer(sizes: Sequence[int]) -> list[dict[str, float]]:
    """At each size, the smallest first. Empty where the peer is not installed."""
    try:
        dynamo = importlib.import_module("dynamo.llm")
    except ImportError:
        print("dynamo.llm is not there (make .venv-routers): without the peer", flush=True)
        return []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tree, rows, filled_to = dynamo.RadixTree(), [], 0
    for size in sizes:
        num_prompts = size // PROMPT_BLOCKS
        for number in range(filled_to, num_prompts):
            tree.apply_event(number % NUM_ENGINES, _event(number))
        filled_to = num_prompts
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        hashes = asked(lambda n: np.frombuffer(prompt(n), "<u8").tolist(), num_prompts)
        found: Sequence[int] = list(tree.find_matches(next(iter(hashes.values()))).scores.values())
        assert found == [PROMPT_BLOCKS]
        match_us = median_us(partial(_find, tree, hashes), num_prompts)
        rows.append(
            {
                "num_blocks": num_prompts * PROMPT_BLOCKS,
                "match_us": match_us,
                "bytes_per_block": grown / (num_prompts * PROMPT_BLOCKS),
            }
        )
    return rows


def _find(tree: Any, hashes: dict[int, Any], number: int) -> object:
    return tree.find_matches(hashes[number])


def _event(number: int) -> bytes:
    hashes = np.frombuffer(prompt(number), "<u8").tolist()
    blocks = [{"block_hash": h, "tokens_hash": h} for h in hashes]
    stored = {"parent_hash": None, "blocks": blocks}
    return json.dumps({"event_id": number, "data": {"stored": stored}, "dp_rank": 0}).encode()


def main() -> None:
    args = harness.parse_arguments(__doc__ or "")
    small, large = (100_000, 1_000_000) if args.quick else (1_000_000, 10_000_000)
    # The peer first: its memory is the growth of the process.
    peer = measure_peer((small, large))
    ours, ours_large = measure_ours(small), measure_ours(large)
    limit_us, limit_large_us = measure_dict(small), measure_dict(large)
    figures = {
        "match_us": ours["match_us"],
        "match_us_at_ten_times": ours_large["match_us"],
        "match_at_ten_times_over_once": ours_large["match_us"] / ours["match_us"],
        "match_over_dict": ours["match_us"] / limit_us,
        "match_over_dict_at_ten_times": ours_large["match_us"] / limit_large_us,
        "index_bytes_per_block": max(ours["bytes_per_block"], ours_large["bytes_per_block"]),
    }
    if peer:
        for name, own, other in (("", ours, peer[0]), ("_at_ten_times", ours_large, peer[1])):
            figures[f"match_over_radix_tree{name}"] = own["match_us"] / other["match_us"]
            figures[f"bytes_over_radix_tree{name}"] = (
                own["bytes_per_block"] / other["bytes_per_block"]
            )
    rows = {
        "ours": [ours, ours_large],
        "radix_tree": peer,
        "dict_us": [limit_us, limit_large_us],
    }
    print(json.dumps(rows), flush=True)
    harness.report("index", args, figures, rows)


if __name__ == "__main__":
    main()
