"""`kvfabric invalidate | receipt`: take something out of reach, and see what became of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kvfabric.daemon.admin_printing import client, common, print_json, print_lines, size, table
from kvfabric.errors import ConfigError

if TYPE_CHECKING:
    from kvfabric.protocol import kvfabric_pb2 as pb


def configure_invalidate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scope", choices=("template", "tenant", "model", "adapter"))
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--version", default="", metavar="V", help="of a template; default: all")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--retire", action="store_true", help="a template can be promoted again (default)"
    )
    how.add_argument("--purge", action="store_true", help="for good")
    common(parser, _invalidate)


def _invalidate(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    if args.version and args.scope != "template":
        raise ConfigError(f"--version is of a template; a {args.scope} has none")
    request = pb.InvalidateRequest(
        scope=args.scope, name=args.name, version=args.version, purge=args.purge
    )
    with client(args) as node:
        receipt = node.call(node.registry.Invalidate, request)
    return print_receipt(args, receipt)


def print_receipt(args: argparse.Namespace, receipt: pb.Receipt) -> int:
    if args.json:
        return print_json(receipt)
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
    return print_lines(
        [
            f"{receipt.action} {receipt.scope}, epoch {receipt.old_epoch} -> {receipt.new_epoch}",
            f"in force everywhere since {at}, {after_s:.3f} s after the request",
            *table(("holder", "id", "after", ""), rows),
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
            size(node.bytes_unreachable),
            size(node.bytes_reclaimed),
            since(node.drained_at),
            since(node.destroyed_at) if node.destroyed_at or node.failure else "-",
            _audit(node, since),
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
    keyrings = [
        (node.node_id, since(node.keys_removed_at), node.keyring_generation)
        for node in receipt.nodes
        if receipt.action == "offboard_tenant"
    ]
    lines = table(("node", "unreachable", "reclaimed", "drained", "destroyed", "audit", ""), nodes)
    lines += table(("node", "engine", "running", "drained", "its own cache"), engines)
    lines += table(("node", "keys removed", "keyring generation"), keyrings)
    if receipt.not_heard_from:
        lines.append(f"not heard from: {', '.join(receipt.not_heard_from)}")
    return lines


def _audit(node: pb.NodeReport, since: Callable[[float], str]) -> str:
    """What the node's auditor was answered when it asked for it."""
    if not node.HasField("audit"):
        return "-"
    audit = node.audit
    asked = audit.num_refused + audit.num_uncontrolled + audit.num_stale
    if not asked:
        return audit.result
    last = f", last refusal {since(audit.refused_at)}" if audit.refused_at else ""
    return f"{audit.result} ({asked} asked for{last})"


def configure_receipt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("receipt_id", metavar="ID", help="as it was printed: SCOPE@EPOCH")
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="until it is final, at most 25"
    )
    common(parser, _receipt)


def _receipt(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    request = pb.GetReceiptRequest(receipt_id=args.receipt_id, wait_s=args.wait)
    with client(args) as node:
        receipt = node.call(node.registry.GetReceipt, request)
    return print_receipt(args, receipt)
