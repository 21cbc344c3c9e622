"""A simulated fleet: machines, what they share, and how a seed makes one unlike the other."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from kvfabric_router.metrics import RouterMetrics

from kvfabric.hashing import layout_fingerprint
from kvfabric.keyring import MemoryKeyring
from kvfabric.registry import changes
from kvfabric.registry.state import TemplateVersion, Tenant, TierQuota
from kvfabric.testing.simulation.disk import SimulatedFiles
from kvfabric.testing.simulation.loop import Process, SimulatedLoop, deterministic, run
from kvfabric.testing.simulation.network import Network
from kvfabric.testing.simulation.redis import SimulatedRedis
from kvfabric.testing.simulation.wire import Fabric
from kvfabric.tiers.arena import PAGE_BYTES
from kvfabric.types import PUBLIC_TENANT, Incarnation, TenantId
from tests.simulation.engine import SimulatedEngine
from tests.simulation.ledger import Ledger
from tests.simulation.node import SimulatedNode, join, make_layout
from tests.simulation.router import Prompt, SimulatedRouter

MAX_NODES, MAX_ROUTERS = 3, 2
TENANTS = ("t-acme", "t-globex", "t-floor")
FLOOR_BLOCKS = 6
"""Guaranteed to `t-floor`, which stores no more than that."""
TEMPLATES = ("sys", "tool")
TEMPLATE_TOKENS = 10


@dataclass(frozen=True, slots=True)
class Plan:
    """What one seed has. Probabilities are of one occasion each, `_s` are seconds."""

    num_nodes: int
    num_routers: int
    engines_per_node: int
    num_parts: int
    num_slots: int
    hbm_blocks: int
    num_requests: int
    request_every_s: float
    kinds: frozenset[str]
    fault_every_s: float
    operations: frozenset[str] = frozenset()
    operation_every_s: float = 1.0
    policy: str = "cost"
    lease_s: float = 1.2
    history_bytes: int = 4096
    max_blocks: int = 512
    window_blocks: int = 64
    lease_share: float = 0.6
    scrub_bytes_per_s: int = 0
    epoch_lease_s: float = 1.0
    block_s: float = 0.004
    copy_s: float = 0.01
    save_after_s: float = 0.02
    ask_again: float = 0.2
    confirm_elsewhere: float = 0.5
    confused: float = 0.05
    forget_to_save: float = 0.1
    give_up: float = 0.1
    commit_late: float = 0.08


FAULTS = (
    "crash node",
    "crash engine",
    "crash router",
    "crash redis",
    "pause node",
    "pause engine",
    "pause router",
    "pause redis",
    "partition",
    "jump",
    "disconnect",
    "slow",
    "careless",
    "spoilt",
    "lose changes",
)
OPERATIONS = ("withdraw", "purge", "roll back", "register", "invalidate", "quota")


THEMES: dict[str, dict[str, Any]] = {
    # Blocks go from node to node all the time.
    "transfers": {
        "num_nodes": 2,
        "engines_per_node": 1,
        "num_parts": 1,
        "num_slots": 26,
        "hbm_blocks": 0,
        "num_requests": 40,
        "request_every_s": 0.04,
        "kinds": frozenset({"slow", "spoilt", "pause engine", "disconnect", "crash engine"}),
        "fault_every_s": 0.3,
        "operations": frozenset(),
        "policy": "round_robin",
    },
    # Daemons die under engines that copy, and come back at once in the same memory.
    "adoption": {
        "num_nodes": 1,
        "engines_per_node": 2,
        "num_parts": 1,
        "num_slots": 14,
        "hbm_blocks": 0,
        "num_requests": 40,
        "request_every_s": 0.04,
        "kinds": frozenset({"crash node", "pause engine", "disconnect"}),
        "fault_every_s": 0.3,
        "operations": frozenset(),
        "copy_s": 0.05,
        "confirm_elsewhere": 1.0,
    },
}
"""Seeds that have one thing often, beside those that have a little of everything."""


def draw_plan(rng: random.Random) -> Plan:
    """Swarm testing: each seed has some kinds of faults, few have all."""
    share = rng.choice((0.2, 0.4, 0.7))
    num_nodes = rng.choice((1, 2, 2, 3))
    num_parts = rng.choice((1, 1, 2))
    theme = THEMES.get(rng.choice(("", "", "", *THEMES)), {})
    plan = Plan(
        num_nodes=num_nodes,
        num_routers=rng.choice((1, 1, 1, 2)),
        engines_per_node=rng.choice((1, 2)) if num_nodes < 3 else 1,
        num_parts=num_parts,
        num_slots=rng.choice((14, 20, 40)) * num_parts,
        hbm_blocks=rng.choice((0, 0, 6, 16)),
        num_requests=rng.randrange(12, 36),
        request_every_s=rng.choice((0.03, 0.08, 0.15)),
        kinds=frozenset(kind for kind in FAULTS if rng.random() < share),
        fault_every_s=rng.choice((0.3, 0.7, 1.5)),
        operations=frozenset(kind for kind in OPERATIONS if rng.random() < 0.35),
        operation_every_s=rng.choice((0.3, 0.8, 2.0)),
        policy=rng.choice(("cost", "round_robin")),
        lease_s=rng.choice((0.25, 1.2)),
        copy_s=rng.choice((0.004, 0.03, 0.12)),
    )
    kinds = frozenset(kind for kind in sorted(theme.get("kinds", ())) if rng.random() < 0.7)
    return replace(plan, **{**theme, "kinds": kinds}) if theme else plan


def plan_of(seed: int) -> Plan:
    """What `simulate` draws first."""
    with deterministic(seed) as rng:
        return draw_plan(rng)


class FixedKeyring(MemoryKeyring):
    """The fleet's secrets, without a file."""

    def __init__(self) -> None:
        super().__init__()
        self._secrets = {name: _digest(f"secret {name}") for name in (*TENANTS, PUBLIC_TENANT)}

    def tenant_secret(self, tenant: TenantId) -> bytes:
        return self._secrets[str(tenant)]

    def handle_keys(self) -> dict[int, bytes]:
        return {1: _digest("handle key")}

    def current_handle_key(self) -> tuple[int, bytes]:
        return 1, _digest("handle key")


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=32).digest()


