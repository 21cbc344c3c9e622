"""`RegistryState` to and from its protobuf message. Pure.

A node sends it, a router reads it; both then conclude from the same value (`registry.state`).
"""

from __future__ import annotations

from types import MappingProxyType

from kvfabric.errors import RemoteProtocolError
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.registry.state import (
    PURGED,
    RETIRED,
    SERVING,
    RegistryState,
    TemplateVersion,
    Tenant,
    TenantLimits,
    TierQuota,
)
from kvfabric.types import Incarnation, TenantId

INCARNATION_BYTES = 16


def quota_to_pb(quota: TierQuota) -> pb.TierQuota:
    return pb.TierQuota(max_bytes=quota.max_bytes, floor_bytes=quota.floor_bytes)


def quota_from_pb(message: pb.TierQuota) -> TierQuota:
    return TierQuota(max_bytes=message.max_bytes, floor_bytes=message.floor_bytes)


def limits_to_pb(limits: TenantLimits) -> pb.TenantLimits:
    return pb.TenantLimits(
        lease_max_bytes=limits.lease_max_bytes,
        ssd_write_bytes_per_day=limits.ssd_write_bytes_per_day,
        requests_per_s=limits.requests_per_s,
        pin_max_bytes=limits.pin_max_bytes,
    )


def limits_from_pb(message: pb.TenantLimits) -> TenantLimits:
    return TenantLimits(
        lease_max_bytes=message.lease_max_bytes,
        ssd_write_bytes_per_day=message.ssd_write_bytes_per_day,
        requests_per_s=message.requests_per_s,
        pin_max_bytes=message.pin_max_bytes if message.HasField("pin_max_bytes") else None,
    )


def tenant_to_pb(tenant: Tenant) -> pb.Tenant:
    return pb.Tenant(
        tenant_id=tenant.tenant_id,
        name=tenant.name,
        api_key_digests=tenant.api_key_digests,
        host=quota_to_pb(tenant.host),
        ssd=quota_to_pb(tenant.ssd),
        max_age_s=tenant.max_age_s,
        opted_out=tenant.opted_out,
        limits=limits_to_pb(tenant.limits),
        expiring_keys=[
            pb.ExpiringKey(digest=digest, expires_at=at) for digest, at in tenant.expiring_keys
        ],
        is_offboarded=tenant.is_offboarded,
        key_check=tenant.key_check,
    )


def _tenant_from_pb(message: pb.Tenant) -> Tenant:
    return Tenant(
        tenant_id=TenantId(message.tenant_id),
        name=message.name,
        api_key_digests=tuple(message.api_key_digests),
        host=quota_from_pb(message.host),
        ssd=quota_from_pb(message.ssd),
        max_age_s=message.max_age_s,
        opted_out=message.opted_out,
        limits=limits_from_pb(message.limits),
        expiring_keys=tuple((key.digest, key.expires_at) for key in message.expiring_keys),
        is_offboarded=message.is_offboarded,
        key_check=message.key_check,
    )


def template_to_pb(template: TemplateVersion) -> pb.Template:
    return pb.Template(
        name=template.name,
        version=template.version,
        incarnation=template.incarnation,
        text=template.text,
        is_public=template.is_public,
        state=template.state,
        pinned_until=template.pinned_until,
        pin_s=template.pin_s,
        after=template.after,
    )


def _template_from_pb(message: pb.Template) -> TemplateVersion:
    if message.state not in (SERVING, RETIRED, PURGED):
        # A state of a newer peer: nothing may be served by what is not understood.
        raise RemoteProtocolError(
            f"template {message.name} {message.version} is in the unknown state {message.state!r}"
        )
    return TemplateVersion(
        name=message.name,
        version=message.version,
        incarnation=_incarnation(message.incarnation, message.name),
        text=message.text,
        is_public=message.is_public,
        state=message.state,
        pinned_until=message.pinned_until,
        pin_s=message.pin_s,
        after=tuple(message.after),
    )


def _incarnation(value: bytes, what: str) -> Incarnation:
    if len(value) != INCARNATION_BYTES:
        raise RemoteProtocolError(f"{what}: an incarnation has 16 bytes, not {len(value)}")
    return Incarnation(value)


def state_to_pb(state: RegistryState) -> pb.RegistryState:
    incarnations = state.scope_incarnations
    return pb.RegistryState(
        registry_id=state.registry_id,
        version=state.version,
        epochs=[
            pb.EpochEntry(scope=scope, epoch=epoch, incarnation=incarnations.get(scope, b""))
            for scope, epoch in sorted(state.epochs.items())
        ],
        tenants=[tenant_to_pb(tenant) for tenant in state.tenants.values()],
        templates=[template_to_pb(template) for template in state.templates.values()],
    )


def state_from_pb(message: pb.RegistryState) -> RegistryState:
    """Raises RemoteProtocolError for a state that cannot be trusted to be whole."""
    templates = [_template_from_pb(template) for template in message.templates]
    tenants = [_tenant_from_pb(tenant) for tenant in message.tenants]
    return RegistryState(
        registry_id=message.registry_id,
        version=message.version,
        epochs=MappingProxyType({entry.scope: entry.epoch for entry in message.epochs}),
        tenants=MappingProxyType({tenant.tenant_id: tenant for tenant in tenants}),
        templates=MappingProxyType({(t.name, t.version): t for t in templates}),
        scope_incarnations=MappingProxyType(
            {
                entry.scope: _incarnation(entry.incarnation, entry.scope)
                for entry in message.epochs
                if entry.incarnation
            }
        ),
    )
