"""A small random LoRA adapter in a folder, in PEFT's format, that changes the answers of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.vllm.checkpoint import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS

RANK = 8
DEVIATION = 0.15
"""Of both matrices: their product is about as large as the weights that it is added to."""


def write_adapter(folder: Path, *, seed: int) -> Path:
    """Of the four attention projections. What is there is overwritten in place."""
    folder.mkdir(parents=True, exist_ok=True)
    widths = {
        "q_proj": (HIDDEN, HEADS * HEAD_DIM),
        "k_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
        "v_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
        "o_proj": (HEADS * HEAD_DIM, HIDDEN),
    }
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for name, (inputs, outputs) in widths.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{key}.lora_A.weight"] = (
                torch.randn(RANK, inputs, generator=random) * DEVIATION
            )
            weights[f"{key}.lora_B.weight"] = (
                torch.randn(outputs, RANK, generator=random) * DEVIATION
            )
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(widths),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
