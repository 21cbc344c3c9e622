"""Proofs 4 and 6 at large counts: any order of calls against a dictionary, cancelled at any await.

The machine and the cancelled calls are those of the unit tests, where their twins stand; here they run from
other seeds each time, for longer.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from kvfabric.testing.store import StoreRig, make_keys
from tests.kvfabric.test_store_cancel import (
    CALLS,
    calls_cancelled,
    commits_cancelled,
    rig_over,
    store_and_seal,
)
from tests.kvfabric.test_store_machine import StoreMachine
from tests.torture.scale import at_most, count, record

pytestmark = pytest.mark.slow

STEPS_A_RUN = 100
STEPS = count(400, 1_000_000, "KVFABRIC_TORTURE_STEPS")
CANCELLED = count(40, 100_000, "KVFABRIC_TORTURE_CANCELLED")


class CountingMachine(StoreMachine):
    """Each step is followed by every check; `steps` counts them over all runs."""

    steps: ClassVar[int] = 0

    @invariant()
    def another_step(self) -> None:
        CountingMachine.steps += 1


def test_no_order_of_calls_gives_wrong_bytes() -> None:
    CountingMachine.steps = 0
    runs = settings(
        max_examples=max(1, STEPS // STEPS_A_RUN),
        stateful_step_count=STEPS_A_RUN,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(CountingMachine, settings=runs)
    steps = CountingMachine.steps
    # Hypothesis ends some runs early; that it ran at all is what must not go unnoticed.
    assert steps > STEPS // 4
    record("4. steps of the state machine", steps, f"{at_most(0, steps)} against the model")


def test_a_call_cancelled_anywhere_leaves_nothing(tmp_path: Path) -> None:
    async def rounds() -> int:
        cancelled = 0
        async with rig_over(tmp_path) as rig:
            await store_and_seal(rig)
            await rig.put(make_keys(4, seed=1))
            while cancelled < CANCELLED:
                for call in CALLS.values():
                    cancelled += await calls_cancelled(rig, call)
                async with StoreRig() as other:
                    cancelled += await commits_cancelled(other)
        return cancelled

    cancelled = asyncio.run(rounds())
    record("6. calls cancelled at an await", cancelled, f"{at_most(0, cancelled)} left a trace")
