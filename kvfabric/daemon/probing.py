"""What an auditor asks, and how: for chains of blocks, by the terms of one state, through the handlers.

A chain tells under what it was stored (`store.sampling`); `Terms` make of it what a router would have put
into a handle, and `ProbingEngine` asks as any engine does.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from kvfabric.daemon import handlers
from kvfabric.daemon.handlers import Caller, Services
from kvfabric.daemon.sessions import Session
from kvfabric.errors import KVFabricError
from kvfabric.handle import FORMAT_VERSION, Handle, from_segments, mint
from kvfabric.protocol.messages import Match, OpenHandle
from kvfabric.registry.state import SERVING, RegistryState, scopes_of
from kvfabric.store.lease import RequestGrant
from kvfabric.store.sampling import Chain
from kvfabric.tiers.base import Lineage
from kvfabric.types import (
    DEFAULT_TENANT,
    PUBLIC_TENANT,
    Incarnation,
    Segment,
    SessionId,
    TenantId,
    tenant_scope,
)

_HANDLE_S = 60

Epochs = tuple[tuple[str, int], ...]


class Question(NamedTuple):
    """A chain, and the terms of a request for it. Segments' first tokens are in blocks: a chain tells no
    more."""

    chain: Chain
    tenant: TenantId
    tag: bytes
    public_tag: bytes
    public_blocks: int
    segments: tuple[Segment, ...]


class ProbingEngine:
    """One that nobody sees, for one question: its session is the store's alone, and gone at the end."""

    def __init__(self, services: Services, model: Session) -> None:
        self._services = services
        self._hello = model.hello
        session = Session(
            SessionId(secrets.token_bytes(16)), model.hello, model.layout, model.fingerprint
        )
        self._caller = Caller(services, session, memoryview(b""))
        self._num = 0

    def __enter__(self) -> ProbingEngine:
        session = self._caller.session
        self._services.store.open_session(session.id, session.layout, counts=False)
        return self

    def __exit__(self, *exc: object) -> None:
        self._services.store.end_rights(self._caller.session.id)
        self._services.store.quiet(self._caller.session.id)

    def by_handle(self, question: Question, epochs: Epochs) -> int:
        """Blocks promised to a request with a handle; 0 if that is refused."""
        request = self._next()
        try:
            handlers.open_handle(
                self._caller, OpenHandle(request, self._mint(question, request, epochs))
            )
        except KVFabricError:  # that it is refused for the right reason is what the control is for
            return 0
        return self._match(question, request)

    def by_grant(self, question: Question, epochs: Epochs) -> int:
        """Blocks promised to a request that was opened when its handle was good."""
        request = self._next()
        grant = RequestGrant(
            tenant=question.tenant,
            namespace_tag=question.tag,
            public_tag=question.public_tag,
            public_blocks=question.public_blocks,
            cacheable_blocks=-1,
            block_tokens=self._caller.session.layout.block_tokens,
            segments=self._placed(question),
            epochs=epochs,
            no_store=True,
            no_read=False,
        )
        self._services.store.open_request(self._caller.session.id, request, grant)
        return self._match(question, request)

    def _next(self) -> str:
        self._num += 1
        return f"audit-{self._num}"

    def _match(self, question: Question, request: str) -> int:
        matched = handlers.match(self._caller, Match(request, question.chain.keys))
        self._services.store.release(self._caller.session.id, [request])
        return matched.num_blocks

    def _placed(self, question: Question) -> tuple[Segment, ...]:
        tokens = self._caller.session.layout.block_tokens
        return tuple(
            replace(segment, first_token=segment.first_token * tokens)
            for segment in question.segments
        )

    def _mint(self, question: Question, request: str, epochs: Epochs) -> str:
        hello = self._hello
        key_id, key = self._services.keyring.current_handle_key()
        handle = Handle(
            version=FORMAT_VERSION,
            key_id=key_id,
            tenant=question.tenant,
            model_revision=hello.model_revision,
            adapter=hello.adapter,
            adapter_revision=hello.adapter_revision,
            layout_fingerprint=self._caller.session.fingerprint,
            segments=from_segments(self._placed(question)),
            public_tokens=question.public_blocks * self._caller.session.layout.block_tokens,
            cacheable_tokens=-1,
            epochs=epochs,
            audience=self._caller.session.id,
            request_id=request,
            expires_at=int(self._services.wall_clock()) + _HANDLE_S,
            no_store=True,
        )
        return mint(handle, key)


class Terms:
    """What one state of the registry says of chains. Pure."""

    def __init__(self, state: RegistryState) -> None:
        self.state = state
        templates = state.templates.values()
        self._serving = {t.incarnation for t in templates if t.state == SERVING}
        self._names = {t.incarnation: (t.name, t.version) for t in templates}

    def withdrawn(self, lineage: Lineage) -> list[bytes]:
        """Its incarnations that do not serve."""
        return [one for one in lineage.incarnations if one not in self._serving]

    def first_dead(self, chain: Chain, names: Collection[bytes]) -> int:
        """Position of the first block that may not be served for one of these names; the chain's length if
        all may: a version may have been promoted again."""
        for position, lineage in enumerate(chain.lineages):
            if lineage.namespace_tag in names or lineage.tenant.encode() in names:
                return position
            if any(one in names for one in self.withdrawn(lineage)):
                return position
        return chain.num_blocks

    def question(self, chain: Chain, num_blocks: int) -> Question:
        """As a request has it whose prompt holds the segments of the first `num_blocks`."""
        last = chain.lineages[-1]
        public = sum(lineage.tenant == PUBLIC_TENANT for lineage in chain.lineages)
        return Question(
            chain=chain,
            tenant=DEFAULT_TENANT if last.tenant == PUBLIC_TENANT else last.tenant,
            tag=last.namespace_tag,
            public_tag=chain.lineages[0].namespace_tag if public else b"",
            public_blocks=public,
            segments=tuple(
                Segment(*self._names.get(one, ("?", "?")), one, block)
                for block, one in _beginnings(chain.lineages[:num_blocks])
            ),
        )

    def epochs(self, question: Question, model: Session) -> Epochs:
        """Those that a router puts into a handle for it."""
        hello = model.hello
        templates = [segment.template for segment in question.segments]
        scopes = scopes_of(question.tenant, hello.model_revision, hello.adapter, templates)
        if question.public_blocks:
            scopes = (*scopes, tenant_scope(PUBLIC_TENANT))
        return self.state.epochs_of(scopes)


def _beginnings(lineages: Sequence[Lineage]) -> Iterator[tuple[int, Incarnation]]:
    """(block, incarnation) of each segment that begins in these leading blocks."""
    known = 0
    for block, lineage in enumerate(lineages):
        for one in lineage.incarnations[known:]:
            yield block, Incarnation(one)
        known = len(lineage.incarnations)
