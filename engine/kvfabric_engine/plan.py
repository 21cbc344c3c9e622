"""Fetch or recompute: what of a match is loaded, by measured seconds. Pure, but for `Planner`'s memory.

Loading blocks [c, m) and computing the tokens from m on takes, as far as is known,

    load_s + sum over the loaded blocks of bytes / rate of their tier
  + step_s + tokens * token_s + (pairs of a computed token with one that it sees) * pair_s

`choose` takes the m with the least of it: blocks that a slow tier would bring later than they are computed
are left out, and with them all that follows. What came of each choice is recorded and moves the rates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kvfabric.types import UNKNOWN_COST, MissReason, RecomputeCost, TierName

PROBE_BYTES = 64 << 20
"""At most this much is loaded from a tier whose rate nobody measured: it is learnt at a bounded price."""
WEIGHT = 0.25
"""Of the newest observation in a rate."""
FORGIVE = 1.05
"""A tier left out is taken for this much faster at the next choice, so that it is tried again in the end."""
RECORDS = 256
MIN_OBSERVED_TOKENS = 256
"""Shorter prefills say more about launching than about computing."""


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The node leases the first `num_blocks` blocks to us; `tiers` has one name for each. `more`: another
    engine is computing the next ones, and they are worth waiting for."""

    num_blocks: int
    tiers: tuple[TierName, ...]
    reason: MissReason
    more: bool = False

    @property
    def num_here(self) -> int:
        """Leading blocks that are in no other node still."""
        away = TierName.PEER
        return self.tiers.index(away) if away in self.tiers else self.num_blocks


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """Blocks [first, first + num_blocks) of the chain are loaded, what follows is computed."""

    first: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Rates:
    """What loading and computing take here, in seconds. A tier not in `bytes_per_s` was not measured."""

    load_s: float = 0.001  # what a load takes before its first byte
    bytes_per_s: dict[TierName, float] = field(default_factory=dict)
    step_s: float = 0.0  # what a forward takes before its first token
    token_s: float = 0.0
    pair_s: float = 0.0

    def prefill_s(self, start: int, end: int) -> float:
        """Seconds to compute tokens [start, end) on top of `start` that are there."""
        pairs = (end - start) * (end + start) / 2
        return self.step_s + (end - start) * self.token_s + pairs * self.pair_s

    def recompute_cost(self) -> RecomputeCost:
        """For the node, which keeps longest what costs most: the launch of a forward left out."""
        if not self.token_s:
            return UNKNOWN_COST
        return RecomputeCost(us_per_token=self.token_s * 1e6, growth=self.pair_s / self.token_s)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a choice is about. Blocks are `block_tokens` tokens and `block_bytes` bytes each."""

    num_tokens: int
    num_cached: int  # blocks in HBM
    num_usable: int  # blocks that a lookup may use
    block_tokens: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """`estimate_s` of `plan`, and of the better of loading nothing and all (`other_blocks`) instead."""

    plan: FetchPlan
    estimate_s: float
    other_blocks: int
    other_s: float


@dataclass(frozen=True, slots=True)
class Record:
    """A choice and what came of it. `outcome_s`: from the choice to the first token."""

    choice: Choice
    offered_blocks: int
    loaded_blocks: int
    outcome_s: float

    @property
    def regret_s(self) -> float:
        """How much longer it took than the best alternative was estimated to take; below 0: it paid."""
        return self.outcome_s - self.choice.other_s


def plan_fetch(match: PrefixMatch, *, num_cached: int, num_usable: int) -> FetchPlan:
    """Fetch whatever the fabric has beyond `num_cached` blocks in HBM, up to `num_usable` blocks."""
    last = min(match.num_blocks, num_usable)
    return FetchPlan(num_cached, max(0, last - num_cached))


def choose(match: PrefixMatch, prompt: Prompt, rates: Rates, *, may_cut: bool = True) -> Choice:
    """The plan that is over soonest; of equal ones the one that loads most. Or all that is offered."""
    whole = plan_fetch(match, num_cached=prompt.num_cached, num_usable=prompt.num_usable)
    first, count = whole.first, whole.num_blocks
    tiers = match.tiers[first : first + count]
    known = _affordable(tiers, prompt, rates) if may_cut else count
    fastest = max(rates.bytes_per_s.values(), default=float("inf"))
    seconds = [prompt.block_bytes / rates.bytes_per_s.get(tier, fastest) for tier in tiers[:known]]
    loading = np.concatenate([[0.0], rates.load_s + np.cumsum(seconds)])
    start = (first + np.arange(known + 1)) * prompt.block_tokens
    left = prompt.num_tokens - start
    pairs = left * (prompt.num_tokens + start) / 2
    total = loading + rates.step_s + left * rates.token_s + pairs * rates.pair_s
    best = known - int(np.argmin(total[::-1])) if may_cut else count
    # Everything or nothing: a block more or less is the same choice.
    other = min({0, known} - {best}, key=lambda blocks: float(total[blocks]), default=best)
    return Choice(FetchPlan(first, best), float(total[best]), other, float(total[other]))


def _affordable(tiers: Sequence[TierName], prompt: Prompt, rates: Rates) -> int:
    """Leading blocks to consider: few from a tier that was never measured."""
    budget = max(1, PROBE_BYTES // prompt.block_bytes)
    for index, tier in enumerate(tiers):
        budget -= tier not in rates.bytes_per_s
        if budget < 0:
            return index
    return len(tiers)


class Planner:
    """Rates kept up to date, and the last choices with what came of them. For one thread.

    `may_cut` False: everything that the fabric has is fetched; estimates and outcomes are recorded still.
    """

    def __init__(self, rates: Rates, *, may_cut: bool) -> None:
        self.rates = rates
        self.records: deque[Record] = deque(maxlen=RECORDS)
        self._may_cut = may_cut

    def choose(self, match: PrefixMatch, prompt: Prompt) -> Choice:
        """As the function, or everything when nothing may be cut."""
        choice = choose(match, prompt, self.rates, may_cut=self._may_cut)
        stop = choice.plan.first + choice.plan.num_blocks
        if stop < min(match.num_blocks, prompt.num_usable):
            self._forgive(match.tiers[stop])
        return choice

    def loaded(self, tiers: Sequence[TierName], block_bytes: int, seconds: float) -> None:
        """A load of one block a tier name ended after `seconds`. Loads of several tiers teach nothing."""
        kinds = set(tiers)
        moving = seconds - self.rates.load_s
        if len(kinds) != 1 or moving <= 0:
            return
        tier = kinds.pop()
        observed = len(tiers) * block_bytes / moving
        self._set(tier, _mixed(self.rates.bytes_per_s.get(tier, observed), observed))

    def computed(self, start: int, end: int, seconds: float) -> None:
        """Tokens [start, end) were computed alone in `seconds`: all of prefill is that much slower."""
        expected = self.rates.prefill_s(start, end)
        if end - start < MIN_OBSERVED_TOKENS or expected <= 0:
            return
        factor = _mixed(1.0, seconds / expected)
        r = self.rates
        self.rates = replace(
            r, step_s=r.step_s * factor, token_s=r.token_s * factor, pair_s=r.pair_s * factor
        )

    def record(
        self, choice: Choice, *, offered_blocks: int, loaded_blocks: int, outcome_s: float
    ) -> None:
        self.records.append(Record(choice, offered_blocks, loaded_blocks, outcome_s))

    def _forgive(self, tier: TierName) -> None:
        if tier in self.rates.bytes_per_s:
            self._set(tier, self.rates.bytes_per_s[tier] * FORGIVE)

    def _set(self, tier: TierName, bytes_per_s: float) -> None:
        self.rates = replace(self.rates, bytes_per_s={**self.rates.bytes_per_s, tier: bytes_per_s})


def _mixed(known: float, observed: float) -> float:
    return known + WEIGHT * (observed - known)


def fit_prefill(rates: Rates, observations: Sequence[tuple[int, float]]) -> Rates:
    """`rates` with prefill from (tokens from 0, seconds) of at least three lengths. Nothing below zero."""
    lengths = np.array([n for n, _ in observations], dtype=float)
    columns = np.stack([np.ones_like(lengths), lengths, lengths**2 / 2], axis=1)
    seconds = np.array([s for _, s in observations])
    weights = 1 / seconds  # relative errors count alike for short and long prompts
    found = np.linalg.lstsq(columns * weights[:, None], seconds * weights, rcond=None)[0]
    step_s, token_s, pair_s = np.maximum(found, 0.0).tolist()
    return replace(rates, step_s=step_s, token_s=token_s, pair_s=pair_s)
