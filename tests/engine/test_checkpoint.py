"""A folder is read as its makers meant it or refused by name; its revision is its content."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kvfabric_engine.layout import PoolShape
from kvfabric_engine.reference.checkpoint import read_weights
from kvfabric_engine.reference.hf_config import read_shape
from kvfabric_engine.reference.model import Model, Span
from kvfabric_engine.reference.weights import Weights

from kvfabric.config import EngineConfig
from kvfabric.errors import ConfigError
from tests.engine import hf_folder

CPU = torch.device("cpu")
PROMPT = list(range(3, 40))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return read_weights(folder, read_shape(folder), dtype=dtype, device=CPU)


def logits(model: Model) -> torch.Tensor:
    s = model.shape
    shape = PoolShape(8, s.num_layers, 16, s.num_kv_heads, s.head_dim, model.dtype, 64)
    return model.forward(shape.create(CPU), [Span(PROMPT, 0, [0, 1, 2], True)])


def model(folder: Path, **changes: Any) -> Model:
    settings: dict[str, Any] = {"model_path": str(folder), "max_model_tokens": 256}
    return Model(EngineConfig(**(settings | changes)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_tensor_has_its_place(tmp_path: Path, family: str) -> None:
    """q, k and v lie one below the other, gate over up; biases and norms where the family has them."""
    given = hf_folder.tensors(family)
    weights = load(hf_folder.write_folder(tmp_path, family))
    layer, prefix = weights.layers[1], "model.layers.1"
    qkv = [given[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(layer.qkv, torch.cat(qkv))
    gate_up = [given[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(layer.gate_up, torch.cat(gate_up))
    assert torch.equal(layer.mlp_norm, given[f"{prefix}.post_attention_layernorm.weight"])
    assert (layer.qkv_bias is not None) == (family == "qwen2")
    assert (layer.q_norm is not None) == (layer.k_norm is not None) == (family == "qwen3")
    assert (weights.head is weights.embedding) == (family == "qwen2")


def _drop_tensor(folder: Path) -> None:
    weights = hf_folder.tensors("llama")
    del weights["model.layers.1.mlp.up_proj.weight"]
    hf_folder.write_weights(folder, weights)


def _add_bias(folder: Path) -> None:
    weights = hf_folder.tensors("llama") | hf_folder.tensors("qwen2")
    hf_folder.write_weights(folder, weights)


def _widen(folder: Path) -> None:
    weights = hf_folder.tensors("llama") | {"model.norm.weight": torch.ones(65)}
    hf_folder.write_weights(folder, weights)


def _quantise(folder: Path) -> None:
    weights = hf_folder.tensors("llama")
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)
    hf_folder.write_weights(folder, weights)


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def _remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _lose_shard(folder: Path) -> None:
    _remove(folder)
    hf_folder.write_weights(folder, hf_folder.tensors("llama"), num_files=3)
    (folder / "model-00002-of-00003.safetensors").unlink()


def _leave_folder(folder: Path) -> None:
    _remove(folder)
    weight_map = {"lm_head.weight": "../elsewhere.safetensors"}
    hf_folder.write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def _break_index(folder: Path) -> None:
    _remove(folder)
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_drop_tensor, "lacks model.layers.1.mlp.up_proj.weight"),
        (_add_bias, "no place for model.layers.0.self_attn.k_proj.bias, "),
        (_widen, "model.norm.weight is [65]; config.json says [64]"),
        (_quantise, "lm_head.weight is I8, which is not supported"),
        (_truncate, "cannot read"),
        (_remove, "holds neither model.safetensors nor"),
        (_lose_shard, "model-00002-of-00003.safetensors"),
        (_leave_folder, "must name files of this folder"),
        (_break_index, "is not JSON"),
    ],
)
def test_damaged_folders_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    """Missing, unknown, misshapen or unreadable: one error that says which."""
    damage(hf_folder.write_folder(tmp_path, "llama"))
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    assert named in str(caught.value)


def test_tied_output_that_is_stored_too(tmp_path: Path) -> None:
    """It must be the embedding, and takes no memory of its own; another one is refused."""
    folder = hf_folder.write_folder(tmp_path, "qwen2")
    weights, revision = hf_folder.tensors("qwen2"), load(folder).revision
    embedding = weights["model.embed_tokens.weight"]
    hf_folder.write_weights(folder, weights | {"lm_head.weight": embedding.clone()})
    again = load(folder)
    assert again.head is again.embedding
    assert again.revision == revision
    for other in (embedding + 1, embedding.half()):
        hf_folder.write_weights(folder, weights | {"lm_head.weight": other})
        with pytest.raises(ConfigError, match=r"lm_head\.weight is not the embedding"):
            load(folder)


def test_shards_do_not_matter(tmp_path: Path) -> None:
    """The same tensors in one file or in several are the same model."""
    one = model(hf_folder.write_folder(tmp_path / "one", "llama"))
    many = model(hf_folder.write_folder(tmp_path / "many", "llama", num_files=4))
    assert many.revision == one.revision
    assert torch.equal(logits(many), logits(one))


def test_revision_is_of_contents(tmp_path: Path) -> None:
    """Other bytes in a file of the same name, size and times are another revision."""
    folder = hf_folder.write_folder(tmp_path, "llama")
    file = folder / "model.safetensors"
    before, revision = file.stat(), load(folder).revision
    assert load(folder).revision == revision
    weights = hf_folder.tensors("llama")
    weights["model.layers.1.self_attn.v_proj.weight"][3, 5] += 0.001
    hf_folder.write_weights(folder, weights)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert load(folder).revision != revision


def test_revision_and_rope_are_of_settings_too(tmp_path: Path) -> None:
    """Equal tensors that are computed with differently never share a key."""
    found = {
        (m.revision, m.rope)
        for m in (
            model(hf_folder.write_folder(tmp_path / "a", "llama")),
            model(hf_folder.write_folder(tmp_path / "b", "llama", rms_norm_eps=1e-5)),
            model(hf_folder.write_folder(tmp_path / "c", "llama", rope_parameters={})),
            model(tmp_path / "a", dtype="bfloat16"),
        )
    }
    assert len({revision for revision, _ in found}) == 4
    assert len({rope for _, rope in found}) == 2


def test_a_file_that_changes_later_changes_nothing(tmp_path: Path) -> None:
    """What was hashed is what is computed with, even when the file is written to in place."""
    folder = hf_folder.write_folder(tmp_path, "qwen3")
    loaded = model(folder)
    before = logits(loaded)
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(bytes(file.stat().st_size // 2))
    assert torch.equal(logits(loaded), before)
    assert model(folder).revision != loaded.revision
    assert not torch.equal(logits(model(folder)), before)


def test_longest_context_is_the_models(tmp_path: Path) -> None:
    """A context that the model was not made for is refused at start."""
    folder = hf_folder.write_folder(tmp_path, "llama")
    model(folder, max_model_tokens=1024)
    with pytest.raises(ConfigError, match=r"engine.max_model_tokens is 1025; .* at most 1024"):
        model(folder, max_model_tokens=1025)
