"""Decoding by CUDA graphs: one launch a step, whatever the number of layers.

A step of the model is some five hundred launches from Python, and between any two another thread may take the
interpreter: while blocks are saved or loaded each step then waits for those threads. Here a step is captured
once for each batch size and replayed, and what changes from step to step lies in page-locked memory that the
kernels themselves read and write (no copy, which would queue behind the fabric's DMA):

    host     tokens, positions, where the KV goes, lengths, pages of each sequence   written before a replay
    replay   host -> device, all layers, logits, the best token of each -> host
    host     best tokens                                                             read after it

Attention reads the pages through the table (`_attend_split`, `_join_splits`: flash decoding, the context cut
into splits that run side by side), so a graph serves every length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvfabric_engine.kernels import copy_words
from kvfabric_engine.lanes import Passed
from kvfabric_engine.reference.model import Model, Span
from kvfabric_engine.reference.scores import Scores

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU comes without it
    triton = None

SPLITS = 16
"""Of a context; with 8 KV heads a single sequence then keeps about all of an H100 busy."""
TILE_TOKENS = 64
LEAST_DIM = 16
"""Of a head: what the matrix units take."""
HEADER_ROWS = 5
"""Of the state: token, position, page and offset for its KV, length; then the pages."""
TOKEN, POSITION, PAGE, OFFSET, LENGTH = range(HEADER_ROWS)
NOWHERE = -1
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class _Captured:
    """A step of `size` sequences. `state`: int64 [HEADER_ROWS + pages, size]."""

    size: int
    graph: torch.cuda.CUDAGraph
    state: npt.NDArray[np.int64]
    best: npt.NDArray[np.int64]
    logits: torch.Tensor
    held: tuple[torch.Tensor, ...]  # what the graph's kernels name by address


def supports(model: Model) -> bool:
    """Whether this model's steps can be captured: on CUDA, in half precision, heads of 16, 32, 64, ..."""
    dim = model.shape.head_dim
    is_half = model.device.type == "cuda" and model.dtype in HALF
    return triton is not None and is_half and dim >= LEAST_DIM and dim & (dim - 1) == 0