@functools.cache
def _metrics() -> RouterMetrics:
    return RouterMetrics()


class World:
    """What processes share, and all of them. `plan`: of this seed."""

    def __init__(
        self, loop: SimulatedLoop, rng: random.Random, plan: Plan, *, verbose: bool = False
    ) -> None:
        self.loop = loop
        self.rng = rng
        self.plan = plan
        self.ledger = Ledger(loop, verbose=verbose)
        self.network = Network(loop, rng)
        self.fabric = Fabric(self.network, rng, self.ledger.touched)
        self.redis = SimulatedRedis(self.network)
        self.keyring = FixedKeyring()
        self.metrics = _metrics()
        self.layout = make_layout(plan.num_parts)
        self.fingerprint = layout_fingerprint(self.layout)
        self.resources = contextlib.ExitStack()
        names = [f"n{at}" for at in range(plan.num_nodes)]
        self.files = {
            host: SimulatedFiles()
            for host in (*names, *(f"r{at}" for at in range(plan.num_routers)))
        }
        self.nodes = [SimulatedNode(self, name) for name in names]
        self.engines = [
            SimulatedEngine(self, node, f"e{at}{number}")
            for at, node in enumerate(self.nodes)
            for number in range(plan.engines_per_node)
        ]
        self.routers = [SimulatedRouter(self, f"r{at}") for at in range(plan.num_routers)]
        self.redis_process: Process | None = None

    def spawn(self, name: str, host: str) -> Process:
        return Process(self.loop, name, host, self.rng)

    def kill(self, process: Process) -> None:
        process.kill()
        self.network.killed(process)

    def start_redis(self) -> None:
        self.redis_process = self.spawn("redis", "redis")
        self.redis.start(self.redis_process)

    # ------------------------------------------------------------------ prompts

    @staticmethod
    def tenant(name: str) -> TenantId:
        return TenantId(name)

    @staticmethod
    def piece_tokens(piece: Sequence[Any]) -> tuple[int, ...]:
        if piece and isinstance(piece[0], str):
            seed = _digest(f"template {piece}")
            return tuple(seed[:TEMPLATE_TOKENS])
        return tuple(piece)

    def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(token for piece in prompt.pieces for token in self.piece_tokens(piece))


# ---------------------------------------------------------------------- what a fleet begins with


@dataclass(frozen=True, slots=True)
class Genesis:
    """A registry with tenants and templates, and everybody's durable copy of it."""

    redis: Any
    files: dict[str, SimulatedFiles]


@functools.cache
def genesis() -> Genesis:
    """Made once for all seeds: a new fleet waits four lease times before anybody trusts it."""
    plan = Plan(MAX_NODES, MAX_ROUTERS, 1, 1, 8, 0, 0, 1.0, frozenset(), 1.0)
    with deterministic(0) as rng:
        loop = SimulatedLoop()

        async def make() -> Genesis:
            world = World(loop, rng, plan)
            world.start_redis()
            holders = [(node.name, "node") for node in world.nodes]
            holders += [(router.name, "router") for router in world.routers]
            processes = {name: world.spawn(name, name) for name, _ in holders}
            stack = contextlib.AsyncExitStack()
            registries = {}

            async def enter(name: str, kind: str) -> None:
                registry = join(world, processes[name], kind)
                registries[name] = await stack.enter_async_context(registry)

            first, *_ = holders
            for name, kind in holders:
                await processes[name].start(enter(name, kind))
            for draft in _FIRST:
                await processes[first[0]].start(registries[first[0]].commit(draft, "genesis"))
            await asyncio.sleep(8 * plan.epoch_lease_s)
            assert all(one.usable() for one in registries.values())
            await processes[first[0]].start(stack.aclose())
            return Genesis(world.redis.backup(), world.files)

        return run(loop, make)


def _tenant(name: str) -> Any:
    floor = FLOOR_BLOCKS * PAGE_BYTES * 2 if name == "t-floor" else 0
    tenant = Tenant(TenantId(name), name[2:], host=TierQuota(0, floor))
    return lambda state: changes.create_tenant(state, tenant, f"kvf-{name}")


def _template(name: str, version: str) -> Any:
    return lambda state: changes.register_template(state, template_version(name, version))


def template_version(name: str, version: str) -> TemplateVersion:
    """`sys` is public where a prompt begins with it."""
    incarnation = Incarnation(_digest(f"incarnation {name} {version}")[:16])
    return TemplateVersion(name, version, incarnation, f"{name} {version}".encode(), name == "sys")


_FIRST = [
    *(_tenant(name) for name in TENANTS),
    *(_template(name, version) for name in TEMPLATES for version in ("v1", "v2")),
]


def begin(world: World) -> None:
    """A fleet that has been there for a while."""
    made = genesis()
    world.redis.restore(made.redis)
    for host in world.files:
        world.files[host] = copy.deepcopy(made.files[host])
    world.start_redis()
    for node in world.nodes:
        node.start()
    for engine in world.engines:
        engine.start()
    for router in world.routers:
        router.start()
