"""What a vLLM engine is to the fabric: version, weights, layout, node. Reads configuration and files only."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfabric.config import default_state_dir
from kvfabric.errors import ConfigError
from kvfabric.hashing import tlv
from kvfabric.types import ENGINE_ROLES, BlockLayout, PartSpec
from kvfabric_engine.layout import default_block_tokens

TESTED_VERSIONS = ("0.32",)
"""Release series of vLLM that this connector was run with; with any other it does nothing."""

SOCKET_VARIABLE = "KVFABRIC_ENGINE_NODE_SOCKET"
LATENT_ROPES = ("yarn", "deepseek_yarn")
"""With these vLLM computes MLA right on a CPU. Its CPU kernel for others takes the distance of two heads for
that of two tokens, so that tokens are rotated many times over and KV depends on what else is in the batch."""

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_UNTESTED_MODES = (
    "pipeline_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
)


@dataclass(frozen=True, slots=True)
class Shard:
    """What one worker process tells the scheduler about its KV tensors."""

    num_layers: int
    page_bytes: int
    form: str
    packing: str
    dtype: str
    error: str = ""
    """Why this worker cannot store or load; empty if its self-test passed."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The engine's one KV group, as its specification says."""

    page_tokens: int
    num_kv_heads: int
    head_dim: int
    attention: str
    layers: tuple[str, ...]
    is_replicated: bool = False
    """Whether every rank holds the same (MLA): then a block is one part, which one rank writes."""

    @property
    def block_tokens(self) -> int:
        return default_block_tokens(self.page_tokens)

    @property
    def pages_per_block(self) -> int:
        return self.block_tokens // self.page_tokens


def check_version(version: str) -> None:
    """Raises ConfigError for a vLLM that this connector was not run with."""
    if not any(version == tested or version.startswith(f"{tested}.") for tested in TESTED_VERSIONS):
        raise ConfigError(
            f"vLLM {version} is not supported (tested: {', '.join(TESTED_VERSIONS)}.x)"
        )


def check_configuration(config: Any) -> None:
    """Raises ConfigError that names what of the engine's configuration the fabric cannot be right with."""
    parallel = config.parallel_config
    extra = config.kv_transfer_config.kv_connector_extra_config or {}
    if extra.get("serves", "both") not in ENGINE_ROLES:
        raise ConfigError(f"serves is one of {', '.join(ENGINE_ROLES)}, not {extra['serves']!r}")
    for name in _UNTESTED_MODES:
        if getattr(parallel, name, 1) != 1:
            raise ConfigError(f"{name} = {getattr(parallel, name)} is not supported")
    if config.speculative_config is not None:
        raise ConfigError("speculative decoding is not supported")
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise ConfigError("KV scales computed at run time are not cached")


