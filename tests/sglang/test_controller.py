"""The HiCache controller that SGLang's scheduler has, with this storage, its threads and queues; no model."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host import HostPoolGroup, PoolEntry
from sglang.srt.mem_cache.radix_cache import RadixKey

from kvfabric.testing.processes import NodeProcess
from tests.sglang.pools import CONNECT_S, EXTRA, LAYERS, PAGE, content, mha_pool, page_hashes

pytestmark = pytest.mark.fleet

WAIT_S = 20.0
NUM_PAGES = 5
SOURCE = torch.arange(2 * PAGE, (2 + NUM_PAGES) * PAGE)
TARGET = torch.arange(9 * PAGE, (9 + NUM_PAGES) * PAGE)


class Allocator:
    """What the controller asks of the device's allocator: its pool."""

    def __init__(self, pool: Any) -> None:
        self.get_kvcache = lambda: pool


@pytest.fixture
def make(
    node: NodeProcess, serve: Callable[..., None]
) -> Iterator[Callable[[Any], HybridCacheController]]:
    """Makes controllers of one rank, each of a host pool; they attach the storage themselves."""
    args = runtime_context.get_server_args()
    runtime_context.publish(args, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=0))
    made = []

    def make(host_pool: Any) -> HybridCacheController:
        device_pool = MHATokenToKVPool(
            size=PAGE, page_size=PAGE, dtype=torch.float16, head_num=2, head_dim=8,
            layer_num=LAYERS, device="cpu", enable_memory_saver=False,
        )  # fmt: skip
        anchor = PoolEntry(
            name=PoolName.KV,
            host_pool=host_pool,
            device_pool=device_pool,
            layer_mapper=lambda layer: layer,
            is_primary_index_anchor=True,
        )
        controller = HybridCacheController(
            Allocator(device_pool),
            HostPoolGroup([anchor]),
            PAGE,
            None,  # its process group: it has no other ranks to agree with
            threading.Event(),
            io_backend="kernel",
            storage_backend="dynamic",
            prefetch_threshold=PAGE,
            model_name="tiny",
            storage_backend_extra_config=EXTRA | {"node_socket": str(node.socket)},
        )
        made.append(controller)
        assert controller.storage_backend.wait_connected(CONNECT_S)
        return controller

    yield make
    for controller in made:
        controller.detach_storage_backend()


def prompt(seed: int, **namespace: str) -> RadixKey:
    return RadixKey(array("q", range(seed, seed + NUM_PAGES * PAGE)), **namespace)


def back_up(controller: HybridCacheController, seed: int, **namespace: str) -> int:
    """Host pool -> storage, as after an eviction or write-through; the tokens that were stored."""
    hashes = page_hashes(seed, NUM_PAGES, **namespace)
    controller.write_storage(SOURCE, prompt(seed), hashes, [])
    return int(controller.ack_backup_queue.get(timeout=WAIT_S).completed_tokens)


def prefetch(controller: HybridCacheController, key: RadixKey) -> tuple[int, int]:
    """Storage -> host pool, as for a request that waits; tokens found, tokens loaded."""
    controller.prefetch(CacheRequestHandle("request", 0), key, None, [])
    operation = controller.prefetch_hit_queue.get(timeout=WAIT_S)
    found = operation.storage_hit_count
    if found:
        operation.host_indices = TARGET[:found]
        controller.prefetch_buffer.put(operation)
    loaded = 0
    while found:
        ack = controller.ack_prefetch_queue.get(timeout=WAIT_S)
        if ack.completed_req:
            break
        loaded = ack.completed_tokens
    return found, loaded


def test_one_engine_stores_and_another_loads(make: Callable[[Any], HybridCacheController]) -> None:
    """Through the controller's zero-copy path, with its own hashes: bit for bit, and under its salt only."""
    pool, tokens = mha_pool("page_first"), NUM_PAGES * PAGE
    first = make(pool)
    assert first.page_get_func == first._page_get_zero_copy
    assert back_up(first, 0, cache_salt="alice") == tokens
    other_pool = mha_pool("page_first")
    second = make(other_pool)
    assert prefetch(second, prompt(0, cache_salt="bob")) == (0, 0)
    assert prefetch(second, prompt(0)) == (0, 0)
    assert prefetch(second, prompt(0, cache_salt="alice")) == (tokens, tokens)
    assert content(other_pool, TARGET) == content(pool, SOURCE)


def test_node_lost_under_a_controller(
    make: Callable[[Any], HybridCacheController], node: NodeProcess
) -> None:
    """The controller's threads outlive the node: nothing is found or stored, and then again all is."""
    pool, tokens = mha_pool("page_first"), NUM_PAGES * PAGE
    controller = make(pool)
    assert back_up(controller, 1000) == tokens
    node.kill()
    assert prefetch(controller, prompt(1000)) == (0, 0)
    assert back_up(controller, 1000) == 0
    node.start()
    assert controller.storage_backend.wait_connected(CONNECT_S)
    assert back_up(controller, 1000) == tokens
    assert prefetch(controller, prompt(1000)) == (tokens, tokens)
    assert content(pool, TARGET) == content(pool, SOURCE)
