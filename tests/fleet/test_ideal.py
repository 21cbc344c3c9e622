"""The ideal that the demo is measured against."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from kvfabric.demo import ideal
from kvfabric.demo.slice import TENANTS, SliceRequest, load, prompt

TRACES = Path(__file__).parents[2] / "benchmarks" / "traces"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "field", "num_requests", "share"),
    [
        ("mooncake_conversation", "hash_ids", 12_031, ideal.WHOLE_TRACE_SHARE),
        ("rtp_llm_online", "bh", 8_332, 0.2231),
    ],
)
def test_whole_traces(name: str, field: str, num_requests: int, share: float) -> None:
    """36.6 % and 22.3 % of the blocks of the committed logs, all requests of them."""
    with gzip.open(TRACES / f"{name}.jsonl.gz") as lines:
        prompts = [json.loads(line)[field] for line in lines]
    assert len(prompts) == num_requests
    assert ideal.reuse_share(prompts) == pytest.approx(share, abs=5e-5)


def test_only_contiguous_prefixes_count() -> None:
    """A block is reusable only when everything before it is the same too."""
    seen = ideal.PrefixSet()
    assert seen.add("abc") == 0
    assert seen.add("abd") == 2
    assert seen.add("xbc") == 0
    assert seen.add("abdc") == 3
    assert ideal.reuse_share(["ab", "ab", "b"]) == 2 / 5
    assert ideal.reuse_share([]) == 0.0


def test_only_full_blocks_count() -> None:
    """The tail behind the last full block is never reusable."""
    assert [len(block) for block in ideal.full_blocks(range(16 * 2 + 5))] == [16, 16]


def test_tenants_share_nothing() -> None:
    """The same prompt of another tenant's group finds nothing; of the same tenant's, all of it."""
    requests = [SliceRequest(0, group, (0, 1, 2)) for group in (0, 1, 0, len(TENANTS))]
    whole = 16 * 5
    assert ideal.reusable_tokens(requests) == [0, 0, whole, whole]


def test_whoever_comes_first_leaves_it_to_the_other() -> None:
    """In whatever order they are answered; of another tenant's nothing."""
    requests = [SliceRequest(0, group, blocks) for group, blocks in ((0, (0, 1)), (1, (0, 1)))]
    requests.append(SliceRequest(0, 0, (0, 1, 2)))
    first, other, second = ideal.shared_tokens(requests)
    assert first == second == 16 * (len(prompt((0, 1))) // 16) > 0
    assert other == 0


def test_the_slice_leaves_room_for_reuse() -> None:
    """What the demo is gated on: two thirds of the prompt tokens of the slice."""
    requests = load()
    tokens = sum(len(prompt(request.blocks)) for request in requests)
    assert (tokens, sum(ideal.reusable_tokens(requests))) == (22_020, 15_232)
