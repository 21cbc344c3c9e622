"""What happens to a simulated fleet: faults, and what its operators do meanwhile. Each kind is one method."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from kvfabric.errors import KVFabricError
from kvfabric.registry import changes
from kvfabric.registry.base import Change
from kvfabric.registry.changes import Draft, TenantChange
from kvfabric.registry.redis.registry import RedisRegistry
from kvfabric.registry.state import RETIRED, RegistryState, TierQuota
from kvfabric.testing.simulation.loop import Process
from kvfabric.tiers.arena import PAGE_BYTES
from kvfabric.types import model_scope, tenant_scope
from tests.simulation.engine import SimulatedEngine
from tests.simulation.node import MODEL
from tests.simulation.world import TEMPLATES, TENANTS, World, template_version

Decide = Callable[[RegistryState], Draft[Any]]


class Faults:
    """Until `stop`. `versions`: of each template, as clients know them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng: random.Random = world.rng
        self.versions = {name: ["v1", "v2"] for name in TEMPLATES}
        self.is_over = False
        self.num_operations = 0
        self._quiet_until = 0.0
        self._keeper = world.spawn("keeper", "keeper")

    # ------------------------------------------------------------------ when

    async def run(self) -> None:
        plan = self.world.plan
        await asyncio.wait(
            [
                self._keeper.start(self._happens(sorted(kinds), every_s))
                for kinds, every_s in (
                    (plan.kinds, plan.fault_every_s),
                    (plan.operations, plan.operation_every_s),
                )
            ]
        )

    async def _happens(self, kinds: list[str], every_s: float) -> None:
        while kinds:
            await asyncio.sleep(self.rng.expovariate(1 / every_s))
            if self.is_over:
                return
            if self.world.loop.time() < self._quiet_until:
                continue
            kind = self.rng.choice(kinds)
            self.world.ledger.note("fault", kind)
            self.world.ledger.counts[f"fault: {kind}"] += 1
            getattr(self, "_" + kind.replace(" ", "_"))()

    def stop(self) -> None:
        """Everything works from now on, and everybody is there."""
        self.is_over = True
        world = self.world
        world.network.heal()
        world.network.chaos.calm()
        world.fabric.chaos.calm()
        for process in self._processes():
            process.resume()
        if not self._is_redis_up():
            world.start_redis()
        for node in world.nodes:
            if node.process is None or not node.process.is_alive:
                node.start()
        for engine in world.engines:
            if not engine.process.is_alive:
                engine.start()
        for router in world.routers:
            if not router.process.is_alive:
                router.start()

    def _is_redis_up(self) -> bool:
        process = self.world.redis_process
        return bool(process is not None and process.is_alive)

    def _processes(self) -> list[Process]:
        world = self.world
        found: list[Process | None] = [engine.process for engine in world.engines]
        found += [router.process for router in world.routers]
        found += [node.process for node in world.nodes]
        found.append(world.redis_process)
        return [process for process in found if process is not None]

    def _later(self, mean_s: float, call: Callable[[], None]) -> None:
        def unless_over() -> None:
            if not self.is_over:
                call()

        self._keeper.call_later(0.05 + self.rng.expovariate(1 / mean_s), unless_over)

    # ------------------------------------------------------------------ processes

    def _crash_node(self) -> None:
        node = self._busy_engine().node
        if node.process is not None and node.process.is_alive:
            node.kill()
            self._later(self.rng.choice((0.02, 0.5)), node.start)

    def _busy_engine(self) -> SimulatedEngine:
        """One that copies right now, if there is one: faults come when they hurt."""
        busy = [engine for engine in self.world.engines if engine.is_copying]
        return self.rng.choice(busy or self.world.engines)

    def _crash_engine(self) -> None:
        engine = self._busy_engine()
        if engine.process.is_alive:
            engine.kill()
            self._later(0.4, engine.start)

    def _crash_router(self) -> None:
        router = self.rng.choice(self.world.routers)
        if router.process.is_alive:
            router.kill()
            self._later(0.4, router.start)

    def _crash_redis(self) -> None:
        process = self.world.redis_process
        if process is not None and process.is_alive:
            self.world.kill(process)
            self._later(0.4, self.world.start_redis)

    def _pause(self, process: Process | None) -> None:
        if process is not None and process.is_alive:
            process.pause()
            self._later(self.rng.choice((0.2, 1.0, 2.5)), process.resume)

    def _pause_node(self) -> None:
        self._pause(self.rng.choice(self.world.nodes).process)

    def _pause_engine(self) -> None:
        self._pause(self._busy_engine().process)

    def _pause_router(self) -> None:
        self._pause(self.rng.choice(self.world.routers).process)

    def _pause_redis(self) -> None:
        self._pause(self.world.redis_process)

    def _disconnect(self) -> None:
        self._busy_engine().disconnect()

    def _jump(self) -> None:
        process = self.rng.choice(self._processes())
        process.clock_ahead += self.rng.choice((-3600.0, -5.0, 5.0, 300.0))

    def _lose_changes(self) -> None:
        """The directory comes back as it was a moment ago. Whoever heard of what it lost is there: the loss
        of all of them too is not survived, and nobody says so."""
        backup = self.world.redis.backup()

        def come_back() -> None:
            everybody = self._processes()
            hosts = {process.host for process in everybody}
            if (
                not all(process.is_alive and not process.is_paused for process in everybody)
                or not all(self.world.network.joined("redis", host) for host in hosts)
                or any(router.registry is None for router in self.world.routers)
                or any(node.life is None for node in self.world.nodes)
            ):
                return
            self._quiet_until = self.world.loop.time() + 4 * self.world.plan.epoch_lease_s
            assert self.world.redis_process is not None
            self.world.kill(self.world.redis_process)
            self.world.redis.restore(backup)
            self.world.start_redis()
            self.world.ledger.note("fault", "the directory has lost changes")
            self.world.ledger.counts["fault: changes were lost"] += 1

        self._later(0.5, come_back)

    # ------------------------------------------------------------------ network and disk

    def _partition(self) -> None:
        hosts = [
            "redis",
            *(n.name for n in self.world.nodes),
            *(r.name for r in self.world.routers),
        ]
        one, *others = self.rng.sample(hosts, len(hosts))
        for other in others[: self.rng.randint(1, len(others))]:
            self.world.network.cut(one, other)
        self._later(self.rng.choice((0.5, 2.5)), self.world.network.heal)

    def _slow(self) -> None:
        self.world.network.chaos.slow = 0.1
        self.world.network.chaos.break_call = 0.03
        self.world.fabric.chaos.slow = 0.4
        self.world.fabric.chaos.lost = 0.3
        self.world.fabric.chaos.abort_s = self.rng.choice((0.02, 0.5))
        self._later(2.0, self._not_slow)

    def _not_slow(self) -> None:
        self.world.network.chaos.slow = self.world.network.chaos.break_call = 0.0
        self.world.fabric.chaos.slow = self.world.fabric.chaos.lost = 0.0

    def _careless(self) -> None:
        chaos = self.world.network.chaos
        chaos.stream_loss = chaos.stream_twice = chaos.stream_swap = 0.1
        self._later(2.0, self._careful)

    def _careful(self) -> None:
        chaos = self.world.network.chaos
        chaos.stream_loss = chaos.stream_twice = chaos.stream_swap = 0.0

    def _spoilt(self) -> None:
        self.world.fabric.chaos.spoilt = 0.3
        self._later(2.0, self._unspoilt)

    def _unspoilt(self) -> None:
        self.world.fabric.chaos.spoilt = 0.0

    # ------------------------------------------------------------------ operators

    def _operate(self, what: str, decide: Decide) -> None:
        """Ask some node for a change, and wait until it reached everybody."""
        nodes = [node for node in self.world.nodes if node.life is not None]
        if not nodes:
            return
        life = self.rng.choice(nodes).life
        assert life is not None
        life.process.start(self._change(life.registry, what, decide))

    async def _change(self, registry: RedisRegistry, what: str, decide: Decide) -> None:
        ledger = self.world.ledger
        self.num_operations += 1
        try:
            _, change = await registry.commit(decide, "operator")
            await registry.reached(change.version)
        except KVFabricError as exc:
            ledger.note("operator", f"{what}: {type(exc).__name__}")
            return
        self._succeeded(change)
        ledger.note("operator", f"{what}: reached everybody")

    def _succeeded(self, change: Change) -> None:
        self.world.ledger.counts["changes that reached everybody"] += 1
        if change.new_epoch > change.old_epoch:
            self.world.ledger.succeeded(change.scope, change.new_epoch)

    def _withdraw(self, *, purge: bool = False) -> None:
        name = self.rng.choice(TEMPLATES)
        version = self.rng.choice(self.versions[name][-2:])

        def decide(state: RegistryState) -> Draft[Any]:
            return changes.withdraw_template(state, name, version, purge=purge)

        self._operate(f"{'purge' if purge else 'retire'} {name} {version}", decide)

    def _purge(self) -> None:
        self._withdraw(purge=True)

    def _roll_back(self) -> None:
        name = self.rng.choice(TEMPLATES)

        def decide(state: RegistryState) -> Draft[Any]:
            retired = sorted(
                one.version
                for one in state.templates.values()
                if one.name == name and one.state == RETIRED
            )
            version = retired[-1] if retired else "v1"
            return changes.promote_template(state, name, version)

        self._operate(f"promote {name}", decide)

    def _register(self) -> None:
        name = self.rng.choice(TEMPLATES)
        version = f"v{len(self.versions[name]) + 1}"
        self.versions[name].append(version)

        def decide(state: RegistryState) -> Draft[Any]:
            return changes.register_template(state, template_version(name, version))

        self._operate(f"register {name} {version}", decide)

    def _invalidate(self) -> None:
        scope = self.rng.choice((model_scope(MODEL), *(tenant_scope(name) for name in TENANTS[:2])))
        self._operate(
            f"invalidate {scope}", lambda state: changes.invalidate_scope(state, scope, "retire")
        )

    def _quota(self) -> None:
        name = self.rng.choice(TENANTS[:2])
        most = self.rng.choice((0, 4, 12)) * PAGE_BYTES
        opted_out = self.rng.random() < 0.2
        change = TenantChange(host=TierQuota(most, 0), opted_out=opted_out)
        self._operate(
            f"quota {name} {most} {opted_out}",
            lambda state: changes.set_tenant(state, state.tenants[World.tenant(name)].name, change),
        )
