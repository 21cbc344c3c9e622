"""Who a request is to the fabric: its namespace, block keys, salt and handle. Pure but for randomness.

Made once for each distinct (model revision, layout, adapter) among the engines that a request may go to;
only the handle is made per engine, because it names the engine's session. All of it is concluded from
one registry state: a later state makes a new identity, never patches an old one.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvfabric import hashing
from kvfabric.errors import LocalProtocolError
from kvfabric.handle import FORMAT_VERSION, Handle, Handoff, from_segments, mint
from kvfabric.keyring import Keyring
from kvfabric.registry.state import RegistryState, Tenant, namespace_of, scopes_of
from kvfabric.types import PUBLIC_TENANT, BlockKey, NodeId, TenantId, tenant_scope
from kvfabric_router.prompt import NO_LIMIT, Recognised


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What decides whether two engines' KV of the same tokens is the same."""

    model_revision: str
    layout_fingerprint: bytes
    block_tokens: int
    adapter: str = ""
    adapter_revision: str = ""


@dataclass(frozen=True, slots=True)
class PromptKeys:
    """The blocks of a prompt that may be reused, for engines of one ModelIdentity.

    `keys[:public_blocks]` belong to the namespace `public_tag`, the rest to `tenant_tag`. Neither the
    block that holds the prompt's last token (an engine computes at least one token) nor anything from
    a withdrawn version's text on is among them. `salt` goes into `cache_salt`. Without `is_exact` the keys
    are the router's own, and no engine has any of them.
    """

    block_tokens: int
    tenant_tag: bytes
    public_tag: bytes
    public_blocks: int
    keys: tuple[BlockKey, ...]
    salt: str
    is_exact: bool = True


def one_time_salt() -> str:
    """A salt that no other request has: whoever gets it reuses nothing and leaves nothing behind."""
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()


class Addressee(NamedTuple):
    """For whom a handle is. `sources`: other nodes that probably hold more of the prompt than theirs.
    `handoff`: what its engine has a part in."""

    session: bytes
    sources: tuple[NodeId, ...] = ()
    handoff: Handoff | None = None


class RequestIdentity:
    """One tenant's prompt under one registry state. Raises UnknownTenant if the keyring lacks a secret.

    `ids_per_token`: 1, or more where the tokens are not known and `token_ids` stand for them.
    """

    def __init__(
        self,
        *,
        tenant: Tenant,
        state: RegistryState,
        keyring: Keyring,
        token_ids: Sequence[int],
        recognised: Recognised,
        ids_per_token: int = 1,
    ) -> None:
        self.state = state
        self._ids_per_token = ids_per_token
        self.recognised = recognised
        self._tenant = tenant
        self._keyring = keyring
        self._token_ids = token_ids
        self._keys: dict[ModelIdentity, PromptKeys] = {}

    def keys(self, model: ModelIdentity) -> PromptKeys:
        """Hashes at the first call for a `model` (1-3 us a block), then remembers."""
        if model not in self._keys:
            self._keys[model] = self._hash(model)
        return self._keys[model]

    def _public_tokens(self, model: ModelIdentity) -> int:
        # A public text was approved for the model as it is, not for what an adapter makes of it.
        return 0 if model.adapter else self.recognised.public_tokens

    def _namespace_key(self, tenant: TenantId, model: ModelIdentity) -> bytes:
        namespace = namespace_of(
            self.state,
            tenant,
            model.model_revision,
            model.layout_fingerprint,
            model.adapter,
            model.adapter_revision,
        )
        return hashing.namespace_key(namespace, self._keyring.tenant_secret(tenant))

    def _hash(self, model: ModelIdentity) -> PromptKeys:
        recognised = self.recognised
        public_tokens = self._public_tokens(model)
        key = self._namespace_key(self._tenant.tenant_id, model)
        public_key = self._namespace_key(PUBLIC_TENANT, model) if public_tokens else None
        usable = len(self._token_ids) - 1
        if recognised.cacheable_tokens != NO_LIMIT:
            usable = min(usable, recognised.cacheable_tokens)
        hasher = hashing.BlockHasher(
            key,
            model.block_tokens * self._ids_per_token,
            segments=recognised.segments,
            public_key=public_key,
            public_tokens=public_tokens,
        )
        keys = hasher.extend(self._token_ids[: max(usable, 0)])
        return PromptKeys(
            block_tokens=model.block_tokens,
            tenant_tag=hashing.namespace_tag(key),
            public_tag=hashing.namespace_tag(public_key) if public_key else b"",
            public_blocks=min(public_tokens // model.block_tokens, len(keys)),
            keys=tuple(keys),
            salt=self._salt(key),
            is_exact=self._ids_per_token == 1,
        )

    def _salt(self, key: bytes) -> str:
        # An engine that caches by salt and tokens alone cannot stop at a withdrawn version's text.
        if self.recognised.cacheable_tokens != NO_LIMIT or self._tenant.opted_out:
            return one_time_salt()
        return hashing.salt(key, self.recognised.segments)

    def mint(
        self,
        model: ModelIdentity,
        *,
        to: Addressee,
        request_id: str,
        expires_at: int,
        no_store: bool = False,
        no_read: bool = False,
    ) -> str:
        """The handle for one engine session; `expires_at` in Unix seconds.

        If it is too long, no node is named in it; then the last segments are left out and caching ends where
        they start.
        Raises LocalProtocolError if it is too long even so.
        """
        key_id, key = self._keyring.current_handle_key()
        recognised, sources = self.recognised, to.sources
        while True:
            handle = Handle(
                version=FORMAT_VERSION,
                key_id=key_id,
                tenant=self._tenant.tenant_id,
                model_revision=model.model_revision,
                adapter=model.adapter,
                adapter_revision=model.adapter_revision,
                layout_fingerprint=model.layout_fingerprint,
                segments=from_segments(recognised.segments),
                public_tokens=0 if model.adapter else recognised.public_tokens,
                cacheable_tokens=recognised.cacheable_tokens,
                epochs=self.state.epochs_of(self._scopes(model, recognised)),
                audience=to.session,
                request_id=request_id,
                expires_at=expires_at,
                sources=sources,
                no_store=no_store or self._tenant.opted_out,
                no_read=no_read or self._tenant.opted_out,
                handoff=to.handoff,
            )
            try:
                return mint(handle, key)
            except LocalProtocolError:
                if not sources and not recognised.segments:
                    raise
                if not sources:
                    recognised = _without_last_segment(recognised)
                sources = ()

    def _scopes(self, model: ModelIdentity, recognised: Recognised) -> tuple[str, ...]:
        templates = [segment.template for segment in recognised.segments]
        scopes = scopes_of(self._tenant.tenant_id, model.model_revision, model.adapter, templates)
        return (*scopes, tenant_scope(PUBLIC_TENANT)) if recognised.public_tokens else scopes


def _without_last_segment(recognised: Recognised) -> Recognised:
    *kept, last = recognised.segments
    return Recognised(
        segments=tuple(kept),
        cacheable_tokens=last.first_token,
        public_tokens=min(recognised.public_tokens, last.first_token),
    )
