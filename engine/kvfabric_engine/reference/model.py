"""The model: a Llama/Qwen3-shaped decoder in plain torch over a paged KV pool. Random, seeded weights.

Computes; decides nothing. Weights are drawn on CPU in float32 from one seeded generator, so every process
with the same configuration has the same model, and `revision` is the digest of what was drawn. Their scale
is large enough that another prompt's KV changes the answer: a test with feeble weights proves nothing.

Shapes: T tokens of a forward, H hidden, A query heads, K KV heads, D head dim, C tokens of context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvfabric.config import EngineConfig
from kvfabric.errors import ConfigError

ROPE_THETA = 10_000.0
RMS_EPSILON = 1e-6
LINEAR_GAIN = 2.0
"""Standard deviation of a linear layer's weights times the root of its fan-in."""

# Without cuDNN's: it builds a plan for each new length of context, which costs more than the attention.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence in a forward: positions [start, start + len(token_ids)).

    `pages` are the sequence's pages from token 0 on, enough for its last token here. `sample` asks for the
    logits after the last token.
    """

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]
    sample: bool

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: torch.Tensor  # [H]
    qkv: torch.Tensor  # [(A + 2 K) D, H]
    q_norm: torch.Tensor  # [D]
    k_norm: torch.Tensor  # [D]
    output: torch.Tensor  # [H, A D]
    mlp_norm: torch.Tensor  # [H]
    gate_up: torch.Tensor  # [2 I, H]
    down: torch.Tensor  # [H, I]


@dataclass(frozen=True, slots=True)
class _SpanIndex:
    """Where a span's rows and context lie. `mask`: additive [n, C], None when every key may be seen."""

    rows: slice
    context: int
    pages: torch.Tensor  # int64 [ceil(C / page_tokens)]
    mask: torch.Tensor | None


def device_of(name: str) -> torch.device:
    """Raises ConfigError if this machine has none of that name, or torch cannot use it."""
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ConfigError(f"engine.device is {name!r}; it must be cpu or cuda") from exc
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"engine.device is {name!r}, which torch does not find here")
    return device


