"""What the config.json of a Hugging Face folder says of its model: Llama, Qwen2 and Qwen3 shapes.

Everything that would change the computation and is not known here is refused by name: a model that loads
computes what its makers' code computes. No code of the folder runs. Pure but for reading the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfabric.errors import ConfigError
from kvfabric.hf_tokenizer import read_json
from kvfabric_engine.reference.weights import Llama3Scaling, ModelShape, Rope


@dataclass(frozen=True, slots=True)
class _Family:
    architecture: str
    qkv_bias: bool
    qk_norm: bool
    head_dim: int | None
    """Head dim if config.json names none; None: the width divided among the heads."""


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", qkv_bias=False, qk_norm=False, head_dim=None),
    "qwen2": _Family("Qwen2ForCausalLM", qkv_bias=True, qk_norm=False, head_dim=None),
    "qwen3": _Family("Qwen3ForCausalLM", qkv_bias=False, qk_norm=True, head_dim=128),
}

_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "dual_chunk_attention_config": None,
}
"""The only values that are understood, where config.json has the key at all."""

_ROPE_KEYS = {
    "default": frozenset(),
    "llama3": frozenset(
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    ),
}
_ROPE_COMMON = frozenset(("rope_type", "type", "rope_theta", "partial_rotary_factor"))


class _Fields:
    """The keys of a JSON object, checked as they are taken. Null counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = {key: value for key, value in values.items() if value is not None}
        self.where = where

    def refuse(self, key: str, wanted: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key} is {self.values.get(key)!r}; {wanted}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._present(key, default)
        if type(value) is not int or value <= 0:
            raise self.refuse(key, "it must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._present(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.refuse(key, "it must be a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._present(key, default)
        if type(value) is not bool:
            raise self.refuse(key, "it must be true or false")
        return value

    def _present(self, key: str, default: Any) -> Any:
        if key not in self.values and default is None:
            raise ConfigError(f"{self.where} has no {key}")
        return self.values.get(key, default)


def read_shape(folder: Path) -> ModelShape:
    """The shape that config.json describes. Raises ConfigError that names what is not supported."""
    fields = _Fields(read_json(folder / "config.json"), str(folder / "config.json"))
    family = _family(fields)
    _refuse_unknown(fields)
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    max_positions = fields.integer("max_position_embeddings")
    shape = ModelShape(
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        # The first Llamas name none; every Qwen does.
        num_kv_heads=fields.integer(
            "num_key_value_heads", num_heads if fields.values["model_type"] == "llama" else None
        ),
        head_dim=fields.integer("head_dim", family.head_dim or hidden_size // num_heads),
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        rms_epsilon=fields.number("rms_norm_eps"),
        rope=_rope(fields),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied=fields.boolean("tie_word_embeddings", False),
        max_positions=max_positions,
    )
    if shape.num_heads % shape.num_kv_heads:
        raise fields.refuse("num_attention_heads", "no multiple of num_key_value_heads")
    if shape.head_dim % 2:
        raise ConfigError(f"{fields.where}: a head dim of {shape.head_dim} cannot be rotated")
    return shape


def _family(fields: _Fields) -> _Family:
    family = _FAMILIES.get(str(fields.values.get("model_type")))
    if family is None:
        raise fields.refuse("model_type", f"supported are {', '.join(_FAMILIES)}")
    architectures = fields.values.get("architectures", [family.architecture])
    if architectures != [family.architecture]:
        raise fields.refuse("architectures", f"supported is {family.architecture}")
    return family


def _refuse_unknown(fields: _Fields) -> None:
    for key, only in _REQUIRED.items():
        if key in fields.values and fields.values[key] != only:
            wanted = "it is not supported" if only is None else f"only {only!r} is supported"
            raise fields.refuse(key, wanted)
    kinds = fields.values.get("layer_types", [])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise fields.refuse("layer_types", "only full_attention is supported")


def _rope(fields: _Fields) -> Rope:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    key = "rope_parameters" if "rope_parameters" in fields.values else "rope_scaling"
    given = fields.values.get(key, {})
    if not isinstance(given, dict):
        raise fields.refuse(key, "it must be an object")
    rope = _Fields(given, f"{fields.where}: {key}")
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise ConfigError(f"{rope.where}: type {kind!r}; supported are {', '.join(_ROPE_KEYS)}")
    if unknown := sorted(rope.values.keys() - _ROPE_COMMON - _ROPE_KEYS[kind]):
        raise ConfigError(f"{rope.where}: {unknown[0]} is not known for rotary type {kind}")
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise rope.refuse("partial_rotary_factor", "only 1.0 is supported")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    return Rope(theta, _scaling(rope) if kind == "llama3" else None)


def _scaling(rope: _Fields) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=rope.number("factor"),
        low_frequency=rope.number("low_freq_factor"),
        high_frequency=rope.number("high_freq_factor"),
        original_positions=rope.integer("original_max_position_embeddings"),
    )
    if scaling.low_frequency >= scaling.high_frequency:
        raise rope.refuse("low_freq_factor", "it must be less than high_freq_factor")
    return scaling
