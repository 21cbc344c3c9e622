"""config.json is read as its makers meant it, or what is not supported is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kvfabric_engine.reference.hf_config import read_shape

from kvfabric.errors import ConfigError
from tests.engine import hf_folder


def test_rope_of_either_spelling(tmp_path: Path) -> None:
    """What transformers 5 calls rope_parameters was rope_theta and rope_scaling before."""
    new = read_shape(hf_folder.write_folder(tmp_path / "new", "llama"))
    old_keys = {k: v for k, v in hf_folder.LLAMA3_ROPE.items() if k != "rope_theta"}
    old = hf_folder.write_folder(
        tmp_path / "old", "llama", rope_parameters=None, rope_theta=5e5, rope_scaling=old_keys
    )
    assert read_shape(old) == new
    assert new.rope.scaling is not None
    assert "llama3 factor=8 " in new.rope.describe()


def test_head_dim_that_is_not_told(tmp_path: Path) -> None:
    """It follows from the width, but for Qwen3, whose own default it is then."""
    llama = hf_folder.write_folder(tmp_path / "llama", "llama", head_dim=None)
    assert read_shape(llama).head_dim == hf_folder.HEAD_DIM
    qwen3 = hf_folder.write_folder(tmp_path / "qwen3", "qwen3", head_dim=None)
    assert read_shape(qwen3).head_dim == 128


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; supported are llama, qwen2, qwen3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "supported is LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias is True; only False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "only full_attention"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "type 'yarn'; supported are"),
        ({"rope_parameters": {"mrope_section": [1]}}, "mrope_section is not known"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "only 1.0 is supported"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters has no factor"),
        ({"rope_parameters": hf_folder.LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"rope_parameters": 3}, "rope_parameters is 3; it must be an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"dual_chunk_attention_config": {}}, "dual_chunk_attention_config"),
        ({"vocab_size": None}, "has no vocab_size"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a positive integer"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0; it must be a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4; no multiple"),
        ({"head_dim": 15}, "head dim of 15"),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    """Nothing that changes the computation is passed over."""
    hf_folder.write_json(tmp_path / "config.json", hf_folder.config("llama") | changes)
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        read_shape(tmp_path)
    assert named in str(caught.value)