class Model:
    """Weights on one device. `forward` is the only thing that runs; it writes the KV of its tokens."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.device = device_of(config.device)
        self.dtype = DTYPES[config.dtype]
        draw = _Weights(config)
        self.embedding = draw.normal(config.vocab_size, config.hidden_size, std=1.0)
        self.layers = [draw.layer() for _ in range(config.num_layers)]
        self.final_norm = draw.ones(config.hidden_size)
        self.head = draw.linear(config.vocab_size, config.hidden_size)
        self.revision = draw.digest()
        self._cos, self._sin = _rope_tables(config, self.device, self.dtype)

    @property
    def rope(self) -> str:
        """The rotary settings as the block layout declares them."""
        return f"neox theta={ROPE_THETA:g}"

    @torch.inference_mode()
    def forward(self, pool: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """Compute all spans in one batch and write their KV into `pool` (shape: see `layout`).

        Returns float32 [number of spans with sample, vocab] on the model's device, in the spans' order.
        Spans must belong to different sequences: none may read what another one writes here.
        """
        tokens = torch.tensor([t for span in spans for t in span.token_ids], device=self.device)
        positions = torch.cat([torch.arange(s.start, s.end) for s in spans]).to(self.device)
        indexes = self._indexes(spans, page_tokens=pool.shape[3])
        page_of_row, offset_of_row = self._slots(spans, page_tokens=pool.shape[3])
        cos, sin = self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)
        hidden = self.embedding[tokens]  # [T, H]
        with sdpa_kernel(_ATTENTION):
            for number, layer in enumerate(self.layers):
                q, k, v = self._project(layer, hidden, cos, sin)
                pages = pool[:, number]  # [num_pages, 2, page_tokens, K, D]
                pages[page_of_row, 0, offset_of_row] = k
                pages[page_of_row, 1, offset_of_row] = v
                mixed = [self._attend(q[index.rows], pages, index) for index in indexes]
                attended = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
                hidden = hidden + F.linear(attended, layer.output)
                gate, up = F.linear(self._norm(hidden, layer.mlp_norm), layer.gate_up).chunk(
                    2, dim=-1
                )
                hidden = hidden + F.linear(F.silu(gate) * up, layer.down)
        last = [index.rows.stop - 1 for index, s in zip(indexes, spans, strict=True) if s.sample]
        chosen = self._norm(hidden[last], self.final_norm)
        return F.linear(chosen, self.head).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, RMS_EPSILON)

    def _project(
        self, layer: _Layer, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T, A, D], k and v [T, K, D]; q and k normalised per head and rotated."""
        c = self.config
        heads = F.linear(self._norm(hidden, layer.attention_norm), layer.qkv)
        heads = heads.view(len(hidden), c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        q, k, v = torch.split(heads, [c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        q = _rotate(self._norm(q, layer.q_norm), cos, sin)
        k = _rotate(self._norm(k, layer.k_norm), cos, sin)
        return q, k, v

    def _attend(self, q: torch.Tensor, pages: torch.Tensor, index: _SpanIndex) -> torch.Tensor:
        """q [n, A, D] of one span over its own context; returns [n, A D]."""
        context = pages[index.pages]  # [pages, 2, page_tokens, K, D], gathered
        k = context[:, 0].flatten(0, 1)[: index.context].transpose(0, 1)  # [K, C, D]
        v = context[:, 1].flatten(0, 1)[: index.context].transpose(0, 1)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            k.unsqueeze(0),
            v.unsqueeze(0),
            attn_mask=index.mask,
            enable_gqa=True,
        )
        return out.squeeze(0).transpose(0, 1).reshape(len(q), -1)

    def _indexes(self, spans: Sequence[Span], *, page_tokens: int) -> list[_SpanIndex]:
        indexes, row = [], 0
        for span in spans:
            num = len(span.token_ids)
            mask = None
            if num > 1:
                hidden = torch.full((num, span.end), float("-inf"), dtype=self.dtype)
                mask = hidden.triu(span.start + 1).to(self.device)
            used = span.pages[: -(-span.end // page_tokens)]
            pages = torch.tensor(used, device=self.device)
            indexes.append(_SpanIndex(slice(row, row + num), span.end, pages, mask))
            row += num
        return indexes

    def _slots(
        self, spans: Sequence[Span], *, page_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and offset in it of each row: int64 [T] twice."""
        places = [
            (span.pages[position // page_tokens], position % page_tokens)
            for span in spans
            for position in range(span.start, span.end)
        ]
        slots = torch.tensor(places, device=self.device)
        return slots[:, 0], slots[:, 1]


class _Weights:
    """Draws tensors in a fixed order and keeps a running digest of them."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._device = torch.device(config.device)
        self._dtype = DTYPES[config.dtype]
        self._generator = torch.Generator().manual_seed(config.seed)
        self._hash = blake2b(digest_size=16, person=b"kvf-weights-1")
        shape = f"theta={ROPE_THETA} epsilon={RMS_EPSILON} heads={config.num_heads}"
        self._hash.update(shape.encode())

    def digest(self) -> str:
        """32 hex digits of every tensor drawn so far, with shape and dtype."""
        return self._hash.hexdigest()

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self._dtype)
        self._hash.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        self._hash.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return tensor.to(self._device)

    def normal(self, *shape: int, std: float) -> torch.Tensor:
        return self._keep(torch.randn(*shape, generator=self._generator) * std)

    def linear(self, fan_out: int, fan_in: int) -> torch.Tensor:
        return self.normal(fan_out, fan_in, std=LINEAR_GAIN / fan_in**0.5)

    def ones(self, size: int) -> torch.Tensor:
        return self._keep(torch.ones(size))

    def layer(self) -> _Layer:
        c = self._config
        heads = c.num_heads + 2 * c.num_kv_heads
        return _Layer(
            attention_norm=self.ones(c.hidden_size),
            qkv=self.linear(heads * c.head_dim, c.hidden_size),
            q_norm=self.ones(c.head_dim),
            k_norm=self.ones(c.head_dim),
            output=self.linear(c.hidden_size, c.num_heads * c.head_dim),
            mlp_norm=self.ones(c.hidden_size),
            gate_up=self.linear(2 * c.intermediate_size, c.hidden_size),
            down=self.linear(c.hidden_size, c.intermediate_size),
        )


def _rope_tables(
    config: EngineConfig, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [max_model_tokens, D]: both halves of a head share their angles."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.outer(torch.arange(config.max_model_tokens).double(), ROPE_THETA**-half)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on x [T, heads, D]; cos and sin [T, 1, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
