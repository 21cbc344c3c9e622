"""Reads the weights of a local Hugging Face folder from its safetensors files.

The files are mapped and copied once, straight to where the model computes from (q, k and v in one tensor,
gate and up in one), in chunks. The revision is hashed from those chunks, in the dtype computed with: it is
the digest of what was loaded, whatever becomes of the files. That is also why nothing is computed from the
mapping itself, which would follow a file that is written to later.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kvfabric.errors import ConfigError
from kvfabric.hf_tokenizer import read_json
from kvfabric_engine.reference.weights import LayerWeights, ModelShape, Weights

CHUNK_BYTES = 4 << 20
"""A tensor is converted, hashed and copied by so much at a time, while it is in the processor's cache."""
MAX_THREADS = 8
MAX_NAMED = 4
"""Tensors that an error message names."""

_DTYPES = frozenset(("F64", "F32", "F16", "BF16"))
_ROTARY = ".rotary_emb.inv_freq"
"""Old checkpoints hold the rotary frequencies; they follow from config.json."""


def read_weights(
    folder: Path, shape: ModelShape, *, dtype: torch.dtype, device: torch.device
) -> Weights:
    """The folder's tensors as a model of `shape`. Raises ConfigError that names file or tensor."""
    with ExitStack() as stack:
        sources = _open(_files(folder), stack)
        _check_tying(sources, shape, folder)
        _check_tensors(shape, sources, folder)
        plan = _Plan(shape, dtype, device)
        weights = plan.weights()
        digests = _fill(plan.places, sources)
    return replace(weights, revision=_revision(shape, dtype, digests))


