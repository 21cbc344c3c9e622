"""What each change makes of a `RegistryState`. Pure: no I/O, no clock; randomness is minted here.

Every function takes a state and returns a `Draft`: the state after, and what to write into the audit log.
The epoch of the scope rises at every change, rollback included; but not at a pin, which changes nothing of
what may be served and must fence nobody. Nothing is ever deleted: an incarnation that was struck off stays
known as such.

    register ---> SERVING  (no other version of the name serves)
        |            ^ |
        |    promote | | retire, or another one promoted
        v            | v
        +---------> RETIRED --purge--> PURGED      (from SERVING too; for good)
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Generic, TypeVar

from kvfabric.errors import ConfigError, Conflict, NotFound
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
from kvfabric.types import (
    DEFAULT_TENANT,
    PUBLIC_TENANT,
    Incarnation,
    TenantId,
    adapter_scope,
    model_scope,
    template_scope,
    tenant_scope,
)

Result = TypeVar("Result")
Key = TypeVar("Key")
Value = TypeVar("Value")

MAX_TEXT_BYTES = 256 << 10
MAX_ALL_TEXT_BYTES = 2 << 20
"""All template texts together: every holder gets the whole state in one message."""
MAX_TENANTS = 4096
MAX_API_KEYS = 64
MAX_PIN_S = 30 * 86_400.0
MIN_DIGEST_PREFIX = 8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")


@dataclass(frozen=True, slots=True)
class Draft(Generic[Result]):
    """A change that is not made yet. `detail`: for the audit log."""

    state: RegistryState
    result: Result
    action: str
    scope: str
    old_epoch: int
    new_epoch: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class TenantChange:
    """None leaves a setting as it is."""

    host: TierQuota | None = None
    ssd: TierQuota | None = None
    max_age_s: float | None = None
    opted_out: bool | None = None
    limits: TenantLimits | None = None


def initial_state() -> RegistryState:
    """Of a new registry: its id is random, so nobody takes it for one that was lost."""
    tenants = {tenant: Tenant(tenant, tenant) for tenant in (DEFAULT_TENANT, PUBLIC_TENANT)}
    return RegistryState(
        registry_id=secrets.token_bytes(16), version=1, tenants=MappingProxyType(tenants)
    )


# ---------------------------------------------------------------------- tenants


def mint_tenant_id() -> TenantId:
    return TenantId(f"t-{secrets.token_hex(8)}")


def mint_api_key() -> str:
    """`kvf-` and 43 characters; the registry keeps its digest alone."""
    return f"kvf-{secrets.token_urlsafe(32)}"


def api_key_digest(api_key: str) -> bytes:
    return hashlib.sha256(api_key.encode()).digest()


def tenant_named(state: RegistryState, name: str) -> Tenant:
    """By the operator's name or by the opaque id. Raises NotFound."""
    for tenant in state.tenants.values():
        if name in (tenant.name, tenant.tenant_id):
            return tenant
    raise NotFound(f"there is no tenant {name!r}: `kvfabric tenant list` shows them")


def create_tenant(state: RegistryState, tenant: Tenant, api_key: str) -> Draft[tuple[Tenant, str]]:
    _check_name("tenant", tenant.name)
    if any(tenant.name in (known.name, known.tenant_id) for known in state.tenants.values()):
        raise Conflict(f"there is a tenant {tenant.name!r} already")
    if len(state.tenants) >= MAX_TENANTS:
        raise Conflict(f"a registry has at most {MAX_TENANTS} tenants")
    _check_quotas(tenant)
    created = replace(tenant, api_key_digests=(api_key_digest(api_key),))
    return _tenant_draft(state, created, (created, api_key), "create_tenant")


def set_tenant(state: RegistryState, name: str, change: TenantChange) -> Draft[Tenant]:
    old = _present(state, name)
    new = replace(
        old,
        host=old.host if change.host is None else change.host,
        ssd=old.ssd if change.ssd is None else change.ssd,
        max_age_s=old.max_age_s if change.max_age_s is None else change.max_age_s,
        opted_out=old.opted_out if change.opted_out is None else change.opted_out,
        limits=old.limits if change.limits is None else change.limits,
    )
    _check_quotas(new)
    return _tenant_draft(state, new, new, "set_tenant")


def create_api_key(state: RegistryState, name: str, api_key: str) -> Draft[str]:
    old = _speaking(state, name)
    if len(old.api_key_digests) >= MAX_API_KEYS:
        raise Conflict(f"tenant {name} has {MAX_API_KEYS} API keys: revoke one first")
    digest = api_key_digest(api_key)
    new = replace(old, api_key_digests=(*old.api_key_digests, digest))
    detail = f"digest {digest.hex()[:MIN_DIGEST_PREFIX]}"
    return _tenant_draft(state, new, api_key, "create_api_key", detail)


