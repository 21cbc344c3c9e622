"""What the scheduler's and the workers' connectors tell each other, inside vLLM's own messages. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvfabric.types import BlockKey, BlockLayout
from kvfabric_engine.integrations.vllm_adapters import Adapter, Weights
from kvfabric_engine.integrations.vllm_identity import Shard


@dataclass(frozen=True, slots=True)
class Join:
    """The session that the scheduler opened and every worker joins."""

    session: bytes
    layout: BlockLayout
    engine_id: str
    model: str
    model_revision: str


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Blocks of a request into vLLM's blocks. `name`: the request at the node, leased by the scheduler.

    `adapter`: what vLLM must hold for the keys to be right.
    """

    request_id: str
    name: str
    keys: list[BlockKey]
    pages: list[list[int]]
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """Blocks that this step computes. `name` and `handle`: how the worker opens them at the node.

    `adapter`: what vLLM must hold when they are computed for the keys to be right.
    """

    name: str
    handle: str
    parent: BlockKey
    keys: list[BlockKey]
    pages: list[list[int]]
    adapter: Adapter | None = None


@dataclass
class FabricMetadata(KVConnectorMetadata):
    """One step's orders. `join` is there when the session changed; `reused`: pages given out anew."""

    join: Join | None = None
    loads: list[LoadOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    reused: list[int] = field(default_factory=list)


@dataclass
class FabricHandshake(KVConnectorHandshakeMetadata):
    """A worker's tensors, told once at start."""

    shard: Shard


@dataclass
class FabricReport(KVConnectorWorkerMetadata):
    """What workers tell of a step: adapters that are loaded, by rank and id, where that changed."""

    adapters: dict[int, dict[int, Weights]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> FabricReport:
        assert isinstance(other, FabricReport)
        return FabricReport(self.adapters | other.adapters)
