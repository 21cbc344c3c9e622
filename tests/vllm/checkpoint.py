"""A small random checkpoint on disk, whose answers depend on its KV: one wrong block changes the text.

vLLM's own dummy weights are so small that another prompt's KV changes nothing: a test on them proves nothing.
"""

from __future__ import annotations

import json
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


def write_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """Llama shape, float32: matrices normal with a deviation of 0.1, embeddings of 1, norms 1."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    _write_tokenizer(folder)
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, deviation: float = 0.1) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * deviation

    weights = {
        "model.embed_tokens.weight": normal(VOCAB, HIDDEN, deviation=1.0),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": normal(VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        weights |= {
            name + "self_attn.q_proj.weight": normal(HEADS * HEAD_DIM, HIDDEN),
            name + "self_attn.k_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            name + "self_attn.v_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            name + "self_attn.o_proj.weight": normal(HIDDEN, HEADS * HEAD_DIM),
            name + "mlp.gate_proj.weight": normal(INTERMEDIATE, HIDDEN),
            name + "mlp.up_proj.weight": normal(INTERMEDIATE, HIDDEN),
            name + "mlp.down_proj.weight": normal(HIDDEN, INTERMEDIATE),
            name + "input_layernorm.weight": torch.ones(HIDDEN),
            name + "post_attention_layernorm.weight": torch.ones(HIDDEN),
        }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write_tokenizer(folder: Path) -> None:
    """Words t0, t1, ...: one for each token id. The server needs one."""
    vocabulary = {f"t{i}": i for i in range(VOCAB)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
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
