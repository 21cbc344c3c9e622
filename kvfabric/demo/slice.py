"""The demo's slice of a real request log: the rule that cuts it, its file, and its prompts. Pure but for
reading the packaged file.

The rule, without hand-picking: whole prefix groups (requests with the same first two blocks) of 3 to 8
requests, none of them above 32 blocks, in order of arrival, until there are 80 requests; gaps between
arrivals are cut to 3 s (one tick of the log's clock), and the replay scales all of them to the load it wants.

A block of the log becomes one fabric block of 16 tokens made from its id. A prompt is the log's first
block, the shared template, the request's other blocks, and a short tail: an engine always computes a
prompt's last token, so with the tail every full block can be reused.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib import resources
from itertools import pairwise
from typing import IO, Any

from kvfabric import tokenizer

BLOCK_TOKENS = 16
TEMPLATE_TEXT = "You are a kind, careful helper.\n"
"""The shared template: two fabric blocks as the byte tokenizer reads it."""

TAIL_TEXT = "Go: "
TENANTS = ("amber", "birch", "cedar")

_MIN_GROUP, _MAX_GROUP = 3, 8
_MAX_BLOCKS = 32
_MIN_REQUESTS = 80
_MAX_GAP_MS = 3_000


@dataclass(frozen=True, slots=True)
class SliceRequest:
    """One request. `arrival_ms` counts from the slice's first; `group` from the first group to arrive."""

    arrival_ms: int
    group: int
    blocks: tuple[int, ...]

    @property
    def tenant(self) -> str:
        """Whole groups belong to one tenant, round robin in order of arrival."""
        return TENANTS[self.group % len(TENANTS)]


def read_trace(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Rows of a gzip-compressed trace of JSON lines."""
    with gzip.open(file) as lines:
        for line in lines:
            yield json.loads(line)


def cut(rows: Iterable[Mapping[str, Any]]) -> list[SliceRequest]:
    """Apply the rule to the rows (`timestamp` in ms, `hash_ids`) of the log."""
    ordered = list(rows)
    members: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(ordered):
        if len(row["hash_ids"]) >= 2:
            members.setdefault(tuple(row["hash_ids"][:2]), []).append(index)
    group_of: dict[int, int] = {}
    groups = 0
    for indexes in members.values():  # in order of each group's first arrival
        if len(group_of) >= _MIN_REQUESTS:
            break
        if not _MIN_GROUP <= len(indexes) <= _MAX_GROUP:
            continue
        if any(len(ordered[index]["hash_ids"]) > _MAX_BLOCKS for index in indexes):
            continue
        group_of |= dict.fromkeys(indexes, groups)
        groups += 1
    chosen = sorted(group_of)
    arrivals = _compress([ordered[index]["timestamp"] for index in chosen])
    return [
        SliceRequest(arrival, group_of[index], tuple(ordered[index]["hash_ids"]))
        for arrival, index in zip(arrivals, chosen, strict=True)
    ]


def _compress(timestamps_ms: Sequence[int]) -> list[int]:
    arrivals = [0]
    for earlier, later in pairwise(timestamps_ms):
        arrivals.append(arrivals[-1] + min(later - earlier, _MAX_GAP_MS))
    return arrivals


def dump(requests: Iterable[SliceRequest]) -> bytes:
    """The slice's file: gzip-compressed JSON lines without a time or a name in the header."""
    lines = [
        json.dumps(
            {"arrival_ms": r.arrival_ms, "group": r.group, "hash_ids": r.blocks},
            separators=(",", ":"),
        )
        + "\n"
        for r in requests
    ]
    return gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0)


def load() -> list[SliceRequest]:
    """The slice that is installed with the package."""
    with resources.files("kvfabric.demo").joinpath("slice.jsonl.gz").open("rb") as file:
        return [
            SliceRequest(row["arrival_ms"], row["group"], tuple(row["hash_ids"]))
            for row in read_trace(file)
        ]


def first_groups(requests: Sequence[SliceRequest], num_groups: int) -> list[SliceRequest]:
    """The requests of the first `num_groups` groups, gaps closed again: the short demo."""
    kept = [r for r in requests if r.group < num_groups]
    arrivals = _compress([r.arrival_ms for r in kept])
    return [
        SliceRequest(arrival, r.group, r.blocks) for arrival, r in zip(arrivals, kept, strict=True)
    ]


def block_tokens(block_id: int) -> list[int]:
    """The 16 token ids that stand for a block of the log; each stands for a byte."""
    digest = blake2b(b"kvfabric demo block %d" % block_id, digest_size=BLOCK_TOKENS).digest()
    return tokenizer.encode(digest)


def prompt(blocks: Sequence[int], *, template: bool = True) -> list[int]:
    """Token ids of the prompt of these blocks of the log."""
    head, rest = (blocks[:1], blocks[1:]) if template else (blocks, ())
    tokens = [token for block in head for token in block_tokens(block)]
    if template:
        tokens += tokenizer.encode(TEMPLATE_TEXT)
    tokens += [token for block in rest for token in block_tokens(block)]
    return tokens + tokenizer.encode(TAIL_TEXT)