def revoke_api_key(state: RegistryState, name: str, digest_prefix: str) -> Draft[Tenant]:
    old = tenant_named(state, name)
    prefix = digest_prefix.lower()
    if len(prefix) < MIN_DIGEST_PREFIX or not re.fullmatch(r"[0-9a-f]+", prefix):
        raise ConfigError(
            f"an API key is named by at least {MIN_DIGEST_PREFIX} hex digits of its digest "
            f"(`kvfabric tenant list` shows them), not {digest_prefix!r}"
        )
    known = (*old.api_key_digests, *(digest for digest, _ in old.expiring_keys))
    found = [digest for digest in known if digest.hex().startswith(prefix)]
    if len(found) != 1:
        raise NotFound(f"{len(found)} API keys of tenant {name} begin with {prefix}; it must be 1")
    new = replace(
        old,
        api_key_digests=tuple(d for d in old.api_key_digests if d not in found),
        expiring_keys=tuple(key for key in old.expiring_keys if key[0] not in found),
    )
    return _tenant_draft(state, new, new, "revoke_api_key", f"digest {prefix}")


def rotate_api_keys(
    state: RegistryState, name: str, api_key: str, *, now: float, grace_s: float
) -> Draft[str]:
    """A fresh key; all that the tenant had end, `grace_s` after `now` (Unix seconds). None ends later than
    an earlier rotation said."""
    old = _speaking(state, name)
    if not 0 <= grace_s < float("inf"):
        raise ConfigError(f"a grace of {grace_s} seconds; it is 0 or more")
    digest = api_key_digest(api_key)
    leaving = [(known, now + grace_s) for known in old.api_key_digests] if grace_s else []
    leaving += [(known, at) for known, at in old.expiring_keys if now < at] if grace_s else []
    if len(leaving) >= MAX_API_KEYS:
        raise Conflict(f"tenant {name} has {MAX_API_KEYS} API keys: revoke one first")
    new = replace(old, api_key_digests=(digest,), expiring_keys=tuple(leaving))
    detail = f"digest {digest.hex()[:MIN_DIGEST_PREFIX]}, {len(leaving)} end in {grace_s:g} s"
    return _tenant_draft(state, new, api_key, "rotate_api_keys", detail)


def offboard_tenant(state: RegistryState, name: str) -> Draft[Tenant]:
    """Nobody speaks for the tenant any more and nothing of it is served, for good. Its id stays known, so
    that every node can tell whose blocks and secrets are to go. Said again, it is so again."""
    old = tenant_named(state, name)
    if old.tenant_id in (DEFAULT_TENANT, PUBLIC_TENANT):
        raise Conflict(f"tenant {name!r} is of every registry and stays")
    new = Tenant(old.tenant_id, old.name, opted_out=True, is_offboarded=True)
    scope = tenant_scope(old.tenant_id)
    incarnations = {**state.scope_incarnations, scope: mint_incarnation()}
    after = replace(state, scope_incarnations=MappingProxyType(incarnations))
    return _tenant_draft(after, new, new, "offboard_tenant")


def claim_keys(
    state: RegistryState, checks: Mapping[TenantId, bytes], *, anew: bool = False
) -> Draft[None]:
    """Say which secrets are the fleet's: of tenants of which nobody did, or of all of these (`anew`). Raises
    Conflict if there are none."""
    claimed = {
        tenant_id: replace(tenant, key_check=checks[tenant_id])
        for tenant_id, tenant in state.tenants.items()
        if checks.get(tenant_id, tenant.key_check) != tenant.key_check
        and not tenant.is_offboarded
        and (anew or not tenant.key_check)
    }
    if not claimed:
        raise Conflict("there are no keys to claim: the fleet has these, or others")
    after = replace(state, tenants=_with(state.tenants, claimed))
    return _draft(
        after, tenant_scope(PUBLIC_TENANT), None, "claim_keys", f"of {len(claimed)} tenants"
    )


def _present(state: RegistryState, name: str) -> Tenant:
    found = tenant_named(state, name)
    if found.is_offboarded:
        raise Conflict(f"tenant {name} is offboarded for good: create one of another name")
    return found


def _speaking(state: RegistryState, name: str) -> Tenant:
    """A tenant that has, or may have, API keys."""
    found = _present(state, name)
    if found.tenant_id == PUBLIC_TENANT:
        raise Conflict("tenant 'public' owns shared prefixes; nobody may speak in its name")
    return found


# ---------------------------------------------------------------------- templates


