"""`NodeHints`: what a request will need comes into the host tier before its engine asks.

A hint carries the request's handle, so it can ask for nothing that its engine could not. Its blocks are
matched and leased as that engine's would be, by a session of the store's alone that counts as no use of a
block: those on SSD are read, those that a source of the handle holds are fetched. When the engine asks, it
finds them there or on their way, and the hint's lease ends.

A hint is never in the way. All hints together bring a small share of the host tier, one of them at most half
of what is left of it, and hold it for `HOLD_S` at most; reads go a few MiB at a time, so an engine's own load
does not wait behind a long prompt; hints let go for any request that finds its lease budget spent; and since
an unused block keeps its age, what a wrong hint brought is the next to be evicted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
from collections import Counter
from dataclasses import dataclass
from typing import Any

from kvfabric import handle as handles
from kvfabric.daemon.fetching import FETCH_S
from kvfabric.daemon.grants import granted
from kvfabric.daemon.handlers import Services, terms_for, weights_of
from kvfabric.daemon.rpc import unary
from kvfabric.daemon.sessions import Session, Sessions
from kvfabric.errors import BadHandle, KVFabricError, Overloaded, RemoteProtocolError
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.registry.base import Registry
from kvfabric.store.store import RequestGrant
from kvfabric.types import KEY_BYTES, BlockLayout, SessionId, TenantId

HOLD_S = 5.0
"""How long brought blocks wait for their engine; after that they may be evicted."""
HINT_SHARE = 1 / 32
"""Of the host tier: what all hints bring or hold at once."""
CHUNK_BYTES = 16 << 20
MAX_BATCH = 64
MAX_HINTS = 512
NUM_AT_WORK = 4

_REQUEST = "hinted"
_ON_SSD = 1  # as `Matched.tiers` has them

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Hint:
    """`num_bytes`: what it brings; `is_held`: its blocks are leased. `session`: one of the store's."""

    name: tuple[str, TenantId]
    session: Session
    grant: RequestGrant
    handle: str
    sources: tuple[str, ...]
    keys: bytes
    num_bytes: int = 0
    is_held: bool = True
    is_fetching: bool = False
    end: asyncio.TimerHandle | None = None


