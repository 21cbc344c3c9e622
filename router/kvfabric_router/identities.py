"""What one call is to the fabric: its identity for each tokenizer and its keys for each model, made once.

Where the router cannot know an engine's tokens (it has no tokenizer for it, or a chat has tools or images) a
request still has a namespace, a salt and a handle, as long as no registered template could stand in it:
whether one does, and from which token on, is then not known. Its keys are of its text, and only tell where
one that begins alike went before (`PromptKeys.is_exact`).
"""

from __future__ import annotations

from collections.abc import Callable

from kvfabric.errors import UnknownTenant
from kvfabric.keyring import Keyring
from kvfabric.registry.state import RegistryState, Tenant
from kvfabric_router.api import ModelRequest
from kvfabric_router.identity import PromptKeys, RequestIdentity
from kvfabric_router.keyring_reader import KeyringReader
from kvfabric_router.policy import EngineView
from kvfabric_router.registry_view import RegistryView
from kvfabric_router.tokenizers import BYTES_PER_TOKEN, UNKNOWN, Tokens

TokensOf = Callable[[str], Tokens | None]
"""Of a tokenizer's name: the prompt's tokens, None if the router cannot know them."""


class Identities:
    """Of one call under one registry state; None without the right to mint by any. Raises ApiError 400."""

    def __init__(
        self,
        tenant: Tenant,
        request: ModelRequest,
        state: RegistryState | None,
        *,
        tokens_of: TokensOf,
        keyring: KeyringReader,
        registry: RegistryView,
    ) -> None:
        self.state = state
        self._tenant = tenant
        self._request = request
        self._tokens_of = tokens_of
        self._keyring = keyring
        self._registry = registry
        self._made: dict[str, RequestIdentity | None] = {}

    def of(self, tokenizer: str) -> RequestIdentity | None:
        """None if nothing may be reused by an engine with this tokenizer."""
        if tokenizer not in self._made:
            self._made[tokenizer] = self._make(tokenizer)
        return self._made[tokenizer]

    def keys(self, engine: EngineView) -> PromptKeys | None:
        identity = self.of(engine.tokenizer)
        if identity is None or engine.model is None:
            return None
        try:
            return identity.keys(engine.model)
        except UnknownTenant:
            return None

    def reason(self, engine: EngineView) -> str:
        """Why `keys` is None."""
        if self.state is None:
            return "no_epoch_lease"
        if engine.model is None:
            return "unknown_engine"
        name = engine.tokenizer
        if name != UNKNOWN and self._tokens_of(name) is not None:
            return "no_secret"
        if self._tokens_of(UNKNOWN) is None:
            return "opaque_prompt"
        if self._may_hold_templates():
            return "no_tokenizer" if name == UNKNOWN else "opaque_prompt"
        return "no_secret"

    def _make(self, name: str) -> RequestIdentity | None:
        templates = self._registry.templates(name)
        if self.state is None or templates is None:
            return None
        tokens = self._tokens_of(name)
        if name != UNKNOWN and tokens is None:
            return self.of(UNKNOWN)
        if tokens is None or (name == UNKNOWN and self._may_hold_templates()):
            return None
        keyring = self._keyring_of_tenant()
        if keyring is None:
            return None
        is_exact = name != UNKNOWN or self._request.token_ids is not None
        return RequestIdentity(
            tenant=self._tenant,
            state=self.state,
            keyring=keyring,
            token_ids=tokens,
            recognised=templates.recognise(tokens),
            ids_per_token=1 if is_exact else BYTES_PER_TOKEN,
        )

    def _may_hold_templates(self) -> bool:
        """Of a prompt whose tokens are not known, or not what they spell: of a text alone it can be told."""
        templates = self._registry.templates(UNKNOWN)
        if not templates:
            return False
        tokens = self._tokens_of(UNKNOWN)
        if self._request.text is None or tokens is None:
            return True
        found = templates.recognise(tokens)
        return bool(found.segments) or found.cacheable_tokens >= 0

    def _keyring_of_tenant(self) -> Keyring | None:
        keyring = self._keyring.current()
        try:
            if keyring is not None:
                keyring.tenant_secret(self._tenant.tenant_id)
        except UnknownTenant:
            self._keyring.reread()  # the tenant is newer than what was read
            self._keyring.unknown()
        return keyring
