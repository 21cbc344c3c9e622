"""What a fleet asks of its directory grows with the fleet, not with its square; on a virtual clock."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from kvfabric.registry.database import Database
from kvfabric.registry.redis import registry
from kvfabric.registry.redis.address import parse
from kvfabric.registry.redis.outside import Outside
from kvfabric.registry.redis.registry import (
    WATCHED_NODES,
    Holder,
    HolderRecord,
    RedisRegistry,
    neighbours,
)
from kvfabric.testing.simulation.disk import SimulatedFiles
from kvfabric.testing.simulation.loop import Process, SimulatedLoop, deterministic, run
from kvfabric.testing.simulation.network import Network
from kvfabric.testing.simulation.redis import SimulatedLink, SimulatedRedis

LEASE_S = 2.0


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def records(kinds: str) -> dict[str, HolderRecord]:
    """`n` for a node, `r` for a router."""
    return {
        f"{at:03}": HolderRecord(f"{at:03}", "node" if kind == "n" else "router", "", "", 1)
        for at, kind in enumerate(kinds)
    }


@pytest.mark.parametrize("kinds", ["n", "nr", "rrrn", "nnnnnnnn", "nrnrrrnnrn" * 5])
def test_everybody_is_watched_by_nodes_and_by_few(kinds: str) -> None:
    known = records(kinds)
    nodes = [one for one, record in known.items() if record.kind == "node"]
    watched = {one: neighbours(list(known), known, one) for one in nodes}
    for one in known:
        watchers = [node for node, its in watched.items() if one in its]
        assert len(watchers) == min(WATCHED_NODES, len(nodes) - (one in nodes))
    assert neighbours(list(known), known, "stranger") == []


def commands_per_holder(num_holders: int) -> tuple[float, int]:
    """(commands a second a holder while nothing happens, holders that are known once one has died)."""
    with deterministic(1) as rng:
        loop = SimulatedLoop()

        async def main() -> tuple[float, int]:
            network = Network(loop, rng)
            redis = SimulatedRedis(network)
            redis.start(Process(loop, "redis", "redis", rng))
            files = SimulatedFiles()
            registries: list[RedisRegistry] = []

            async def hold(process: Process) -> None:
                outside = Outside(
                    clock=process.clock,
                    wall_clock=process.wall_clock,
                    database=lambda home: Database(home, files.open_env),
                    link=partial(SimulatedLink, network),
                    thread=lambda: process.threads,
                )
                holder = Holder("node", process.name, process.name)
                address = parse("unix:///simulated", insecure=False)
                home = Path(process.name)
                async with RedisRegistry(
                    address, home, holder=holder, lease_s=LEASE_S, outside=outside
                ) as joined:
                    registries.append(joined)
                    await asyncio.Event().wait()

            processes = [Process(loop, f"n{at}", f"n{at}", rng) for at in range(num_holders)]
            for process in processes:
                process.start(hold(process))
            await asyncio.sleep(6 * LEASE_S)
            assert {len(one.holders) for one in registries} == {num_holders}
            assert all(one.usable() for one in registries)
            before = redis.num_commands
            await asyncio.sleep(2 * LEASE_S)
            rate = (redis.num_commands - before) / (2 * LEASE_S) / num_holders
            processes[0].kill()
            network.killed(processes[0])
            await asyncio.sleep(7 * LEASE_S)
            [left] = {len(one.holders) for one in registries if one.holder_id[:3] != "n0."}
            return rate, left

        return run(loop, main)


def test_commands_of_a_holder_do_not_grow_with_the_fleet() -> None:
    few, left = commands_per_holder(8)
    assert left == 7
    many, left = commands_per_holder(24)
    assert left == 23
    assert many < 1.1 * few


def test_where_everybody_watches_everybody_they_do() -> None:
    """The twin."""
    with patch.object(registry, "neighbours", lambda ids, _known, _own: list(ids)):
        few, _ = commands_per_holder(8)
        many, _ = commands_per_holder(24)
    assert many > 1.5 * few
