"""`Registry`: epochs, tenants, templates, and the log of who changed them.

The verbs are the same for every home of the registry; what differs is `commit`, which makes one change
durable, in order, and publishes the state after it. What a change does is decided in `changes`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, TypeVar

from kvfabric.errors import ConfigError
from kvfabric.registry import changes
from kvfabric.registry.audit import AuditRecord
from kvfabric.registry.changes import Draft, TenantChange
from kvfabric.registry.holders import Ack
from kvfabric.registry.state import (
    RegistryState,
    TemplateVersion,
    Tenant,
    TenantLimits,
    TierQuota,
)
from kvfabric.types import TenantId

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Change:
    """A change that is durable. `version`: of the registry from it on; holders acknowledge that.

    `audit_head`: 32 bytes, the newest link of the audit log, this change included.
    """

    action: str
    scope: str
    old_epoch: int
    new_epoch: int
    version: int
    audit_head: bytes


@dataclass(frozen=True, slots=True)
class RegistryStatus:
    """For status, metrics and doctor. `home`: embedded, or the address of the directory, without secrets.

    `state`: serving, or why nothing may be served: `no_lease`, or `new_store` for two lease times after the
    store turned out to be another one. `detail`: what was wrong last, empty if nothing is. `num_errors` by
    reason and `num_restores` (what a store had lost was given back) count since start.
    """

    home: str
    state: str
    detail: str = ""
    lease_left_s: float = float("inf")
    num_holders: int = 0
    num_restores: int = 0
    num_errors: Mapping[str, int] = field(default_factory=dict)


class Registry(ABC):
    """An async context manager. Every verb that changes something is durable when it returns.

    On cancellation a verb may still take effect; the next state shows. `requested_by` goes into the audit
    log. Raises ConfigError for what could never be right, NotFound, and Conflict for what the present
    state forbids; then nothing changed.
    """

    wall_clock: Callable[[], float] = staticmethod(time.time)
    """Unix seconds."""

    @abstractmethod
    async def __aenter__(self) -> Self: ...

    @abstractmethod
    async def __aexit__(self, *exc: object) -> None: ...

    @property
    @abstractmethod
    def state(self) -> RegistryState:
        """The newest published state; immutable."""

    @abstractmethod
    async def wait_newer(self, version: int) -> RegistryState:
        """The newest state as soon as it is newer than `version`."""

    def usable(self) -> RegistryState | None:
        """The state to serve by now, or None without an epoch lease: then every lookup is a miss.

        A registry that nobody else can change needs no lease.
        """
        return self.state

    @property
    @abstractmethod
    def status(self) -> RegistryStatus: ...

    @property
    def tracks_holders(self) -> bool:
        """Whether `reached` knows every holder of an epoch lease, this process included."""
        return False

    async def reached(self, version: int) -> list[Ack]:
        """Wait until every holder applied `version` or was waited out, one lease and a grace after the call.

        On cancellation the change stands. Only where `tracks_holders`.
        """
        raise NotImplementedError

    @abstractmethod
    async def commit(
        self, decide: Callable[[RegistryState], Draft[Result]], requested_by: str
    ) -> tuple[Result, Change]:
        """Make one change: `decide` gets the newest state, pure, and no other change comes between.

        Epochs and version never go back, whatever `decide` says.
        """

    @abstractmethod
    async def audit_log(self) -> list[AuditRecord]:
        """The whole log, oldest first. Raises Conflict if its chain does not hold."""

    holder_id: str = ""
    """Of this process, where `tracks_holders`."""

    @abstractmethod
    async def put_receipt_row(self, receipt_id: str, key: str, row: bytes) -> None:
        """Keep a row of a receipt beside the audit log, in place of the one before."""

    @abstractmethod
    async def receipt_rows(self, receipt_id: str) -> dict[str, bytes]:
        """All rows of a receipt, of all holders, by key."""

    # ------------------------------------------------------------------ tenants

    async def create_tenant(
        self,
        name: str,
        host: TierQuota,
        ssd: TierQuota,
        *,
        limits: TenantLimits | None = None,
        minted: tuple[TenantId, bytes] | None = None,
        requested_by: str = "",
    ) -> tuple[Tenant, str]:
        """The tenant and its first API key, which is shown this once. `minted`: its id and the check of its
        secret (`Keyring.check`), if it has one."""
        tenant_id, key_check = minted or (changes.mint_tenant_id(), b"")
        tenant = Tenant(
            tenant_id,
            name,
            host=host,
            ssd=ssd,
            limits=limits or TenantLimits(),
            key_check=key_check,
        )
        api_key = changes.mint_api_key()
        return (
            await self.commit(
                lambda state: changes.create_tenant(state, tenant, api_key), requested_by
            )
        )[0]

    async def set_tenant(
        self, name: str, change: TenantChange, *, requested_by: str = ""
    ) -> Tenant:
        return (
            await self.commit(lambda state: changes.set_tenant(state, name, change), requested_by)
        )[0]

    async def create_api_key(self, name: str, *, requested_by: str = "") -> str:
        """A further key of the tenant, which is shown this once."""
        api_key = changes.mint_api_key()
        return (
            await self.commit(
                lambda state: changes.create_api_key(state, name, api_key), requested_by
            )
        )[0]

    async def revoke_api_key(
        self, name: str, digest_prefix: str, *, requested_by: str = ""
    ) -> tuple[Tenant, Change]:
        """End a key, named by at least 8 hex digits of its digest."""
        return await self.commit(
            lambda state: changes.revoke_api_key(state, name, digest_prefix), requested_by
        )

    async def rotate_api_keys(
        self, name: str, *, grace_s: float, requested_by: str = ""
    ) -> tuple[str, Change]:
        """A fresh key, which is shown this once; those there are end in `grace_s` seconds."""
        api_key, now = changes.mint_api_key(), self.wall_clock()
        return await self.commit(
            lambda state: changes.rotate_api_keys(state, name, api_key, now=now, grace_s=grace_s),
            requested_by,
        )

    async def offboard_tenant(self, name: str, *, requested_by: str = "") -> Change:
        """End a tenant for good. Secrets and blocks are for the nodes to destroy."""
        return (
            await self.commit(lambda state: changes.offboard_tenant(state, name), requested_by)
        )[1]

    async def claim_keys(
        self, checks: Mapping[TenantId, bytes], *, anew: bool = False, requested_by: str = ""
    ) -> Change:
        """Say of which secrets (`Keyring.check`) the fleet's are; see `changes.claim_keys`."""
        return (
            await self.commit(
                lambda state: changes.claim_keys(state, checks, anew=anew), requested_by
            )
        )[1]

    # ------------------------------------------------------------------ templates

    async def register_template(
        self,
        name: str,
        version: str,
        text: bytes,
        *,
        is_public: bool,
        after: Sequence[str] = (),
        requested_by: str = "",
    ) -> TemplateVersion:
        """A new version with an incarnation of its own. It serves at once unless another one of the
        name does: then it waits, retired, for `promote_template`.
        """
        incarnation = changes.mint_incarnation()
        template = TemplateVersion(name, version, incarnation, text, is_public, after=tuple(after))
        return (
            await self.commit(
                lambda state: changes.register_template(state, template), requested_by
            )
        )[0]

    async def promote_template(self, name: str, version: str, *, requested_by: str = "") -> Change:
        """Make this version the one that serves: a new one or, as a rollback, a retired one."""
        return (
            await self.commit(
                lambda state: changes.promote_template(state, name, version), requested_by
            )
        )[1]

    async def pin_template(
        self, name: str, version: str, *, ttl_s: float, requested_by: str = ""
    ) -> TemplateVersion:
        """Keep this version's blocks in every host tier for `ttl_s` seconds, within pin budgets. `version`
        empty: the one that serves."""
        now = self.wall_clock()
        return (
            await self.commit(
                lambda state: changes.pin_template(state, name, version, now=now, ttl_s=ttl_s),
                requested_by,
            )
        )[0]

    async def unpin_template(
        self, name: str, version: str, *, requested_by: str = ""
    ) -> TemplateVersion:
        """End a pin before its time."""
        return (
            await self.commit(
                lambda state: changes.unpin_template(state, name, version), requested_by
            )
        )[0]

    # ------------------------------------------------------------------ invalidation

    async def invalidate(
        self, kind: str, name: str, version: str, *, purge: bool, requested_by: str = ""
    ) -> Change:
        """Take a template (version), tenant, model or adapter out of reach, everywhere, at once.

        A retired template version comes back by `promote_template`; everything else is for good.
        """
        if version and kind != "template":
            raise ConfigError(f"a {kind} has no versions: {version!r} cannot be meant")

        def decide(state: RegistryState) -> Draft[None]:
            scope = changes.scope_of(state, kind, name)
            if kind == "template":
                return changes.withdraw_template(state, name, version, purge=purge)
            verb = "purge" if purge else "retire"
            return changes.invalidate_scope(state, scope, f"{verb}_{kind}")

        return (await self.commit(decide, requested_by))[1]
