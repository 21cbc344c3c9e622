"""The registry's state as one immutable value, and what may be concluded from it. Pure.

Nodes and routers each hold a `RegistryState`; whoever holds one without a valid epoch lease may serve
nothing by it. `fence_reason` is the one place that decides whether a request made under some epochs may
still read or store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from kvfabric.types import (
    Incarnation,
    MissReason,
    Namespace,
    Segment,
    TenantId,
    adapter_scope,
    fabric_scope,
    model_scope,
    template_scope,
    tenant_scope,
)

SERVING, RETIRED, PURGED = "serving", "retired", "purged"


@dataclass(frozen=True, slots=True)
class TierQuota:
    """`max_bytes` 0: no limit of the tenant's own. `floor_bytes`: nobody pushes it below this."""

    max_bytes: int = 0
    floor_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What bounds a tenant beside the bytes it holds; 0 is no limit of its own.

    `lease_max_bytes`: under leases or draining, on each node. `ssd_write_bytes_per_day`: written to SSD by
    each node, see `tiers.write_budget`. `requests_per_s`: taken by each router, bursts of a second's worth.
    `pin_max_bytes`: of blocks that pinned templates keep in each host tier; 0: none, None: see `store.quota`.
    """

    lease_max_bytes: int = 0
    ssd_write_bytes_per_day: int = 0
    requests_per_s: float = 0.0
    pin_max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """`tenant_id` is opaque and is what metrics, events and logs may show; `name` is the operator's.

    `expiring_keys`: (digest, Unix seconds) of keys that a rotation left for a while; they are not among
    `api_key_digests`. `is_offboarded`: for good; its keys and secrets are gone, its id is not used again.
    `key_check`: of its secret (`Keyring.check`), so that whoever has none or another one can tell; of the
    tenant `public`, of the secrets that all keyrings of the fleet have. Empty: nobody said.
    """

    tenant_id: TenantId
    name: str
    api_key_digests: tuple[bytes, ...] = ()
    host: TierQuota = TierQuota()
    ssd: TierQuota = TierQuota()
    max_age_s: float = 0.0
    opted_out: bool = False
    limits: TenantLimits = TenantLimits()
    expiring_keys: tuple[tuple[bytes, float], ...] = ()
    is_offboarded: bool = False
    key_check: bytes = b""


@dataclass(frozen=True, slots=True)
class TemplateVersion:
    """One registration. The incarnation is minted once and never used again for anything else.

    `is_public`: its blocks may be shared by all tenants where a prompt begins with it or, with `after`, where
    it stands right behind one of these templates that is itself shared there.

    `pinned_until`: Unix seconds, 0 for not pinned. `pin_s`: for how long it was pinned; whoever's clock is
    wrong keeps it no longer than that. Only what serves is pinned.
    """

    name: str
    version: str
    incarnation: Incarnation
    text: bytes
    is_public: bool = False
    state: str = SERVING
    pinned_until: float = 0.0
    pin_s: float = 0.0
    after: tuple[str, ...] = ()

    def put(self, state: str) -> TemplateVersion:
        """In that state. A pin ends with the service."""
        if state == SERVING:
            return replace(self, state=state)
        return replace(self, state=state, pinned_until=0.0, pin_s=0.0)


@dataclass(frozen=True, slots=True)
class RegistryState:
    """`version` rises with every change. A scope without an entry in `epochs` is at epoch 0.

    `scope_incarnations` has an entry for each tenant, model or adapter scope that was ever invalidated.
    Epochs are not in keys: this is what keeps blocks from before an invalidation out of reach of requests
    after it (a template version has its own incarnation).
    """

    registry_id: bytes = bytes(16)
    version: int = 0
    epochs: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    tenants: Mapping[TenantId, Tenant] = field(default_factory=lambda: MappingProxyType({}))
    templates: Mapping[tuple[str, str], TemplateVersion] = field(
        default_factory=lambda: MappingProxyType({})
    )
    scope_incarnations: Mapping[str, Incarnation] = field(
        default_factory=lambda: MappingProxyType({})
    )

    def epoch(self, scope: str) -> int:
        return self.epochs.get(scope, 0)

    def epochs_of(self, scopes: Sequence[str]) -> tuple[tuple[str, int], ...]:
        """(scope, epoch) pairs to put into a handle."""
        return tuple((scope, self.epoch(scope)) for scope in scopes)

    def fence_reason(
        self, epochs: Sequence[tuple[str, int]], segments: Sequence[Segment]
    ) -> MissReason:
        """NONE if a request made under `epochs` with these segments may be served and stored now."""
        for segment in segments:
            known = self.templates.get((segment.template, segment.version))
            if known is None or known.incarnation != segment.incarnation:
                return MissReason.WITHDRAWN
            if known.state != SERVING:
                return MissReason.WITHDRAWN
        if any(self.epoch(scope) != epoch for scope, epoch in epochs):
            return MissReason.FENCED
        return MissReason.NONE


def scopes_of(
    tenant: str, model_revision: str, adapter: str = "", templates: Sequence[str] = ()
) -> tuple[str, ...]:
    """The scopes whose epochs fence a request: what a router puts into its handle."""
    scopes = [fabric_scope(), tenant_scope(tenant), model_scope(model_revision)]
    if adapter:
        scopes.append(adapter_scope(adapter))
    return (*scopes, *(template_scope(name) for name in dict.fromkeys(templates)))


def namespace_of(
    state: RegistryState,
    tenant: TenantId,
    model_revision: str,
    layout_fingerprint: bytes,
    adapter: str = "",
    adapter_revision: str = "",
) -> Namespace:
    """The one maker of namespaces: router and node must get equal ones from equal states."""
    scopes = [tenant_scope(tenant), model_scope(model_revision)]
    if adapter:
        scopes.append(adapter_scope(adapter))
    known = state.scope_incarnations
    return Namespace(
        tenant=tenant,
        model_revision=model_revision,
        layout_fingerprint=layout_fingerprint,
        adapter=adapter,
        adapter_revision=adapter_revision,
        incarnations=tuple(known[scope] for scope in scopes if scope in known),
    )
