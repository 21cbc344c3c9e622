"""Who an engine process is to its node, and how long it may wait for it. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvfabric.protocol.messages import Role
from kvfabric.types import UNKNOWN_COST, RecomputeCost

GROUP = 0
"""The one KV group that the connector moves."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that a request may lose to the fabric before it does without."""

    control_s: float = 1.0  # open, match, release, events
    load_s: float = 5.0  # a whole load
    save_s: float = 5.0  # each reserve or commit


@dataclass(frozen=True, slots=True)
class ConnectorOptions:
    """Who this engine is to its node. `audit_parts`: path of the checksum log, empty for none.

    `serves`: `prefill` for prompts that others answer, `decode` for answers to such prompts, or `both`.
    """

    node_socket: str
    engine_id: str
    endpoint: str
    model: str
    model_revision: str
    window_bytes: int
    adapter: str = ""
    adapter_revision: str = ""
    shard: int = 0
    role: Role = Role.SCHEDULER | Role.WORKER
    session: bytes = b""
    audit_parts: str = ""
    serves: str = "both"
    recompute: RecomputeCost = UNKNOWN_COST
    deadlines: Deadlines = field(default_factory=Deadlines)
