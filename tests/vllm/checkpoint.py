"""A small random checkpoint on disk, whose answers depend on its KV: one wrong block changes the text.

vLLM's own dummy weights are so small that another prompt's KV changes nothing: a test on them proves nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCAB = 512
HIDDEN = 64
LAYERS = 2
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 32
INTERMEDIATE = 128
MAX_TOKENS = 4096

_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": MAX_TOKENS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


_SLIDING = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 256,
}
_HYBRID = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 256}
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
_LATENT: dict[str, Any] = {  # vLLM's CPU kernels know one width of latent KV: 512 + 64
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "head_dim": 64,
    "num_key_value_heads": HEADS,
    "n_routed_experts": 2,  # of layers that there are not: all are dense
    "first_k_dense_replace": LAYERS,
    "moe_layer_freq": 1,
    "rope_parameters": {  # as DeepSeek's own models have
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": MAX_TOKENS,
    },
}


def write_checkpoint(folder: Path, *, kind: str = "full", seed: int = 0) -> Path:
    """Float32: matrices normal with a deviation of 0.1, embeddings of 1, norms 1.

    `kind`: full (Llama), sliding (Mistral with a window), hybrid (Llama with a window in one layer),
    latent (MLA, as DeepSeek V2) or unscaled (latent with plain RoPE).
    """
    folder.mkdir(parents=True)
    kinds = {"full": {}, "sliding": _SLIDING, "hybrid": _HYBRID, "latent": _LATENT}
    own = kinds["latent"] | {"rope_parameters": _PLAIN} if kind == "unscaled" else kinds[kind]
    (folder / "config.json").write_text(json.dumps(_CONFIG | own))
    write_tokenizer(folder)
    normal = Normal(seed)
    weights = {
        "model.embed_tokens.weight": normal(VOCAB, HIDDEN, deviation=1.0),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": normal(VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        attention = _latent_attention(normal) if "kv_lora_rank" in own else _attention(normal)
        weights |= {f"{name}self_attn.{key}.weight": value for key, value in attention.items()}
        weights |= {
            name + "mlp.gate_proj.weight": normal(INTERMEDIATE, HIDDEN),
            name + "mlp.up_proj.weight": normal(INTERMEDIATE, HIDDEN),
            name + "mlp.down_proj.weight": normal(HIDDEN, INTERMEDIATE),
            name + "input_layernorm.weight": torch.ones(HIDDEN),
            name + "post_attention_layernorm.weight": torch.ones(HIDDEN),
        }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Normal:
    """Random tensors, of the seed alone."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, deviation: float = 0.1) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random) * deviation


def _attention(normal: Normal) -> dict[str, torch.Tensor]:
    return {
        "q_proj": normal(HEADS * HEAD_DIM, HIDDEN),
        "k_proj": normal(KV_HEADS * HEAD_DIM, HIDDEN),
        "v_proj": normal(KV_HEADS * HEAD_DIM, HIDDEN),
        "o_proj": normal(HIDDEN, HEADS * HEAD_DIM),
    }


def _latent_attention(normal: Normal) -> dict[str, torch.Tensor]:
    nope, rope, value, rank = (
        _LATENT[name]
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    return {
        "q_proj": normal(HEADS * (nope + rope), HIDDEN),
        "kv_a_proj_with_mqa": normal(rank + rope, HIDDEN),
        "kv_a_layernorm": torch.ones(rank),
        "kv_b_proj": normal(HEADS * (nope + value), rank),
        "o_proj": normal(HIDDEN, HEADS * value),
    }


def write_tokenizer(folder: Path, *, special: Mapping[int, str] | None = None) -> None:
    """Words t0, t1, ...: one for each token id, but for those of `special` tokens. The server needs one."""
    names = special or {}
    vocabulary = {names.get(i, f"t{i}"): i for i in range(VOCAB)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": name, "special": True, **flags} for i, name in names.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "truncation": None,
        "padding": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "t0",
        "bos_token": "t1",
        "eos_token": "t2",
        "chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
