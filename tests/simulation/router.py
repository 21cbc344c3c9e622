"""A simulated router: the product's index, node links, fleet account, identities and policy.

What is left out is HTTP and the queue in front of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from kvfabric_router.fleet import Fleet, ProbeReport
from kvfabric_router.flight import Sent
from kvfabric_router.identity import Addressee, ModelIdentity, PromptKeys, RequestIdentity
from kvfabric_router.nodes import NodeLink
from kvfabric_router.policy import (
    Candidate,
    Ranked,
    Reuse,
    choose,
    reuse_of,
    sources_of,
    with_peers,
)
from kvfabric_router.prompt import NO_LIMIT, Recognised
from kvfabric_router.rates import Work

from kvfabric.events.index import FleetIndex, Holder, Present
from kvfabric.registry.redis.registry import RedisRegistry
from kvfabric.registry.state import SERVING, RegistryState, TemplateVersion
from kvfabric.testing.simulation.loop import Process
from kvfabric.testing.simulation.network import Network, Unreachable
from kvfabric.testing.simulation.rpc import Channel
from kvfabric.tls import Security
from kvfabric.types import Segment, SessionId
from tests.simulation.engine import Asked
from tests.simulation.node import BLOCK_TOKENS, MODEL, join

if TYPE_CHECKING:
    from tests.simulation.world import World

ANSWER_S = 6.0
_SECURITY = Security("router", None, True)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Pieces: a template version's text by (name, version), or tokens. The first piece may be public."""

    tenant: str
    pieces: tuple[tuple[str, str] | tuple[int, ...], ...]


class _Link(NodeLink):
    """The product's, over the simulated network; without its diagnosis, which looks at this machine's."""

    network: Network

    @contextlib.asynccontextmanager
    async def _channel(self) -> AsyncIterator[Any]:
        yield Channel(self.network, self.target)

    async def _tell(self, reason: str) -> None:
        pass


