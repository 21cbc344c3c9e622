"""A choice and what became of it: what is explained, counted and kept. Pure; holds nothing of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvfabric.types import TenantId
from kvfabric_router.policy import Ranked
from kvfabric_router.rates import Work


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the engine reported afterwards. `ttft_ms` from arrival; None if the answer came in one piece."""

    prompt_tokens: int
    reused: Work
    ttft_ms: float | None


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a call goes and why: `ranked[0]` is the choice. Holds nothing of the prompt.

    `reason`: why nothing may be reused; empty if it may.
    """

    tenant: TenantId
    ranked: tuple[Ranked, ...]
    reason: str
    outcome: Outcome | None = None

    @property
    def selected_tokens(self) -> int:
        """Reuse that was predicted of the chosen engine."""
        return self.ranked[0].candidate.reuse.tokens

    @property
    def reachable_tokens(self) -> int:
        """Reuse at the engine that has most of the prompt."""
        return max(ranked.candidate.reuse.tokens for ranked in self.ranked)

    @property
    def regret_tokens(self) -> int:
        """Reuse given up for a shorter wait, this request's or others'."""
        return self.reachable_tokens - self.selected_tokens

    @property
    def regret_ms(self) -> float:
        """How much sooner its first token was expected elsewhere: given up for others."""
        soonest = min(ranked.terms.first_token for ranked in self.ranked)
        return self.ranked[0].terms.first_token - soonest


def explain(decision: Decision) -> dict[str, Any]:
    """A decision as JSON: each candidate with its reuse in tokens and its cost terms in milliseconds."""
    outcome = decision.outcome
    return {
        "reason": decision.reason,
        "reachable_tokens": decision.reachable_tokens,
        "selected_tokens": decision.selected_tokens,
        "regret_tokens": decision.regret_tokens,
        "regret_ms": round(decision.regret_ms, 3),
        "actual": outcome
        and {
            "prompt_tokens": outcome.prompt_tokens,
            "reuse_tokens": {
                "hbm": outcome.reused.hbm,
                "host": outcome.reused.host,
                "ssd": outcome.reused.ssd,
            },
            "ttft_ms": outcome.ttft_ms and round(outcome.ttft_ms, 3),
        },
        "candidates": [
            {
                "engine": ranked.candidate.engine.engine_id,
                "prompt_tokens": ranked.candidate.prompt_tokens,
                "reuse_tokens": {
                    "hbm": ranked.candidate.reuse.hbm_tokens,
                    "host": ranked.candidate.reuse.host_tokens,
                    "ssd": ranked.candidate.reuse.ssd_tokens,
                    "is_approximate": ranked.candidate.reuse.is_approximate,
                },
                "cost_ms": {
                    "wait": round(ranked.terms.wait, 3),
                    "fetch": round(ranked.terms.fetch, 3),
                    "prefill": round(ranked.terms.prefill, 3),
                    "decode": round(ranked.terms.decode, 3),
                    "others": round(ranked.terms.others, 3),
                    "total": round(ranked.terms.total, 3),
                },
            }
            for ranked in decision.ranked
        ],
    }
