"""Writes small Hugging Face folders with random weights, as tests want them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HIDDEN, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 64, 96, 2, 4, 2, 16, 320

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
ROPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA3_ROPE,
    "qwen2": {"rope_type": "default", "rope_theta": 1000000.0},
    "qwen3": {"rope_type": "default", "rope_theta": 1000000.0},
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "a tenant reads its own blocks again"]


def config(family: str) -> dict[str, Any]:
    """config.json as transformers 5 writes it."""
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_parameters": ROPES[family],
        "tie_word_embeddings": family == "qwen2",
        "eos_token_id": 2,
    }


def tensors(family: str, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor under the name that Hugging Face gives it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, generator=generator) * (2 / math.sqrt(dims[-1]))

    found = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN) * 4}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            found[f"{prefix}self_attn.{name}.weight"] = draw(rows, HIDDEN)
            if family == "qwen2":
                found[f"{prefix}self_attn.{name}.bias"] = draw(rows)
        if family == "qwen3":
            found[f"{prefix}self_attn.q_norm.weight"] = 1 + draw(HEAD_DIM)
            found[f"{prefix}self_attn.k_norm.weight"] = 1 + draw(HEAD_DIM)
        found[f"{prefix}self_attn.o_proj.weight"] = draw(HIDDEN, q)
        found[f"{prefix}mlp.gate_proj.weight"] = draw(WIDTH, HIDDEN)
        found[f"{prefix}mlp.up_proj.weight"] = draw(WIDTH, HIDDEN)
        found[f"{prefix}mlp.down_proj.weight"] = draw(HIDDEN, WIDTH)
        found[f"{prefix}input_layernorm.weight"] = 1 + draw(HIDDEN)
        found[f"{prefix}post_attention_layernorm.weight"] = 1 + draw(HIDDEN)
    found["model.norm.weight"] = 1 + draw(HIDDEN)
    if family != "qwen2":  # which ties it to the embedding
        found["lm_head.weight"] = draw(VOCAB, HIDDEN)
    return found


def tokenizer() -> Tokenizer:
    """A byte-level BPE that puts <|begin|> before a text. Ids: 0 <|begin|>, 1 <|im_start|>, 2 <|im_end|>."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|begin|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(CORPUS, trainer)
    found.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return found


def write_json(file: Path, document: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(document))


def write_tokenizer(folder: Path, *, template: str | None = CHATML) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "chat_template": template,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor], *, num_files: int = 1) -> None:
    """`model.safetensors`, or so many shards and their index."""
    if num_files == 1:
        save_file(dict(weights), folder / "model.safetensors")
        return
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for number in range(num_files):
        file = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        part = names[number::num_files]
        save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def write_folder(folder: Path, family: str, *, num_files: int = 1, **changes: Any) -> Path:
    """A whole model. `changes` are keys of config.json."""
    write_tokenizer(folder)
    write_json(folder / "config.json", config(family) | changes)
    write_weights(folder, tensors(family), num_files=num_files)
    return folder
