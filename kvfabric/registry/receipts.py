"""What is kept of a change beside the audit log: who agreed when, and what became of the bytes.

A receipt is put together from rows under its id, `SCOPE@EPOCH`: one of whoever made the change, and one of
each node, which that node writes anew as things go on. Pure; rows are kept by the registry.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from kvfabric.protocol import kvfabric_pb2 as pb

MADE = "change"
"""Key of the row of whoever made the change; every other key is a holder's id."""

PASSED, NO_CONTROL, NOTHING_HELD, BROUGHT_BACK, STALE = (
    "passed",
    "no_control",
    "nothing_held",
    "brought_back",
    "stale",
)
"""Of an audit: refused while something live was served; refused, but nothing live was there to compare; the
node held nothing of it; it was promoted again before; it was served. Or PENDING."""

UNAFFECTED, PENDING, RESET, NOT_RESET, GONE = "unaffected", "pending", "reset", "not_reset", "gone"


class AckRow(msgspec.Struct, frozen=True):
    holder_id: str
    kind: str
    after_s: float
    waited_out: bool


class ChangeRow(msgspec.Struct, frozen=True):
    """Times are Unix seconds, `after_s` seconds from the request on."""

    action: str
    scope: str
    old_epoch: int
    new_epoch: int
    requested_by: str
    requested_at: float
    unreachable_at: float
    acknowledgements: tuple[AckRow, ...]
    audit_head: bytes
    for_good: bool


class EngineRow(msgspec.Struct, frozen=True):
    """`running`: requests that were made under what was withdrawn and have not ended. `hbm`: what became of
    blocks in the engine's own cache; `detail`: why, if they stayed."""

    session: str
    engine_id: str
    running: int
    drained_at: float
    hbm: str
    detail: str


class AuditRow(msgspec.Struct, frozen=True):
    """What a node's auditor was answered: chains of blocks that were refused, refused without a control, and
    served. `refused_at`: Unix seconds of the last refusal; 0: none."""

    result: str
    num_refused: int
    num_uncontrolled: int
    num_stale: int
    refused_at: float


class NodeRow(msgspec.Struct, frozen=True):
    """0 in `destroyed_at`: not yet, or never to be. `failure`: what destroying met last. Of an offboarded
    tenant, `keys_removed_at`: when this node's keyring, of that generation, had no key of it any more.
    `audit` None: nothing left by this change, or the audit was cut off by a restart."""

    node_id: str
    applied_at: float
    bytes_unreachable: int
    bytes_reclaimed: int
    destroyed_at: float
    engines: tuple[EngineRow, ...]
    failure: str = ""
    keys_removed_at: float = 0.0
    keyring_generation: int = 0
    audit: AuditRow | None = None


def assemble(receipt_id: str, rows: Mapping[str, bytes]) -> pb.Receipt | None:
    """None without the row of whoever made it. Raises msgspec.DecodeError for what is no row."""
    made = rows.get(MADE)
    if made is None:
        return None
    change = msgspec.msgpack.decode(made, type=ChangeRow)
    nodes = {
        holder: msgspec.msgpack.decode(row, type=NodeRow)
        for holder, row in sorted(rows.items())
        if holder != MADE
    }
    # A node that was away reports when it is back. A router has no bytes: its lease is over, and that is all.
    missing = {
        ack.holder_id
        for ack in change.acknowledgements
        if ack.kind == "node" and not _has_reported(ack.holder_id, nodes)
    }
    waited_out = {ack.holder_id for ack in change.acknowledgements if ack.waited_out}
    unheard = missing | {one for one in waited_out if not _has_reported(one, nodes)}
    drained = [_drained_at(node) for node in nodes.values()]
    destroyed = [node.destroyed_at for node in nodes.values()]
    everybody = bool(nodes) and not missing
    receipt = pb.Receipt(
        receipt_id=receipt_id,
        action=change.action,
        scope=change.scope,
        old_epoch=change.old_epoch,
        new_epoch=change.new_epoch,
        requested_by=change.requested_by,
        requested_at=change.requested_at,
        unreachable_at=change.unreachable_at,
        audit_head=change.audit_head,
        acknowledgements=[
            pb.Acknowledgement(
                holder_id=ack.holder_id,
                holder_kind=ack.kind,
                after_s=ack.after_s,
                waited_out=ack.waited_out,
            )
            for ack in change.acknowledgements
        ],
        nodes=[_node_to_pb(node) for node in nodes.values()],
        bytes_unreachable=sum(node.bytes_unreachable for node in nodes.values()),
        bytes_reclaimed=sum(node.bytes_reclaimed for node in nodes.values()),
        not_heard_from=sorted(unheard),
    )
    if everybody and all(drained):
        receipt.drained_at = max(drained)
    if everybody and change.for_good and all(destroyed):
        receipt.destroyed_at = max(destroyed)
    audited = not any(node.audit and node.audit.result == PENDING for node in nodes.values())
    is_gone = not change.for_good or bool(receipt.destroyed_at)
    receipt.is_final = bool(receipt.drained_at) and is_gone and audited
    return receipt


def _has_reported(holder_id: str, nodes: Mapping[str, NodeRow]) -> bool:
    """In this life (`NAME.RANDOM`) or, of a node that was away, in a later one."""
    name = holder_id.rpartition(".")[0]
    return holder_id in nodes or any(row.node_id == name for row in nodes.values())


def _drained_at(node: NodeRow) -> float:
    """When the last request of any of its engines had ended; 0: not yet."""
    ends = [engine.drained_at for engine in node.engines]
    return max([node.applied_at, *ends]) if all(ends) else 0.0


def _node_to_pb(node: NodeRow) -> pb.NodeReport:
    return pb.NodeReport(
        node_id=node.node_id,
        bytes_unreachable=node.bytes_unreachable,
        bytes_reclaimed=node.bytes_reclaimed,
        destroyed_at=node.destroyed_at,
        drained_at=_drained_at(node),
        failure=node.failure,
        keys_removed_at=node.keys_removed_at,
        keyring_generation=node.keyring_generation,
        audit=None if node.audit is None else pb.AuditReport(**msgspec.structs.asdict(node.audit)),
        engines=[
            pb.EngineReport(
                session=engine.session,
                engine_id=engine.engine_id,
                running=engine.running,
                drained_at=engine.drained_at,
                hbm=engine.hbm,
                detail=engine.detail,
            )
            for engine in node.engines
        ],
    )
