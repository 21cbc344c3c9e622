"""The demo's figures: of one run, of two side by side, and the JSON report of everything. Pure."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvfabric import __version__
from kvfabric.demo import ideal
from kvfabric.demo.checks import Check
from kvfabric.demo.replay import Answer


@dataclass(frozen=True, slots=True)
class RunFigures:
    """One replay of the slice. Tokens are prompt tokens; times in milliseconds."""

    requests: int
    prompt_tokens: int
    reused_tokens: int
    hbm_tokens: int
    host_tokens: int
    ssd_tokens: int
    ttft_ms_p50: float
    ttft_ms_p90: float
    ttft_ms_mean: float


def run_figures(answers: Sequence[Answer]) -> RunFigures:
    ttft_ms = [1000 * answer.ttft_s for answer in answers]
    return RunFigures(
        requests=len(answers),
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        reused_tokens=sum(answer.cached_tokens for answer in answers),
        hbm_tokens=sum(answer.hbm_tokens for answer in answers),
        host_tokens=sum(answer.host_tokens for answer in answers),
        ssd_tokens=sum(answer.ssd_tokens for answer in answers),
        ttft_ms_p50=round(percentile(ttft_ms, 0.5), 1),
        ttft_ms_p90=round(percentile(ttft_ms, 0.9), 1),
        ttft_ms_mean=round(sum(ttft_ms) / len(ttft_ms), 1) if ttft_ms else math.nan,
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def side_by_side(baseline: RunFigures, fabric: RunFigures, ideal_tokens: int) -> str:
    """The comparison as a table."""

    def tokens(value: int, figures: RunFigures) -> str:
        share = 100 * value / figures.prompt_tokens if figures.prompt_tokens else 0.0
        return f"{value:,} ({share:.1f} %)"

    rows = [
        ("", "round robin, own HBM cache", "through the fabric"),
        ("requests", f"{baseline.requests:,}", f"{fabric.requests:,}"),
        ("prompt tokens", f"{baseline.prompt_tokens:,}", f"{fabric.prompt_tokens:,}"),
    ]
    for label, name in (
        ("reused from HBM", "hbm_tokens"),
        ("reused from host", "host_tokens"),
        ("reused from SSD", "ssd_tokens"),
        ("reused in all", "reused_tokens"),
    ):
        rows.append(
            (
                label,
                tokens(getattr(baseline, name), baseline),
                tokens(getattr(fabric, name), fabric),
            )
        )
    best = tokens(ideal_tokens, fabric)
    whole = f"{100 * ideal.WHOLE_TRACE_SHARE:.1f} % of its blocks"
    rows += [
        ("TTFT p50", f"{baseline.ttft_ms_p50:.0f} ms", f"{fabric.ttft_ms_p50:.0f} ms"),
        ("TTFT p90", f"{baseline.ttft_ms_p90:.0f} ms", f"{fabric.ttft_ms_p90:.0f} ms"),
        ("ideal of this slice", best, best),
        ("ideal of the whole log", whole, whole),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"  {row[0]:<{widths[0]}}   {row[1]:>{widths[1]}}   {row[2]:>{widths[2]}}" for row in rows
    ]
    lines.insert(1, "  " + "-" * (sum(widths) + 6))
    return "\n".join(lines)


def receipt_lines(receipt: Mapping[str, Any]) -> list[str]:
    """A receipt of the registry for people."""
    after_ms = 1000 * (receipt["unreachable_at"] - receipt["requested_at"])
    lines = [
        f"{receipt['action']} of {receipt['scope']}, requested by {receipt['requested_by']}",
        f"epoch {receipt['old_epoch']} -> {receipt['new_epoch']}, "
        f"in force everywhere after {after_ms:.1f} ms",
    ]
    for ack in receipt["acknowledgements"]:
        how = "waited out" if ack["waited_out"] else f"applied after {1000 * ack['after_s']:.1f} ms"
        lines.append(f"{ack['holder_kind']} {ack['holder_id']}: {how}")
    for node in receipt["nodes"]:
        line = f"node {node['node_id']}: {node['bytes_unreachable']} bytes out of reach"
        if receipt["destroyed_at"]:
            line += f", {node['bytes_reclaimed']} destroyed"
        lines.append(line)
        lines += [
            f"engine {engine['engine_id']}: {engine['running']} requests still run with it, "
            f"its own cache: {engine['hbm']}"
            for engine in node["engines"]
        ]
    if receipt["not_heard_from"]:
        lines.append(f"not heard from: {', '.join(receipt['not_heard_from'])}")
    return [*lines, f"receipt {receipt['receipt_id']}, audit head {receipt['audit_head']}"]


@dataclass(slots=True)
class Step:
    """One step of the story: what was checked and what was measured."""

    title: str
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Report:
    """Everything the demo found. `passed` only if there were checks and every one held."""

    quick: bool
    steps: list[Step] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def passed(self) -> bool:
        checks = [check for step in self.steps for check in step.checks]
        return bool(checks) and not self.error and all(check.passed for check in checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "subject": "demo",
            "version": __version__,
            "passed": self.passed,
            "quick": self.quick,
            "error": self.error,
            "hardware": {
                "machine": platform.machine(),
                "cores": os.cpu_count(),
                "python": platform.python_version(),
            },
            "figures": self.figures,
            "steps": [asdict(step) for step in self.steps],
        }


def request_rows(answers: Sequence[Answer], ideal_tokens: Sequence[int]) -> list[dict[str, Any]]:
    """One row a request, for the report."""
    return [
        {
            "index": answer.job.index,
            "tenant": answer.job.tenant,
            "status": answer.status,
            "prompt_tokens": answer.prompt_tokens,
            "ideal_tokens": tokens,
            "hbm_tokens": answer.hbm_tokens,
            "host_tokens": answer.host_tokens,
            "ssd_tokens": answer.ssd_tokens,
            "ttft_ms": round(1000 * answer.ttft_s, 1),
        }
        for answer, tokens in zip(answers, ideal_tokens, strict=True)
    ]
