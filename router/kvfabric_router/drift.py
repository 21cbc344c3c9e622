"""Prefix drift: a prompt misses although the same template hit before, because what it starts with changed.

Of each tenant and template the tokens are kept that hit last, from the prompt's start to the end of the
template's text. A later prompt of that tenant that uses the template, or starts as that one did into its
text, and then reuses nothing from the first token on that differs, has drifted there: a date before the
template, a changed line in it, another version. Tokens stay in this process's memory, bounded; what is told
is the place. Pure, sync.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvfabric.types import Segment, TenantId

KEPT = 512
MAX_TOKENS = 16_384
"""Of a prompt; a template that ends later is not watched."""


@dataclass(frozen=True, slots=True)
class Drift:
    """`token`: the first that differs from the last prompt in which `template` was reused. `segment`: the
    template whose text holds it there; empty if it stands before any.
    """

    template: str
    version: str
    segment: str
    token: int


@dataclass(frozen=True, slots=True)
class _Hit:
    version: str
    segments: tuple[Segment, ...]
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Seen:
    """A prompt that was answered. `ends`: where the text of each of `segments` ends, in tokens."""

    tokens: Sequence[int]
    segments: tuple[Segment, ...]
    ends: tuple[int, ...]
    block_tokens: int
    reused_tokens: int


class DriftWatch:
    """See the module."""

    def __init__(self, *, max_kept: int = KEPT) -> None:
        self._max_kept = max_kept
        self._hits: OrderedDict[TenantId, OrderedDict[str, _Hit]] = OrderedDict()
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def judge(self, tenant: TenantId, seen: Seen) -> Drift | None:
        """Where a prompt drifted from one that hit; what hit of it is remembered."""
        drift = _find(self._hits.get(tenant, OrderedDict()), seen)
        for segment, end in zip(seen.segments, seen.ends, strict=True):
            whole = end // seen.block_tokens * seen.block_tokens
            if segment.first_token < whole <= seen.reused_tokens and end <= MAX_TOKENS:
                self._remember(tenant, segment, seen, end)
        return drift

    def _remember(self, tenant: TenantId, segment: Segment, seen: Seen, end: int) -> None:
        mine = self._hits.setdefault(tenant, OrderedDict())
        self._hits.move_to_end(tenant)
        self._num += segment.template not in mine
        kept = tuple(one for one in seen.segments if one.first_token <= segment.first_token)
        mine[segment.template] = _Hit(segment.version, kept, seen.tokens[:end])
        mine.move_to_end(segment.template)
        while self._num > self._max_kept:
            oldest = next(iter(self._hits))
            self._hits[oldest].popitem(last=False)
            self._num -= 1
            if not self._hits[oldest]:
                del self._hits[oldest]


def _find(known: Mapping[str, _Hit], seen: Seen) -> Drift | None:
    used = {segment.template for segment in seen.segments}
    found: Drift | None = None
    for template, hit in known.items():
        common = _common(hit.tokens, seen.tokens)
        if common == len(hit.tokens):
            continue
        is_same = template in used or common > hit.segments[-1].first_token
        within = [one for one in hit.segments if one.first_token <= common]
        # Text that is no template's any more changes the key of the block where the template began. Blocks
        # before that one that miss too miss for another reason.
        first = within[-1].first_token if within else common
        size, missing = seen.block_tokens, seen.reused_tokens // seen.block_tokens
        if is_same and first // size <= missing <= common // size:
            segment = within[-1].template if within else ""
            drift = Drift(template, hit.version, segment, common)
            found = drift if found is None or drift.token > found.token else found
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
