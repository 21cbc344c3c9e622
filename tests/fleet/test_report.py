"""The demo's figures, its table, its report, and what it shows while it runs."""

from __future__ import annotations

import io
import json
import math

from kvfabric.demo.checks import Check
from kvfabric.demo.progress import Progress
from kvfabric.demo.replay import Answer, Job
from kvfabric.demo.report import (
    Report,
    Step,
    percentile,
    receipt_lines,
    request_rows,
    run_figures,
    side_by_side,
)


def _answers(cached: int) -> list[Answer]:
    return [
        Answer(
            Job(i, "amber", (3,)),
            status=200,
            prompt_tokens=100,
            cached_tokens=cached,
            host_tokens=cached,
            ttft_s=i / 1000,
        )
        for i in range(1, 11)
    ]


def test_percentiles_are_of_the_nearest_rank() -> None:
    """p50 of ten values is the fifth, p90 the ninth; of one value it is that value."""
    values = [float(i) for i in range(1, 11)]
    assert (percentile(values, 0.5), percentile(values, 0.9)) == (5.0, 9.0)
    assert percentile([7.0], 0.9) == 7.0
    assert math.isnan(percentile([], 0.5))


def test_the_table_shows_both_runs_and_both_ideals() -> None:
    """Tokens with their share, TTFT, the slice's ideal, the whole log's ideal."""
    baseline, fabric = run_figures(_answers(10)), run_figures(_answers(60))
    table = side_by_side(baseline, fabric, 700)
    for text in ("1,000", "100 (10.0 %)", "600 (60.0 %)", "700 (70.0 %)", "36.6 %", "5 ms", "9 ms"):
        assert text in table
    assert len({len(line) for line in table.splitlines() if "---" not in line}) == 1


def test_a_report_passes_only_when_checks_were_made_and_all_held() -> None:
    """No checks, a failed check, or an error: not passed."""
    good, bad = Check("a", passed=True, seen=""), Check("b", passed=False, seen="")
    assert Report(quick=True, steps=[Step("s", [good])]).passed
    assert not Report(quick=True).passed
    assert not Report(quick=True, steps=[Step("s", [good, bad])]).passed
    assert not Report(quick=True, steps=[Step("s", [good])], error="a child died").passed


def test_the_report_is_json_with_every_check() -> None:
    """It survives a round trip and keeps figures, rows and checks."""
    report = Report(quick=True, figures={"rows": request_rows(_answers(10), [16] * 10)})
    report.steps.append(Step("s", [Check("a", passed=True, seen="x")], {"n": 1}))
    read = json.loads(json.dumps(report.to_json()))
    assert read["passed"] is True
    assert read["steps"][0] == {
        "title": "s",
        "checks": [{"name": "a", "passed": True, "seen": "x"}],
        "figures": {"n": 1},
    }
    assert read["figures"]["rows"][0]["ideal_tokens"] == 16


def test_a_receipt_says_who_applied_and_who_was_waited_out() -> None:
    """Epochs, how long it took, each holder, and the head of the audit log."""
    receipt = {
        "action": "retire_template",
        "scope": "template:helper",
        "requested_by": "root@here",
        "requested_at": 100.0,
        "unreachable_at": 102.5,
        "old_epoch": 1,
        "new_epoch": 2,
        "audit_head": "ff00",
        "acknowledgements": [
            {"holder_kind": "node", "holder_id": "a", "after_s": 0.002, "waited_out": False},
            {"holder_kind": "router", "holder_id": "b", "after_s": 2.5, "waited_out": True},
        ],
        "nodes": [
            {
                "node_id": "a",
                "bytes_unreachable": 4096,
                "bytes_reclaimed": 4096,
                "engines": [{"engine_id": "e", "running": 2, "hbm": "reset"}],
            }
        ],
        "destroyed_at": 103.0,
        "not_heard_from": ["b"],
        "receipt_id": "template:helper@2",
    }
    assert receipt_lines(receipt) == [
        "retire_template of template:helper, requested by root@here",
        "epoch 1 -> 2, in force everywhere after 2500.0 ms",
        "node a: applied after 2.0 ms",
        "router b: waited out",
        "node a: 4096 bytes out of reach, 4096 destroyed",
        "engine e: 2 requests still run with it, its own cache: reset",
        "not heard from: b",
        "receipt template:helper@2, audit head ff00",
    ]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _show(out: io.StringIO) -> str:
    times = iter([0.0, 0.0, 2.0])
    progress = Progress(out, clock=lambda: next(times))
    progress.stage("replay", total=2)
    progress.advance()
    progress.advance()
    progress.end()
    progress.check(Check("equal", passed=False, seen="1 of 2"))
    return out.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    """The bar fills up in place and gives way to one line."""
    shown = _show(_Terminal())
    assert "\r\033[K  [###############...............] 1/2 replay" in shown
    assert shown.endswith("\r\033[K  replay (2 requests, 2.0 s)\n  FAIL equal: 1 of 2\n")


def test_a_pipe_gets_lines_only() -> None:
    """No control characters where nobody sees them move."""
    assert _show(io.StringIO()) == "  replay (2 requests, 2.0 s)\n  FAIL equal: 1 of 2\n"
