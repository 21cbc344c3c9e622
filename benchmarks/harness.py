"""What every benchmark shares: its command line, alternating measurement, and the one JSON line at the end.

A benchmark prints rows for people, writes them to `benchmarks/results/<subject>.json` (not with --quick), and
ends standard output with one flat JSON object: subject, quick, commit, hardware, then its figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def parse_arguments(
    description: str, parents: Sequence[argparse.ArgumentParser] = ()
) -> argparse.Namespace:
    """`--quick` (a smoke run of at most 20 s) and `--seed`, and what a benchmark adds by `parents`."""
    parser = argparse.ArgumentParser(description=description, parents=parents)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def commit() -> str:
    """The commit that is measured, with `+` if the tree differs from it; `unknown` outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def hardware() -> str:
    """Processor, cores and memory in one line."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB"


def alternate(sides: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round; the sides take turns, so that noise meets all of them."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            taken[name].append(time.perf_counter() - started)
    return taken


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` per cent of `values` lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def report(
    subject: str,
    args: argparse.Namespace,
    figures: Mapping[str, float],
    rows: object,
    *,
    on: str = "",
) -> None:
    """Keep the rows and print the figures as the last line. `on`: the hardware, if that says too little."""
    machine = on or hardware()
    head = {"subject": subject, "quick": args.quick, "commit": commit(), "hardware": machine}
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        document = {**head, **rounded, "rows": rows}
        (RESULTS / f"{subject}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(head | rounded), flush=True)
