"""One seed, one run: a fleet, its clients, what goes wrong, and what must hold then and in the end."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvfabric.events.index import Holder
from kvfabric.registry.state import PURGED, SERVING
from kvfabric.testing.simulation.loop import Process, SimulatedLoop, Stalled, deterministic, run
from kvfabric.types import BlockKey, TierName
from tests.simulation.engine import SimulatedEngine
from tests.simulation.faults import Faults
from tests.simulation.node import Life, SimulatedNode
from tests.simulation.router import Prompt, SimulatedRouter
from tests.simulation.world import (
    FLOOR_BLOCKS,
    TEMPLATES,
    TENANTS,
    World,
    begin,
    draw_plan,
    genesis,
)

WARM_S = 0.5
CALM_S = 3.6
"""After the last fault: leases, reservations, epoch leases and streams have all come to their ends."""
CHECK_S = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """`violation` is empty if every promise was kept. `trace`: digest of all that happened."""

    seed: int
    violation: str
    trace: str
    tail: str
    counts: Counter[str]
    virtual_s: float


def simulate(seed: int, *, verbose: bool = False) -> Outcome:
    genesis()
    with deterministic(seed) as rng:
        loop = SimulatedLoop()
        plan = draw_plan(rng)
        world = World(loop, rng, plan, verbose=verbose)
        ledger = world.ledger
        ledger.note("plan", repr((plan.num_nodes, plan.num_routers, sorted(plan.kinds))))

        async def main() -> None:
            scenario = world.spawn("scenario", "scenario").start(_scenario(world))
            failed = world.spawn("ledger", "ledger").start(ledger.failed.wait())
            await asyncio.wait([scenario, failed], return_when=asyncio.FIRST_COMPLETED)
            if scenario.done():
                scenario.result()

        try:
            run(loop, main)
        except Stalled as exc:
            ledger.broken(str(exc))
        except AssertionError as exc:
            ledger.broken(f"{type(exc).__name__}: {exc}")
        finally:
            world.resources.close()
        return Outcome(
            seed, ledger.violation, ledger.trace, ledger.tail, ledger.counts, loop.time()
        )


async def _scenario(world: World) -> None:
    begin(world)
    client = world.spawn("client", "client")
    faults = Faults(world)
    watch = client.start(_watch(world))
    await asyncio.sleep(WARM_S)
    faulty = client.start(faults.run())
    calls = [client.start(call) for call in [_clients(world, faults, client)]]
    await asyncio.wait(calls)
    faults.stop()
    await asyncio.wait([faulty])
    world.ledger.note("calm", "faults end")
    await asyncio.sleep(CALM_S / 2)
    for node in world.nodes:
        if node.life is not None:
            node.life.events.alarm(0)  # a batch: what was lost before it shows
    await asyncio.sleep(CALM_S / 2)
    watch.cancel()
    _check_end(world)


# ---------------------------------------------------------------------- clients


async def _clients(world: World, faults: Faults, client: Process) -> None:
    running = []
    for number in range(world.plan.num_requests):
        running.append(client.start(_one(world, f"q{number}", _prompt(world, faults))))
        await asyncio.sleep(world.rng.expovariate(1 / world.plan.request_every_s))
    await asyncio.wait(running)


async def _one(world: World, request_id: str, prompt: Prompt) -> None:
    """A client goes to another router if one is gone or says nothing."""
    for router in world.rng.sample(world.routers, len(world.routers)):
        process = router.process
        if not process.is_alive:
            continue
        task = process.start(router.answer(request_id, prompt))
        done, _ = await asyncio.wait([task], timeout=15.0)
        if done and task.result():
            world.ledger.counts["answered"] += 1
            return
    world.ledger.counts["unanswered"] += 1


def _prompt(world: World, faults: Faults) -> Prompt:
    rng = world.rng
    tenant = rng.choice((*TENANTS[:2], *TENANTS[:2], TENANTS[2]))
    if tenant == TENANTS[2]:
        return Prompt(tenant, (tuple(range(250, 250 + 4 * FLOOR_BLOCKS + 1)),))
    pieces: list[tuple[str, str] | tuple[int, ...]] = [
        (name, _version(world, faults, name)) for name in TEMPLATES if rng.random() < 0.5
    ]
    shared = rng.randrange(3)
    pieces.append(tuple(100 + shared for _ in range(rng.randrange(8, 20))))
    if rng.random() < 0.5:
        pieces.append(tuple(rng.randrange(256) for _ in range(rng.randrange(1, 20))))
    return Prompt(tenant, tuple(pieces))


def _version(world: World, faults: Faults, name: str) -> str:
    """A client writes what is in service, as far as it heard, or what it once copied."""
    router = world.rng.choice(world.routers)
    if router.registry is not None and world.rng.random() < 0.8:
        for one in router.registry.state.templates.values():
            if one.name == name and one.state == SERVING:
                return one.version
    return world.rng.choice(faults.versions[name][-3:])


# ---------------------------------------------------------------------- what must hold


async def _watch(world: World) -> None:
    """Now and then, whatever happens."""
    while True:
        await asyncio.sleep(CHECK_S)
        for node in world.nodes:
            _check_accounts(world, node)
        if world.loop.errors:
            world.ledger.broken(world.loop.errors[0])


def _check_accounts(world: World, node: SimulatedNode) -> None:
    if node.life is None:
        return
    try:
        node.life.store._residency.check()
    except AssertionError as exc:
        world.ledger.broken(f"accounts of {node.name}: {exc}")
    if "invalidate" not in world.plan.operations:
        _check_floor(world, node.life)


def _check_floor(world: World, life: Life) -> None:
    """What a tenant has within its floor, nobody takes away."""
    accounts = life.store._host.accounts
    ready = sum(account.ready for account in accounts if account.tenant == TENANTS[2])
    known = world.ledger.floored.get(life.process.name, 0)
    world.ledger.floored[life.process.name] = ready
    if ready < known:
        world.ledger.broken(
            f"{life.process.name}: a tenant has {ready} bytes of {known} within its floor"
        )


def _check_end(world: World) -> None:
    for promise in _broken_at_end(world):
        world.ledger.broken(promise)
    if world.loop.errors:
        world.ledger.broken(world.loop.errors[0])


def _broken_at_end(world: World) -> Iterator[str]:
    for node in world.nodes:
        if node.life is None:
            yield f"{node.name} does not serve"
            continue
        _check_accounts(world, node)
        found = node.life.store.statistics()
        for counts in (node.life.fetches.counts, node.life.sender.counts):
            for what, number in counts.items():
                world.ledger.counts[f"transfers: {what}"] += number
        left = (found.leased_bytes, found.draining_bytes, found.reserved_bytes, found.num_requests)
        if any(left):
            yield f"{node.name} keeps leased, draining, reserved bytes and requests: {left}"
        if node.life.registry.usable() is None:
            yield f"{node.name} has no epoch lease: {node.life.registry.status}"
    for router in world.routers:
        if router.registry is None or router.registry.usable() is None:
            yield f"{router.name} has no epoch lease"
    if world.ledger.violation:
        return
    states = [n.life.registry.state for n in world.nodes if n.life is not None]
    states += [r.registry.state for r in world.routers if r.registry is not None]
    if any(state != states[0] for state in states):
        yield f"registries differ: versions {[state.version for state in states]}"
    purged = {one.incarnation for one in states[0].templates.values() if one.state == PURGED}
    for node in world.nodes:
        if node.life is not None and (left_bytes := node.life.store.bytes_of(purged)):
            yield f"{node.name} keeps {left_bytes} bytes of what was purged"
    for router in world.routers:
        yield from _index_differs(world, router)


def _index_differs(world: World, router: SimulatedRouter) -> Iterator[str]:
    """A router's index against what tiers hold."""
    truth: dict[Holder, set[tuple[bytes, bytes]]] = {}
    for node in world.nodes:
        assert node.life is not None
        held = truth.setdefault(Holder(node.name, TierName.HOST), set())
        for runs in node.life.store.resident_runs(TierName.HOST, 64):
            for tag, _, prefixes in runs:
                held |= {(tag, prefixes[at : at + 8]) for at in range(0, len(prefixes), 8)}
    for engine in world.engines:
        if engine.session is not None:
            held = truth.setdefault(_hbm(engine), set())
            held |= {(tag, key[:8]) for tag, key in engine.pool}
    everything = sorted({place for held in truth.values() for place in held} | world.ledger.seen)
    by_tag: dict[bytes, list[bytes]] = {}
    for tag, prefix in everything:
        by_tag.setdefault(tag, []).append(prefix)
    told: dict[Holder, set[tuple[bytes, bytes]]] = {}
    for tag, known in by_tag.items():
        keys = [BlockKey(prefix + bytes(24)) for prefix in known]
        for holder, present in router.index.match(tag, keys).items():
            at = np.flatnonzero(present).tolist()
            told.setdefault(holder, set()).update((tag, known[one]) for one in at)
    for holder in sorted(told.keys() | truth.keys()):
        more = told.get(holder, set()) - truth.get(holder, set())
        less = truth.get(holder, set()) - told.get(holder, set())
        if more or less:
            yield (
                f"{router.name} believes {len(more)} blocks too many and {len(less)} too few "
                f"of {holder.node_id} {holder.tier.value}"
            )
    world.ledger.counts["blocks compared"] += sum(map(len, truth.values()))


def _hbm(engine: SimulatedEngine) -> Holder:
    assert engine.session is not None
    return Holder(engine.node.name, TierName.HBM, engine.session)
