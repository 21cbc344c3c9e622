"""The layout of an engine of several ranks: a part for each, or one for all that hold the same."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from kvfabric_engine.integrations.vllm_identity import Groups, Shard, layout_of

from kvfabric.errors import ConfigError

CONFIG = SimpleNamespace(
    cache_config=SimpleNamespace(cache_dtype="auto"),
    model_config=SimpleNamespace(hf_text_config=SimpleNamespace(rope_parameters={})),
)
SHARD = Shard(num_layers=2, page_bytes=4608, form="form", packing="packing", dtype="float32")
HEADS = Groups(
    page_tokens=16, num_kv_heads=2, head_dim=32, attention="FullAttentionSpec", layers=("a", "b")
)
LATENT = dataclasses.replace(HEADS, num_kv_heads=1, head_dim=576, is_replicated=True)


def test_each_rank_has_a_part_of_its_own() -> None:
    parts = layout_of(CONFIG, HEADS, [SHARD, SHARD]).parts
    assert [(p.group, p.shard, p.num_bytes) for p in parts] == [(0, 0, 18432), (0, 1, 18432)]


def test_what_all_ranks_hold_is_one_part() -> None:
    parts = layout_of(CONFIG, LATENT, [SHARD, SHARD]).parts
    assert [(p.group, p.shard, p.num_bytes) for p in parts] == [(0, 0, 18432)]


@pytest.mark.parametrize("change", [{"page_bytes": 9216}, {"form": "other"}])
def test_ranks_that_should_hold_the_same_and_do_not(change: dict[str, object]) -> None:
    other = dataclasses.replace(SHARD, **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="what they should all hold"):
        layout_of(CONFIG, LATENT, [SHARD, other])
    assert len(layout_of(CONFIG, HEADS, [SHARD, other]).parts) == 2


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"packing": "o"}, {"num_layers": 1}])
def test_ranks_that_pack_differently(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="pack their KV differently"):
        layout_of(CONFIG, HEADS, [SHARD, dataclasses.replace(SHARD, **change)])  # type: ignore[arg-type]


def test_a_rank_that_failed_its_self_test_is_named() -> None:
    with pytest.raises(ConfigError, match="rank 1: no"):
        layout_of(CONFIG, HEADS, [SHARD, dataclasses.replace(SHARD, error="no")])
