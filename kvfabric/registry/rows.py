"""`RegistryState` to and from rows of three tables, for stores that keep keys and values. Pure.

epochs     scope -> MessagePack (epoch, incarnation or empty)
tenants    tenant id -> MessagePack Tenant
templates  SHA-256 of MessagePack (name, version) -> MessagePack TemplateVersion
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from kvfabric.registry.state import RegistryState, TemplateVersion, Tenant
from kvfabric.types import Incarnation, TenantId

Row = TypeVar("Row")

TABLES = ("epochs", "tenants", "templates")
_EPOCH = msgspec.msgpack.Decoder(tuple[int, bytes])
_TENANT = msgspec.msgpack.Decoder(Tenant)
_TEMPLATE = msgspec.msgpack.Decoder(TemplateVersion)


def changed(before: RegistryState, after: RegistryState) -> Iterator[tuple[str, bytes, bytes]]:
    """(table, key, row) of everything in `after` that `before` has otherwise or not at all."""
    incarnations = after.scope_incarnations
    for scope, epoch in _changed(before.epochs, after.epochs):
        row = msgspec.msgpack.encode((epoch, incarnations.get(scope, b"")))
        yield "epochs", scope.encode(), row
    for tenant_id, tenant in _changed(before.tenants, after.tenants):
        yield "tenants", tenant_id.encode(), msgspec.msgpack.encode(tenant)
    for name, template in _changed(before.templates, after.templates):
        # LMDB keys have at most 511 bytes.
        key = hashlib.sha256(msgspec.msgpack.encode(name)).digest()
        yield "templates", key, msgspec.msgpack.encode(template)


def to_state(
    registry_id: bytes, version: int, tables: Mapping[str, Iterable[tuple[bytes, bytes]]]
) -> RegistryState:
    """Raises msgspec.DecodeError or UnicodeDecodeError for what is no row."""
    epochs = {bytes(scope).decode(): _EPOCH.decode(row) for scope, row in tables["epochs"]}
    tenants = [_TENANT.decode(row) for _, row in tables["tenants"]]
    templates = [_TEMPLATE.decode(row) for _, row in tables["templates"]]
    return RegistryState(
        registry_id=registry_id,
        version=version,
        epochs=MappingProxyType({scope: epoch for scope, (epoch, _) in epochs.items()}),
        tenants=MappingProxyType({TenantId(t.tenant_id): t for t in tenants}),
        templates=MappingProxyType({(t.name, t.version): t for t in templates}),
        scope_incarnations=MappingProxyType(
            {scope: Incarnation(value) for scope, (_, value) in epochs.items() if value}
        ),
    )


def _changed(before: Mapping[Any, Row], after: Mapping[Any, Row]) -> Iterator[tuple[Any, Row]]:
    return ((key, row) for key, row in after.items() if before.get(key) != row)
