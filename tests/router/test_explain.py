"""One reason for each miss, whoever knows it, and why the other engines were not chosen."""

from __future__ import annotations

import msgspec
import pytest
from kvfabric_router import policy
from kvfabric_router.decision import Decision, Outcome
from kvfabric_router.drift import Drift
from kvfabric_router.explain import explain
from kvfabric_router.explain_command import lines
from kvfabric_router.identity import ModelIdentity
from kvfabric_router.missed import why_missed
from kvfabric_router.nodes import Told
from kvfabric_router.policy import Candidate, EngineView, Reuse
from kvfabric_router.rates import Work

from kvfabric.types import MissReason, TenantId

LAYOUTS = {"a": bytes(32), "b": bytes([1]) * 32}


def candidate(name: str, *, layout: str = "a", hbm: int = 0, waiting_ms: float = 0.0) -> Candidate:
    engine = EngineView(
        endpoint=f"http://{name}",
        engine_id=name,
        model_name="m",
        model=ModelIdentity("r", LAYOUTS[layout], 16),
        waiting_ms=waiting_ms,
    )
    return Candidate(engine, 100, Reuse(hbm_tokens=hbm))


def decision(*candidates: Candidate, **changes: object) -> Decision:
    ranked = policy.choose("cost", candidates, 1)
    made = Decision(TenantId("t"), ranked, "", reusable_tokens=96)
    return msgspec.structs.replace(made, **changes)


def outcome(reused: int, miss: MissReason = MissReason.NONE) -> Outcome:
    return Outcome(100, Work(100 - reused, hbm=reused), 5.0, miss)


ALONE = candidate("e0")
DRIFT = Drift("helper", "1", "helper", 20)


@pytest.mark.parametrize(
    ("made", "told", "expected"),
    [
        (decision(ALONE), None, "none"),  # not answered yet
        (decision(ALONE, outcome=outcome(96)), MissReason.ABSENT, "none"),
        (decision(ALONE, outcome=outcome(16)), None, "absent"),
        (decision(ALONE, outcome=outcome(16)), MissReason.EVICTED, "evicted"),
        (decision(ALONE, outcome=outcome(16, MissReason.TOO_SLOW)), MissReason.NONE, "too_slow"),
        (decision(ALONE, outcome=outcome(16, MissReason.ABSENT), drift=DRIFT), None, "drifted"),
        (decision(ALONE, outcome=outcome(16), drift=DRIFT), MissReason.OVER_QUOTA, "over_quota"),
        (decision(ALONE, outcome=outcome(96), is_cut=True), None, "withdrawn"),
        (decision(ALONE, reason="no_epoch_lease"), None, "no_epoch_lease"),
        (decision(ALONE, reason="opaque_prompt"), None, "no_handle"),
        (decision(ALONE, no_read=True, outcome=outcome(0)), None, "no_read"),
    ],
)
def test_one_reason(made: Decision, told: MissReason | None, expected: str) -> None:
    assert why_missed(made, told) == expected


def test_what_only_engines_of_another_layout_have() -> None:
    ours = candidate("e0", waiting_ms=0.0)
    theirs = candidate("e1", layout="b", hbm=96, waiting_ms=1e6)
    assert why_missed(decision(ours, theirs, outcome=outcome(0))) is MissReason.OTHER_LAYOUT
    same = candidate("e2", hbm=96, waiting_ms=1e6)
    assert why_missed(decision(ours, theirs, same, outcome=outcome(0))) is MissReason.ABSENT


def test_every_candidate_is_told_with_why_it_was_not_chosen() -> None:
    made = decision(
        candidate("e0"),
        candidate("e1", hbm=96, waiting_ms=4000.0),
        candidate("e2", waiting_ms=0.0),
        outcome=outcome(16),
        left_out=(("http://e3", "excluded: it failed"),),
    )
    told = explain("req-1", made, Told(6, 1, 0, 2, MissReason.ABSENT))
    chosen, *others = told["candidates"]
    assert chosen["why_not"] is None
    why = {one["engine"]: one["why_not"] for one in others}
    assert why.pop("e1").startswith("39")
    assert list(why.values()) == ["as cheap: the lot fell"]
    assert told["node"] == {
        "asked_blocks": 6,
        "host_blocks": 1,
        "ssd_blocks": 0,
        "peer_blocks": 2,
        "reason": "absent",
    }
    assert told["miss"]["first_missing_token"] == 16
    assert told["regret_tokens"] == 96
    text = "\n".join(lines(told))
    assert "missed from token 16 on: absent" in text
    assert "ms dearer: wait +4000.0" in text
    assert "excluded: it failed" in text


@pytest.mark.parametrize("name", ["cost", "least_loaded", "round_robin"])
def test_a_draw_decides_whatever_the_order_of_the_candidates(name: str) -> None:
    some = [candidate(f"e{number}") for number in range(6)]
    for draw in range(8):
        assert policy.choose(name, some, draw) == policy.choose(name, some[::-1], draw)
    assert len({policy.choose(name, some, draw)[0].candidate.engine for draw in range(32)}) > 3
