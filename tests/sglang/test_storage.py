"""The storage against a real node, on SGLang's own host pools, configuration and page hashes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kvfabric_engine.integrations import sglang_identity
from kvfabric_engine.integrations.sglang import KVFabricStorage
from kvfabric_engine.integrations.sglang_pool import HostPages
from sglang.srt.mem_cache.hicache_storage import PoolName

from kvfabric.errors import ConfigError, LocalProtocolError
from kvfabric.testing.processes import NodeProcess, until
from tests.sglang.conftest import LLAMA, PYTHON
from tests.sglang.pools import (
    EXTRA,
    PAGE,
    after,
    attached,
    content,
    mha_pool,
    mla_pool,
    page_hashes,
    storage_config,
)

Serve = Callable[..., None]
pytestmark = [pytest.mark.fleet, pytest.mark.usefixtures("serve")]

POOLS: dict[str, Callable[[], Any]] = {
    "mha layer_first": lambda: mha_pool("layer_first"),
    "mha page_first": lambda: mha_pool("page_first"),
    "mha page_first_direct": lambda: mha_pool("page_first_direct"),
    "mha page_head": lambda: mha_pool("page_head"),
    "mha fp32": lambda: mha_pool("page_first", dtype=torch.float32),
    "mla layer_first": lambda: mla_pool("layer_first"),
    "mla page_first": lambda: mla_pool("page_first"),
    "mla page_first_direct": lambda: mla_pool("page_first_direct"),
}
SOURCE = torch.arange(2 * PAGE, 6 * PAGE)
TARGET = torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in (9, 7, 14, 8)])


@pytest.mark.parametrize("name", POOLS)
def test_loaded_is_what_was_stored(node: NodeProcess, name: str) -> None:
    """Pages come back bit for bit, to other slots and another engine; no other page in use changes."""
    is_mla = name.startswith("mla")
    hashes = page_hashes(1000, 4)
    pool = POOLS[name]()
    with attached(node, pool, is_mla_model=is_mla) as storage:
        assert storage.batch_exists(hashes) == 0
        assert storage.batch_set_v1(hashes, SOURCE) == [True] * 4
        assert storage.batch_exists([*hashes, *page_hashes(5000, 1)]) == 4
        assert storage.batch_set_v1(hashes, SOURCE) == [True] * 4, "stored already"
    stored = content(pool, SOURCE)
    pool = POOLS[name]()
    others = torch.cat([torch.arange(2 * PAGE, 7 * PAGE), torch.arange(10 * PAGE, 14 * PAGE)])
    before = content(pool, others)
    assert content(pool, TARGET) != stored
    with attached(node, pool, is_mla_model=is_mla) as storage:
        assert storage.batch_get_v1(hashes, TARGET) == [True] * 4
    assert content(pool, TARGET) == stored
    assert content(pool, others) == before


def test_wrong_bytes_would_be_noticed(node: NodeProcess) -> None:
    """The comparison above, with one bit of one page changed before it was stored."""
    pool, hashes = mha_pool("page_first"), page_hashes(2000, 4)
    right = content(pool, SOURCE)
    pool.kv_buffer.view(torch.uint8)[1, 3 * PAGE, 1, 0, 0] ^= 1
    with attached(node, pool) as storage:
        assert all(storage.batch_set_v1(hashes, SOURCE))
        assert all(storage.batch_get_v1(hashes, TARGET))
    loaded = content(pool, TARGET)
    assert [a == b for a, b in zip(loaded, right, strict=True)] == [True, False, True, True]


def test_only_the_prefix_that_is_there_is_loaded(node: NodeProcess) -> None:
    """Pages after the first missing one are reported as missing, and their slots are not vouched for."""
    pool, hashes = mha_pool("page_first"), page_hashes(3000, 4)
    with attached(node, pool) as storage:
        assert all(storage.batch_set_v1(hashes[:2], SOURCE[: 2 * PAGE]))
        assert storage.batch_exists(hashes) == 2
        assert storage.batch_get_v1(hashes, TARGET) == [True, True, False, False]
        assert content(pool, TARGET)[:2] == content(pool, SOURCE)[:2]


def test_pages_follow_a_prefix(node: NodeProcess) -> None:
    """A later batch hangs on the page before it; where that one is unknown it begins a chain of its own."""
    pool, hashes = mha_pool("page_first"), page_hashes(4000, 4)
    lost = page_hashes(4500, 4)
    with attached(node, pool) as storage:
        assert all(storage.batch_set_v1(hashes[:2], SOURCE[: 2 * PAGE]))
        assert all(storage.batch_set_v1(hashes[2:], SOURCE[2 * PAGE :], after(hashes[:2])))
        assert storage.batch_exists(hashes) == 4
        assert storage.batch_exists(hashes[2:], after(hashes[:2])) == 2
        assert all(storage.batch_set_v1(lost[2:], SOURCE[2 * PAGE :], after(lost[:2])))
        assert (storage.batch_exists(lost), storage.batch_exists(lost[2:])) == (0, 2)


def test_batches_larger_than_the_window(node: NodeProcess) -> None:
    """A batch goes through a window that holds three pages of it."""
    pool, hashes = mha_pool("layer_first"), page_hashes(6000, 4)
    window_bytes = 3 * pool.get_size_per_token() * PAGE
    with attached(node, pool, extra={"window_bytes": window_bytes}) as storage:
        assert all(storage.batch_set_v1(hashes, SOURCE))
        assert all(storage.batch_get_v1(hashes, TARGET))
    assert content(pool, TARGET) == content(pool, SOURCE)


def test_more_than_may_be_leased_at_once(tmp_path: Path) -> None:
    """A batch of which the node leases a page or two at a time is found and loaded whole."""
    pool, hashes = mha_pool("page_first", heads=256), page_hashes(6500, 4)
    page_bytes = pool.get_size_per_token() * PAGE
    options = {"host_bytes": 14 * page_bytes, "python": str(PYTHON)}
    with NodeProcess(tmp_path, **options) as node, attached(node, pool) as storage:
        assert all(storage.batch_set_v1(hashes, SOURCE))
        assert storage.batch_exists([*hashes, *page_hashes(1, 1)]) == 4
        assert all(storage.batch_get_v1(hashes, TARGET))
    assert content(pool, TARGET) == content(pool, SOURCE)


# --- identity ---


def test_salt_and_extra_key_keep_pages_apart(node: NodeProcess) -> None:
    """The same tokens under another salt or extra key are other pages, through SGLang's own hashes."""
    pool = mha_pool("page_first")
    kinds = [{}, {"cache_salt": "ab"}, {"extra_key": "ab"}, {"extra_key": "a", "cache_salt": "b"}]
    with attached(node, pool) as storage:
        assert all(storage.batch_set_v1(page_hashes(7000, 4, **kinds[1]), SOURCE))
        found = [storage.batch_exists(page_hashes(7000, 4, **kind)) for kind in kinds]
    assert found == [0, 4, 0, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"weights": b"other weights"},
        {"config": LLAMA | {"rope_theta": 5e5}},
        {"json_model_override_args": '{"rope_theta": 5e5}'},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"enable_lora": True, "lora_paths": [], "max_lora_rank": 8, "lora_target_modules": ["all"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_engines_share_nothing(
    node: NodeProcess, serve: Serve, change: dict[str, Any]
) -> None:
    """Other weights, architecture, override, KV type or adapters: the same page hash finds nothing."""
    hashes = page_hashes(8000, 4)
    with attached(node, mha_pool("page_first")) as storage:
        assert all(storage.batch_set_v1(hashes, SOURCE))
    serve(**change)
    with attached(node, mha_pool("page_first"), extra={"adapter_revision": "r1"}) as storage:
        assert storage.batch_exists(hashes) == 0
    serve()
    with attached(node, mha_pool("page_first")) as storage:
        assert storage.batch_exists(hashes) == 4


def test_other_layouts_share_nothing(node: NodeProcess) -> None:
    """Equal bytes a page, but another dtype, memory layout or place in the pipeline: other blocks."""
    hashes = page_hashes(9000, 4)
    with attached(node, mha_pool("page_first")) as storage:
        assert all(storage.batch_set_v1(hashes, SOURCE))
    others: list[tuple[Any, dict[str, Any]]] = [
        (mha_pool("page_first", dtype=torch.bfloat16), {}),
        (mha_pool("page_first_direct"), {}),
        (mha_pool("layer_first"), {}),
        (mha_pool("page_first"), {"pp_size": 2, "pp_rank": 1}),
        (mha_pool("page_first"), {"attn_cp_size": 2, "attn_cp_rank": 1}),
        (mha_pool("page_first"), {"tp_size": 2}),
    ]
    for pool, fields in others:
        with attached(node, pool, **fields) as storage:
            assert storage.batch_exists(hashes) == 0


def test_ranks_store_a_part_each(node: NodeProcess) -> None:
    """With two ranks a page is there when both stored theirs, and each gets its own bytes back."""
    pools, hashes = [mha_pool("page_first") for _ in range(2)], page_hashes(10_000, 4)
    with (
        attached(node, pools[0], tp_size=2) as first,
        attached(node, pools[1], tp_size=2, tp_rank=1) as second,
    ):
        assert all(first.batch_set_v1(hashes, SOURCE))
        assert (first.batch_exists(hashes), second.batch_exists(hashes)) == (0, 0)
        assert all(second.batch_set_v1(hashes[:3], SOURCE[: 3 * PAGE]))
        assert (first.batch_exists(hashes), second.batch_exists(hashes)) == (3, 3)
        for storage, pool in ((first, pools[0]), (second, pools[1])):
            assert sum(storage.batch_get_v1(hashes, TARGET)) == 3
            assert content(pool, TARGET)[:3] == content(pool, SOURCE)[:3]
    assert content(pools[0], TARGET)[0] != content(pools[1], TARGET)[0]


def test_replicated_pages_have_one_writer(node: NodeProcess) -> None:
    """MLA: what rank 0 stored, rank 1 of two loads."""
    pools, hashes = [mla_pool("page_first") for _ in range(2)], page_hashes(11_000, 4)
    with (
        attached(node, pools[0], tp_size=2, is_mla_model=True) as first,
        attached(node, pools[1], tp_size=2, tp_rank=1, is_mla_model=True) as second,
    ):
        assert all(first.batch_set_v1(hashes, SOURCE))
        assert all(second.batch_get_v1(hashes, TARGET))
    assert content(pools[1], TARGET) == content(pools[0], SOURCE)


# --- what is refused ---


def refused(caplog: pytest.LogCaptureFixture, pool: Any, **options: Any) -> str:
    """Attach to a node that is not there; the one line that says why nothing is cached."""
    caplog.clear()
    with attached("/nowhere/node.sock", pool, wait=False, **options) as storage:
        pages = page_hashes(0, 4)
        assert storage.batch_exists(pages) == 0
        assert not any(storage.batch_get_v1(pages, TARGET) + storage.batch_set_v1(pages, SOURCE))
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("kvfabric_engine")]
    assert len([line for line in lines if "attach failed" in line]) <= 1
    return "\n".join(lines)


