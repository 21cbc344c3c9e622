"""What the node does with each message of an engine: one function per message.

Translates between wire and store; decides nothing that the store decides. Handlers of `IN_ORDER` answer
at once and in the order of a connection's requests; those of `CONCURRENT` wait for copies or a disk and
may overtake each other.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from kvfabric import handle as handles
from kvfabric.daemon.grants import Terms, Weights, granted, state_of, terms_of
from kvfabric.daemon.handoffs import MAY_COME, Awaited, Handoffs
from kvfabric.daemon.lookups import Lookups
from kvfabric.daemon.pools import Pools
from kvfabric.daemon.sessions import Session
from kvfabric.errors import BadHandle, Fenced, RemoteProtocolError
from kvfabric.keyring import Keyring
from kvfabric.protocol.messages import (
    Abort,
    Commit,
    Committed,
    Confirm,
    Confirmed,
    Done,
    EngineEvents,
    HandleOpened,
    Load,
    Located,
    Match,
    Matched,
    OpenHandle,
    Ping,
    Placed,
    Pong,
    Recheck,
    Rechecked,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
    WireSegment,
)
from kvfabric.registry.state import RegistryState, scopes_of
from kvfabric.store.store import BlockStore
from kvfabric.types import (
    DEFAULT_TENANT,
    KEY_BYTES,
    MissReason,
    TenantId,
)

if TYPE_CHECKING:
    from kvfabric.daemon.fetching import Fetches
    from kvfabric.daemon.meters import Meters
    from kvfabric.daemon.prefetching import Prefetches


class EngineEventSink(Protocol):
    """Where engines' HBM events go (`EventStream` is one)."""

    def engine_events(self, session: bytes, events: EngineEvents) -> None: ...


@dataclass(slots=True)
class Services:
    """What handlers work with. `wall_clock`: Unix seconds, for the expiry of handles."""

    store: BlockStore
    keyring: Keyring
    registry: Callable[[], RegistryState | None]
    events: EngineEventSink
    require_handle: bool
    wall_clock: Callable[[], float]
    lookups: Lookups = field(default_factory=Lookups)
    handoffs: Handoffs = field(default_factory=Handoffs)
    heard: Callable[[bytes, Ping], Pong] = lambda _session, _ping: Pong(0, ())
    """A session says what its HBM let go of, and is told what to."""
    pools: Pools = field(default_factory=lambda: Pools(lambda _: None))
    fetches: Fetches | None = None
    """Blocks from other nodes; None where they exchange none, and until they can."""
    meters: Meters | None = None
    """What is measured of loads; None where nobody asks."""
    prefetches: Prefetches | None = None
    """What routers have brought in ahead; None where nobody asks for it."""
    key_unknown: Callable[[], None] = lambda: None
    """Called when a request names a tenant or is signed with a key that is not here."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The connection a request came over. `window`: what its process writes, empty for none."""

    services: Services
    session: Session
    window: memoryview = field(repr=False)


def open_handle(caller: Caller, message: OpenHandle) -> HandleOpened:
    """Verify the handle and open the request. Raises BadHandle, Fenced, UnknownTenant."""
    services, session = caller.services, caller.session
    terms = _terms_of(caller, message) if message.handle else _default_terms(caller)
    given = granted(services, terms, weights_of(session))
    services.store.open_request(session.id, message.request_id, given.grant)
    if terms.told_id:
        services.lookups.opened(session.id, message.request_id, terms.told_id, terms.tenant)
    if terms.sources and services.fetches is not None:
        services.fetches.opened(session, message.request_id, message.handle, terms.sources)
    handoff = terms.handoff
    if handoff is not None:
        services.handoffs.opened(
            session.id, message.request_id, terms.tenant, handoff, message.handle
        )
    return HandleOpened(
        namespace_key=given.namespace_key,
        public_key=given.public_key,
        public_tokens=terms.public_tokens,
        cacheable_tokens=terms.cacheable_tokens,
        segments=tuple(
            WireSegment(s.template, s.version, s.incarnation, s.first_token) for s in terms.segments
        ),
        no_store=given.grant.no_store,
        no_read=given.grant.no_read,
        hands_over=handoff is not None and not handoff.wait_ms,
        wait_s=handoff.wait_ms / 1e3 if handoff is not None else 0.0,
    )


def weights_of(session: Session) -> Weights:
    hello = session.hello
    return Weights(
        hello.model_revision,
        hello.adapter,
        hello.adapter_revision,
        session.fingerprint,
        session.layout.block_tokens,
    )


