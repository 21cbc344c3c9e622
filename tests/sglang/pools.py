"""SGLang's own host pools on the CPU, its page hashes, and storages as its controller makes them."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from kvfabric_engine.integrations.sglang import KVFabricStorage
from sglang.srt.mem_cache.device_pool_info import (
    KVBufferLayout,
    KVBuffers,
    MHABufferInfo,
    MLABufferInfo,
)
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, HiCacheStorageExtraInfo
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.storage import StorageBackendFactory
from sglang.srt.mem_cache.utils import get_storage_hash_str

from kvfabric.testing.processes import NodeProcess

PAGE = 16
TOKENS = 16 * PAGE
LAYERS = 3
EXTRA = {
    "backend_name": "kvfabric",
    "module_path": "kvfabric_engine.integrations.sglang",
    "class_name": "KVFabricStorage",
    "interface_v1": 1,
}
CONNECT_S = 10.0


def mha_pool(layout: str, *, dtype: torch.dtype = torch.float16, heads: int = 2) -> Any:
    """Keys and values of 3 layers, 17 pages of 16 tokens, filled with random bytes."""
    k, v = (
        tuple(torch.zeros(PAGE, heads, 8, dtype=dtype) for _ in range(LAYERS)) for _ in range(2)
    )
    buffers = KVBuffers(
        k=k,
        v=v,
        k_data_ptrs=_pointers(k),
        v_data_ptrs=_pointers(v),
        layout=KVBufferLayout.NHD,
    )
    info = MHABufferInfo(
        buffers=buffers,
        page_size=PAGE,
        head_num=heads,
        head_dim=8,
        v_head_dim=8,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    return _filled(
        MHATokenToKVPoolHost(
            info, 1.0, 0, PAGE, layout, pin_memory=False,
            device_capacity_tokens=TOKENS, start_layer=0, end_layer=LAYERS,
        )
    )  # fmt: skip


def mla_pool(layout: str) -> Any:
    """Latents of 3 layers, 17 pages of 16 tokens, filled with random bytes."""
    rows = tuple(torch.zeros(PAGE, 1, 24, dtype=torch.bfloat16) for _ in range(LAYERS))
    info = MLABufferInfo(
        buffers=rows,
        data_ptrs=_pointers(rows),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        kv_cache_dim=24,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return _filled(
        MLATokenToKVPoolHost(
            info, 1.0, 0, PAGE, layout, pin_memory=False, device_capacity_tokens=TOKENS,
            start_layer=0, end_layer=LAYERS, target_layer_num=LAYERS,
        )
    )  # fmt: skip


def _pointers(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.uint64)


_seeds = itertools.count()


def _filled(pool: Any) -> Any:
    generator = torch.Generator().manual_seed(next(_seeds))
    raw = pool.kv_buffer.view(torch.uint8)
    raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=generator))
    return pool


def content(pool: Any, indices: torch.Tensor) -> list[bytes]:
    """The pages' bytes as SGLang itself reads them."""
    return [
        pool.get_data_page(int(first)).contiguous().view(torch.uint8).numpy().tobytes()
        for first in indices[::PAGE]
    ]


def page_hashes(seed: int, num_pages: int, **namespace: str) -> list[str]:
    """SGLang's hashes of a prompt of its own; `namespace`: extra_key, cache_salt."""
    tokens = array("q", range(seed, seed + num_pages * PAGE))
    return list(get_storage_hash_str(RadixKey(tokens, **namespace), None, page_size=PAGE))


def after(prefix: list[str]) -> HiCacheStorageExtraInfo:
    return HiCacheStorageExtraInfo(prefix_keys=prefix)


def storage_config(*, extra: dict[str, Any] | None = None, **fields: Any) -> HiCacheStorageConfig:
    """As a controller of one rank makes it. `fields`: what differs."""
    known: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": True,
        "model_name": "tiny",
        "extra_config": EXTRA | (extra or {}),
    }
    return HiCacheStorageConfig(**known | fields)


@contextmanager
def attached(
    node: NodeProcess | str, pool: Any, *, wait: bool = True, **options: Any
) -> Iterator[KVFabricStorage]:
    """A storage made and attached as `HiCacheController.attach_storage_backend` does it."""
    socket = node if isinstance(node, str) else str(node.socket)
    extra = {"node_socket": socket} | options.pop("extra", {})
    config = storage_config(extra=extra, **options)
    storage = StorageBackendFactory.create_backend("dynamic", config, pool)
    assert isinstance(storage, KVFabricStorage)
    try:
        storage.register_mem_pool_host(pool)
        storage.on_host_pools_registered()
        assert not wait or storage.wait_connected(CONNECT_S)
        yield storage
    finally:
        storage.close()