def _files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ConfigError(f"{folder} holds neither {single.name} nor {index.name}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ConfigError(f"{index} has no weight_map")
    files = set(names.values())
    if not all(isinstance(name, str) and Path(name).name == name for name in files):
        raise ConfigError(f"{index}: weight_map must name files of this folder")
    return [folder / name for name in sorted(files)]


@dataclass(frozen=True, slots=True)
class _Source:
    file: Path
    handle: Any
    """The mapped file. safetensors has no type for it."""

    def check(self, name: str, dims: list[int]) -> None:
        """Raises ConfigError if the tensor is none of these dimensions that can be computed with."""
        found = self.handle.get_slice(name)
        if list(found.get_shape()) != dims:
            raise ConfigError(
                f"{self.file}: {name} is {found.get_shape()}; config.json says {dims}"
            )
        if found.get_dtype() not in _DTYPES:
            raise ConfigError(f"{self.file}: {name} is {found.get_dtype()}, which is not supported")

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the mapping."""
        try:
            tensor: torch.Tensor = self.handle.get_tensor(name)
        except SafetensorError as exc:
            raise ConfigError(f"{self.file}: cannot read {name}: {exc}") from exc
        return tensor


def _open(files: Iterable[Path], stack: ExitStack) -> dict[str, _Source]:
    """Every tensor's name -> the file it is in."""
    sources: dict[str, _Source] = {}
    for file in files:
        try:
            handle = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
        except (OSError, SafetensorError) as exc:
            raise ConfigError(f"cannot read {file}: {exc}") from exc
        for name in handle.keys():  # noqa: SIM118 - it is no mapping
            if name in sources:
                raise ConfigError(f"{name} is both in {sources[name].file} and in {file}")
            sources[name] = _Source(file, handle)
    return sources


class _Plan:
    """Allocates what the model computes with; `places` says where each tensor of the files goes."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
        self.places: dict[str, torch.Tensor] = {}
        self._shape = shape
        self._dtype = dtype
        self._device = device

    def weights(self) -> Weights:
        """Uninitialised, without a revision. To be called once."""
        s = self._shape
        embedding = self._one("model.embed_tokens.weight", s.vocab_size, s.hidden_size)
        return Weights(
            shape=s,
            embedding=embedding,
            layers=tuple(self._layer(f"model.layers.{n}") for n in range(s.num_layers)),
            final_norm=self._one("model.norm.weight", s.hidden_size),
            head=embedding if s.tied else self._one("lm_head.weight", s.vocab_size, s.hidden_size),
            revision="",
        )

    def _layer(self, prefix: str) -> LayerWeights:
        s, attention, mlp = self._shape, f"{prefix}.self_attn", f"{prefix}.mlp"
        heads = {
            "q_proj": s.num_heads * s.head_dim,
            "k_proj": s.num_kv_heads * s.head_dim,
            "v_proj": s.num_kv_heads * s.head_dim,
        }
        qkv = {f"{attention}.{name}": rows for name, rows in heads.items()}
        gate_up = {f"{mlp}.gate_proj": s.intermediate_size, f"{mlp}.up_proj": s.intermediate_size}
        return LayerWeights(
            attention_norm=self._one(f"{prefix}.input_layernorm.weight", s.hidden_size),
            qkv=self._stack(qkv, "weight", s.hidden_size),
            qkv_bias=self._stack(qkv, "bias") if s.qkv_bias else None,
            q_norm=self._one(f"{attention}.q_norm.weight", s.head_dim) if s.qk_norm else None,
            k_norm=self._one(f"{attention}.k_norm.weight", s.head_dim) if s.qk_norm else None,
            output=self._one(f"{attention}.o_proj.weight", s.hidden_size, heads["q_proj"]),
            mlp_norm=self._one(f"{prefix}.post_attention_layernorm.weight", s.hidden_size),
            gate_up=self._stack(gate_up, "weight", s.hidden_size),
            down=self._one(f"{mlp}.down_proj.weight", s.hidden_size, s.intermediate_size),
        )

    def _one(self, name: str, *dims: int) -> torch.Tensor:
        self.places[name] = torch.empty(dims, dtype=self._dtype, device=self._device)
        return self.places[name]

    def _stack(self, parts: Mapping[str, int], kind: str, *width: int) -> torch.Tensor:
        """One tensor of several (name -> rows), one below the other."""
        rows = list(parts.values())
        whole = torch.empty(sum(rows), *width, dtype=self._dtype, device=self._device)
        for name, place in zip(parts, torch.split(whole, rows), strict=True):
            self.places[f"{name}.{kind}"] = place
        return whole


def _check_tying(sources: dict[str, _Source], shape: ModelShape, folder: Path) -> None:
    """A tied output layer that is stored as well must be the embedding; then it is left out."""
    head, embedding = sources.get("lm_head.weight"), sources.get("model.embed_tokens.weight")
    if not shape.tied or head is None or embedding is None:
        return
    stored, tied = head.tensor("lm_head.weight"), embedding.tensor("model.embed_tokens.weight")
    if stored.dtype != tied.dtype or not torch.equal(stored, tied):
        raise ConfigError(
            f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding"
        )
    del sources["lm_head.weight"]


def _check_tensors(shape: ModelShape, sources: Mapping[str, _Source], folder: Path) -> None:
    """That the files hold what the shape needs and nothing else, before any memory is taken for it."""
    draft = _Plan(shape, torch.float32, torch.device("meta"))
    draft.weights()
    places = draft.places
    if missing := [name for name in places if name not in sources]:
        raise ConfigError(f"{folder} lacks {_first_of(missing)}")
    unknown = [name for name in sources if name not in places and not name.endswith(_ROTARY)]
    if unknown:
        raise ConfigError(f"{folder}: this model has no place for {_first_of(unknown)}")
    for name, place in places.items():
        sources[name].check(name, list(place.shape))


def _first_of(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _fill(
    places: Mapping[str, torch.Tensor], sources: Mapping[str, _Source]
) -> dict[str, tuple[torch.Size, bytes]]:
    """Copy every tensor to its place; shape and digest of each."""
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: _copy(name, sources[name], places[name]), places)
        return {
            name: (place.shape, digest)
            for (name, place), digest in zip(places.items(), digests, strict=True)
        }


def _copy(name: str, source: _Source, place: torch.Tensor) -> bytes:
    tensor = source.tensor(name)
    digest = blake2b(digest_size=32, person=b"kvf-tensor-1")
    rows = max(1, CHUNK_BYTES // (place[0].numel() * place.element_size()))
    for chunk, target in zip(torch.split(tensor, rows), torch.split(place, rows), strict=True):
        converted = chunk.to(place.dtype, copy=True)  # owned: hashed and loaded are one
        digest.update(converted.view(torch.uint8).numpy().data)
        target.copy_(converted)
    return digest.digest()


def _revision(
    shape: ModelShape, dtype: torch.dtype, digests: Mapping[str, tuple[torch.Size, bytes]]
) -> str:
    """In the order of names: how the tensors were spread over files does not matter."""
    whole = blake2b(digest_size=16, person=b"kvf-weights-2")
    settings = (
        f"{dtype} heads={shape.num_heads} kv_heads={shape.num_kv_heads} epsilon={shape.rms_epsilon:.17g} "
        f"rope={shape.rope.describe()} tied={shape.tied}"
    )
    for text, digest in [
        (settings, b""),
        *((f"{name} {list(dims)}", digest) for name, (dims, digest) in sorted(digests.items())),
    ]:
        whole.update(len(text).to_bytes(4, "little") + text.encode() + digest)
    return whole.hexdigest()
