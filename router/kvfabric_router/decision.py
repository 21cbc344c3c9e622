"""A choice and what became of it: what is explained, counted and kept. Pure; holds nothing of a prompt."""

from __future__ import annotations

import msgspec

from kvfabric.types import MissReason, TenantId
from kvfabric_router.drift import Drift
from kvfabric_router.policy import Ranked
from kvfabric_router.rates import Work


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """What the engine reported afterwards. `ttft_ms` from arrival; None if the answer came in one piece.

    `miss`: why its first missing block came from nowhere; NONE too if it does not say.
    """

    prompt_tokens: int
    reused: Work
    ttft_ms: float | None
    miss: MissReason = MissReason.NONE
    completion_tokens: int = 0

    @property
    def reused_tokens(self) -> int:
        return self.reused.reused


class Decision(msgspec.Struct, frozen=True, gc=False):
    """Where a call goes and why: `ranked[0]` is the choice. Holds nothing of the prompt.

    `reason`: why nothing may be reused; empty if it may. `policy` with its `draw` (the seed of its ties, or
    whose turn it was) makes the same choice again. `reusable_tokens` in whole blocks; `is_cut`: the text of
    a withdrawn template ends them. `left_out`: engines that were no candidates, and why.
    """

    tenant: TenantId
    ranked: tuple[Ranked, ...]
    reason: str
    policy: str = "cost"
    draw: int = 0
    made_at: float = 0.0  # Unix seconds
    waited_ms: float = 0.0  # at the router, for an engine with room
    reusable_tokens: int = 0
    is_cut: bool = False
    no_read: bool = False
    left_out: tuple[tuple[str, str], ...] = ()
    outcome: Outcome | None = None
    drift: Drift | None = None

    @property
    def selected_tokens(self) -> int:
        """Reuse that was predicted of the engine that computes the prompt."""
        return self.ranked[0].candidate.computing.reuse.tokens

    @property
    def reachable_tokens(self) -> int:
        """Reuse at the engine that has most of the prompt."""
        return max(ranked.candidate.computing.reuse.tokens for ranked in self.ranked)

    @property
    def regret_tokens(self) -> int:
        """Reuse given up for a shorter wait, this request's or others'."""
        return self.reachable_tokens - self.selected_tokens

    @property
    def regret_ms(self) -> float:
        """How much sooner its first token was expected elsewhere: given up for others."""
        soonest = min(ranked.terms.first_token for ranked in self.ranked)
        return self.ranked[0].terms.first_token - soonest
