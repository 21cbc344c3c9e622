"""Two histories of one registry: whatever either side withdrew stays withdrawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfabric.errors import Conflict, KVFabricError
from kvfabric.registry import audit, changes, merge
from kvfabric.registry.audit import AuditRecord
from kvfabric.registry.changes import TenantChange
from kvfabric.registry.database import Entry
from kvfabric.registry.state import PURGED, SERVING, RegistryState, TemplateVersion, Tenant
from kvfabric.types import TenantId, fabric_scope

ACME = TenantId("t-acme")
KEYS = ("kvf-a", "kvf-b", "kvf-c")
Change = Callable[[RegistryState], RegistryState]


def _register(state: RegistryState, version: str) -> RegistryState:
    template = TemplateVersion("t", version, changes.mint_incarnation(), f"text {version}".encode())
    return changes.register_template(state, template).state


MAKE: dict[str, Change] = {
    "register 1": lambda state: _register(state, "1"),
    "register 2": lambda state: _register(state, "2"),
    "promote 1": lambda state: changes.promote_template(state, "t", "1").state,
    "promote 2": lambda state: changes.promote_template(state, "t", "2").state,
    "pin 1": lambda state: changes.pin_template(state, "t", "1", now=0.0, ttl_s=60.0).state,
    "pin 1 later": lambda state: changes.pin_template(state, "t", "1", now=9.0, ttl_s=60.0).state,
    "unpin": lambda state: changes.unpin_template(state, "t", "").state,
    "retire": lambda state: changes.withdraw_template(state, "t", "", purge=False).state,
    "purge 1": lambda state: changes.withdraw_template(state, "t", "1", purge=True).state,
    "model": lambda state: changes.invalidate_scope(state, "model:m", "retire_model").state,
    "opt out": lambda state: changes.set_tenant(state, "acme", TenantChange(opted_out=True)).state,
    "key": lambda state: changes.create_api_key(state, "acme", KEYS[2]).state,
    "rotate": lambda state: (
        changes.rotate_api_keys(state, "acme", KEYS[2], now=0.0, grace_s=60.0).state
    ),
    "rotate later": lambda state: (
        changes.rotate_api_keys(state, "acme", KEYS[1], now=9.0, grace_s=60.0).state
    ),
    "offboard": lambda state: changes.offboard_tenant(state, "acme").state,
    "revoke": lambda state: (
        changes.revoke_api_key(state, "acme", changes.api_key_digest(KEYS[0]).hex()[:8]).state
    ),
}


def start() -> RegistryState:
    state = changes.initial_state()
    state = changes.create_tenant(state, Tenant(ACME, "acme"), KEYS[0]).state
    return changes.create_api_key(state, "acme", KEYS[1]).state


def after(state: RegistryState, names: list[str]) -> RegistryState:
    for name in names:
        try:
            state = MAKE[name](state)
        except KVFabricError:
            continue  # what the present state forbids
    return state


names = st.lists(st.sampled_from(sorted(MAKE)), max_size=6)


@settings(max_examples=200, deadline=None)
@given(common=names, ours=names, theirs=names)
def test_nothing_that_either_side_withdrew_comes_back(
    common: list[str], ours: list[str], theirs: list[str]
) -> None:
    check(common, ours, theirs)


@pytest.mark.parametrize(
    ("part", "ours"),
    [
        ("_templates", ["purge 1"]),
        ("_tenants", ["revoke"]),
        ("_tenants", ["rotate"]),
        ("_tenants", ["offboard"]),
        ("_incarnations", ["model"]),
        ("_epochs", ["model"]),
    ],
)
def test_believing_the_store_alone_brings_it_back(
    monkeypatch: pytest.MonkeyPatch, part: str, ours: list[str]
) -> None:
    """The twins of the above: of one part the store's side is taken."""
    fields = {"_incarnations": "scope_incarnations"}
    field = fields.get(part, part.removeprefix("_"))
    check(["register 1"], ours, [])
    monkeypatch.setattr(merge, part, lambda mine, theirs, *_: getattr(theirs, field))
    with pytest.raises((AssertionError, KeyError)):
        check(["register 1"], ours, [])


