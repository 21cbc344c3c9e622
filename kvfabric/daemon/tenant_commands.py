"""`kvfabric tenant`: create, list, set, key, usage, offboard."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kvfabric.config import parse_size
from kvfabric.daemon.admin_printing import (
    DIGEST_DIGITS,
    client,
    common,
    dump,
    print_json,
    print_lines,
    size,
    table,
)
from kvfabric.daemon.receipt_commands import print_receipt

if TYPE_CHECKING:
    from kvfabric.protocol import kvfabric_pb2 as pb
    from kvfabric.registry.state import Tenant, TenantLimits

_SIZE_FLAGS = ("host_max", "host_floor", "ssd_max", "ssd_floor", "lease_max", "ssd_write_per_day")


def configure_tenant(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    create = verbs.add_parser("create", help="make a tenant; prints its API key, once")
    create.add_argument("name", metavar="NAME")
    _quota_arguments(create)
    common(create, _tenant_create)
    common(verbs.add_parser("list", help="tenants, their limits and keys"), _tenant_list)
    change = verbs.add_parser("set", help="change limits of a tenant; what is not named stays")
    change.add_argument("name", metavar="NAME")
    _quota_arguments(change)
    change.add_argument("--max-age", type=float, metavar="SECONDS", help="0: none")
    opted = change.add_mutually_exclusive_group()
    opted.add_argument("--opt-out", action="store_true", help="neither stored nor looked up")
    opted.add_argument("--opt-in", action="store_true", help="cached again")
    common(change, _tenant_set)
    key = verbs.add_parser("key", help="API keys").add_subparsers(
        dest="key_verb", metavar="VERB", required=True
    )
    create_key = key.add_parser("create", help="a further API key; prints it, once")
    create_key.add_argument("name", metavar="NAME")
    common(create_key, _key_create)
    revoke = key.add_parser("revoke", help="end an API key; returns when no router takes it")
    revoke.add_argument("name", metavar="NAME")
    revoke.add_argument("digest", metavar="DIGEST", help="8 or more hex digits, from `tenant list`")
    common(revoke, _key_revoke)
    rotate = key.add_parser("rotate", help="a fresh API key for all there are; prints it, once")
    rotate.add_argument("name", metavar="NAME")
    rotate.add_argument(
        "--grace", type=float, default=0.0, metavar="S", help="the old ones stay valid so long"
    )
    common(rotate, _key_rotate)
    offboard = verbs.add_parser(
        "offboard", help="end a tenant for good: API keys, secrets and blocks; prints a receipt"
    )
    offboard.add_argument("name", metavar="NAME")
    common(offboard, _tenant_offboard)
    claim = verbs.add_parser(
        "claim-keys", help="make this node's keyring the fleet's, if no node has the one that was"
    )
    common(claim, _claim_keys)
    common(verbs.add_parser("usage", help="bytes that each tenant has here"), _tenant_usage)


def _quota_arguments(parser: argparse.ArgumentParser) -> None:
    for tier in ("host", "ssd"):
        parser.add_argument(f"--{tier}-max", metavar="SIZE", help=f"most bytes in {tier}; 0: none")
        parser.add_argument(
            f"--{tier}-floor", metavar="SIZE", help=f"bytes in {tier} that nobody takes away"
        )
    parser.add_argument(
        "--lease-max", metavar="SIZE", help="most bytes under leases on a node; 0: none of its own"
    )
    parser.add_argument(
        "--ssd-write-per-day", metavar="SIZE", help="most bytes a node writes to SSD; 0: no limit"
    )
    parser.add_argument(
        "--requests-per-s", type=float, metavar="N", help="taken by each router; 0: no limit"
    )
    parser.add_argument(
        "--pin-budget",
        metavar="SIZE",
        help="most bytes that pinned templates keep in host; 0: none; default: its floor and 5%% of the tier",
    )


def _tenant_create(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    sizes = _sizes(args)
    request = pb.CreateTenantRequest(
        name=args.name,
        host=pb.TierQuota(max_bytes=sizes["host_max"], floor_bytes=sizes["host_floor"]),
        ssd=pb.TierQuota(max_bytes=sizes["ssd_max"], floor_bytes=sizes["ssd_floor"]),
        limits=pb.TenantLimits(
            lease_max_bytes=sizes["lease_max"],
            ssd_write_bytes_per_day=sizes["ssd_write_per_day"],
            requests_per_s=args.requests_per_s or 0.0,
            pin_max_bytes=_pin_budget(args, None),
        ),
    )
    with client(args) as node:
        created = node.call(node.registry.CreateTenant, request)
    if args.json:
        return print_json(created)
    return print_lines(
        [
            f"tenant {created.tenant.name} is {created.tenant.tenant_id}",
            f"API key (shown once): {created.api_key}",
        ]
    )


def _tenant_list(args: argparse.Namespace) -> int:
    from kvfabric.daemon.admin_client import to_plain
    from kvfabric.registry.wire import tenant_to_pb

    with client(args) as node:
        tenants = list(node.state().tenants.values())
    if args.json:
        return dump({"tenants": [to_plain(tenant_to_pb(tenant)) for tenant in tenants]})
    rows = [
        (
            tenant.name,
            tenant.tenant_id,
            _quota(tenant.host.max_bytes, tenant.host.floor_bytes),
            _quota(tenant.ssd.max_bytes, tenant.ssd.floor_bytes),
            size(tenant.limits.lease_max_bytes) if tenant.limits.lease_max_bytes else "-",
            _per_day(tenant.limits.ssd_write_bytes_per_day),
            f"{tenant.limits.requests_per_s:g}/s" if tenant.limits.requests_per_s else "-",
            "-" if tenant.limits.pin_max_bytes is None else size(tenant.limits.pin_max_bytes),
            f"{tenant.max_age_s:g} s" if tenant.max_age_s else "-",
            _cache_state(tenant),
            _keys(tenant),
        )
        for tenant in tenants
    ]
    header = ("name", "id", "host max/floor", "ssd max/floor", "leases", "ssd writes", "requests")
    return print_lines(table((*header, "pins", "max age", "cache", "keys"), rows))


def _per_day(num_bytes: int) -> str:
    return f"{size(num_bytes)}/day" if num_bytes else "-"


def _cache_state(tenant: Tenant) -> str:
    if tenant.is_offboarded:
        return "offboarded"
    return "opted out" if tenant.opted_out else "cached"


def _keys(tenant: Tenant) -> str:
    """Digests; those that a rotation left, with the time of their end."""
    keys = [digest.hex()[:DIGEST_DIGITS] for digest in tenant.api_key_digests]
    for digest, at in tenant.expiring_keys:
        end = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
        keys.append(f"{digest.hex()[:DIGEST_DIGITS]} (until {end})")
    return " ".join(keys) or "-"


def _tenant_set(args: argparse.Namespace) -> int:
    from kvfabric.daemon.admin_client import to_plain
    from kvfabric.protocol import kvfabric_pb2 as pb
    from kvfabric.registry.changes import tenant_named

    request = pb.SetTenantRequest(name=args.name)
    if args.max_age is not None:
        request.max_age_s = args.max_age
    if args.opt_out or args.opt_in:
        request.opted_out = args.opt_out
    sizes = _sizes(args)
    with client(args) as node:
        old = tenant_named(node.state(), args.name)
        for tier, quota in (("host", old.host), ("ssd", old.ssd)):
            maximum, floor = f"{tier}_max", f"{tier}_floor"
            if getattr(args, maximum) is None and getattr(args, floor) is None:
                continue
            target = getattr(request, tier)
            target.SetInParent()
            target.max_bytes = _given(args, sizes, maximum, quota.max_bytes)
            target.floor_bytes = _given(args, sizes, floor, quota.floor_bytes)
        _set_limits(args, sizes, request, old.limits)
        tenant = node.call(node.registry.SetTenant, request)
    if args.json:
        return dump(to_plain(tenant))
    return print_lines([f"tenant {tenant.name} ({tenant.tenant_id}) is set"])


def _set_limits(
    args: argparse.Namespace,
    sizes: dict[str, int],
    request: pb.SetTenantRequest,
    old: TenantLimits,
) -> None:
    given = (args.lease_max, args.ssd_write_per_day, args.requests_per_s, args.pin_budget)
    if all(one is None for one in given):
        return
    target, rate = request.limits, args.requests_per_s
    target.SetInParent()
    target.lease_max_bytes = _given(args, sizes, "lease_max", old.lease_max_bytes)
    target.ssd_write_bytes_per_day = _given(
        args, sizes, "ssd_write_per_day", old.ssd_write_bytes_per_day
    )
    target.requests_per_s = old.requests_per_s if rate is None else rate
    pin_budget = _pin_budget(args, old.pin_max_bytes)
    if pin_budget is not None:
        target.pin_max_bytes = pin_budget


def _pin_budget(args: argparse.Namespace, old: int | None) -> int | None:
    """None: what every tenant has."""
    if args.pin_budget is None:
        return old
    return None if args.pin_budget == "default" else parse_size(args.pin_budget, "--pin-budget")


def _given(args: argparse.Namespace, sizes: dict[str, int], flag: str, old: int) -> int:
    return old if getattr(args, flag) is None else sizes[flag]


def _key_create(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    with client(args) as node:
        request = pb.CreateApiKeyRequest(name=args.name)
        created = node.call(node.registry.CreateApiKey, request)
    if args.json:
        return print_json(created)
    return print_lines([f"API key (shown once): {created.api_key}"])


def _key_rotate(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    with client(args) as node:
        request = pb.RotateApiKeyRequest(name=args.name, grace_s=args.grace)
        created = node.call(node.registry.RotateApiKey, request)
    if args.json:
        return print_json(created)
    left = f"; the old ones end in {args.grace:g} s" if args.grace else "; the old ones ended"
    return print_lines([f"API key (shown once): {created.api_key}{left}"])


def _key_revoke(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    with client(args) as node:
        request = pb.RevokeApiKeyRequest(name=args.name, api_key_prefix=args.digest)
        tenant = node.call(node.registry.RevokeApiKey, request)
    if args.json:
        return print_json(tenant)
    left = len(tenant.api_key_digests)
    return print_lines([f"revoked; tenant {tenant.name} has {left} API keys left"])


def _tenant_offboard(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    with client(args) as node:
        request = pb.OffboardTenantRequest(name=args.name)
        receipt = node.call(node.registry.OffboardTenant, request)
    return print_receipt(args, receipt)


def _claim_keys(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    with client(args) as node:
        claimed = node.call(node.registry.ClaimKeys, pb.ClaimKeysRequest())
    if args.json:
        return print_json(claimed)
    return print_lines([f"the fleet's keys are this node's, of {claimed.num_tenants} tenants"])


def _tenant_usage(args: argparse.Namespace) -> int:
    from kvfabric.daemon.admin_client import to_plain
    from kvfabric.protocol import kvfabric_pb2 as pb

    with client(args) as node:
        status = node.call(node.admin.Status, pb.StatusRequest())
        names = {tenant.tenant_id: tenant.name for tenant in node.state().tenants.values()}
    named = [(str(names.get(usage.tenant_id, "?")), usage) for usage in status.usage]
    if args.json:
        return dump({"usage": [{"name": name} | to_plain(usage) for name, usage in named]})
    rows = [
        (
            name,
            u.tenant_id,
            size(u.host_bytes),
            size(u.ssd_bytes),
            size(u.leased_bytes),
            size(u.ssd_written_bytes),
            f"{size(u.pinned_bytes)} / {size(u.pin_max_bytes)}",
            u.pins_refused,
        )
        for name, u in named
    ]
    header = (
        "name",
        "id",
        "host",
        "ssd",
        "leased",
        "ssd written",
        "pinned / budget",
        "over budget",
    )
    return print_lines(table(header, rows))


def _sizes(args: argparse.Namespace) -> dict[str, int]:
    """Bytes of each flag that is a size; 0 for one that was not given."""
    flags = {flag: getattr(args, flag) for flag in _SIZE_FLAGS}
    return {
        flag: 0 if text is None else parse_size(text, "--" + flag.replace("_", "-"))
        for flag, text in flags.items()
    }


def _quota(max_bytes: int, floor_bytes: int) -> str:
    return f"{size(max_bytes) if max_bytes else '-'} / {size(floor_bytes)}"
