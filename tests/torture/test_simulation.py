"""A fleet simulated from seeds: the product unchanged; clock, network and files replaced.

Each seed is another fleet with other faults; a seed that fails does so again, step by step:
`python -m tests.simulation.replay SEED --trace`.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.simulation.scenario import simulate
from tests.simulation.twins import TWINS, Twin, found_by
from tests.torture.scale import at_most, count, record

pytestmark = pytest.mark.slow

SEEDS = count(500, 20_000, "KVFABRIC_TORTURE_SEEDS")
CI_SEEDS = 500
SAME = (3, 17, 33, 171)
_SEEN = ("fetched_blocks", "corrupt_blocks", "sent_blocks")


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    """The product reports every fault that is made here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_every_seed_keeps_every_promise() -> None:
    counts: Counter[str] = Counter()
    broken = []
    for seed in range(1, SEEDS + 1):
        outcome = simulate(seed)
        counts += outcome.counts
        if outcome.violation:
            broken.append(f"{outcome.violation}: python -m tests.simulation.replay {seed} --trace")
    assert not broken, "\n".join(broken[:10])
    # What is said of so many seeds means nothing if little happened in them.
    assert counts["blocks confirmed"] > 10 * SEEDS
    assert counts["changes that reached everybody"] > 2 * SEEDS
    assert all(counts[f"transfers: {what}"] > SEEDS // 20 for what in _SEEN)
    assert counts["fault: changes were lost"] > SEEDS // 20
    faults = sum(number for what, number in counts.items() if what.startswith("fault"))
    record(
        "simulation. seeds of a fleet with faults",
        SEEDS,
        f"{at_most(0, SEEDS)} broke a promise; {faults} faults, {counts['answered']} requests, "
        f"{counts['blocks confirmed']} blocks served, {counts['transfers: fetched_blocks']} of peers, "
        f"{counts['changes that reached everybody']} changes that reached everybody",
    )


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)
def test_without_one_guard_some_seed_tells(twin: Twin) -> None:
    seed, violation = found_by(twin, range(1, CI_SEEDS + 1))
    assert seed > 0, f"no seed misses the guard: {twin.name}"
    assert twin.expects in violation
    assert not simulate(seed).violation, "the guard makes the difference"


def test_a_seed_is_the_same_run_each_time_in_every_process() -> None:
    here = [simulate(seed).trace for seed in SAME]
    assert here == [simulate(seed).trace for seed in SAME]
    assert len(set(here)) == len(SAME)
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        traces = []
        for seed in SAME:
            command = [sys.executable, "-m", "tests.simulation.replay", str(seed)]
            found = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            )
            traces.append(found.stdout.splitlines()[0].rpartition(" ")[2])
        assert traces == here
