"""The registry as this router knows it: newest state, what follows from it, and the lease to act on it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterator

from kvfabric.registry.lease import EpochLease
from kvfabric.registry.state import RegistryState, Tenant
from kvfabric_router.api import ApiError
from kvfabric_router.auth import TenantDirectory
from kvfabric_router.prompt import TemplateIndex
from kvfabric_router.tokenizers import Tokenizers


class RegistryView:
    """Written by the link to the registry's node, read by every request. Sync.

    `required` is false for a router without any node: it then serves the tenant `default`, and
    without a lease nothing is ever reused.
    """

    def __init__(
        self,
        *,
        lease: EpochLease,
        required: bool = True,
        tokenizers: Tokenizers | None = None,
    ) -> None:
        self.lease = lease
        self.tokenizers = tokenizers or Tokenizers()
        self.holder_id = f"router-{secrets.token_hex(8)}"
        self._required = required
        self._state: RegistryState | None = None if required else RegistryState()
        self._directory = TenantDirectory(RegistryState())
        self._templates: dict[str, TemplateIndex] = {}
        self._unsent: dict[object, int] = {}
        self._sent = asyncio.Event()
        self.changed = asyncio.Event()
        """Set when a newer state was applied: to be acknowledged."""

    @property
    def state(self) -> RegistryState | None:
        """The newest state heard of; None before the first."""
        return self._state

    def apply(self, state: RegistryState) -> None:
        """Every request from now on follows `state`. An older one of the same registry is ignored."""
        known = self._state
        same = known is not None and known.registry_id == state.registry_id
        if same and known is not None and state.version <= known.version:
            return
        self._state = state
        self._directory = TenantDirectory(state)
        self._templates = {
            name: TemplateIndex(state, tokenizer) for name, tokenizer in self.tokenizers.items()
        }
        self.changed.set()

    def authenticate(self, authorization: str | None) -> Tenant:
        """Raises ApiError 401, or 503 while no registry was heard of: who has a key is not known yet."""
        if self._state is None:
            raise ApiError(503, "The registry of tenants is not reachable yet.", code="not_ready")
        return self._directory.authenticate(authorization)

    def usable(self) -> RegistryState | None:
        """The state to mint by, or None: then nothing may be reused."""
        return self._state if self.lease.allows(self._state) else None

    def templates(self, tokenizer: str) -> TemplateIndex | None:
        """The versions of the newest state in a tokenizer's tokens; None for one we do not have."""
        return self._templates.get(tokenizer)

    @contextlib.contextmanager
    def sending(self, version: int) -> Iterator[Callable[[], None]]:
        """Around the sending of a request minted by the state `version`; call the value once it is out."""
        token = object()
        self._unsent[token] = version

        def sent() -> None:
            if self._unsent.pop(token, None) is not None:
                self._sent.set()

        try:
            yield sent
        finally:
            sent()

    async def wait_sent(self) -> None:
        """Until every request minted by an older state than the newest is on its way.

        Only then is the newest acknowledged: whoever withdraws a version is told of no success while
        a request that uses it may still be sent.
        """
        while self._state is not None and any(
            version < self._state.version for version in self._unsent.values()
        ):
            self._sent.clear()
            await self._sent.wait()
