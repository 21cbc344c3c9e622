"""How much could be reused at best: one infinite cache, contiguous prefixes. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from kvfabric.demo.slice import BLOCK_TOKENS, SliceRequest, prompt

WHOLE_TRACE_SHARE = 0.3664
"""`reuse_share` of the log that the slice is cut from (it is too large to install; a test computes this)."""


class PrefixSet:
    """Every prefix of blocks seen so far, as a tree: an infinite cache that forgets nothing."""

    def __init__(self) -> None:
        self._children: dict[tuple[int, Hashable], int] = {}

    def add(self, blocks: Iterable[Hashable]) -> int:
        """Record one prompt; returns how many of its leading blocks were there already."""
        node = 0
        reused = 0
        for block in blocks:
            edge = (node, block)
            if edge in self._children:
                reused += 1
            node = self._children.setdefault(edge, len(self._children) + 1)
        return reused


def reuse_share(prompts: Iterable[Sequence[Hashable]]) -> float:
    """Reusable blocks over all blocks of `prompts`, in their order, all of one owner."""
    seen = PrefixSet()
    reused = total = 0
    for blocks in prompts:
        reused += seen.add(blocks)
        total += len(blocks)
    return reused / total if total else 0.0


def full_blocks(token_ids: Sequence[int]) -> list[tuple[int, ...]]:
    """The full fabric blocks of a prompt."""
    whole = len(token_ids) - len(token_ids) % BLOCK_TOKENS
    return [tuple(token_ids[i : i + BLOCK_TOKENS]) for i in range(0, whole, BLOCK_TOKENS)]


def reusable_tokens(requests: Iterable[SliceRequest]) -> list[int]:
    """For each request in order: prompt tokens that its tenant has sent before, in full blocks."""
    seen: dict[str, PrefixSet] = {}
    return [
        BLOCK_TOKENS
        * seen.setdefault(request.tenant, PrefixSet()).add(full_blocks(prompt(request.blocks)))
        for request in requests
    ]


def shared_tokens(requests: Sequence[SliceRequest]) -> list[int]:
    """For each request: prompt tokens that another one of its tenant has too, whichever comes first; under
    load a router may let a later one pass."""
    backwards = reusable_tokens(reversed(requests))[::-1]
    return [max(pair) for pair in zip(reusable_tokens(requests), backwards, strict=True)]