def match(caller: Caller, message: Match) -> Matched:
    _check_keys(message.keys)
    services, session = caller.services, caller.session
    if services.prefetches is not None:
        services.prefetches.taken(session.id, message.request_id)
    matched = services.store.match(session.id, message.request_id, message.keys)
    if (
        matched.reason == MissReason.LEASE_BUDGET
        and services.prefetches is not None
        and services.prefetches.let_go()
    ):
        matched = services.store.match(session.id, message.request_id, message.keys)
    services.lookups.matched(
        session.id,
        message.request_id,
        len(message.keys) // KEY_BYTES,
        matched.tiers,
        matched.reason,
    )
    return matched


async def match_with_peers(caller: Caller, message: Match) -> Matched:
    """As `match`, of a request that other nodes may have more for: they are asked first, for a moment.
    Of one whose blocks another engine computes, once there are more of them."""
    _check_keys(message.keys)
    services, session = caller.services, caller.session
    awaited = services.handoffs.awaited(session.id, message.request_id)
    if awaited is not None and await _awaits_more(caller, message, awaited):
        matched = services.store.match(session.id, message.request_id, message.keys, counts=False)
        if matched.reason in MAY_COME:
            return msgspec.structs.replace(matched, more=True)
    if services.fetches is not None:
        await services.fetches.promise(session, message.request_id, message.keys)
    return match(caller, message)


async def _awaits_more(caller: Caller, message: Match, awaited: Awaited) -> bool:
    services, session, request_id = caller.services, caller.session, message.request_id
    handoffs, keys = services.handoffs, message.keys
    if not awaited.is_begun:
        awaited.is_begun = True
        if not handoffs.is_here(awaited):
            if services.fetches is None:
                handoffs.over(awaited)
            else:
                left_s = awaited.deadline - time.monotonic()
                following = services.fetches.follow(
                    session, request_id, awaited.handle, awaited.node, keys, left_s
                )
                following.add_done_callback(lambda _: handoffs.over(awaited))
    return await handoffs.more(
        awaited,
        lambda: services.store.peek(session.id, request_id, keys, arriving=False),
        beyond=message.beyond,
        wanted=len(keys) // KEY_BYTES,
        wait_s=message.wait_s,
    )


def asks_peers(caller: Caller, message: Request) -> bool:
    if not isinstance(message, Match):
        return False
    services, session = caller.services, caller.session.id
    if services.handoffs.awaited(session, message.request_id) is not None:
        return True
    fetches = services.fetches
    return fetches is not None and fetches.concerns(session, message.request_id)


async def load(caller: Caller, message: Load) -> Located:
    """On cancellation nothing becomes visible that was not before."""
    _check_keys(message.keys)
    services, session = caller.services, caller.session
    located = await services.store.load(
        session.id, message.request_id, message.keys, message.group, message.shard
    )
    if services.meters is not None:
        part = (session.id, message.request_id, message.group, message.shard)
        services.meters.located(part, located.num_blocks * located.part_bytes)
    return services.pools.name_pools(session, message, located)


def confirm(caller: Caller, message: Confirm) -> Confirmed:
    _check_keys(message.keys)
    num_keys = len(message.keys) // KEY_BYTES
    _check_vector("generations", message.generations, 4, num_keys)
    confirmed = caller.services.store.confirm(
        caller.session.id,
        message.request_id,
        message.keys,
        message.generations,
        message.group,
        message.shard,
    )
    if caller.services.meters is not None:
        part = (caller.session.id, message.request_id, message.group, message.shard)
        caller.services.meters.confirmed(part, is_good=confirmed.num_blocks == num_keys)
    return confirmed


async def recheck(caller: Caller, message: Recheck) -> Rechecked:
    """On cancellation what was found so far is out."""
    _check_keys(message.keys)
    return Rechecked(
        await caller.services.store.recheck(
            caller.session.id, message.request_id, message.keys, message.group, message.shard
        )
    )


def reserve(caller: Caller, message: Reserve) -> Reserved:
    _check_keys(message.keys)
    _check_vector("parent", message.parent, KEY_BYTES, 1)
    return caller.services.store.reserve(
        caller.session.id,
        message.request_id,
        message.parent,
        message.keys,
        message.group,
        message.shard,
    )


async def commit(caller: Caller, message: Commit) -> Committed:
    """Answered only when the window is not read any more. On cancellation nothing was stored."""
    count = len(message.indexes) // 4
    _check_vector("indexes", message.indexes, 4, count)
    _check_vector("offsets", message.offsets, 8, count)
    return await caller.services.store.commit(
        caller.session.id, message.reservation, message.indexes, caller.window, message.offsets
    )


