"""SGLang on the fabric: a HiCache storage backend, loaded by the engine without a patch.

    --enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
    '{"backend_name": "kvfabric", "module_path": "kvfabric_engine.integrations.sglang",
      "class_name": "KVFabricStorage", "interface_v1": 1, "hicache_storage_pass_prefix_keys": true}'

SGLang keeps HBM and its host pool; this class moves whole pages between that pool and the node, in both
directions without a copy of our own where the pool's layout allows it (`sglang_pool`). Further keys:
`node_socket` (default: of a node started with its defaults), `window_bytes`, `adapter_revision` (below).

What a page is, is SGLang's word. It hands over no token ids, only page hashes: 64 hex digits, SHA-256 over
the hash of the page before and the page's token ids, the first one seeded with `extra_key` and `cache_salt`.
So that equal hashes mean equal tokens, equal tokens before them and equal salt rests on SHA-256 and on
SGLang's code; that this code chains and salts is tried at start (`check_page_hashes`). What we add is proven
by us: the BlockKey is keyed BLAKE2b over the whole hash under the node's namespace key (`engine_page_keys`),
so tenant, model revision (digest of the weight files and of the configuration), dtype, layout and parallel
split are told apart, a hash alone names nothing in the fabric, and bytes are verified before SGLang has them.

Where SGLang's hash does not tell apart what must be, nothing is cached and one line says why:

* multimodal models: an image enters by 64 bits of its hash;
* LoRA, unless `adapter_revision` is given: an adapter enters by a UUID of its name and path, appended to
  `extra_key` without a mark. With it the operator states which weights the adapters have, and that no client
  can choose an `extra_key`;
* hybrid models (Mamba, sliding window, sparse indexers: more pools than one), speculative decoding;
* an update of weights at run time, from the moment that it names another `weight_version`; one that names
  none is not seen here: detach before, attach after.

Withdrawal reaches SGLang by model and tenant: the interface knows no template. All requests are the node's
default tenant's; users are kept apart by `cache_salt`. A node with `require_handle` serves no such engine.

Fails open: no exception leaves a method, a page that is not certainly right is reported as not there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
)

from kvfabric.client import EngineHello
from kvfabric.errors import ConfigError, Fenced
from kvfabric.protocol.messages import Role
from kvfabric_engine.boundary import Boundary
from kvfabric_engine.integrations.sglang_pool import HostPages
from kvfabric_engine.integrations.sglang_store import PageStore
from kvfabric_engine.integrations.vllm_identity import node_socket
from kvfabric_engine.options import Deadlines

_log = logging.getLogger(__name__)
R = TypeVar("R")

WINDOW_BYTES = 64 << 20
OURS = frozenset({"node_socket", "window_bytes", "adapter_revision"})
SGLANGS = frozenset(
    {
        "backend_name",
        "module_path",
        "class_name",
        "interface_v1",
        "allocator",
        "hicache_storage_pass_prefix_keys",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "tp_lcm_size",
    }
)


class KVFabricStorage(HiCacheStorage):
    """One rank's storage. SGLang calls `register_mem_pool_host` before use and `close` at the end."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Any = None) -> None:
        """`kwargs`: what SGLang passes to every dynamic backend; nothing, so far."""
        self._config = storage_config
        self._boundary = Boundary()
        self._store: PageStore | None = None
        self._pages: HostPages | None = None
        self._weight_version: Callable[[], str] = str
        self._loaded_version = ""
        self._is_hybrid = False

    def __repr__(self) -> str:
        return (
            f"<KVFabricStorage rank {self._config.tp_rank}/{self._config.tp_size} {self._store!r}>"
        )

    # --- attach --------------------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The pool that pages move to and from. From here on the node is looked for, in the background.

        Whatever cannot be cached is said here, in one line; the storage is then empty and stays so.
        """
        self.close()
        super().register_mem_pool_host(mem_pool_host)
        self._boundary.run("attach", lambda: self._attach(mem_pool_host), _nothing)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """More pools than that of the KV are a hybrid model's: its pages alone restore nothing."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool_name != PoolName.KV and not self._is_hybrid:
            self._is_hybrid = True
            _log.warning("fabric: pool %s: hybrid models are not cached", host_pool_name)

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait for the node; False if it is not there after `timeout_s`."""
        return self._store is not None and self._store.wait_connected(timeout_s)

    def close(self) -> None:
        """Say goodbye to the node. Idempotent; the storage is empty afterwards."""
        store, self._store = self._store, None
        if store is not None:
            self._boundary.run("close", store.close, _nothing)

    def _attach(self, pool: Any) -> None:
        # Not at the top: what these need of SGLang differs by release, and a storage that cannot be
        # imported would keep the server from starting.
        from kvfabric_engine.integrations import sglang_identity as identity

        extra = _checked(self._config)
        identity.check_page_hashes()
        engine = identity.engine_of(str(extra.get("adapter_revision", "")))
        pages = HostPages(pool)
        pages.prove()
        config = self._config
        hello = EngineHello(
            engine_id=f"sglang-dp{config.dp_rank}-tp{config.tp_rank}-pp{config.pp_rank}",
            endpoint="",  # no front door sends requests by this: SGLang's own address is given to it
            model=config.model_name or "",
            model_revision=engine.model_revision,
            adapter=engine.adapter,
            adapter_revision=engine.adapter_revision,
            layout=identity.layout_of(pool, pages, config),
            shard=0 if config.is_mla_model else config.tp_rank,
            window_bytes=int(extra.get("window_bytes", WINDOW_BYTES)),
            role=Role.SCHEDULER | Role.WORKER,
        )
        store = PageStore(
            node_socket(extra),
            hello,
            engine="sglang",
            boundary=self._boundary,
            deadlines=Deadlines(),
        )
        store.start()
        self._weight_version, self._loaded_version = (
            identity.weight_version,
            engine.weight_version,
        )
        self._pages, self._store = pages, store
        _log.info("fabric: %r of %r, model revision %s", store, pages, engine.model_revision)

    # --- interface_v1 --------------------------------------------------------------------------------

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        """Number of leading `keys` that could be loaded now."""
        return self._run("match", lambda store, _: store.exists(_digests(keys)), 0)

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Load pages into the host pool; a leading run of True for those that hold what was stored.

        `host_indices`: int64, `page_size` token slots a page. Slots of the other pages hold anything.
        """

        def load(store: PageStore, pages: HostPages) -> int:
            return store.load(_digests(keys), pages.runs(len(keys), host_indices))

        num_pages = self._run("load", load, 0)
        return [index < num_pages for index in range(len(keys))]

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Store pages of the host pool, consecutive ones of a chain. All True, or all False if any failed."""
        before = extra_info.prefix_keys[-1:] if extra_info and extra_info.prefix_keys else []

        def save(store: PageStore, pages: HostPages) -> bool:
            runs = pages.runs(len(keys), host_indices)
            store.save(b"".join(_digests(before)), _digests(keys), runs)
            return True

        return [self._run("save", save, False)] * len(keys)

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    # --- the generic interface: SGLang uses it without `interface_v1` only, which is refused at attach -----

    def get(
        self, key: str, target_location: Any | None = None, target_sizes: Any | None = None
    ) -> torch.Tensor | None:
        """A miss."""
        return None

    def batch_get(
        self,
        keys: list[str],
        target_locations: Any | None = None,
        target_sizes: Any | None = None,
    ) -> list[torch.Tensor | None]:
        """Misses."""
        return [None] * len(keys)

    def set(
        self,
        key: str,
        value: Any | None = None,
        target_location: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        """Stores nothing."""
        return False

    def batch_set(
        self,
        keys: list[str],
        values: Any | None = None,
        target_locations: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        """Stores nothing."""
        return False

    def clear(self) -> bool:
        """Refused: other engines share what is stored. `kvfabric invalidate model` withdraws it."""
        _log.warning("fabric: nothing cleared; use `kvfabric invalidate model NAME`")
        return False

    def _run(self, operation: str, action: Callable[[PageStore, HostPages], R], otherwise: R) -> R:
        store, pages = self._store, self._pages
        if store is None or pages is None or self._is_hybrid:
            return otherwise

        def run() -> R:
            if self._weight_version() != self._loaded_version:
                raise Fenced("weights were updated since this storage was attached: attach it anew")
            return action(store, pages)

        return self._boundary.run(operation, run, lambda _: otherwise)


def _checked(config: HiCacheStorageConfig) -> dict[str, Any]:
    """`extra_config`. Raises ConfigError for what is missing, unknown or not supported."""
    extra = dict(config.extra_config or {})
    if unknown := sorted(set(extra) - OURS - SGLANGS):
        raise ConfigError(f"unknown keys in the extra config: {', '.join(unknown)}")
    if not extra.get("interface_v1"):
        raise ConfigError('the extra config needs "interface_v1": 1')
    if config.dcp_size != 1:
        raise ConfigError(f"decode context parallelism ({config.dcp_size}) is not supported")
    return extra


def _digests(hashes: list[str]) -> list[bytes]:
    return [bytes.fromhex(value) for value in hashes]


def _nothing(_: object) -> None:
    return None
