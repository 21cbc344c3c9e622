"""The demo's slice: cut by the rule from the committed log, and turned into prompts."""

from __future__ import annotations

import gzip
from collections import Counter
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest

from kvfabric import tokenizer
from kvfabric.demo import slice as demo_slice
from kvfabric.demo.slice import SliceRequest

TRACE = Path(__file__).parents[2] / "benchmarks" / "traces" / "mooncake_conversation.jsonl.gz"


@pytest.fixture(scope="module")
def recut() -> list[SliceRequest]:
    with TRACE.open("rb") as file:
        return demo_slice.cut(demo_slice.read_trace(file))


@pytest.mark.slow
def test_the_packaged_slice_is_what_the_rule_cuts_from_the_log(recut: list[SliceRequest]) -> None:
    """No hand-picking: the committed file is the rule's output, byte for byte once unpacked."""
    packaged = resources.files("kvfabric.demo").joinpath("slice.jsonl.gz").read_bytes()
    assert gzip.decompress(packaged) == gzip.decompress(demo_slice.dump(recut))
    assert demo_slice.load() == recut


def test_one_request_more_or_less_is_another_file(recut: list[SliceRequest]) -> None:
    """Control of the comparison above."""
    packaged = resources.files("kvfabric.demo").joinpath("slice.jsonl.gz").read_bytes()
    assert gzip.decompress(packaged) != gzip.decompress(demo_slice.dump(recut[1:]))


def test_groups_are_whole_small_and_in_order_of_arrival() -> None:
    """Groups of 3 to 8 requests with the same first two blocks, none above 32 blocks, about 80 requests."""
    requests = demo_slice.load()
    assert 80 <= len(requests) < 88
    heads: dict[int, set[tuple[int, ...]]] = {}
    for request in requests:
        heads.setdefault(request.group, set()).add(request.blocks[:2])
        assert 2 <= len(request.blocks) <= 32
    assert list(heads) == sorted(heads)
    assert all(len(head) == 1 for head in heads.values())
    sizes = Counter(request.group for request in requests)
    assert all(3 <= size <= 8 for size in sizes.values())
    gaps = [b.arrival_ms - a.arrival_ms for a, b in pairwise(requests)]
    assert min(gaps) >= 0
    assert max(gaps) <= 3_000


def test_groups_outside_the_rule_are_left_out() -> None:
    """Too few, too many, too long or without a second block: not in the slice."""
    rows = [{"timestamp": 1000 * i, "hash_ids": [0, 1, 10 + i]} for i in range(3)]  # fits
    rows += [{"timestamp": 9000, "hash_ids": [0, 2, 20 + i]} for i in range(2)]  # too few
    rows += [{"timestamp": 9000, "hash_ids": [0, 3, 30 + i]} for i in range(9)]  # too many
    rows += [{"timestamp": 9000, "hash_ids": [0, 4, *range(40, 72)]} for _ in range(3)]  # too long
    rows += [{"timestamp": 9000, "hash_ids": [0]} for _ in range(4)]  # no second block
    rows += [{"timestamp": 90_000 + i, "hash_ids": [0, 5, 80 + i]} for i in range(4)]  # fits
    requests = demo_slice.cut(rows)
    assert [request.group for request in requests] == [0, 0, 0, 1, 1, 1, 1]
    assert [r.arrival_ms for r in requests] == [0, 1000, 2000, 5000, 5001, 5002, 5003]


def test_tenants_own_whole_groups_round_robin() -> None:
    """Group 0 is the first tenant's, group 3 the first tenant's again."""
    requests = demo_slice.load()
    owners = {request.group: request.tenant for request in requests}
    assert [owners[group] for group in range(6)] == list(demo_slice.TENANTS) * 2


def test_the_short_demo_takes_the_first_groups_whole() -> None:
    """`first_groups` keeps whole groups and cuts the gaps that leaving others out made."""
    requests = demo_slice.load()
    kept = demo_slice.first_groups(requests, 4)
    assert Counter(r.group for r in kept) == {
        group: size for group, size in Counter(r.group for r in requests).items() if group < 4
    }
    assert max(b.arrival_ms - a.arrival_ms for a, b in pairwise(kept)) <= 3_000


def test_a_block_of_the_log_is_a_fabric_block_of_byte_tokens() -> None:
    """16 tokens, the same every time, another for another id, each standing for a byte."""
    tokens = demo_slice.block_tokens(7)
    assert tokens == demo_slice.block_tokens(7)
    assert tokens != demo_slice.block_tokens(8)
    assert len(tokens) == demo_slice.BLOCK_TOKENS
    assert all(tokenizer.FIRST_BYTE_ID <= token < tokenizer.NUM_IDS for token in tokens)


def test_a_prompt_is_first_block_template_other_blocks_tail() -> None:
    """The template fills two fabric blocks exactly and the tail lies behind the last full block."""
    template = tokenizer.encode(demo_slice.TEMPLATE_TEXT)
    assert len(template) == 2 * demo_slice.BLOCK_TOKENS
    tokens = demo_slice.prompt([0, 5, 6])
    blocks = [demo_slice.block_tokens(block) for block in (0, 5, 6)]
    assert tokens == [*blocks[0], *template, *blocks[1], *blocks[2], *tokens[80:]]
    assert 0 < len(tokens[80:]) < demo_slice.BLOCK_TOKENS
    bare = demo_slice.prompt([5, 6], template=False)
    assert bare == [*blocks[1], *blocks[2], *tokens[80:]]