class SimulatedRouter:
    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.num_lives = 0
        self.registry: RedisRegistry | None = None

    def start(self) -> None:
        self.num_lives += 1
        self.process = self.world.spawn(f"{self.name}.{self.num_lives}", self.name)
        self.fleet = Fleet(clock=self.process.clock)
        self.index = FleetIndex(capacity=256, max_blocks=4096)
        self.links: dict[str, NodeLink] = {}
        self.registry = None
        self.process.start(self._live(self.process))

    def kill(self) -> None:
        self.world.kill(self.process)
        self.registry = None

    async def _live(self, process: Process) -> None:
        async with join(self.world, process, "router") as registry:
            self.registry = registry
            process.start(self._watch_states(registry))
            process.start(self._probe())
            while True:
                for holder in registry.holders:
                    if holder.kind == "node" and holder.address not in self.links:
                        self._link(holder.address)
                await asyncio.sleep(0.3)

    async def _watch_states(self, registry: RedisRegistry) -> None:
        version = 0
        while True:
            state = await registry.wait_newer(version)
            version = state.version
            self.world.ledger.state(self.name, state)

    def _link(self, address: str) -> None:
        link = _Link(
            address,
            fleet=self.fleet,
            index=self.index,
            registry=None,
            metrics=self.world.metrics,
            security=_SECURITY,
        )
        link.network = self.world.network
        self.links[address] = link
        self.process.start(link.run())

    async def _probe(self) -> None:
        while True:
            for endpoint in self.fleet.due():
                self.process.start(self._probe_one(endpoint))
            await asyncio.sleep(0.2)

    async def _probe_one(self, endpoint: str) -> None:
        try:
            session = await self.world.network.call(endpoint, "probe", None, timeout=1.0)
        except (Unreachable, TimeoutError):
            self.fleet.probe_failed(endpoint)
            return
        model = ModelIdentity(MODEL, self.world.fingerprint, BLOCK_TOKENS)
        self.fleet.probe_answered(endpoint, ProbeReport(MODEL, session, model))

    # ------------------------------------------------------------------ requests

    async def answer(self, request_id: str, prompt: Prompt) -> bool:
        """Whether some engine answered; each is tried once."""
        tried: set[str] = set()
        while True:
            chosen = self._choose(request_id, prompt, tried)
            if chosen is None:
                return False
            ranked, asked, sent = chosen
            endpoint = ranked.candidate.engine.endpoint
            tried.add(endpoint)
            try:
                with self.fleet.flight(endpoint, sent) as flight:
                    hbm, host = await self.world.network.call(
                        endpoint, "request", asked, timeout=ANSWER_S
                    )
                    flight.stream_event()
                    whole = len(asked.tokens)
                    found = Work(
                        whole - (hbm + host) * BLOCK_TOKENS,
                        hbm=hbm * BLOCK_TOKENS,
                        host=host * BLOCK_TOKENS,
                    )
                    flight.answered(found, completion_tokens=1)
            except (Unreachable, TimeoutError):
                self.fleet.failed(endpoint)
                continue
            return True

    def _choose(
        self, request_id: str, prompt: Prompt, tried: set[str]
    ) -> tuple[Ranked, Asked, Sent] | None:
        """All at one moment, as `dispatch.Planner` does it: by the state of now, and sent at once."""
        world = self.world
        engines = [e for e in self.fleet.view().engines if e.endpoint not in tried]
        if not engines:
            return None
        state = self.registry.usable() if self.registry is not None else None
        tokens = world.tokens_of(prompt)
        draw = world.rng.getrandbits(32)
        identity = keys = None
        present: dict[Holder, Present] = {}
        model = ModelIdentity(MODEL, world.fingerprint, BLOCK_TOKENS)
        if state is not None and prompt.tenant in state.tenants:
            identity = RequestIdentity(
                tenant=state.tenants[world.tenant(prompt.tenant)],
                state=state,
                keyring=world.keyring,
                token_ids=tokens,
                recognised=recognise(prompt, state, world),
            )
            keys = identity.keys(model)
            present = self._present(keys)
        predicted = self.fleet.predicted.of(keys.keys) if keys is not None else {}
        candidates = [
            Candidate(
                engine,
                len(tokens),
                Reuse()
                if keys is None
                else reuse_of(
                    engine,
                    present,
                    predicted.get(engine.endpoint),
                    num_blocks=len(keys.keys),
                    block_tokens=BLOCK_TOKENS,
                ),
            )
            for engine in engines
        ]
        candidates = [self._with_peers(one, present) for one in candidates]
        best = choose(world.plan.policy, candidates, draw)[0]
        engine, handle = best.candidate.engine, ""
        if identity is not None and keys is not None and engine.session:
            links = self.fleet.topology.links_of(engine.node_id)
            reuse = best.candidate.reuse
            sources = sources_of(present, links, reuse, block_tokens=BLOCK_TOKENS)
            handle = identity.mint(
                model,
                to=Addressee(SessionId(engine.session), sources),
                request_id=request_id,
                expires_at=int(self.process.wall_clock() + 600),
            )
            scopes = identity._scopes(model, identity.recognised)
            world.ledger.dispatched(self.name, identity.state.epochs_of(scopes))
            world.ledger.counts["blocks predicted"] += best.candidate.reuse.tokens // BLOCK_TOKENS
        world.ledger.note(
            self.name,
            f"{request_id} {prompt.tenant} -> {engine.endpoint} reuse "
            f"{best.candidate.reuse.tokens} handle {bool(handle)}",
        )
        asked = Asked(request_id, prompt.tenant, tokens, handle)
        sent = Sent(best.candidate.work, best.terms.own_work, keys.keys if keys and handle else ())
        return best, asked, sent

    def _with_peers(self, candidate: Candidate, present: Mapping[Holder, Present]) -> Candidate:
        links = self.fleet.topology.links_of(candidate.engine.node_id)
        reuse = with_peers(candidate, present, links, block_tokens=BLOCK_TOKENS)
        return Candidate(candidate.engine, candidate.prompt_tokens, reuse)

    def _present(self, keys: PromptKeys) -> dict[Holder, Present]:
        public, own = keys.keys[: keys.public_blocks], keys.keys[keys.public_blocks :]
        found: dict[Holder, Present] = {}
        for tag, some, first in (
            (keys.public_tag, public, 0),
            (keys.tenant_tag, own, len(public)),
        ):
            for holder, present in (self.index.match(tag, some) if some else {}).items():
                whole = found.setdefault(holder, np.zeros(len(keys.keys), np.bool_))
                whole[first : first + len(some)] = present
        return found


def recognise(prompt: Prompt, state: RegistryState, world: World) -> Recognised:
    """What `prompt.TemplateIndex` would find, from what the prompt was made of."""
    segments: list[Segment] = []
    at, public, leading = 0, 0, True
    for piece in prompt.pieces:
        tokens = world.piece_tokens(piece)
        version = _version(piece, state)
        if version is not None and version.state != SERVING:
            return Recognised(tuple(segments), cacheable_tokens=at, public_tokens=min(public, at))
        if version is not None:
            segments.append(
                Segment(version.name, version.version, version.incarnation, at, len(tokens))
            )
        leading = leading and version is not None and version.is_public and at == 0
        at += len(tokens)
        if leading:
            public = at
    return Recognised(tuple(segments), NO_LIMIT, public)


def _version(piece: Sequence[object], state: RegistryState) -> TemplateVersion | None:
    if len(piece) == 2 and isinstance(piece[0], str) and isinstance(piece[1], str):
        return state.templates.get((piece[0], piece[1]))
    return None