class Prefetches(pb_grpc.NodeHintsServicer):
    """An async context manager: leaving ends every hint. `counts`: hints by what became of them; blocks."""

    def __init__(self, services: Services, sessions: Sessions, *, host_bytes: int) -> None:
        self.counts: Counter[str] = Counter()
        self._services = services
        self._sessions = sessions
        self._budget = int(host_bytes * HINT_SHARE)
        self._hints: dict[tuple[str, TenantId], _Hint] = {}
        self._num_bytes = 0
        self._room = asyncio.Semaphore(NUM_AT_WORK)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_paused = False

    def __repr__(self) -> str:
        return f"<Prefetches {len(self._hints)} hints, {self._num_bytes} of {self._budget} bytes>"

    async def __aenter__(self) -> Prefetches:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.pause()

    async def pause(self) -> None:
        """End every hint; there are no new ones until `resume`. Blocks on their way come all the same."""
        self._is_paused = True
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        for hint in [*self._hints.values()]:
            self._end(hint)

    def resume(self) -> None:
        self._is_paused = False

    async def follow(self, registry: Registry) -> None:
        """A change of the registry ends every hold: what it withdrew must not be kept by a hint. Until
        cancelled."""
        version = registry.state.version
        while True:
            version = (await registry.wait_newer(version)).version
            self.let_go()

    # -- what routers say ----------------------------------------------------------------------------

    @unary
    async def Prefetch(self, request: pb.PrefetchRequest, context: Any) -> pb.Prefetched:
        num_begun = num_refused = 0
        for hint in request.hints[:MAX_BATCH]:
            try:
                num_begun += self._begin(hint.handle, hint.keys)
            except KVFabricError as exc:
                log.debug("a hint is not followed: %s", exc)
                num_refused += 1
        num_refused += max(len(request.hints) - MAX_BATCH, 0)
        self.counts["refused"] += num_refused
        return pb.Prefetched(num_begun=num_begun, num_refused=num_refused)

    def _begin(self, handle: str, keys: bytes) -> bool:
        """Whether it was needed. Raises BadHandle, Fenced, UnknownTenant, Overloaded, RemoteProtocolError."""
        services = self._services
        if not keys or len(keys) % KEY_BYTES:
            raise RemoteProtocolError(f"keys are {KEY_BYTES} bytes each, not {len(keys)} in all")
        if self._is_paused or len(self._hints) >= MAX_HINTS or self._left < 2:
            raise Overloaded("hints have their share of the host tier")
        opened = handles.open_relayed(
            handle, services.keyring.handle_keys(), now=services.wall_clock()
        )
        engine = self._sessions.find_live(opened.audience)
        if engine is None:
            raise BadHandle("handle was made for no engine session of this node")
        terms = terms_for(services, engine, opened)
        name = (terms.told_id, terms.tenant)
        if name in self._hints or services.lookups.find(*name) is not None:
            return False  # the engine was faster
        grant = granted(services, terms, weights_of(engine)).grant
        session = dataclasses.replace(engine, id=SessionId(secrets.token_bytes(16)), processes={})
        services.store.open_session(session.id, session.layout, counts=False)
        services.store.open_request(session.id, _REQUEST, grant)
        hint = self._hints[name] = _Hint(name, session, grant, handle, terms.sources, keys)
        task = asyncio.get_running_loop().create_task(self._bring(hint), name="kvfabric-prefetch")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    # -- what is done about it -----------------------------------------------------------------------

    @property
    def _left(self) -> int:
        return self._budget - self._num_bytes

    async def _bring(self, hint: _Hint) -> None:
        try:
            async with self._room:
                if hint.is_held:
                    await self._fetch(hint)
                if hint.is_held:
                    await self._promote(hint, self._match(hint))
        except KVFabricError as exc:
            log.debug("a hint is given up: %s", exc)
        finally:
            if hint.is_held and not hint.num_bytes:
                self._end(hint)
            elif hint.is_held:
                later = asyncio.get_running_loop().call_later
                hint.end = later(HOLD_S, self._unused, hint)

    def _match(self, hint: _Hint) -> bytes:
        """Leases what is here or on its way, as far as what is not in the arena fits; tiers by block."""
        store, session = self._services.store, hint.session.id
        block_bytes = hint.session.layout.block_bytes
        matched = store.match(session, _REQUEST, hint.keys)
        places = [at for at, tier in enumerate(matched.tiers) if tier == _ON_SSD]
        fitting = max((self._left + hint.num_bytes) // 2 - hint.num_bytes, 0) // block_bytes
        tiers = matched.tiers
        if len(places) > fitting:
            tiers = tiers[: places[fitting]]
            store.release(session, [_REQUEST])
            store.open_request(session, _REQUEST, hint.grant)
            if tiers:
                store.match(session, _REQUEST, hint.keys[: len(tiers) * KEY_BYTES])
        self._take(hint, tiers.count(_ON_SSD) * block_bytes)
        return tiers

    def _take(self, hint: _Hint, num_bytes: int) -> None:
        hint.num_bytes += num_bytes
        self._num_bytes += num_bytes

    async def _fetch(self, hint: _Hint) -> None:
        """Ask the handle's sources for what is not here."""
        fetches = self._services.fetches
        if fetches is None or not hint.sources:
            return
        store, session = self._services.store, hint.session
        here = store.peek(session.id, _REQUEST, hint.keys)
        wanted = min(
            self._left // 2 // session.layout.block_bytes, len(hint.keys) // KEY_BYTES - here
        )
        if wanted <= 0:
            return
        self._take(hint, wanted * session.layout.block_bytes)
        hint.is_fetching = True
        fetches.opened(session, _REQUEST, hint.handle, hint.sources)
        await fetches.promise(session, _REQUEST, hint.keys[: (here + wanted) * KEY_BYTES])
        if not hint.is_held:
            return
        coming = store.peek(session.id, _REQUEST, hint.keys) - here
        self._take(hint, (max(coming, 0) - wanted) * session.layout.block_bytes)
        self.counts["fetched_blocks"] += max(coming, 0)

    async def _promote(self, hint: _Hint, tiers: bytes) -> None:
        """Have blocks on SSD read, in order, some at a time. An engine that loads meanwhile waits for the
        same reads, not behind all of them."""
        layout = hint.session.layout
        step = max(1, CHUNK_BYTES // layout.block_bytes)
        for first in range(0, len(tiers), step):
            if not hint.is_held:
                return
            some = tiers[first : first + step]
            if _ON_SSD in some:
                await self._load(hint, layout, first, len(some))
                self.counts["promoted_blocks"] += some.count(_ON_SSD)

    async def _load(self, hint: _Hint, layout: BlockLayout, first: int, count: int) -> None:
        keys = hint.keys[first * KEY_BYTES : (first + count) * KEY_BYTES]
        for part in layout.parts:
            await self._services.store.load(hint.session.id, _REQUEST, keys, part.group, part.shard)

    # -- how it ends ---------------------------------------------------------------------------------

    def taken(self, session: bytes, request_id: str) -> None:
        """The engine asks for its request now: what was brought is its own to lease."""
        hint = self._hints.get(self._services.lookups.told(session, request_id))
        if hint is not None and hint.is_held:
            self.counts["used" if hint.num_bytes else "early"] += 1
            self._release(hint)

    def let_go(self) -> bool:
        """Nothing is held for hints any more; whether something was."""
        held = [hint for hint in self._hints.values() if hint.is_held]
        for hint in held:
            self._release(hint)
        return bool(held)

    def _unused(self, hint: _Hint) -> None:
        self.counts["unused"] += hint.is_held
        self._end(hint)

    def _release(self, hint: _Hint) -> None:
        """Its lease. The store's session stays while blocks are on their way from a peer under it."""
        hint.is_held = False
        self._services.store.release(hint.session.id, [_REQUEST])
        if hint.is_fetching:
            if hint.end is not None:
                hint.end.cancel()
            later = asyncio.get_running_loop().call_later
            hint.end = later(FETCH_S, self._end, hint)
        else:
            self._end(hint)

    def _end(self, hint: _Hint) -> None:
        if self._hints.get(hint.name) is not hint:
            return
        del self._hints[hint.name]
        if hint.end is not None:
            hint.end.cancel()
        self._num_bytes -= hint.num_bytes
        hint.is_held = False
        store, session = self._services.store, hint.session.id
        if self._services.fetches is not None:
            self._services.fetches.released(session, [_REQUEST])
        store.release(session, [_REQUEST])
        store.end_rights(session)
        store.quiet(session)
