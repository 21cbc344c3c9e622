"""What it costs to compute a block again: milliseconds per byte, in levels of half a power of two. Pure.

Prefill of a token is a constant, for the weights, and attention, which grows with the tokens before it. So
of two blocks of one model the deeper costs more, and of two models the one with more compute per byte of
KV. Levels rather than figures, because eviction keeps a queue for each.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import NamedTuple

from kvfabric.types import RecomputeCost

NEUTRAL_NS_PER_BYTE = 0.24
"""Of a model whose engine says nothing: an 8B model on an H100 takes 33 us for a token's 144 KiB. Without
growth: every byte of it is worth the same."""

MAX_LEVEL = 15
_STEPS = 8
"""Levels that depth adds at most: sixteen times the cost."""


MIN_GROWTH = 1e-9
"""Less is none: no prompt is long enough to show it."""


class CostLevels(NamedTuple):
    """Of the blocks of one layout: `base`, and one more from each block index of `bounds` on."""

    base: int
    bounds: tuple[int, ...]

    def at(self, block_index: int) -> int:
        return self.base + bisect_right(self.bounds, block_index)


NEUTRAL = CostLevels(0, ())


def cost_levels(cost: RecomputeCost, block_tokens: int, block_bytes: int) -> CostLevels:
    """Two levels are a factor of two; level 0 is the neutral cost at depth 0."""
    base = 0
    if cost.us_per_token > 0:
        ns_per_byte = cost.us_per_token * 1000 * block_tokens / block_bytes
        base = round(2 * math.log2(ns_per_byte / NEUTRAL_NS_PER_BYTE))
    if cost.growth < MIN_GROWTH:
        return CostLevels(_within(base), ())
    tokens = [(2 ** (step / 2) - 1) / cost.growth for step in range(1, _STEPS + 1)]
    return CostLevels(_within(base), tuple(math.ceil(at / block_tokens) for at in tokens))


def _within(level: int) -> int:
    return max(-MAX_LEVEL, min(MAX_LEVEL, level))
