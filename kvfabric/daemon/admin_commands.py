"""`kvfabric status | tenant | template | invalidate | receipt`: what an administrator asks of a node.

Each talks to the node's admin socket. These modules are imported to list the commands: grpc is imported
when one of them runs.
"""

from __future__ import annotations

import argparse

from kvfabric.cli import Command
from kvfabric.daemon.admin_printing import Run, client, common, print_json, print_lines, size, table
from kvfabric.daemon.receipt_commands import configure_invalidate, configure_receipt
from kvfabric.daemon.template_commands import configure_template
from kvfabric.daemon.tenant_commands import configure_tenant


def configure_status(parser: argparse.ArgumentParser) -> None:
    common(parser, _status)


def _status(args: argparse.Namespace) -> int:
    from kvfabric.protocol import kvfabric_pb2 as pb

    with client(args) as node:
        status = node.call(node.admin.Status, pb.StatusRequest())
    if args.json:
        return print_json(status)
    lines = [
        f"node {status.node_id}, version {status.version}, boot {status.boot_id.hex()[:8]}, "
        f"up {status.uptime_s:.0f} s, registry version {status.registry_version}"
    ]
    registry = status.registry
    lines.append(
        f"registry {registry.home}: {registry.state}, {registry.num_holders} holders, "
        f"restored {registry.num_restores} times" + (f": {registry.detail}" * bool(registry.detail))
    )
    if registry.tenants_without_keys:
        names = ", ".join(registry.tenants_without_keys)
        lines.append(f"no keys of tenants {names}: their requests reuse nothing here")
    lines += table(
        ("tier", "state", "used", "capacity", "draining", "blocks"),
        [
            (
                tier.tier,
                tier.state,
                size(tier.used_bytes),
                size(tier.capacity_bytes),
                size(tier.draining_bytes),
                tier.num_blocks,
            )
            for tier in status.tiers
        ],
    )
    lines += [f"{tier.tier} is degraded: {tier.detail}" for tier in status.tiers if tier.detail]
    audit = status.audit
    lines.append(
        f"audit of {audit.num_audits} changes: {audit.num_refused} probes refused, "
        f"{audit.num_uncontrolled} without anything live to compare, {audit.stale_serves} stale"
    )
    lines += [f"ALARM: {audit.alarm}"] * bool(audit.alarm)
    lines += table(
        ("engine", "endpoint", "model", "revision", "block"),
        [
            (e.engine_id, e.endpoint, e.model, e.model_revision, f"{e.block_tokens} tokens")
            for e in status.engines
        ],
    )
    return print_lines(lines)


def _run(args: argparse.Namespace) -> int:
    run: Run = args.run_verb
    return run(args)


STATUS = Command("what a node holds and serves", "node", configure_status, _run)
TENANT = Command(
    "tenants: create, list, set, key, usage, offboard, claim-keys", "node", configure_tenant, _run
)
TEMPLATE = Command(
    "templates: register, list, promote, pin, unpin", "node", configure_template, _run
)
INVALIDATE = Command(
    "take a template, tenant, model or adapter out of reach", "node", configure_invalidate, _run
)
RECEIPT = Command(
    "what became of a change: who applied it, what is drained and destroyed",
    "node",
    configure_receipt,
    _run,
)