def test_believing_the_winner_pins_what_one_side_unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    check(["register 1", "pin 1"], ["unpin"], [])
    monkeypatch.setattr(merge, "_pinned_on_both", lambda winner, *_: winner)
    with pytest.raises(AssertionError):
        check(["register 1", "pin 1"], ["unpin"], [])


def check(common: list[str], ours: list[str], theirs: list[str]) -> None:
    fork = after(start(), common)
    mine, other = after(fork, ours), after(fork, theirs)
    found = merge.merged(mine, other).state
    for side in (mine, other):
        assert found.version > side.version
        assert found.epoch(fabric_scope()) > side.epoch(fabric_scope())
        assert all(found.epoch(scope) >= epoch for scope, epoch in side.epochs.items())
        for key, template in side.templates.items():
            merged = found.templates[key]
            if template.state == PURGED:
                assert merged.state == PURGED
            assert merged.pinned_until <= template.pinned_until
            assert merged.state == SERVING or not merged.pinned_until
            # Served under an unchanged epoch only by the very incarnation that both served.
            if merged.state == SERVING and found.epoch(f"template:{key[0]}") == side.epoch(
                f"template:{key[0]}"
            ):
                assert template == merged
        merged_tenant, tenant = found.tenants[ACME], side.tenants[ACME]
        assert set(merged_tenant.api_key_digests) <= set(tenant.api_key_digests)
        ends = dict(tenant.expiring_keys)
        for digest, at in merged_tenant.expiring_keys:
            assert digest in tenant.api_key_digests or at <= ends[digest]
        assert merged_tenant.is_offboarded >= tenant.is_offboarded
        assert found.tenants[ACME].opted_out >= side.tenants[ACME].opted_out
    serving = [template for template in found.templates.values() if template.state == SERVING]
    assert len(serving) <= 1
    ours_now, theirs_now = (side.scope_incarnations.get("model:m") for side in (mine, other))
    if ours_now != theirs_now:
        assert found.scope_incarnations["model:m"] not in (ours_now, theirs_now)


def test_what_only_one_side_knows_is_kept() -> None:
    fork = start()
    other = changes.create_tenant(fork, Tenant(TenantId("t-2"), "two"), "kvf-x").state
    mine = changes.create_tenant(fork, Tenant(TenantId("t-3"), "two"), "kvf-y").state
    found = merge.merged(mine, other).state
    assert found.tenants[TenantId("t-2")].name == "two"
    assert found.tenants[TenantId("t-3")].name == "t-3"  # the store's keeps the name


def test_restored_fences_everything() -> None:
    state = start()
    draft = merge.restored(state)
    changes.check_forward(state, draft.state)
    assert draft.new_epoch == draft.state.epoch(fabric_scope()) == state.epoch(fabric_scope()) + 1
    assert replace(draft.state, version=state.version, epochs=state.epochs) == state


def entries(*whos: str) -> list[Entry]:
    head, found = audit.FIRST_HEAD, []
    for sequence, who in enumerate(whos, start=1):
        record = audit.encode(AuditRecord(sequence, 0.0, who, "", "", "", 0, 1, sequence))
        head = audit.link(head, record)
        found.append((record, head))
    return found


def test_where_two_logs_part() -> None:
    one = entries("a", "b", "c", "d")
    assert merge.common_length(one, one) == 4
    assert merge.common_length(one, one[:2]) == merge.common_length(one[:2], one) == 2
    assert merge.common_length(one, entries("a", "b", "x", "d")) == 2
    assert merge.common_length(one, entries("x", "b")) == merge.common_length([], one) == 0


def test_going_back_is_refused() -> None:
    state = start()
    for rogue in (
        replace(state, version=state.version),
        replace(state, version=state.version + 1, registry_id=bytes(16)),
    ):
        try:
            changes.check_forward(state, rogue)
        except Conflict:
            continue
        raise AssertionError("it was let through")