class DecodeGraphs:
    """The steps of a model over one pool, for up to `max_batch` sequences. For one thread."""

    @torch.inference_mode()
    def __init__(self, model: Model, pool: torch.Tensor, *, max_batch: int) -> None:
        """Captures a step for 1, 2, 4, ... sequences, in about a second; writes nothing into `pool`."""
        self._model = model
        self._pool = pool
        self._page_tokens = pool.shape[3]
        self._max_batch = max_batch
        # The largest first: the smaller ones then find their memory in what it took.
        self._captured: list[_Captured] = []
        for size in [1 << n for n in range((max_batch - 1).bit_length() + 1)][::-1]:
            self._captured.insert(0, self._capture(size))

    def takes(self, spans: Sequence[Span]) -> bool:
        """Whether `step` computes these: a token each, its logits wanted."""
        return 0 < len(spans) <= self._max_batch and all(
            len(span.token_ids) == 1 and span.sample for span in spans
        )

    def step(self, spans: Sequence[Span]) -> Scores:
        """Of spans that `takes` allows. Waits for the result; its logits hold until the next step."""
        captured = next(some for some in self._captured if some.size >= len(spans))
        self._write(captured.state, spans)
        captured.graph.replay()
        torch.cuda.current_stream(self._model.device).synchronize()
        return Scores(captured.logits[: len(spans)], captured.best[: len(spans)].tolist(), Passed())

    def _write(self, state: npt.NDArray[np.int64], spans: Sequence[Span]) -> None:
        state[PAGE, len(spans) :] = NOWHERE
        state[LENGTH, len(spans) :] = 0
        for row, span in enumerate(spans):
            number, offset = divmod(span.start, self._page_tokens)
            used = span.pages[: number + 1]
            state[:HEADER_ROWS, row] = span.token_ids[0], span.start, used[-1], offset, span.end
            state[HEADER_ROWS : HEADER_ROWS + len(used), row] = used

    def _capture(self, size: int) -> _Captured:
        model, device = self._model, self._model.device
        pages = -(-model.config.max_model_tokens // self._page_tokens)
        host_state = torch.zeros(HEADER_ROWS + pages, size, dtype=torch.int64, pin_memory=True)
        host_best = torch.zeros(size, dtype=torch.int64, pin_memory=True)
        host_state[PAGE] = NOWHERE
        state = torch.empty_like(host_state, device=device)
        scratch = _Scratch.of(model, size)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # untyped in torch
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # compiled, and cuBLAS ready, before anything is captured
            self._launch(host_state, state, host_best, scratch)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        memory = self._captured[-1].graph.pool() if self._captured else None
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            logits = self._launch(host_state, state, host_best, scratch)
        held = (host_state, host_best, state, *scratch)
        return _Captured(size, graph, host_state.numpy(), host_best.numpy(), logits, held)

    def _launch(
        self,
        host_state: torch.Tensor,
        state: torch.Tensor,
        host_best: torch.Tensor,
        scratch: _Scratch,
    ) -> torch.Tensor:
        """The logits of all rows; those without a length mean nothing."""
        copy_words(host_state, state)

        def attend(q: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
            return attend_paged(q, pages, state[HEADER_ROWS:], state[LENGTH], scratch)

        slots = (state[PAGE], state[OFFSET])
        hidden = self._model.compute_layers(
            self._pool, state[TOKEN], state[POSITION], slots, attend
        )
        logits = self._model.logits(hidden)
        copy_words(logits.argmax(dim=-1), host_best)
        return logits


class _Scratch(NamedTuple):
    """Of attention: what each split found (float32 [B, A, SPLITS, D]) and its weight (base-2 logarithm)."""

    partial: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(cls, model: Model, size: int) -> _Scratch:
        shape = (size, model.shape.num_heads, SPLITS)
        partial = torch.empty(*shape, model.shape.head_dim, device=model.device)
        return cls(partial, torch.empty(*shape, device=model.device))


def attend_paged(
    q: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scratch: _Scratch,
) -> torch.Tensor:
    """The last token of each of B sequences over its context; [B, A D], zeros for a length of 0.

    `q`: [B, A, D]. `pages`: [num_pages, 2, page_tokens, K, D]. `table`: int64 [pages, B], contiguous: page i
    of each. `lengths`: int64 [B].
    """
    num_rows, num_heads, dim = q.shape
    page_tokens, num_kv_heads = pages.shape[2:4]
    group = num_heads // num_kv_heads
    out = torch.empty_like(q)
    _attend_split[(num_rows, num_kv_heads, SPLITS)](
        q,
        pages,
        table,
        lengths,
        *scratch,
        num_rows,
        *pages.stride()[:4],
        1.4426950408889634 / dim**0.5,
        NUM_HEADS=num_heads,
        DIM=dim,
        PAGE_TOKENS=page_tokens,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        SPLITS=SPLITS,
        TILE=TILE_TOKENS,
        num_warps=4,
    )
    _join_splits[(num_rows, num_heads)](
        *scratch, out, NUM_HEADS=num_heads, DIM=dim, SPLITS=SPLITS, num_warps=1
    )
    return out.view(num_rows, -1)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore] # triton is untyped
    def _attend_split(  # type: ignore[no-untyped-def] # noqa: PLR0913 - triton evaluates annotations
        q,
        pages,
        table,
        lengths,
        partial,
        weight,
        num_rows,
        page_stride,
        kv_stride,
        token_stride,
        head_stride,
        scale,
        NUM_HEADS: tl.constexpr,
        DIM: tl.constexpr,
        PAGE_TOKENS: tl.constexpr,
        GROUP: tl.constexpr,
        ROWS: tl.constexpr,
        SPLITS: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """Program (i, j, k): the queries of KV head j of row i over split k of its context."""
        row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        length = tl.load(lengths + row)
        share = tl.cdiv(tl.cdiv(length, SPLITS), TILE) * TILE
        begin = split * share
        stop = tl.minimum(begin + share, length)
        member, place = tl.arange(0, ROWS), tl.arange(0, DIM)
        head = kv_head * GROUP + member
        is_head = member < GROUP
        own = (row * NUM_HEADS + head)[:, None] * DIM + place[None, :]
        query = tl.load(q + own, mask=is_head[:, None], other=0)
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        mixed = tl.zeros((ROWS, DIM), tl.float32)
        for first in range(begin, stop, TILE):
            token = first + tl.arange(0, TILE)
            there = token < stop
            page = tl.load(table + token // PAGE_TOKENS * num_rows + row, mask=there, other=0)
            slot = page * page_stride + token % PAGE_TOKENS * token_stride + kv_head * head_stride
            keys = tl.load(pages + slot[None, :] + place[:, None], mask=there[None, :], other=0)
            scores = tl.where(there[None, :], tl.dot(query, keys) * scale, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            shares = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(peak - higher)
            values = tl.load(
                pages + kv_stride + slot[:, None] + place[None, :], mask=there[:, None], other=0
            )
            mixed = mixed * shrink[:, None] + tl.dot(shares.to(values.dtype), values)
            total = total * shrink + tl.sum(shares, axis=1)
            peak = higher
        target = (row * NUM_HEADS + head) * SPLITS + split
        is_empty = begin >= stop
        found = tl.where(is_empty, 0.0, mixed / tl.where(is_empty, 1.0, total)[:, None])
        tl.store(partial + target[:, None] * DIM + place[None, :], found, mask=is_head[:, None])
        tl.store(weight + target, peak + tl.log2(tl.where(is_empty, 1.0, total)), mask=is_head)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore] # triton is untyped
    def _join_splits(  # type: ignore[no-untyped-def]
        partial, weight, out, NUM_HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr
    ):
        """Program (i, j): head j of row i out of its splits; a row without a context gets zeros."""
        number = tl.program_id(0) * NUM_HEADS + tl.program_id(1)
        split, place = tl.arange(0, SPLITS), tl.arange(0, DIM)
        weights = tl.load(weight + number * SPLITS + split)
        peak = tl.max(weights, axis=0)
        shares = tl.exp2(weights - tl.where(peak == float("-inf"), 0.0, peak))
        found = tl.load(partial + (number * SPLITS + split)[:, None] * DIM + place[None, :])
        total = tl.sum(shares, axis=0)
        mixed = tl.sum(found * shares[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
        tl.store(out + number * DIM + place, mixed.to(out.dtype.element_ty))