def register_template(state: RegistryState, template: TemplateVersion) -> Draft[TemplateVersion]:
    """`template` brings a fresh incarnation. It serves at once unless another version does."""
    _check_name("template", template.name)
    _check_name("version", template.version)
    _check_text(state, template)
    _check_after(state, template)
    versions = [known for known in state.templates.values() if known.name == template.name]
    taken = any(known.state == SERVING for known in versions)
    added = replace(template, state=RETIRED if taken else SERVING)
    return _template_draft(state, template.name, [added], added, "register_template")


def promote_template(state: RegistryState, name: str, version: str) -> Draft[None]:
    """This version serves, no other of the name does. Of a retired one it is a rollback: warm again."""
    if not version:
        raise ConfigError(f"which version of template {name!r}? it is missing")
    chosen = _versions(state, name, version)[0]
    if chosen.state == PURGED:
        raise Conflict(
            f"template {name} {version} was purged and never serves again: "
            "register its text as a new version"
        )
    changed = [
        known.put(RETIRED)
        for known in state.templates.values()
        if known.name == name and known.state == SERVING and known is not chosen
    ]
    changed.append(chosen.put(SERVING))
    return _template_draft(state, name, changed, None, "promote_template")


def withdraw_template(state: RegistryState, name: str, version: str, *, purge: bool) -> Draft[None]:
    """`version` empty: all of them. Retired comes back by promote; purged never does."""
    target = PURGED if purge else RETIRED
    changed = [
        known.put(target) for known in _versions(state, name, version) if known.state != PURGED
    ]
    action = "purge_template" if purge else "retire_template"
    return _template_draft(state, name, changed, None, action)


def pin_template(
    state: RegistryState, name: str, version: str, *, now: float, ttl_s: float
) -> Draft[TemplateVersion]:
    """Blocks of this version's text stay in every host tier, within budgets, until `ttl_s` after `now` (Unix
    seconds). `version` empty: the one that serves. Pinned again, only the new end counts."""
    if not 0 < ttl_s <= MAX_PIN_S:
        raise ConfigError(f"a pin lasts up to {MAX_PIN_S:.0f} seconds, not {ttl_s}")
    known = _versions(state, name, version)
    serving = [one for one in known if one.state == SERVING]
    if not serving:
        raise Conflict(
            f"template {name} {known[0].version} is {known[0].state}, and only what serves is pinned: "
            "`kvfabric template promote` it first"
        )
    pinned = replace(serving[0], pinned_until=now + ttl_s, pin_s=ttl_s)
    detail = f"{pinned.version} for {ttl_s:g} s"
    return _pin_draft(state, pinned, "pin_template", detail)


def unpin_template(state: RegistryState, name: str, version: str) -> Draft[TemplateVersion]:
    """`version` empty: whichever is pinned. Raises Conflict if none is."""
    pinned = [known for known in _versions(state, name, version) if known.pinned_until]
    if not pinned:
        raise Conflict(f"template {name} {version} is not pinned".replace("  ", " "))
    free = replace(pinned[0], pinned_until=0.0, pin_s=0.0)
    return _pin_draft(state, free, "unpin_template", free.version)


# ---------------------------------------------------------------------- other scopes


def invalidate_scope(state: RegistryState, scope: str, action: str) -> Draft[None]:
    """Everything cached under a tenant, model or adapter is out of reach for good.

    The scope gets a fresh incarnation, which enters the keys of every namespace in it.
    """
    incarnations = {**state.scope_incarnations, scope: mint_incarnation()}
    after = replace(state, scope_incarnations=MappingProxyType(incarnations))
    return _draft(after, scope, None, action)


def mint_incarnation() -> Incarnation:
    return Incarnation(secrets.token_bytes(16))


def scope_of(state: RegistryState, kind: str, name: str) -> str:
    """The scope that an administrator means. Raises NotFound, ConfigError."""
    if kind == "tenant":
        return tenant_scope(tenant_named(state, name).tenant_id)
    if not name:
        raise ConfigError(f"which {kind}? its name is missing")
    scopes = {"template": template_scope, "model": model_scope, "adapter": adapter_scope}
    if kind not in scopes:
        raise ConfigError(f"{kind!r} is no scope: template, tenant, model or adapter")
    return scopes[kind](name)


# ---------------------------------------------------------------------- what never goes back


def check_forward(before: RegistryState, after: RegistryState) -> None:
    """Whatever made `after`: no epoch and no version goes back, and what was purged stays purged.

    Raises Conflict.
    """
    back = [scope for scope, epoch in before.epochs.items() if after.epoch(scope) < epoch]
    if back or after.version <= before.version or after.registry_id != before.registry_id:
        raise Conflict(f"epochs never go back: {', '.join(back) or 'registry version'} would")
    for name, template in before.templates.items():
        if template.state == PURGED and after.templates.get(name) != template:
            raise Conflict(f"template {' '.join(name)} was purged for good")


# ---------------------------------------------------------------------- inside


