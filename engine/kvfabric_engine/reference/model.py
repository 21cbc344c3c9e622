"""The model: a decoder of the Llama, Qwen2 or Qwen3 shape in plain torch over a paged KV pool.

Computes; decides nothing. Its weights are random ones of a seed (`weights.py`) or those of a folder
(`checkpoint.py`); `revision` is their digest.

Shapes: T tokens of a forward, H hidden, A query heads, K KV heads, D head dim, C tokens of context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvfabric.config import EngineConfig
from kvfabric.errors import ConfigError
from kvfabric_engine.lanes import Fence, wait_here
from kvfabric_engine.reference.heads import HeadShape, Places, place_heads
from kvfabric_engine.reference.weights import DTYPES, LayerWeights, Weights, draw_weights

NOTHING: Mapping[int, Fence] = MappingProxyType({})
Attend = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Queries [T, A, D] and a layer's pages -> [T, A D]."""
# Without cuDNN's: it builds a plan for each new length of context, which costs more than the attention.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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
class _SpanIndex:
    """Where a span's rows and context lie. `mask`: additive [n, C], None when every key may be seen."""

    rows: slice
    context: int
    pages: torch.Tensor  # int64 [ceil(C / page_tokens)]
    mask: torch.Tensor | None  # on a GPU in half precision: a causal bias, which needs no memory


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

    def __init__(self, config: EngineConfig, weights: Weights | None = None) -> None:
        """`weights`: of this configuration's shape, dtype and device, instead of its own."""
        self.config = config
        self.device = device_of(config.device)
        self.dtype = DTYPES[config.dtype]
        weights = weights or _load(config, self.dtype, self.device)
        self.shape = weights.shape
        self.embedding = weights.embedding
        self.layers = weights.layers
        self.final_norm = weights.final_norm
        self.head = weights.head
        self.revision = weights.revision
        self._cos, self._sin = self.shape.rope.tables(
            config.max_model_tokens, self.shape.head_dim, self.device, self.dtype
        )

    @property
    def rope(self) -> str:
        """The rotary settings as the block layout declares them."""
        return self.shape.rope.describe()

    @torch.inference_mode()
    def forward(
        self, pool: torch.Tensor, spans: Sequence[Span], before: Mapping[int, Fence] = NOTHING
    ) -> torch.Tensor:
        """Compute all spans in one batch and write their KV into `pool` (shape: see `layout`).

        `before`: what must have passed before a layer reads the pool; no thread waits for it on a GPU.

        Returns float32 [number of spans with sample, vocab] on the model's device, in the spans' order.
        Spans must belong to different sequences: none may read what another one writes here.
        """
        tokens = self._move(torch.tensor([t for span in spans for t in span.token_ids]))
        positions = self._move(torch.cat([torch.arange(s.start, s.end) for s in spans]))
        indexes = self._indexes(spans, page_tokens=pool.shape[3])
        slots = self._slots(spans, page_tokens=pool.shape[3])

        def attend(q: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
            mixed = [self._attend(q[index.rows], pages, index) for index in indexes]
            return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

        with sdpa_kernel(_ATTENTION):
            hidden = self.compute_layers(pool, tokens, positions, slots, attend, before)
        last = [index.rows.stop - 1 for index, s in zip(indexes, spans, strict=True) if s.sample]
        return self.logits(hidden[self._move(torch.tensor(last, dtype=torch.int64))])

    def compute_layers(
        self,
        pool: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
        before: Mapping[int, Fence] = NOTHING,
    ) -> torch.Tensor:
        """All layers of T tokens, [T, H]. `tokens`, `positions`, and `slots` (page, offset in it): int64 [T];
        a row whose page is negative keeps its KV nowhere, on a GPU. Launches only: may be captured."""
        places = Places(*slots, self._cos[positions], self._sin[positions])
        hidden = self.embedding[tokens]
        for number, layer in enumerate(self.layers):
            if number in before:
                wait_here(self.device, before[number])
            pages = pool[:, number]  # [num_pages, 2, page_tokens, K, D]
            attended = attend(self._project(layer, hidden, places, pages), pages)
            hidden = hidden + F.linear(attended, layer.output)
            gate, up = F.linear(self._norm(hidden, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate).mul_(up), layer.down)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` [n, H] after the last layer; float32 [n, vocab]."""
        return F.linear(self._norm(hidden, self.final_norm), self.head).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.shape.rms_epsilon)

    def _project(
        self, layer: LayerWeights, hidden: torch.Tensor, places: Places, pages: torch.Tensor
    ) -> torch.Tensor:
        """q [T, A, D]; keys and values go to their pages."""
        s = self.shape
        heads = F.linear(self._norm(hidden, layer.attention_norm), layer.qkv, layer.qkv_bias)
        heads = heads.view(len(hidden), s.num_heads + 2 * s.num_kv_heads, s.head_dim)
        norms = None
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = layer.q_norm, layer.k_norm
        shape = HeadShape(s.num_heads, s.num_kv_heads, s.head_dim, s.rms_epsilon)
        return place_heads(heads, shape, norms, places, pages)

    def _attend(self, q: torch.Tensor, pages: torch.Tensor, index: _SpanIndex) -> torch.Tensor:
        """q [n, A, D] of one span over its own context; returns [n, A D]."""
        # Keys and values gathered apart: [pages, page_tokens, K, D] each, so that the rest is views.
        k = pages[:, 0][index.pages].flatten(0, 1)[: index.context].transpose(0, 1)  # [K, C, D]
        v = pages[:, 1][index.pages].flatten(0, 1)[: index.context].transpose(0, 1)
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
                mask = self._causal(num, span.end)
            used = span.pages[: -(-span.end // page_tokens)]
            pages = self._move(torch.tensor(used))
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
        slots = self._move(torch.tensor(places).T.contiguous())
        return slots[0], slots[1]

    def _causal(self, num: int, context: int) -> torch.Tensor:
        """What the last `num` tokens of a context may see of it, [num, context]."""
        if self.device.type == "cuda" and self.dtype != torch.float32:
            from torch.nn.attention.bias import causal_lower_right  # takes seconds to import

            bias: torch.Tensor = causal_lower_right(num, context)
            return bias
        hidden = torch.full((num, context), float("-inf"), dtype=self.dtype, device=self.device)
        return hidden.triu(context - num + 1)

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the model's device; the calling thread waits for nothing that was launched before."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor


def _load(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    """Raises ConfigError if the folder's model cannot be run, or not with this configuration."""
    if not config.model_path:
        return draw_weights(config)
    # Needs safetensors, which random weights do not.
    from kvfabric_engine.reference.checkpoint import read_weights
    from kvfabric_engine.reference.hf_config import read_shape

    folder = Path(config.model_path).expanduser()
    shape = read_shape(folder)
    if config.max_model_tokens > shape.max_positions:
        raise ConfigError(
            f"engine.max_model_tokens is {config.max_model_tokens}; {folder} was made for at most "
            f"{shape.max_positions}"
        )
    return read_weights(folder, shape, dtype=dtype, device=device)
