"""A small random Qwen2-Audio on disk: a model with an encoder that vLLM runs without torchvision.

The audio's part of the prompt is one token `AUDIO` for each of its frames (25 a second).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.vllm.checkpoint import LAYERS, VOCAB, Normal, write_tokenizer

AUDIO_BOS, AUDIO, AUDIO_EOS = 509, 510, 511
RATE = 16000
HIDDEN = 128
HEADS = 4
KV_HEADS = 2
HEAD_DIM = HIDDEN // HEADS
INTERMEDIATE = 256
ENCODER = 32
ENCODER_FFN = 64
MELS = 128
FRAMES = 1500
"""Of 30 seconds, to which every audio is padded."""

_TEXT: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_ENCODER: dict[str, Any] = {
    "model_type": "qwen2_audio_encoder",
    "num_mel_bins": MELS,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": ENCODER_FFN,
    "d_model": ENCODER,
    "max_source_positions": FRAMES,
}


def write_audio_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    config = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "text_config": _TEXT,
        "audio_config": _ENCODER,
        "audio_token_index": AUDIO,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    extractor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "Qwen2AudioProcessor",
        "feature_size": MELS,
        "sampling_rate": RATE,
        "hop_length": 160,
        "chunk_length": 30,
        "n_fft": 400,
        "return_attention_mask": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor))
    names = {AUDIO_BOS: "<|audio_bos|>", AUDIO: "<|AUDIO|>", AUDIO_EOS: "<|audio_eos|>"}
    write_tokenizer(folder, special=names)
    normal = Normal(3)
    weights = _language_model(normal) | _encoder(normal)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _linear(normal: Normal, outputs: int, inputs: int, name: str) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": normal(outputs, inputs), f"{name}.bias": normal(outputs)}


def _norm(name: str) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.ones(ENCODER), f"{name}.bias": torch.zeros(ENCODER)}


def _language_model(normal: Normal) -> dict[str, torch.Tensor]:
    weights = {
        "language_model.model.embed_tokens.weight": normal(VOCAB, HIDDEN, deviation=1.0),
        "language_model.model.norm.weight": torch.ones(HIDDEN),
        "language_model.lm_head.weight": normal(VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        name = f"language_model.model.layers.{layer}."
        for key, width in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights |= _linear(normal, width * HEAD_DIM, HIDDEN, f"{name}self_attn.{key}_proj")
        weights |= {
            name + "self_attn.o_proj.weight": normal(HIDDEN, HIDDEN),
            name + "mlp.gate_proj.weight": normal(INTERMEDIATE, HIDDEN),
            name + "mlp.up_proj.weight": normal(INTERMEDIATE, HIDDEN),
            name + "mlp.down_proj.weight": normal(HIDDEN, INTERMEDIATE),
            name + "input_layernorm.weight": torch.ones(HIDDEN),
            name + "post_attention_layernorm.weight": torch.ones(HIDDEN),
        }
    return weights


def _encoder(normal: Normal) -> dict[str, torch.Tensor]:
    weights = {
        "audio_tower.conv1.weight": normal(ENCODER, MELS, 3),
        "audio_tower.conv1.bias": normal(ENCODER),
        "audio_tower.conv2.weight": normal(ENCODER, ENCODER, 3),
        "audio_tower.conv2.bias": normal(ENCODER),
        "audio_tower.embed_positions.weight": normal(FRAMES, ENCODER),
        **_norm("audio_tower.layer_norm"),
        # As large as the rows of tokens, so that what was said changes the answer.
        "multi_modal_projector.linear.weight": normal(HIDDEN, ENCODER, deviation=1.0),
        "multi_modal_projector.linear.bias": normal(HIDDEN),
    }
    for layer in range(_ENCODER["encoder_layers"]):
        name = f"audio_tower.layers.{layer}."
        for key in ("q", "v", "out"):
            weights |= _linear(normal, ENCODER, ENCODER, f"{name}self_attn.{key}_proj")
        weights[f"{name}self_attn.k_proj.weight"] = normal(ENCODER, ENCODER)
        weights |= _linear(normal, ENCODER_FFN, ENCODER, name + "fc1")
        weights |= _linear(normal, ENCODER, ENCODER_FFN, name + "fc2")
        weights |= _norm(name + "self_attn_layer_norm") | _norm(name + "final_layer_norm")
    return weights
