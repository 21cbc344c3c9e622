"""A decision in words and numbers: what `GET /v1/explain/{request id}` answers. Pure.

Tokens and milliseconds only: nothing of the prompt, and nothing of any other request.
"""

from __future__ import annotations

from typing import Any

from kvfabric.types import MissReason
from kvfabric_router.decision import Decision
from kvfabric_router.missed import why_missed
from kvfabric_router.nodes import Told
from kvfabric_router.policy import TIE_SHARE, Candidate, CostTerms, Ranked

_TERMS = ("wait", "fetch", "prefill", "decode", "others", "handoff", "stall")
_LEAST_MS = 0.0005


def explain(request_id: str, decision: Decision, told: Told | None) -> dict[str, Any]:
    """`told`: what the chosen engine's node answered to its lookup, if it still knows."""
    outcome, chosen = decision.outcome, decision.ranked[0]
    miss = why_missed(decision, told.reason if told is not None else None)
    return {
        "request_id": request_id,
        "made_at": round(decision.made_at, 3),
        "engine": chosen.candidate.engine.engine_id,
        "prefill_engine": _prefill_engine(chosen.candidate),
        "policy": decision.policy,
        "waited_ms": round(decision.waited_ms, 3),
        "reason": decision.reason,
        "miss": {
            "reason": miss.value,
            "first_missing_token": _first_missing(decision, miss),
            "drift": decision.drift
            and {
                "template": decision.drift.template,
                "version": decision.drift.version,
                "segment": decision.drift.segment or None,
                "token": decision.drift.token,
            },
        },
        "node": told
        and {
            "asked_blocks": told.num_asked,
            "host_blocks": told.num_host,
            "ssd_blocks": told.num_ssd,
            "peer_blocks": told.num_peer,
            "reason": told.reason.value,
        },
        "reusable_tokens": decision.reusable_tokens,
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
                "peer": outcome.reused.peer,
            },
            "ttft_ms": outcome.ttft_ms and round(outcome.ttft_ms, 3),
            "miss_reason": outcome.miss.value,
        },
        "candidates": [
            _candidate(ranked, None if ranked is chosen else _why_not(decision, ranked))
            for ranked in decision.ranked
        ],
        "left_out": dict(decision.left_out),
    }


def _first_missing(decision: Decision, miss: MissReason) -> int | None:
    if miss is MissReason.NONE:
        return None
    return decision.outcome.reused_tokens if decision.outcome is not None else 0


def _candidate(ranked: Ranked, why_not: str | None) -> dict[str, Any]:
    candidate, engine = ranked.candidate, ranked.candidate.engine
    reuse = candidate.computing.reuse
    return {
        "engine": engine.engine_id,
        "prefill_engine": _prefill_engine(candidate),
        "why_not": why_not,
        "prompt_tokens": candidate.prompt_tokens,
        "reuse_tokens": {
            "hbm": reuse.hbm_tokens,
            "host": reuse.host_tokens,
            "ssd": reuse.ssd_tokens,
            "peer": reuse.peer_tokens,
            "is_approximate": reuse.is_approximate,
        },
        "cost_ms": {
            **{term: round(getattr(ranked.terms, term), 3) for term in _TERMS},
            "total": round(ranked.terms.total, 3),
        },
        "background_ms": round(engine.background_ms, 3),
        "fetch_ms": {
            tier: round(ms, 3) for tier, ms in engine.rates.fetch_by_tier(candidate.work).items()
        },
        "peer": reuse.link
        and {
            "node": reuse.peer,
            "link": reuse.link.kind,
            "bytes_per_s": round(reuse.link.bytes_per_ms * 1e3),
            "basis": reuse.link.basis,
        },
    }


def _prefill_engine(candidate: Candidate) -> str | None:
    """Who computes the prompt, if another does."""
    return candidate.prefill.engine.engine_id if candidate.prefill is not None else None


def _why_not(decision: Decision, other: Ranked) -> str:
    chosen = decision.ranked[0]
    if decision.policy == "round_robin":
        return "it was not its turn"
    if decision.policy == "least_loaded":
        ours, its = (
            r.candidate.engine.num_waiting + r.candidate.engine.num_decoding
            for r in (chosen, other)
        )
        return "as many requests there: the lot fell" if ours == its else f"{its} requests there"
    dearer = other.terms.total - chosen.terms.total
    if other.terms.total <= min(r.terms.total for r in decision.ranked) * (1 + TIE_SHARE):
        return "as cheap: the lot fell"
    return f"{dearer:.1f} ms dearer: {_differences(chosen.terms, other.terms)}"


def _differences(chosen: CostTerms, other: CostTerms) -> str:
    """The terms that differ, largest first."""
    by = {term: getattr(other, term) - getattr(chosen, term) for term in _TERMS}
    ordered = sorted(by.items(), key=lambda item: -abs(item[1]))
    return ", ".join(f"{term} {ms:+.1f}" for term, ms in ordered if abs(ms) > _LEAST_MS)
