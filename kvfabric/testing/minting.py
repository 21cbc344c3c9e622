"""What a router does for an engine's request, for tests and benchmarks that have none: mint its handle."""

from __future__ import annotations

import time
from pathlib import Path

from kvfabric.handle import FORMAT_VERSION, Handle, Handoff, from_segments, mint
from kvfabric.hashing import BlockHasher, layout_fingerprint
from kvfabric.keyring import Keyring
from kvfabric.protocol.messages import HandleOpened
from kvfabric.registry.state import RegistryState, scopes_of
from kvfabric.testing.engine import BLOCK_TOKENS, TinyEngine, tokens_of
from kvfabric.types import PUBLIC_TENANT, BlockKey, Incarnation, Segment, TenantId, tenant_scope

TTL_S = 600


class Minter:
    """Handles by the keyring in `directory`, which must be there already."""

    def __init__(self, directory: Path) -> None:
        keyring = Keyring.create_or_open(directory)
        self.sources: tuple[str, ...] = ()  # of each handle: nodes that probably hold the prefix
        self.handoff: Handoff | None = None  # likewise: which one the request has a part in
        self._key_id, self._key = max(keyring.handle_keys().items())

    def handle(
        self,
        engine: TinyEngine,
        request: str,
        state: RegistryState,
        segments: tuple[Segment, ...] = (),
        *,
        tenant: TenantId,
        public_tokens: int = 0,
    ) -> str:
        """Made under `state`, for the engine's session, of a prompt with these segments."""
        hello = engine.hello
        scopes = scopes_of(
            tenant, hello.model_revision, hello.adapter, [s.template for s in segments]
        )
        if public_tokens:
            scopes = (*scopes, tenant_scope(PUBLIC_TENANT))
        handle = Handle(
            version=FORMAT_VERSION,
            key_id=self._key_id,
            tenant=tenant,
            model_revision=hello.model_revision,
            adapter=hello.adapter,
            adapter_revision=hello.adapter_revision,
            layout_fingerprint=layout_fingerprint(hello.layout),
            segments=from_segments(segments),
            public_tokens=public_tokens,
            cacheable_tokens=-1,
            epochs=state.epochs_of(scopes),
            audience=engine.client.session,
            request_id=request,
            expires_at=int(time.time()) + TTL_S,
            sources=self.sources,
            handoff=self.handoff,
        )
        return mint(handle, self._key)


def segment_of(
    state: RegistryState, name: str, version: str, first_token: int = 0, num_tokens: int = 0
) -> Segment:
    """The version as it is registered."""
    known = state.templates[name, version]
    return Segment(name, version, known.incarnation, first_token, num_tokens)


def keys_of(opened: HandleOpened, prompt: str, num_blocks: int) -> list[BlockKey]:
    """As an engine makes them of what its node answered."""
    segments = tuple(
        Segment(s.template, s.version, Incarnation(s.incarnation), s.first_token)
        for s in opened.segments
    )
    hasher = BlockHasher(
        opened.namespace_key,
        BLOCK_TOKENS,
        segments=segments,
        public_key=opened.public_key or None,
        public_tokens=opened.public_tokens,
    )
    return hasher.extend(tokens_of(prompt, num_blocks))