def _draft(
    after: RegistryState, scope: str, result: Result, action: str, detail: str = ""
) -> Draft[Result]:
    """`after` with the scope's epoch and the registry's version one higher."""
    old = after.epoch(scope)
    state = replace(
        after, version=after.version + 1, epochs=MappingProxyType({**after.epochs, scope: old + 1})
    )
    return Draft(state, result, action, scope, old, old + 1, detail)


def _tenant_draft(
    state: RegistryState, tenant: Tenant, result: Result, action: str, detail: str = ""
) -> Draft[Result]:
    after = replace(state, tenants=_with(state.tenants, {tenant.tenant_id: tenant}))
    return _draft(after, tenant_scope(tenant.tenant_id), result, action, detail)


def _template_draft(
    state: RegistryState,
    name: str,
    changed: list[TemplateVersion],
    result: Result,
    action: str,
) -> Draft[Result]:
    rows = {(template.name, template.version): template for template in changed}
    after = replace(state, templates=_with(state.templates, rows))
    detail = ", ".join(f"{template.version} {template.state}" for template in changed)
    return _draft(after, template_scope(name), result, action, detail)


def _pin_draft(
    state: RegistryState, template: TemplateVersion, action: str, detail: str
) -> Draft[TemplateVersion]:
    rows = {(template.name, template.version): template}
    after = replace(state, version=state.version + 1, templates=_with(state.templates, rows))
    scope = template_scope(template.name)
    epoch = state.epoch(scope)
    return Draft(after, template, action, scope, epoch, epoch, detail)


def _with(rows: Mapping[Key, Value], changed: Mapping[Key, Value]) -> Mapping[Key, Value]:
    return MappingProxyType({**rows, **changed})


def _versions(state: RegistryState, name: str, version: str) -> list[TemplateVersion]:
    found = [
        known
        for known in state.templates.values()
        if known.name == name and version in ("", known.version)
    ]
    if not found:
        what = f"template {name!r}" + (f" version {version!r}" if version else "")
        raise NotFound(f"there is no {what}: `kvfabric template list` shows them")
    return found


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what} {name!r}: use 1 to 128 letters, digits and ._:/@+- beginning with a letter or digit"
        )


def _check_quotas(tenant: Tenant) -> None:
    for tier, quota in (("host", tenant.host), ("SSD", tenant.ssd)):
        if quota.max_bytes and quota.floor_bytes > quota.max_bytes:
            raise ConfigError(
                f"tenant {tenant.name}: its {tier} floor of {quota.floor_bytes} bytes "
                f"is above its maximum of {quota.max_bytes}"
            )
    for name, limit in (
        ("lease_max_bytes", tenant.limits.lease_max_bytes),
        ("ssd_write_bytes_per_day", tenant.limits.ssd_write_bytes_per_day),
        ("requests_per_s", tenant.limits.requests_per_s),
        ("pin_max_bytes", tenant.limits.pin_max_bytes or 0),
    ):
        if not 0 <= limit < float("inf"):
            raise ConfigError(f"tenant {tenant.name}: {name} is {limit}; it is 0 or more")
    if not 0 <= tenant.max_age_s < float("inf"):
        raise ConfigError(f"tenant {tenant.name}: max_age_s is {tenant.max_age_s}; 0 means none")


def _check_after(state: RegistryState, template: TemplateVersion) -> None:
    if template.after and not template.is_public:
        raise ConfigError(
            f"template {template.name} comes after others, which says where it is shared: it is to be public"
        )
    for name in template.after:
        if name == template.name:
            raise ConfigError(f"template {name} cannot come after itself")
        if not any(known.is_public for known in _versions(state, name, "")):
            raise Conflict(f"template {name} is not public: nothing is shared after it")


def _check_text(state: RegistryState, template: TemplateVersion) -> None:
    if (template.name, template.version) in state.templates:
        raise Conflict(
            f"template {template.name} {template.version} exists; a version never changes: "
            "register the text under another version"
        )
    if not 0 < len(template.text) <= MAX_TEXT_BYTES:
        raise ConfigError(
            f"a template has 1 to {MAX_TEXT_BYTES} bytes of text, not {len(template.text)}"
        )
    try:
        template.text.decode()
    except UnicodeDecodeError as exc:
        raise ConfigError(f"the text of a template is UTF-8: {exc}") from exc
    known = state.templates.values()
    if sum(len(other.text) for other in known) + len(template.text) > MAX_ALL_TEXT_BYTES:
        raise Conflict(f"all templates together have at most {MAX_ALL_TEXT_BYTES} bytes of text")
    for other in known:
        # Two names for one text: which segment a prompt holds would be a matter of chance.
        if other.text == template.text and other.state != PURGED:
            raise Conflict(f"this text is registered already: {other.name} {other.version}")
