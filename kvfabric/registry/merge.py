"""What becomes of a registry whose store lost part of it: nothing that was withdrawn comes back. Pure.

Two histories of one registry are compared by their audit chains: a head stands for all before it. A store
that holds an older part of a holder's history gets the rest back as it was. Where both went on without
each other (a fail-over lost writes, then new ones were made) every row is decided on its own:

    epochs       the higher one and 1 more, wherever the two sides differ: what is in flight is fenced
    templates    purged on one side is purged; else the side with the higher epoch; of equal ones, retired;
                 pinned only if both sides say so, until the sooner of the two ends
    tenants      the side with the higher epoch; API keys that both sides know; opted out or offboarded if
                 one says so
    incarnations a fresh one wherever the two sides differ: blocks of neither side are reachable

The epoch of the whole fabric rises with every restoration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType

from kvfabric.registry.changes import Draft, mint_incarnation
from kvfabric.registry.database import Entry
from kvfabric.registry.state import (
    PURGED,
    RETIRED,
    SERVING,
    RegistryState,
    TemplateVersion,
    Tenant,
)
from kvfabric.types import Incarnation, TenantId, fabric_scope, template_scope, tenant_scope


def common_length(mine: Sequence[Entry], theirs: Sequence[Entry]) -> int:
    """How many changes two audit logs have in common, from the first on."""
    low, high = 0, min(len(mine), len(theirs))
    while low < high:  # equal heads: all before them is equal too
        middle = (low + high + 1) // 2
        if mine[middle - 1][1] == theirs[middle - 1][1]:
            low = middle
        else:
            high = middle - 1
    return low


def restored(state: RegistryState) -> Draft[None]:
    """Of a store that was behind `state`, once it has been given all of it."""
    scope = fabric_scope()
    epoch = state.epoch(scope)
    after = replace(
        state,
        version=state.version + 1,
        epochs=MappingProxyType({**state.epochs, scope: epoch + 1}),
    )
    return Draft(after, None, "restore_registry", scope, epoch, epoch + 1)


def merged(
    mine: RegistryState,
    theirs: RegistryState,
    *,
    mint: Callable[[], Incarnation] = mint_incarnation,
) -> Draft[None]:
    """Of two that went on without each other; `theirs` is the store's, and its id stays."""
    base = replace(
        theirs,
        version=max(mine.version, theirs.version),
        epochs=_epochs(mine, theirs),
        templates=MappingProxyType(_templates(mine, theirs)),
        tenants=MappingProxyType(_tenants(mine, theirs)),
        scope_incarnations=MappingProxyType(_incarnations(mine, theirs, mint)),
    )
    draft = restored(base)
    return replace(draft, action="merge_registry", detail=f"with version {mine.version}")


def _epochs(mine: RegistryState, theirs: RegistryState) -> MappingProxyType[str, int]:
    ours, others = _by_scope(mine), _by_scope(theirs)

    def epoch(scope: str) -> int:
        highest = max(mine.epoch(scope), theirs.epoch(scope))
        return highest if ours.get(scope) == others.get(scope) else highest + 1

    return MappingProxyType({scope: epoch(scope) for scope in {**others, **ours}})


def _by_scope(state: RegistryState) -> dict[str, list[object]]:
    """Everything that a scope's epoch speaks of, by scope."""
    found: dict[str, list[object]] = {
        scope: [epoch, state.scope_incarnations.get(scope)] for scope, epoch in state.epochs.items()
    }
    for tenant in state.tenants.values():
        found.setdefault(tenant_scope(tenant.tenant_id), []).append(tenant)
    for key in sorted(state.templates):
        found.setdefault(template_scope(key[0]), []).append(state.templates[key])
    return found


def _templates(
    mine: RegistryState, theirs: RegistryState
) -> dict[tuple[str, str], TemplateVersion]:
    found: dict[tuple[str, str], TemplateVersion] = {}
    for key in {**theirs.templates, **mine.templates}:
        found[key] = _template(key, mine, theirs)
    return found


def _template(key: tuple[str, str], mine: RegistryState, theirs: RegistryState) -> TemplateVersion:
    ours, other = mine.templates.get(key), theirs.templates.get(key)
    scope = template_scope(key[0])
    difference = mine.epoch(scope) - theirs.epoch(scope)
    winner = (ours if difference > 0 else other) or ours or other
    assert winner is not None
    winner = _pinned_on_both(winner, ours, other)
    if any(side is not None and side.state == PURGED for side in (ours, other)):
        return winner.put(PURGED)
    serves_on_winning_side = (ours if difference > 0 else other) is not None
    agreed = ours is not None and other is not None and ours.state == other.state
    if winner.state == SERVING and not (agreed or (difference and serves_on_winning_side)):
        return winner.put(RETIRED)
    return winner


def _pinned_on_both(
    winner: TemplateVersion, ours: TemplateVersion | None, other: TemplateVersion | None
) -> TemplateVersion:
    sides = [side for side in (ours, other) if side is not None and side.pinned_until]
    if len(sides) < 2:
        return replace(winner, pinned_until=0.0, pin_s=0.0)
    sooner = min(sides, key=lambda side: side.pinned_until)
    return replace(winner, pinned_until=sooner.pinned_until, pin_s=sooner.pin_s)


def _tenants(mine: RegistryState, theirs: RegistryState) -> dict[TenantId, Tenant]:
    found: dict[TenantId, Tenant] = {}
    for tenant_id in {**theirs.tenants, **mine.tenants}:
        ours, other = mine.tenants.get(tenant_id), theirs.tenants.get(tenant_id)
        if ours is None or other is None:
            found[tenant_id] = _renamed(ours, found) if ours is not None else _there(other)
            continue
        scope = tenant_scope(tenant_id)
        winner = ours if mine.epoch(scope) > theirs.epoch(scope) else other
        if ours.is_offboarded or other.is_offboarded:
            found[tenant_id] = ours if ours.is_offboarded else other
            continue
        # A key of one side is in its grace on the other, or gone there.
        both = _digests(ours) & _digests(other)
        both_stay = set(ours.api_key_digests) & set(other.api_key_digests)
        expiring = dict(sorted((*ours.expiring_keys, *other.expiring_keys), key=_later_first))
        found[tenant_id] = replace(
            winner,
            api_key_digests=tuple(key for key in winner.api_key_digests if key in both_stay),
            expiring_keys=tuple((key, at) for key, at in expiring.items() if key in both),
            opted_out=ours.opted_out or other.opted_out,
        )
    return found


def _later_first(key: tuple[bytes, float]) -> float:
    """So that of two ends of one key the earlier one is the last word."""
    return -key[1]


def _digests(tenant: Tenant) -> set[bytes]:
    return {*tenant.api_key_digests, *(digest for digest, _ in tenant.expiring_keys)}


def _there(tenant: Tenant | None) -> Tenant:
    assert tenant is not None
    return tenant


def _renamed(tenant: Tenant, known: dict[TenantId, Tenant]) -> Tenant:
    """Two tenants of one name, made on either side: the store's keeps it."""
    taken = any(tenant.name in (other.name, other.tenant_id) for other in known.values())
    return replace(tenant, name=tenant.tenant_id) if taken else tenant


def _incarnations(
    mine: RegistryState, theirs: RegistryState, mint: Callable[[], Incarnation]
) -> dict[str, Incarnation]:
    ours, others = mine.scope_incarnations, theirs.scope_incarnations
    return {
        scope: others[scope] if ours.get(scope) == others.get(scope) else mint()
        for scope in {**others, **ours}
    }
