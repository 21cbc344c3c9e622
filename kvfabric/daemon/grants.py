"""What a request may do at a node, by its handle, the registry and the keyring: for engines and peers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfabric.errors import Fenced, UnknownTenant
from kvfabric.handle import Handle, Handoff
from kvfabric.hashing import namespace_key, namespace_tag
from kvfabric.registry.state import RegistryState, namespace_of
from kvfabric.store.store import RequestGrant
from kvfabric.types import PUBLIC_TENANT, Segment, TenantId

if TYPE_CHECKING:
    from kvfabric.daemon.handlers import Services


@dataclass(frozen=True, slots=True)
class Weights:
    """What computes the KV of a request, and how it is laid out."""

    model_revision: str
    adapter: str
    adapter_revision: str
    layout_fingerprint: bytes
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Terms:
    """Under what a request runs, from its handle or from the defaults. `told_id`: its router's id."""

    tenant: TenantId
    segments: tuple[Segment, ...] = ()
    epochs: tuple[tuple[str, int], ...] = ()
    public_tokens: int = 0
    cacheable_tokens: int = -1
    no_store: bool = False
    no_read: bool = False
    told_id: str = ""
    sources: tuple[str, ...] = ()
    handoff: Handoff | None = None


@dataclass(frozen=True, slots=True)
class Granted:
    """`public_key` is empty without a public prefix."""

    grant: RequestGrant
    namespace_key: bytes
    public_key: bytes


def terms_of(opened: Handle) -> Terms:
    return Terms(
        tenant=TenantId(opened.tenant),
        segments=opened.to_segments(),
        epochs=opened.epochs,
        public_tokens=max(0, opened.public_tokens),
        cacheable_tokens=opened.cacheable_tokens,
        no_store=opened.no_store,
        no_read=opened.no_read,
        told_id=opened.request_id,
        sources=opened.sources,
        handoff=opened.handoff,
    )


def state_of(services: Services) -> RegistryState:
    """What requests are opened by. Raises Fenced without an epoch lease: a namespace key made by an old state
    names what was invalidated since, in an engine's own HBM, and here as soon as there is a lease again."""
    state = services.registry()
    if state is None:
        raise Fenced("this node holds no epoch lease: it cannot know what was withdrawn")
    return state


def granted(services: Services, terms: Terms, weights: Weights) -> Granted:
    """Raises Fenced, UnknownTenant."""
    key = _namespace_key(services, terms.tenant, weights)
    public_key = _namespace_key(services, PUBLIC_TENANT, weights) if terms.public_tokens else b""
    opted_out = _opted_out(services, terms.tenant)
    grant = RequestGrant(
        tenant=terms.tenant,
        namespace_tag=namespace_tag(key),
        public_tag=namespace_tag(public_key) if public_key else b"",
        public_blocks=terms.public_tokens // weights.block_tokens,
        cacheable_blocks=max(-1, terms.cacheable_tokens // weights.block_tokens),
        block_tokens=weights.block_tokens,
        segments=terms.segments,
        epochs=terms.epochs,
        no_store=terms.no_store or opted_out,
        no_read=terms.no_read or opted_out,
    )
    return Granted(grant, key, public_key)


def _namespace_key(services: Services, tenant: TenantId, weights: Weights) -> bytes:
    namespace = namespace_of(
        state_of(services),
        tenant,
        weights.model_revision,
        weights.layout_fingerprint,
        weights.adapter,
        weights.adapter_revision,
    )
    try:
        secret = services.keyring.tenant_secret(tenant)
    except UnknownTenant:
        services.key_unknown()
        raise
    return namespace_key(namespace, secret)


def _opted_out(services: Services, tenant: TenantId) -> bool:
    known = state_of(services).tenants.get(tenant)
    return known is not None and known.opted_out
