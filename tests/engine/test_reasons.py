"""Why an engine computed what it might have had: one reason a request, told in its usage and its metrics."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from kvfabric_engine.plan import Planner
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.testing import ask, small_config

from kvfabric.testing.processes import NodeProcess, until
from kvfabric.types import MissReason, TierName


def counted(engine: Engine) -> dict[MissReason, int]:
    assert engine.connector is not None
    return engine.connector.statistics().misses


def test_reasons_of_a_real_node_reach_usage_and_metrics(tmp_path: Path) -> None:
    prompt = random.Random(5).choices(range(3, 259), k=70)
    with NodeProcess(tmp_path / "node") as node:
        config = small_config(node_socket=str(node.socket))
        with Engine(config) as engine:
            assert engine.connector is not None
            until(lambda: engine.connector is not None and engine.connector.statistics().is_up)
            assert ask(engine, prompt).reused.miss is MissReason.ABSENT
            assert counted(engine) == {MissReason.ABSENT: 1}
            until(lambda: engine.connector is not None and saved(engine) == 4)
        with Engine(config) as engine:
            until(lambda: engine.connector is not None and engine.connector.statistics().is_up)
            # A host tier of one byte a second: computing is sooner done.
            planner = Planner(engine._planner.rates, may_cut=True)
            planner.rates = replace(planner.rates, bytes_per_s={TierName.HOST: 1.0}, token_s=1e-6)
            engine._planner = planner
            slow = ask(engine, prompt)
            assert (slow.reused.total, slow.reused.miss) == (0, MissReason.TOO_SLOW)
            assert counted(engine) == {MissReason.TOO_SLOW: 1}
            node.kill()
            until(lambda: engine.connector is not None and not engine.connector.statistics().is_up)
            other = random.Random(6).choices(range(3, 259), k=70)
            assert ask(engine, other).reused.miss is MissReason.NODE_DOWN


def saved(engine: Engine) -> int:
    assert engine.connector is not None
    return engine.connector.statistics().saved_blocks


def test_a_node_that_wants_handles_is_told_as_no_handle(tmp_path: Path) -> None:
    prompt = random.Random(5).choices(range(3, 259), k=70)
    with (
        NodeProcess(tmp_path / "node", require_handle="true") as node,
        Engine(small_config(node_socket=str(node.socket))) as engine,
    ):
        until(lambda: engine.connector is not None and engine.connector.statistics().is_up)
        assert ask(engine, prompt).reused.miss is MissReason.NO_HANDLE
        assert counted(engine) == {MissReason.NO_HANDLE: 1}