def groups_of(config: Any, kv_cache_config: Any) -> Groups:
    """Raises ConfigError for hybrid models and for kinds of attention whose blocks are not cached."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise ConfigError(f"models with {len(groups)} KV cache groups (hybrid) are not cached")
    spec = groups[0].kv_cache_spec
    kind = type(spec).__name__
    if kind not in ("FullAttentionSpec", "MLAAttentionSpec"):
        raise ConfigError(f"KV of {kind} is not cached")
    if getattr(spec, "non_causal", False):
        raise ConfigError("KV of a non-causal model depends on later tokens: it is not cached")
    is_latent = kind == "MLAAttentionSpec"
    if (
        is_latent
        and config.device_config.device_type == "cpu"
        and _rope(config) not in LATENT_ROPES
    ):
        raise ConfigError(f"KV of MLA with RoPE of type {_rope(config)} is not cached on a CPU")
    return Groups(
        page_tokens=int(spec.block_size),
        num_kv_heads=int(spec.num_kv_heads),
        head_dim=int(spec.head_size),
        attention=_attention(spec),
        layers=tuple(groups[0].layer_names),
        is_replicated=is_latent,
    )


def _rope(config: Any) -> str:
    rope = getattr(config.model_config.hf_text_config, "rope_parameters", None) or {}
    return str(rope.get("rope_type"))


def _attention(spec: Any) -> str:
    fields = ("sliding_window", "attention_chunk_size", "head_size_v", "kv_quant_mode")
    values = [f"{name}={getattr(spec, name, None)}" for name in fields]
    return " ".join([type(spec).__name__, *values])


def layout_of(config: Any, groups: Groups, shards: Sequence[Shard]) -> BlockLayout:
    """The engine's layout; `shards` by tensor-parallel rank. Raises ConfigError if they do not fit."""
    for rank, shard in enumerate(shards):
        if shard.error:
            raise ConfigError(f"rank {rank}: {shard.error}")
    first = shards[0]
    if len({(s.num_layers, s.packing, s.dtype) for s in shards}) != 1:
        raise ConfigError("the ranks pack their KV differently")
    holders = shards
    if groups.is_replicated:
        if len({(s.page_bytes, s.form) for s in shards}) != 1:
            raise ConfigError("the ranks hold different pages of what they should all hold")
        holders = shards[:1]
    parts = [
        PartSpec(group=0, shard=rank, num_bytes=groups.pages_per_block * shard.page_bytes)
        for rank, shard in enumerate(holders)
    ]
    return BlockLayout(
        num_layers=first.num_layers,
        num_kv_heads=groups.num_kv_heads,
        head_dim=groups.head_dim,
        dtype=first.dtype,
        block_tokens=groups.block_tokens,
        engine_block_tokens=groups.page_tokens,
        parts=tuple(parts),
        kv_scales="static" if "fp8" in str(config.cache_config.cache_dtype) else "none",
        packing=f"{first.packing} {first.form}",
        parallel=f"tp{len(shards)}",
        rope=_text(getattr(config.model_config.hf_text_config, "rope_parameters", None)),
        attention=groups.attention,
    )


def model_revision(config: Any, version: str) -> str:
    """32 hex digits of the weights and of what decides how they are computed. Reads every weight file once.

    Weights that are in no file (dummy weights) get a revision of their own in each engine.
    """
    model = config.model_config
    folder = _folder(model)
    files = [] if folder is None else _weight_files(folder)
    is_real = bool(files) and str(config.load_config.load_format) != "dummy"
    weights = b"".join(file_digest(file) for file in files) if is_real else secrets.token_bytes(32)
    fields = [
        (1, weights),
        (2, _architecture(model).encode()),
        (3, str(model.dtype).encode()),
        (4, str(model.quantization).encode()),
        (5, str(config.cache_config.cache_dtype).encode()),
        (6, version.encode()),
    ]
    return hashlib.blake2b(tlv("kvfabric/vllm-model", fields), digest_size=16).hexdigest()


def node_socket(extra: Mapping[str, Any]) -> str:
    """Where the node listens: variable, `kv_connector_extra_config`, or a node started with its defaults."""
    given = os.environ.get(SOCKET_VARIABLE) or extra.get("node_socket")
    return str(given) if given else str(default_state_dir() / "node.sock")


def _folder(model: Any) -> Path | None:
    if Path(model.model).is_dir():
        return Path(model.model)
    from huggingface_hub import snapshot_download  # comes with vLLM, imports much

    try:
        return Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _weight_files(folder: Path) -> list[Path]:
    return sorted({file for pattern in WEIGHT_FILES for file in folder.glob(pattern)})


def file_digest(file: Path) -> bytes:
    """32 bytes of the file's name and content."""
    with file.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").digest()
    return hashlib.sha256(file.name.encode() + b"\0" + content).digest()


def _architecture(model: Any) -> str:
    known = model.hf_config.to_dict()
    return _text(
        {k: v for k, v in known.items() if k not in ("_name_or_path", "transformers_version")}
    )


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)
