"""What one state of the registry takes out of reach that the state before it had there. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvfabric.registry.state import PURGED, SERVING, RegistryState
from kvfabric.types import Incarnation, TenantId, template_scope, tenant_scope


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """Of one scope at one epoch. `incarnations` are those of template versions; a tenant, model or adapter
    names none: what was stored under it before is known by its namespaces.

    `for_good`: no later change brings it back, so its bytes are to be destroyed. `offboarded`: the tenant
    that ends, so that its keys go too.
    """

    scope: str
    epoch: int
    incarnations: frozenset[Incarnation]
    for_good: bool
    offboarded: TenantId | None = None

    @property
    def receipt_id(self) -> str:
        return receipt_id(self.scope, self.epoch)


def receipt_id(scope: str, epoch: int) -> str:
    return f"{scope}@{epoch}"


def withdrawals(before: RegistryState, after: RegistryState) -> Iterator[Withdrawal]:
    """One for each scope whose epoch rose. Where several changes lie between the two states, those of one
    scope are one, under the newest epoch."""
    ended = {tenant_scope(one): one for one in offboarded_tenants(after)}
    for scope, epoch in after.epochs.items():
        if epoch <= before.epoch(scope):
            continue
        new = after.scope_incarnations.get(scope)
        if new is not None and new != before.scope_incarnations.get(scope):
            yield Withdrawal(scope, epoch, frozenset(), for_good=True, offboarded=ended.get(scope))
            continue
        gone = [
            (known.incarnation, known.state == PURGED)
            for name, known in after.templates.items()
            if template_scope(known.name) == scope and _left(before, name, known.state)
        ]
        for_good = any(purged for _, purged in gone)
        chosen = frozenset(one for one, purged in gone if purged or not for_good)
        yield Withdrawal(scope, epoch, chosen, for_good)


def offboarded_tenants(state: RegistryState) -> frozenset[TenantId]:
    return frozenset(one.tenant_id for one in state.tenants.values() if one.is_offboarded)


def offboarding(state: RegistryState, tenant: TenantId) -> Withdrawal:
    """Of a tenant that `state` knows as offboarded, for whoever was away when that happened."""
    scope = tenant_scope(tenant)
    return Withdrawal(scope, state.epoch(scope), frozenset(), for_good=True, offboarded=tenant)


def _left(before: RegistryState, name: tuple[str, str], state: str) -> bool:
    known = before.templates.get(name)
    old = known.state if known is not None else SERVING
    return state != old and (state == PURGED or old == SERVING)
