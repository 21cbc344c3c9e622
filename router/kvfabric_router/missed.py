"""Why a request reused less than it could have: one `MissReason`, of its first missing block. Pure."""

from __future__ import annotations

from kvfabric.types import MissReason
from kvfabric_router.decision import Decision

_NOT_THERE = frozenset({MissReason.NONE, MissReason.ABSENT})


def why_missed(decision: Decision, told: MissReason | None = None) -> MissReason:
    """NONE if all that may be reused was, or if the engine has not answered yet.

    `told`: by the engine's node, of its lookup. Who came later knows better: what the engine says of
    fetching goes first, then what the node said. Where neither had the block, the router may know that the
    prompt drifted or that engines with another layout have it.
    """
    outcome = decision.outcome
    if decision.reason:
        known = decision.reason == MissReason.NO_EPOCH_LEASE
        return MissReason.NO_EPOCH_LEASE if known else MissReason.NO_HANDLE
    if decision.no_read:
        return MissReason.NO_READ
    if outcome is None:
        return MissReason.NONE
    if outcome.reused_tokens >= decision.reusable_tokens:
        return MissReason.WITHDRAWN if decision.is_cut else MissReason.NONE
    said = outcome.miss
    if said in _NOT_THERE and told is not None:
        said = told
    if said not in _NOT_THERE:
        return said
    if decision.drift is not None:
        return MissReason.DRIFTED
    if _is_elsewhere_in_another_layout(decision, outcome.reused_tokens):
        return MissReason.OTHER_LAYOUT
    return MissReason.ABSENT


def _is_elsewhere_in_another_layout(decision: Decision, reused_tokens: int) -> bool:
    """Whether engines whose KV is laid out differently have more of the prompt, and none like ours has."""
    chosen = decision.ranked[0].candidate.engine.model
    others = [r.candidate for r in decision.ranked if r.candidate.reuse.tokens > reused_tokens]
    layouts = {c.engine.model.layout_fingerprint for c in others if c.engine.model is not None}
    return bool(layouts) and chosen is not None and chosen.layout_fingerprint not in layouts
