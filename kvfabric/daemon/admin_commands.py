"""`kvfabric status | tenant | template | invalidate`: what an administrator asks of a node.

Each talks to the node's admin socket. This module is imported to list the commands: grpc is imported when
one of them runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfabric.cli import Command
from kvfabric.config import NodeConfig, load, parse_size, split_address
from kvfabric.errors import ConfigError

if TYPE_CHECKING:
    from kvfabric.daemon.admin_client import AdminClient
    from kvfabric.protocol import kvfabric_pb2 as pb
    from kvfabric.registry.state import Tenant, TenantLimits

_DIGEST_DIGITS = 8
_SIZE_FLAGS = ("host_max", "host_floor", "ssd_max", "ssd_floor", "lease_max", "ssd_write_per_day")

Run = Callable[[argparse.Namespace], int]


# ---------------------------------------------------------------------- status


def _configure_status(parser: argparse.ArgumentParser) -> None:
    _common(parser, _status)


def _status(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    with _client(args) as client:
        status = client.call(client.admin.Status, pb.StatusRequest())
    if args.json:
        return _print_json(status)
    lines = [
        f"node {status.node_id}, version {status.version}, boot {status.boot_id.hex()[:8]}, "
        f"up {status.uptime_s:.0f} s, registry version {status.registry_version}"
    ]
    registry = status.registry
    lines.append(
        f"registry {registry.home}: {registry.state}, {registry.num_holders} holders, "
        f"restored {registry.num_restores} times" + (f": {registry.detail}" * bool(registry.detail))
    )
    lines += _table(
        ("tier", "state", "used", "capacity", "draining", "blocks"),
        [
            (
                tier.tier,
                tier.state,
                _size(tier.used_bytes),
                _size(tier.capacity_bytes),
                _size(tier.draining_bytes),
                tier.num_blocks,
            )
            for tier in status.tiers
        ],
    )
    lines += [f"{tier.tier} is degraded: {tier.detail}" for tier in status.tiers if tier.detail]
    lines += _table(
        ("engine", "endpoint", "model", "revision", "block"),
        [
            (e.engine_id, e.endpoint, e.model, e.model_revision, f"{e.block_tokens} tokens")
            for e in status.engines
        ],
    )
    return _print_lines(lines)


# ---------------------------------------------------------------------- tenant


def _configure_tenant(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    create = verbs.add_parser("create", help="make a tenant; prints its API key, once")
    create.add_argument("name", metavar="NAME")
    _quota_arguments(create)
    _common(create, _tenant_create)
    _common(verbs.add_parser("list", help="tenants, their limits and keys"), _tenant_list)
    change = verbs.add_parser("set", help="change limits of a tenant; what is not named stays")
    change.add_argument("name", metavar="NAME")
    _quota_arguments(change)
    change.add_argument("--max-age", type=float, metavar="SECONDS", help="0: none")
    opted = change.add_mutually_exclusive_group()
    opted.add_argument("--opt-out", action="store_true", help="neither stored nor looked up")
    opted.add_argument("--opt-in", action="store_true", help="cached again")
    _common(change, _tenant_set)
    key = verbs.add_parser("key", help="API keys").add_subparsers(
        dest="key_verb", metavar="VERB", required=True
    )
    create_key = key.add_parser("create", help="a further API key; prints it, once")
    create_key.add_argument("name", metavar="NAME")
    _common(create_key, _key_create)
    revoke = key.add_parser("revoke", help="end an API key; returns when no router takes it")
    revoke.add_argument("name", metavar="NAME")
    revoke.add_argument("digest", metavar="DIGEST", help="8 or more hex digits, from `tenant list`")
    _common(revoke, _key_revoke)
    rotate = key.add_parser("rotate", help="a fresh API key for all there are; prints it, once")
    rotate.add_argument("name", metavar="NAME")
    rotate.add_argument(
        "--grace", type=float, default=0.0, metavar="S", help="the old ones stay valid so long"
    )
    _common(rotate, _key_rotate)
    offboard = verbs.add_parser(
        "offboard", help="end a tenant for good: API keys, secrets and blocks; prints a receipt"
    )
    offboard.add_argument("name", metavar="NAME")
    _common(offboard, _tenant_offboard)
    _common(verbs.add_parser("usage", help="bytes that each tenant has here"), _tenant_usage)


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
        ),
    )
    with _client(args) as client:
        created = client.call(client.registry.CreateTenant, request)
    if args.json:
        return _print_json(created)
    return _print_lines(
        [
            f"tenant {created.tenant.name} is {created.tenant.tenant_id}",
            f"API key (shown once): {created.api_key}",
        ]
    )


def _tenant_list(args: argparse.Namespace) -> int:
    from kvfabric.daemon.admin_client import to_plain
    from kvfabric.registry.wire import tenant_to_pb

    with _client(args) as client:
        tenants = list(client.state().tenants.values())
    if args.json:
        return _dump({"tenants": [to_plain(tenant_to_pb(tenant)) for tenant in tenants]})
    rows = [
        (
            tenant.name,
            tenant.tenant_id,
            _quota(tenant.host.max_bytes, tenant.host.floor_bytes),
            _quota(tenant.ssd.max_bytes, tenant.ssd.floor_bytes),
            _size(tenant.limits.lease_max_bytes) if tenant.limits.lease_max_bytes else "-",
            _per_day(tenant.limits.ssd_write_bytes_per_day),
            f"{tenant.limits.requests_per_s:g}/s" if tenant.limits.requests_per_s else "-",
            f"{tenant.max_age_s:g} s" if tenant.max_age_s else "-",
            _cache_state(tenant),
            _keys(tenant),
        )
        for tenant in tenants
    ]
    header = ("name", "id", "host max/floor", "ssd max/floor", "leases", "ssd writes", "requests")
    return _print_lines(_table((*header, "max age", "cache", "keys"), rows))


def _per_day(num_bytes: int) -> str:
    return f"{_size(num_bytes)}/day" if num_bytes else "-"


def _cache_state(tenant: Tenant) -> str:
    if tenant.is_offboarded:
        return "offboarded"
    return "opted out" if tenant.opted_out else "cached"


def _keys(tenant: Tenant) -> str:
    """Digests; those that a rotation left, with the time of their end."""
    keys = [digest.hex()[:_DIGEST_DIGITS] for digest in tenant.api_key_digests]
    for digest, at in tenant.expiring_keys:
        end = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
        keys.append(f"{digest.hex()[:_DIGEST_DIGITS]} (until {end})")
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
    with _client(args) as client:
        old = tenant_named(client.state(), args.name)
        for tier, quota in (("host", old.host), ("ssd", old.ssd)):
            maximum, floor = f"{tier}_max", f"{tier}_floor"
            if getattr(args, maximum) is None and getattr(args, floor) is None:
                continue
            target = getattr(request, tier)
            target.SetInParent()
            target.max_bytes = _given(args, sizes, maximum, quota.max_bytes)
            target.floor_bytes = _given(args, sizes, floor, quota.floor_bytes)
        _set_limits(args, sizes, request, old.limits)
        tenant = client.call(client.registry.SetTenant, request)
    if args.json:
        return _dump(to_plain(tenant))
    return _print_lines([f"tenant {tenant.name} ({tenant.tenant_id}) is set"])


def _set_limits(
    args: argparse.Namespace,
    sizes: dict[str, int],
    request: pb.SetTenantRequest,
    old: TenantLimits,
) -> None:
    if args.lease_max is args.ssd_write_per_day is args.requests_per_s is None:
        return
    target, rate = request.limits, args.requests_per_s
    target.SetInParent()
    target.lease_max_bytes = _given(args, sizes, "lease_max", old.lease_max_bytes)
    target.ssd_write_bytes_per_day = _given(
        args, sizes, "ssd_write_per_day", old.ssd_write_bytes_per_day
    )
    target.requests_per_s = old.requests_per_s if rate is None else rate


def _given(args: argparse.Namespace, sizes: dict[str, int], flag: str, old: int) -> int:
    return old if getattr(args, flag) is None else sizes[flag]


def _key_create(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    with _client(args) as client:
        request = pb.CreateApiKeyRequest(name=args.name)
        created = client.call(client.registry.CreateApiKey, request)
    if args.json:
        return _print_json(created)
    return _print_lines([f"API key (shown once): {created.api_key}"])


def _key_rotate(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    with _client(args) as client:
        request = pb.RotateApiKeyRequest(name=args.name, grace_s=args.grace)
        created = client.call(client.registry.RotateApiKey, request)
    if args.json:
        return _print_json(created)
    left = f"; the old ones end in {args.grace:g} s" if args.grace else "; the old ones ended"
    return _print_lines([f"API key (shown once): {created.api_key}{left}"])


def _key_revoke(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    with _client(args) as client:
        request = pb.RevokeApiKeyRequest(name=args.name, api_key_prefix=args.digest)
        tenant = client.call(client.registry.RevokeApiKey, request)
    if args.json:
        return _print_json(tenant)
    left = len(tenant.api_key_digests)
    return _print_lines([f"revoked; tenant {tenant.name} has {left} API keys left"])


def _tenant_offboard(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    with _client(args) as client:
        gone = client.call(client.registry.OffboardTenant, pb.OffboardTenantRequest(name=args.name))
    if args.json:
        return _print_json(gone)
    at = datetime.fromtimestamp(gone.destroyed_at, UTC).isoformat(timespec="milliseconds")
    secrets = "removed" if gone.had_secrets else "gone before"
    rest = "encrypted under keys that are gone" if gone.ssd_encrypted else "plain until overwritten"
    _print_lines(
        [
            f"tenant {gone.tenant_id} is offboarded; on this node, at {at}:",
            f"secrets {secrets}, keyring generation {gone.keyring_generation}, new root key",
            f"{gone.num_blocks} blocks dropped; what SSD still has of them is {rest}",
        ]
    )
    return _print_receipt(args, gone.receipt)


def _tenant_usage(args: argparse.Namespace) -> int:
    from kvfabric.daemon.admin_client import to_plain
    from kvfabric.protocol import kvfabric_pb2 as pb

    with _client(args) as client:
        status = client.call(client.admin.Status, pb.StatusRequest())
        names = {tenant.tenant_id: tenant.name for tenant in client.state().tenants.values()}
    named = [(str(names.get(usage.tenant_id, "?")), usage) for usage in status.usage]
    if args.json:
        return _dump({"usage": [{"name": name} | to_plain(usage) for name, usage in named]})
    rows = [
        (
            name,
            u.tenant_id,
            _size(u.host_bytes),
            _size(u.ssd_bytes),
            _size(u.leased_bytes),
            _size(u.ssd_written_bytes),
        )
        for name, u in named
    ]
    return _print_lines(_table(("name", "id", "host", "ssd", "leased", "ssd written"), rows))


# ---------------------------------------------------------------------- template


def _configure_template(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    register = verbs.add_parser("register", help="add a version of a template")
    register.add_argument("name", metavar="NAME")
    register.add_argument("--version", required=True, metavar="V")
    register.add_argument("--file", required=True, metavar="FILE", help="its text; - for stdin")
    register.add_argument(
        "--public", action="store_true", help="its blocks may be shared by all tenants"
    )
    _common(register, _template_register)
    _common(verbs.add_parser("list", help="templates and their versions"), _template_list)
    promote = verbs.add_parser("promote", help="make a version the serving one, or roll back to it")
    promote.add_argument("name", metavar="NAME")
    promote.add_argument("position", nargs="?", default="", metavar="V")
    promote.add_argument("--version", default="", metavar="V", help="the same as V")
    _common(promote, _template_promote)


def _template_register(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    request = pb.RegisterTemplateRequest(
        name=args.name, version=args.version, text=_text(args.file), is_public=args.public
    )
    with _client(args) as client:
        template = client.call(client.registry.RegisterTemplate, request)
    if args.json:
        return _print_json(template)
    waits = ""
    if template.state != "serving":
        promote = f"kvfabric template promote {template.name} {template.version}"
        waits = f"; another version serves: `{promote}` switches"
    return _print_lines([f"template {template.name} {template.version} is {template.state}{waits}"])


def _text(file: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror}") from exc


def _template_list(args: argparse.Namespace) -> int:
    from kvfabric.daemon.admin_client import to_plain
    from kvfabric.registry.wire import template_to_pb

    with _client(args) as client:
        templates = list(client.state().templates.values())
    if args.json:
        return _dump({"templates": [to_plain(template_to_pb(t)) for t in templates]})
    rows = [
        (
            template.name,
            template.version,
            template.state,
            "public" if template.is_public else "-",
            f"{len(template.text)} bytes",
            template.incarnation.hex()[:_DIGEST_DIGITS],
        )
        for template in templates
    ]
    header = ("template", "version", "state", "shared", "text", "incarnation")
    return _print_lines(_table(header, rows))


def _template_promote(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    version = args.position or args.version
    if not version or (args.position and args.version and args.position != args.version):
        raise ConfigError("name one version: kvfabric template promote NAME V")
    with _client(args) as client:
        request = pb.PromoteTemplateRequest(name=args.name, version=version)
        receipt = client.call(client.registry.PromoteTemplate, request)
    return _print_receipt(args, receipt)


# ---------------------------------------------------------------------- invalidate


def _configure_invalidate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scope", choices=("template", "tenant", "model", "adapter"))
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--version", default="", metavar="V", help="of a template; default: all")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--retire", action="store_true", help="a template can be promoted again (default)"
    )
    how.add_argument("--purge", action="store_true", help="for good")
    _common(parser, _invalidate)


def _invalidate(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    if args.version and args.scope != "template":
        raise ConfigError(f"--version is of a template; a {args.scope} has none")
    request = pb.InvalidateRequest(
        scope=args.scope, name=args.name, version=args.version, purge=args.purge
    )
    with _client(args) as client:
        receipt = client.call(client.registry.Invalidate, request)
    return _print_receipt(args, receipt)


def _print_receipt(args: argparse.Namespace, receipt: pb.Receipt) -> int:
    if args.json:
        return _print_json(receipt)
    at = datetime.fromtimestamp(receipt.unreachable_at, UTC).isoformat(timespec="milliseconds")
    after_s = receipt.unreachable_at - receipt.requested_at
    rows = [
        (
            ack.holder_kind,
            ack.holder_id,
            f"{ack.after_s:.3f} s",
            "not heard from, lease waited out" if ack.waited_out else "applied",
        )
        for ack in receipt.acknowledgements
    ]
    return _print_lines(
        [
            f"{receipt.action} {receipt.scope}, epoch {receipt.old_epoch} -> {receipt.new_epoch}",
            f"in force everywhere since {at}, {after_s:.3f} s after the request",
            *_table(("holder", "id", "after", ""), rows),
            *_fate_lines(receipt),
            f"receipt {receipt.receipt_id}"
            + ("" if receipt.is_final else f"; the rest: `kvfabric receipt {receipt.receipt_id}`"),
            f"requested by {receipt.requested_by or 'unknown'}, "
            f"audit head {receipt.audit_head.hex()}",
        ]
    )


def _fate_lines(receipt: pb.Receipt) -> list[str]:
    """What became of the bytes and of the requests that ran."""

    def since(at: float) -> str:
        return f"after {at - receipt.requested_at:.3f} s" if at else "not yet"

    nodes = [
        (
            node.node_id,
            _size(node.bytes_unreachable),
            _size(node.bytes_reclaimed),
            since(node.drained_at),
            since(node.destroyed_at) if node.destroyed_at or node.failure else "-",
            node.failure,
        )
        for node in receipt.nodes
    ]
    engines = [
        (node.node_id, engine.engine_id, engine.running, since(engine.drained_at), hbm)
        for node in receipt.nodes
        for engine in node.engines
        for hbm in [f"{engine.hbm}: {engine.detail}" if engine.detail else engine.hbm]
    ]
    lines = _table(("node", "unreachable", "reclaimed", "drained", "destroyed", ""), nodes)
    lines += _table(("node", "engine", "running", "drained", "its own cache"), engines)
    if receipt.not_heard_from:
        lines.append(f"not heard from: {', '.join(receipt.not_heard_from)}")
    return lines


def _configure_receipt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("receipt_id", metavar="ID", help="as it was printed: SCOPE@EPOCH")
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="until it is final, at most 25"
    )
    _common(parser, _receipt)


def _receipt(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    request = pb.GetReceiptRequest(receipt_id=args.receipt_id, wait_s=args.wait)
    with _client(args) as client:
        receipt = client.call(client.registry.GetReceipt, request)
    return _print_receipt(args, receipt)


# ---------------------------------------------------------------------- what they share


def _common(parser: argparse.ArgumentParser, run: Run) -> None:
    parser.add_argument("--admin-socket", metavar="PATH", help="of the node (default: its own)")
    parser.add_argument("--node", metavar="HOST:PORT", help="ask this one, over mTLS")
    parser.add_argument("--tls-dir", metavar="DIR", help="of this administrator (`kvfabric pki`)")
    parser.add_argument("--config", metavar="FILE", help="the node's TOML file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run_verb=run)


def _client(args: argparse.Namespace) -> AbstractContextManager[AdminClient]:
    from kvfabric.daemon.admin_client import AdminClient
    from kvfabric.tls import Security

    if args.node:
        split_address(args.node, "--node")
        tls_dir = Path(args.tls_dir).expanduser() if args.tls_dir else None
        return AdminClient(args.node, security=Security("admin", tls_dir))
    flags = {"admin_socket": args.admin_socket} if args.admin_socket else {}
    config = load(NodeConfig, file=Path(args.config) if args.config else None, flags=flags)
    return AdminClient(config.admin_socket_path)


def _sizes(args: argparse.Namespace) -> dict[str, int]:
    """Bytes of each flag that is a size; 0 for one that was not given."""
    flags = {flag: getattr(args, flag) for flag in _SIZE_FLAGS}
    return {
        flag: 0 if text is None else parse_size(text, "--" + flag.replace("_", "-"))
        for flag, text in flags.items()
    }


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _quota(max_bytes: int, floor_bytes: int) -> str:
    return f"{_size(max_bytes) if max_bytes else '-'} / {_size(floor_bytes)}"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines with aligned columns; none without rows."""
    cells = [tuple(str(cell) for cell in row) for row in rows]
    if not cells:
        return []
    cells.insert(0, tuple(header))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _print_lines(lines: Iterable[str]) -> int:
    print("\n".join(lines) or "nothing")
    return 0


def _print_json(message: Any) -> int:
    from kvfabric.daemon.admin_client import to_plain

    return _dump(to_plain(message))


def _dump(plain: dict[str, Any]) -> int:
    print(json.dumps(plain, indent=2))
    return 0


def _run(args: argparse.Namespace) -> int:
    run: Run = args.run_verb
    return run(args)


STATUS = Command("what a node holds and serves", "node", _configure_status, _run)
TENANT = Command(
    "tenants: create, list, set, key, usage, offboard", "node", _configure_tenant, _run
)
TEMPLATE = Command("templates: register, list, promote", "node", _configure_template, _run)
INVALIDATE = Command(
    "take a template, tenant, model or adapter out of reach", "node", _configure_invalidate, _run
)
RECEIPT = Command(
    "what became of a change: who applied it, what is drained and destroyed",
    "node",
    _configure_receipt,
    _run,
)
