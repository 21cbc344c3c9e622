"""Run seeds of the simulation: `python -m tests.simulation.replay FIRST [LAST] [--trace]`."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter

from tests.simulation.scenario import simulate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int, nargs="?")
    parser.add_argument("--trace", action="store_true", help="print all that happens")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.CRITICAL)
    counts: Counter[str] = Counter()
    began, failures = time.process_time(), 0
    last = arguments.first if arguments.last is None else arguments.last
    for seed in range(arguments.first, last + 1):
        outcome = simulate(seed, verbose=arguments.trace)
        counts += outcome.counts
        if outcome.violation:
            failures += 1
            print(f"seed {seed}: {outcome.violation}")
        if last == arguments.first:
            print(f"seed {seed}: {outcome.virtual_s:.3f} s, trace {outcome.trace}")
    print(f"{failures} of {last - arguments.first + 1} seeds, {time.process_time() - began:.1f} s")
    for what, number in sorted(counts.items()):
        print(f"  {what}: {number}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
