"""Each check of the demo holds on good results and fails on the same results tampered with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from kvfabric.demo import checks
from kvfabric.demo.checks import AuditLine, Check
from kvfabric.demo.replay import Answer, Job, arrivals_at_rate, merge


def _answer(index: int, **changes: object) -> Answer:
    good = Answer(
        job=Job(index, "amber", (3, 4, 5)),
        status=200,
        text="ab",
        token_ids=(100, 101),
        prompt_tokens=100,
        completion_tokens=2,
        cached_tokens=48,
        hbm_tokens=16,
        host_tokens=32,
        ttft_s=0.1,
        total_s=0.2,
    )
    return replace(good, **changes)  # type: ignore[arg-type]


GOOD = [_answer(0), _answer(1), _answer(2)]
LINES = [
    AuditLine("store", "aa", 0, 0, "01"),
    AuditLine("store", "bb", 0, 0, "02"),
    AuditLine("load", "aa", 0, 0, "01"),
]
TOLD: dict[str, Any] = {
    "engine": "engine-0",
    "miss": {"reason": "withdrawn", "first_missing_token": 16},
    "candidates": [{"cost_ms": {"total": 12.0}}],
}
RECEIPT = {
    "old_epoch": 1,
    "new_epoch": 2,
    "audit_head": "ff",
    "acknowledgements": [
        {"holder_kind": "router", "holder_id": "r.1f", "waited_out": False},
        {"holder_kind": "node", "holder_id": "n1.2f", "waited_out": False},
    ],
}


def _tampered(**changes: object) -> list[Answer]:
    return [*GOOD[:2], _answer(2, **changes)]


Case = tuple[Callable[..., Check], Sequence[object], Sequence[object]]
TOLD_BY_PEER: dict[str, Any] = {"node": {"peer_blocks": 2}}
NO_MISS: dict[str, Any] = {"reason": "none", "first_missing_token": None}
TOLD_OF_LOSS: dict[str, Any] = {
    "engine": "engine-0",
    "miss": {"reason": "absent", "first_missing_token": 0},
    "left_out": {"http://127.0.0.1:1": "tried before"},
}

CASES: dict[str, Case] = {
    "a failed request": (checks.all_succeeded, (GOOD,), (_tampered(status=502),)),
    "an answer cut short": (checks.all_succeeded, (GOOD,), (_tampered(completion_tokens=0),)),
    "an error inside the stream": (checks.all_succeeded, (GOOD,), (_tampered(error="x"),)),
    "no request at all": (checks.all_succeeded, (GOOD,), ([],)),
    "another token": (
        checks.same_answers,
        (dict(enumerate(GOOD)), GOOD),
        (dict(enumerate(GOOD)), _tampered(token_ids=(100, 102))),
    ),
    "answers without tokens": (
        checks.same_answers,
        (dict(enumerate(GOOD)), GOOD),
        ({i: replace(a, token_ids=()) for i, a in enumerate(GOOD)}, _tampered(token_ids=())),
    ),
    "a load of other bytes": (
        checks.loads_equal_stores,
        (LINES,),
        ([*LINES, AuditLine("load", "bb", 0, 0, "03")],),
    ),
    "a load of what nobody stored": (
        checks.loads_equal_stores,
        (LINES,),
        ([*LINES, AuditLine("load", "aa", 0, 1, "01")],),
    ),
    "nothing loaded": (checks.loads_equal_stores, (LINES,), (LINES[:2],)),
    "a token too many": (
        checks.reused_exactly,
        (GOOD, [48, 48, 48]),
        (_tampered(cached_tokens=64), [48, 48, 48]),
    ),
    "a token too few": (
        checks.reused_exactly,
        (GOOD, [48, 48, 48]),
        (_tampered(cached_tokens=32), [48, 48, 48]),
    ),
    "reuse below the gate": (checks.reused_share_of_ideal, (GOOD, 144), (GOOD, 181)),
    "reuse of what another tenant sent": (
        checks.no_more_than_ideal,
        (GOOD, [48, 64, 48]),
        (GOOD, [48, 64, 32]),
    ),
    "a restarted engine that loaded nothing": (
        checks.first_from_host,
        (LINES, GOOD),
        (LINES[:2], GOOD),
    ),
    "a sealed block lost": (checks.all_still_sealed, (["aa"], ["aa", "bb"]), (["aa"], ["bb"])),
    "nothing sealed": (checks.all_still_sealed, (["aa"], ["aa"]), ([], ["aa"])),
    "a sealed block stored anew": (
        checks.all_sealed_served,
        (["aa"], LINES[2:]),
        (["aa"], LINES),
    ),
    "a sealed block never loaded": (
        checks.all_sealed_served,
        (["aa"], LINES[2:]),
        (["aa", "bb"], LINES[2:]),
    ),
    "a silent tier": (checks.some_tokens, ("host", GOOD), ("ssd", GOOD)),
    "a receipt without the router": (
        checks.receipt_is_complete,
        (RECEIPT, ["router"]),
        (RECEIPT | {"acknowledgements": RECEIPT["acknowledgements"][1:]}, ["router"]),  # type: ignore[index]
    ),
    "a miss for another reason": (
        checks.miss_is_explained,
        (TOLD, 16),
        (TOLD | {"miss": {"reason": "absent", "first_missing_token": 16}}, 16),
    ),
    "a miss at another place": (checks.miss_is_explained, (TOLD, 16), (TOLD, 0)),
    "a receipt without one of the nodes": (
        checks.receipt_is_complete,
        (RECEIPT, ["router"], ["n1"]),
        (RECEIPT, ["router"], ["n1", "n2"]),
    ),
    "nothing of another machine": (
        checks.came_from_other_machines,
        ([TOLD_BY_PEER], [AuditLine("load", "cc", 0, 0, "01")]),
        ([TOLD_BY_PEER | {"node": {"peer_blocks": 0}}], [AuditLine("load", "cc", 0, 0, "01")]),
    ),
    "promised, but stored here": (
        checks.came_from_other_machines,
        ([TOLD_BY_PEER], [AuditLine("load", "cc", 0, 0, "01")]),
        ([TOLD_BY_PEER], LINES),
    ),
    "an answer of the machine that is gone": (
        checks.answered_without_machine,
        (_answer(0), TOLD_OF_LOSS, "engine-1", _answer(0)),
        (_answer(0), TOLD_OF_LOSS, "engine-0", _answer(0)),
    ),
    "another answer without the machine": (
        checks.answered_without_machine,
        (_answer(0), TOLD_OF_LOSS, "engine-1", _answer(0)),
        (_answer(0, token_ids=(100, 102)), TOLD_OF_LOSS, "engine-1", _answer(0)),
    ),
    "a loss that is not explained": (
        checks.answered_without_machine,
        (_answer(0), TOLD_OF_LOSS, "engine-1", _answer(0)),
        (_answer(0), TOLD_OF_LOSS | {"miss": NO_MISS}, "engine-1", _answer(0)),
    ),
    "a receipt of no change": (
        checks.receipt_is_complete,
        (RECEIPT, ["router"]),
        (RECEIPT | {"new_epoch": 1}, ["router"]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_check_sees_tampering(name: str) -> None:
    """The same check holds for good results and fails for the one thing changed in them."""
    check, good, bad = CASES[name]
    assert check(name, *good).passed, check(name, *good)
    assert not check(name, *bad).passed, check(name, *bad)


def test_audit_lines_being_written_are_left_out() -> None:
    """The last line of a file that an engine still writes may be half a line."""
    row = {"op": "load", "key": "aa", "group": 0, "shard": 1, "checksum": "01"}
    line = json.dumps(row)
    assert checks.parse_audit(f"{line}\n{line[:9]}") == [AuditLine("load", "aa", 0, 1, "01")]
    assert checks.parse_audit("") == []


def test_streamed_chunks_add_up_to_an_answer() -> None:
    """The first token sets TTFT; the last chunk brings the usage; an error ends in the answer."""
    answer = Answer(Job(0, "amber", (3,)), status=200)
    for now_s, chunk in (
        (0.1, {"choices": [{"text": "a", "token_ids": [100]}]}),
        (0.2, {"choices": [{"text": "b", "token_ids": [101]}]}),
        (
            0.3,
            {
                "choices": [],
                "usage": {
                    "prompt_tokens": 9,
                    "completion_tokens": 2,
                    "prompt_tokens_details": {"cached_tokens": 4, "kvfabric": {"host_tokens": 4}},
                },
            },
        ),
    ):
        answer = merge(answer, chunk, now_s)
    assert (answer.text, answer.token_ids, answer.ttft_s) == ("ab", (100, 101), 0.1)
    assert (answer.cached_tokens, answer.host_tokens, answer.hbm_tokens) == (4, 4, 0)
    assert answer.succeeded
    assert not merge(answer, {"error": {"message": "gone"}}, 0.4).succeeded


def test_arrivals_are_stretched_to_the_rate() -> None:
    """The order and the proportions of the gaps stay, the mean rate is the one asked for."""
    assert arrivals_at_rate([5, 5, 15, 35], 1.5) == pytest.approx([0.0, 0.0, 2 / 3, 2.0])
