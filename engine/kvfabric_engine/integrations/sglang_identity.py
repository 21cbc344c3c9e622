"""What an SGLang engine is to the fabric: weights, adapters, layout, and whether its page hashes may be used.

Reads SGLang's published configuration and model files, and asks its hash function; talks to no node.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang.srt.arg_groups.model_override_base import model_config_of
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.runtime_context import get_server_args, get_serving
from sglang.version import __version__ as sglang_version

from kvfabric.errors import ConfigError
from kvfabric.hashing import tlv
from kvfabric.types import BlockLayout, PartSpec
from kvfabric_engine.integrations.sglang_pool import HostPages

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_ARGUMENTS = (
    "quantization",
    "kv_cache_dtype",
    "json_model_override_args",
    "load_format",
    "model_impl",
)
_UNTESTED = ("speculative_algorithm", "elastic_ep_backend")
_PROBE_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Engine:
    """Of one server process. `adapter_revision` empty: it serves no LoRA adapters."""

    model_revision: str
    adapter: str
    adapter_revision: str
    weight_version: str


def engine_of(adapter_revision: str) -> Engine:
    """This process's engine. Raises ConfigError for what the page hashes do not tell apart.

    `adapter_revision` is the operator's word (`KVFabricStorage`) and needed with LoRA only. Every weight
    file is read once.
    """
    try:
        args = get_server_args()
    except ValueError as exc:
        raise ConfigError(f"SGLang published no configuration in this process: {exc}") from exc
    for name in _UNTESTED:
        if getattr(args, name, None) is not None:
            raise ConfigError(f"{name} = {getattr(args, name)} is not supported")
    config = model_config_of(args)
    if config.is_multimodal:
        raise ConfigError(
            "multimodal models are not cached: SGLang puts 64 bits of an image's hash into a page's hash"
        )
    has_adapters = bool(args.enable_lora or args.lora_paths)
    if has_adapters and not adapter_revision:
        raise ConfigError(
            "with LoRA, adapter_revision must be given: SGLang's page hashes know an adapter by its name "
            "and path alone, appended to the request's extra_key"
        )
    return Engine(
        model_revision=_model_revision(args, config),
        adapter="sglang-lora" if has_adapters else "",
        adapter_revision=adapter_revision if has_adapters else "",
        weight_version=weight_version(),
    )


def weight_version() -> str:
    """What the engine calls its weights now; changes when an update of weights names another."""
    return str(get_serving().weight_version)


def check_page_hashes() -> None:
    """Raises ConfigError if SGLang's page hashes are not what keys may be made of.

    Asked of the function that the engine itself calls: 32 bytes, chained over pages, and seeded with
    `cache_salt` and `extra_key` as two things (older releases hash tokens alone).
    """

    def hashes(first: int, *, salt: str | None = None, extra: str | None = None) -> list[str]:
        tokens = array("q", [first, *range(1, 2 * _PROBE_TOKENS)])
        key = RadixKey(tokens, extra_key=extra, cache_salt=salt)
        return list(get_storage_hash_str(key, None, page_size=_PROBE_TOKENS))

    seeds: list[dict[str, str]] = [
        {}, {"salt": "ab"}, {"extra": "ab"}, {"salt": "b", "extra": "a"}, {"salt": "a", "extra": "b"}
    ]  # fmt: skip
    try:
        chains = [hashes(first, **seed) for first in (0, 1) for seed in seeds]
    except (TypeError, RuntimeError) as exc:
        raise ConfigError(f"SGLang {sglang_version} hashes no pages: {exc}") from exc
    found = [value for chain in chains for value in chain]
    if len(found) != 20 or len({bytes.fromhex(value) for value in found if len(value) == 64}) != 20:
        raise ConfigError(
            f"page hashes of SGLang {sglang_version} are short, unchained or not salted: nothing is cached"
        )


def layout_of(pool: Any, pages: HostPages, storage: Any) -> BlockLayout:
    """A page is a block. `storage`: HiCacheStorageConfig. Replicated KV (MLA) is one shard.

    Ranks of other pipeline stages and context shards hold other bytes of the page: each is a namespace of
    its own, and SGLang itself takes the least of what they find.
    """
    num_shards = 1 if storage.is_mla_model else storage.tp_size
    parts = [
        PartSpec(group=group, shard=shard, num_bytes=num_bytes)
        for group, num_bytes in enumerate(pages.part_bytes)
        for shard in range(num_shards)
    ]
    return BlockLayout(
        num_layers=int(pool.layer_num),
        num_kv_heads=int(getattr(pool, "head_num", 1)),
        head_dim=int(getattr(pool, "head_dim", 0) or pool.kv_cache_dim),
        dtype=str(pool.dtype).removeprefix("torch."),
        block_tokens=pages.page_tokens,
        engine_block_tokens=pages.page_tokens,
        parts=tuple(parts),
        packing=pages.form,
        parallel=(
            f"tp{num_shards} pp{storage.pp_rank}/{storage.pp_size} "
            f"cp{storage.attn_cp_rank}/{storage.attn_cp_size}"
        ),
    )


def _model_revision(args: Any, config: Any) -> str:
    """32 hex digits of the weights and of what decides how they are computed.

    Weights that are in no file (dummy weights) get a revision of their own in each engine.
    """
    folder = _folder(args.model_path, args.revision)
    files = (
        sorted({file for pattern in WEIGHT_FILES for file in folder.glob(pattern)})
        if folder
        else []
    )
    is_real = bool(files) and args.load_format != "dummy"
    scales = Path(args.quantization_param_path) if args.quantization_param_path else None
    fields = [
        (1, b"".join(_digest_of(file) for file in files) if is_real else secrets.token_bytes(32)),
        (2, _architecture(config).encode()),
        (3, str(config.dtype).encode()),
        (4, json.dumps([str(getattr(args, name, None)) for name in _ARGUMENTS]).encode()),
        (5, _digest_of(scales) if scales else b""),
        (6, sglang_version.encode()),
    ]
    return hashlib.blake2b(tlv("kvfabric/sglang-model", fields), digest_size=16).hexdigest()


def _folder(model_path: str, revision: str | None) -> Path | None:
    if Path(model_path).is_dir():
        return Path(model_path)
    from huggingface_hub import snapshot_download  # comes with SGLang

    try:
        return Path(snapshot_download(model_path, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _digest_of(file: Path) -> bytes:
    with file.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").digest()
    return hashlib.sha256(file.name.encode() + b"\0" + content).digest()


def _architecture(config: Any) -> str:
    known = config.hf_config.to_dict()
    kept = {k: v for k, v in known.items() if k not in ("_name_or_path", "transformers_version")}
    return json.dumps(kept, sort_keys=True, default=str)