def abort(caller: Caller, message: Abort) -> Done:
    caller.services.store.abort(caller.session.id, message.reservation)
    return Done()


def release(caller: Caller, message: Release) -> Done:
    caller.services.store.release(caller.session.id, message.request_ids)
    caller.services.lookups.released(caller.session.id, message.request_ids)
    caller.services.handoffs.released(caller.session.id, message.request_ids)
    if caller.services.fetches is not None:
        caller.services.fetches.released(caller.session.id, message.request_ids)
    return Done()


def engine_events(caller: Caller, message: EngineEvents) -> Done:
    caller.services.pools.heard(caller.session.id, message)
    caller.services.events.engine_events(caller.session.id, message)
    return Done()


def placed(caller: Caller, message: Placed) -> Done:
    caller.services.pools.placed(caller.session.id, message)
    return Done()


def ping(caller: Caller, message: Ping) -> Pong:
    pong = caller.services.heard(caller.session.id, message)
    pools = caller.services.pools.offered(caller.session.id)
    return msgspec.structs.replace(pong, pools=pools) if pools else pong


IN_ORDER: Mapping[type[Request], Callable[[Caller, Any], Reply]] = {
    OpenHandle: open_handle,
    Match: match,
    Confirm: confirm,
    Reserve: reserve,
    Abort: abort,
    Release: release,
    EngineEvents: engine_events,
    Placed: placed,
    Ping: ping,
}
CONCURRENT: Mapping[type[Request], Callable[[Caller, Any], Awaitable[Reply]]] = {
    Load: load,
    Commit: commit,
    Recheck: recheck,
}


def _terms_of(caller: Caller, message: OpenHandle) -> Terms:
    services, session = caller.services, caller.session
    try:
        opened = handles.open_handle(
            message.handle,
            services.keyring.handle_keys(),
            audience=session.id,
            now=services.wall_clock(),
        )
    except BadHandle:
        services.key_unknown()  # perhaps: signed with a key that another node has by now
        raise
    # Engines decorate the id that the router gave a request (vLLM: `cmpl-ID-0`); none invents another.
    if opened.request_id not in message.request_id:
        raise BadHandle("handle was made for another request")
    return terms_for(services, session, opened)


def terms_for(services: Services, session: Session, opened: handles.Handle) -> Terms:
    """Of a genuine handle made for `session`. Raises BadHandle for another model or layout than the
    session's, Fenced for what has changed since."""
    hello = session.hello
    if opened.model_revision != hello.model_revision:
        raise BadHandle(f"handle for model {opened.model_revision}, not {hello.model_revision}")
    if (opened.adapter, opened.adapter_revision) != (hello.adapter, hello.adapter_revision):
        raise BadHandle(f"handle for adapter {opened.adapter!r}, not {hello.adapter!r}")
    if opened.layout_fingerprint != session.fingerprint:
        raise BadHandle("handle for another layout than this session's")
    # The store would refuse each call; refused here, the engine's own HBM serves nothing by it either.
    try:
        state = state_of(services)
    except Fenced:
        reason = MissReason.NO_EPOCH_LEASE
        services.lookups.refused(opened.request_id, TenantId(opened.tenant), reason)
        raise
    reason = state.fence_reason(opened.epochs, opened.to_segments())
    if reason is not MissReason.NONE:
        services.lookups.refused(opened.request_id, TenantId(opened.tenant), reason)
        raise Fenced(f"what the handle was made under has changed since: {reason.value}")
    return terms_of(opened)


def _default_terms(caller: Caller) -> Terms:
    if caller.services.require_handle:
        raise BadHandle("this node serves no request without a handle (require_handle)")
    hello, state = caller.session.hello, state_of(caller.services)
    scopes = scopes_of(DEFAULT_TENANT, hello.model_revision, hello.adapter)
    return Terms(tenant=DEFAULT_TENANT, epochs=state.epochs_of(scopes))


def _check_keys(keys: bytes) -> None:
    if not keys or len(keys) % KEY_BYTES:
        raise RemoteProtocolError(f"keys are {KEY_BYTES} bytes each, not {len(keys)} in all")


def _check_vector(name: str, vector: bytes, item_bytes: int, count: int) -> None:
    if len(vector) != item_bytes * count:
        raise RemoteProtocolError(f"{count} {name} have {item_bytes * count} B, not {len(vector)}")