def test_configurations_that_cannot_be_right(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is refused in one line, and leaves an empty storage, not a server that does not start."""
    caplog.set_level(logging.WARNING)
    pool = mha_pool("page_first")
    assert "interface_v1" in refused(caplog, pool, extra={"interface_v1": 0})
    assert "unknown keys in the extra config: sockte" in refused(caplog, pool, extra={"sockte": 1})
    serve(enable_lora=True, lora_paths=[], max_lora_rank=8, lora_target_modules=["all"])
    assert "adapter_revision" in refused(caplog, pool)
    assert "attach failed" not in refused(caplog, pool, extra={"adapter_revision": "r1"})
    serve()
    assert "attach failed" not in refused(caplog, pool)


def test_multimodal_models_are_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Multimodal:
        is_multimodal = True

    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(sglang_identity, "model_config_of", lambda _: Multimodal)
    assert "multimodal" in refused(caplog, mha_pool("page_first"))


def test_pool_that_hands_out_only_a_part_is_refused() -> None:
    """Pages of which something is kept elsewhere (scales, say) could not be restored."""
    pool = mha_pool("page_first")
    HostPages(pool)
    pool.get_size_per_token = lambda: 1000
    with pytest.raises(ConfigError, match="hands out"):
        HostPages(pool)
    pool.shared_allocation_domain = object()
    with pytest.raises(ConfigError, match="move"):
        HostPages(pool)
    pool.shared_allocation_domain = None
    pool.layout = "page_unified"
    with pytest.raises(ConfigError, match="page_unified"):
        HostPages(pool)


@pytest.mark.parametrize("name", POOLS)
def test_layout_is_tried_before_use(name: str) -> None:
    """Two free pages carry a page over; pointers that are off by a token do not. The pages are given back."""
    pool = POOLS[name]()
    pages, free = HostPages(pool), pool.available_size()
    pages.prove()
    right = pool.get_page_buffer_meta
    row = pool.get_size_per_token() // (1 if "mla" in name else 2)

    def wrong(indices: torch.Tensor) -> Any:
        pointers, sizes = right(indices)
        return [pointer + row * (int(indices[0]) // PAGE % 2) for pointer in pointers], sizes

    pool.get_page_buffer_meta = wrong
    with pytest.raises(ConfigError, match="do not lie"):
        pages.prove()
    assert pool.available_size() == free
    while pool.available_size() > PAGE:
        pool.alloc(PAGE)
    with pytest.raises(ConfigError, match="free pages"):
        pages.prove()


def test_hybrid_models_are_refused(node: NodeProcess) -> None:
    """A second pool: from then on nothing is stored or found."""
    pool, hashes = mha_pool("page_first"), page_hashes(12_000, 4)
    with attached(node, pool) as storage:
        storage.register_mem_host_pool_v2(pool, PoolName.KV)
        assert all(storage.batch_set_v1(hashes, SOURCE))
        storage.register_mem_host_pool_v2(pool, PoolName.MAMBA)
        assert storage.batch_exists(hashes) == 0
        assert not any(storage.batch_set_v1(hashes, SOURCE))


def test_updated_weights_end_the_storage(node: NodeProcess) -> None:
    """After an update that names another version nothing of the old weights is found, nothing is stored."""
    from sglang.srt.runtime_context import get_context

    pool, hashes = mha_pool("page_first"), page_hashes(13_000, 4)
    with attached(node, pool) as storage:
        assert all(storage.batch_set_v1(hashes, SOURCE))
        get_context().override("scheduler.weight_version", weight_version="step-2")
        assert storage.batch_exists(hashes) == 0
        assert not any(storage.batch_get_v1(hashes, TARGET))
        assert not any(storage.batch_set_v1(hashes, SOURCE))
        get_context().override("scheduler.weight_version", weight_version="default")
        assert storage.batch_exists(hashes) == 4


def test_slots_that_are_no_pages_are_a_miss(node: NodeProcess) -> None:
    """Half a page, a page across two, or one outside the pool moves no byte."""
    pool, hashes = mha_pool("page_first"), page_hashes(14_000, 1)
    pages = HostPages(pool)
    with attached(node, pool) as storage:
        for bad in (SOURCE[: PAGE // 2], SOURCE[8 : 8 + PAGE], SOURCE[:PAGE] + 100 * PAGE):
            assert storage.batch_set_v1(hashes, bad) == [False]
            assert storage.batch_get_v1(hashes, bad) == [False]
            with pytest.raises(LocalProtocolError):
                pages.runs(1, bad)
        assert storage.batch_exists(hashes) == 0


def test_the_generic_interface_holds_nothing() -> None:
    """Without `interface_v1` SGLang calls these: misses, never an error."""
    storage = KVFabricStorage(storage_config(extra={"interface_v1": 0}), {})
    assert storage.get("00") is None
    assert storage.batch_get(["00", "01"]) == [None, None]
    assert (storage.set("00", 1), storage.batch_set(["00"], [1]), storage.exists("00")) == (
        False,
    ) * 3
    assert storage.clear() is False
    assert EXTRA["interface_v1"] == 1


# --- failures ---


def test_node_absent_killed_and_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Absent: misses at once. Killed in between: misses. Back: stored and found again. Never an error."""
    caplog.set_level(logging.WARNING)
    pool, hashes = mha_pool("page_first"), page_hashes(15_000, 4)
    node = NodeProcess(tmp_path / "node", python=str(PYTHON))
    with attached(node, pool, wait=False) as storage:
        assert storage.batch_exists(hashes) == 0
        assert not any(storage.batch_set_v1(hashes, SOURCE) + storage.batch_get_v1(hashes, TARGET))
        with node:
            assert storage.wait_connected(15)
            assert all(storage.batch_set_v1(hashes, SOURCE))
            node.kill()
            assert not any(storage.batch_get_v1(hashes, TARGET))
            assert storage.batch_exists(hashes) == 0
            node.start()
            until(lambda: all(storage.batch_set_v1(hashes, SOURCE)))
            assert all(storage.batch_get_v1(hashes, TARGET))
    assert content(pool, TARGET) == content(pool, SOURCE)


def test_corrupt_pages_are_misses(tmp_path: Path) -> None:
    """Bytes spoilt in the node's memory never reach SGLang as a page that it may use."""
    pool, hashes = mha_pool("page_first"), page_hashes(16_000, 4)
    with NodeProcess(tmp_path, python=str(PYTHON)) as node, attached(node, pool) as storage:
        assert all(storage.batch_set_v1(hashes, SOURCE))
        spoil(node, content(pool, SOURCE)[2][:64])
        assert storage.batch_get_v1(hashes, TARGET) == [True, True, False, False]
        assert content(pool, TARGET)[:2] == content(pool, SOURCE)[:2]


def spoil(node: NodeProcess, data: bytes) -> None:
    """Flip a bit where `data` lies in the node's arena, behind its back."""
    for name in os.listdir(f"/proc/{node.pid}/fd"):
        path = f"/proc/{node.pid}/fd/{name}"
        if not os.readlink(path).startswith("/memfd:") or os.stat(path).st_size != 64 << 20:
            continue
        with open(path, "r+b", buffering=0) as memory:
            at = memory.readall().find(data)
            if at >= 0:
                memory.seek(at)
                memory.write(bytes([data[0] ^ 1]))
                return
    raise AssertionError("not found in the node's memory")
