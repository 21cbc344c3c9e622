"""What becomes of a layer's projected heads: queries and keys normalised per head and rotated, keys and
values written to their pages. One Triton kernel on CUDA, torch elsewhere.

As separate operations this moves 16k tokens' heads a dozen times a layer and launches as many kernels; a
short span then waits for the launches and a long one for the memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU comes without it
    triton = None

NUM_WARPS = 4


class HeadShape(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_epsilon: float


class Places(NamedTuple):
    """Of each row of a forward. `pages`, `offsets`: int64 [T], where its KV goes (nowhere if the page is
    negative, on CUDA). `cos`, `sin`: [T, D], the
    first half of sin with its sign turned."""

    pages: torch.Tensor
    offsets: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


Norms = tuple[torch.Tensor, torch.Tensor] | None
"""Weights [D] of queries and keys; None for models that do not normalise them."""


def place_heads(
    heads: torch.Tensor, shape: HeadShape, norms: Norms, places: Places, pages: torch.Tensor
) -> torch.Tensor:
    """`heads`: contiguous [T, A + 2 K, D], queries, keys, values. `pages`: [num_pages, 2, page_tokens, K, D],
    written. Returns the queries, [T, A, D]."""
    if heads.is_cuda and triton is not None:
        return _launch(heads, shape, norms, places, pages)
    q_and_k, v = heads[:, : -shape.num_kv_heads], heads[:, -shape.num_kv_heads :]
    if norms is not None:
        q, k = q_and_k[:, : shape.num_heads], q_and_k[:, shape.num_heads :]
        q_and_k = torch.cat([_norm(q, norms[0], shape), _norm(k, norms[1], shape)], dim=1)
    first, second = q_and_k.chunk(2, dim=-1)
    cos, sin = places.cos.unsqueeze(1), places.sin.unsqueeze(1)
    rotated = torch.addcmul(q_and_k * cos, torch.cat([second, first], dim=-1), sin)
    k_and_v = torch.stack([rotated[:, shape.num_heads :], v], dim=1)
    pages[places.pages, :, places.offsets] = k_and_v
    return rotated[:, : shape.num_heads]


def _norm(x: torch.Tensor, weight: torch.Tensor, shape: HeadShape) -> torch.Tensor:
    return F.rms_norm(x, (shape.head_dim,), weight, shape.rms_epsilon)


def _launch(
    heads: torch.Tensor, shape: HeadShape, norms: Norms, places: Places, pages: torch.Tensor
) -> torch.Tensor:
    out = heads.new_empty(len(heads), shape.num_heads, shape.head_dim)
    q_norm, k_norm = norms if norms is not None else (out, out)
    total = shape.num_heads + 2 * shape.num_kv_heads
    _place[(len(heads),)](
        heads,
        out,
        pages,
        q_norm,
        k_norm,
        places.cos,
        places.sin,
        places.pages,
        places.offsets,
        *pages.stride()[:4],
        shape.rms_epsilon,
        NUM_HEADS=shape.num_heads,
        NUM_KV_HEADS=shape.num_kv_heads,
        DIM=shape.head_dim,
        TOTAL=triton.next_power_of_2(total),
        HAS_NORM=norms is not None,
        num_warps=NUM_WARPS,
    )
    return out


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore] # triton is untyped
    def _place(  # type: ignore[no-untyped-def] # noqa: PLR0913 - triton evaluates annotations
        heads,
        out,
        pages,
        q_norm,
        k_norm,
        cos,
        sin,
        page_of_row,
        offset_of_row,
        page_stride,
        kv_stride,
        token_stride,
        head_stride,
        epsilon,
        NUM_HEADS: tl.constexpr,
        NUM_KV_HEADS: tl.constexpr,
        DIM: tl.constexpr,
        TOTAL: tl.constexpr,
        HAS_NORM: tl.constexpr,
    ):
        """Program i places all heads of row i: computed in float32, rounded once."""
        row = tl.program_id(0).to(tl.int64)
        head, place = tl.arange(0, TOTAL), tl.arange(0, DIM)
        partner = (place + DIM // 2) % DIM
        num_all = NUM_HEADS + 2 * NUM_KV_HEADS
        there = (head < num_all)[:, None] & (place >= 0)[None, :]
        first = heads + (row * num_all + head)[:, None] * DIM
        raw = tl.load(first + place[None, :], mask=there, other=0)
        x = raw.to(tl.float32)
        other = tl.load(first + partner[None, :], mask=there, other=0).to(tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + epsilon)[:, None]
            is_q = (head < NUM_HEADS)[:, None]
            own = tl.where(is_q, tl.load(q_norm + place)[None, :], tl.load(k_norm + place)[None, :])
            its = tl.where(
                is_q, tl.load(q_norm + partner)[None, :], tl.load(k_norm + partner)[None, :]
            )
            x = x * scale * own.to(tl.float32)
            other = other * scale * its.to(tl.float32)
        c = tl.load(cos + row * DIM + place).to(tl.float32)[None, :]
        s = tl.load(sin + row * DIM + place).to(tl.float32)[None, :]
        rotated = (x * c + other * s).to(raw.dtype)
        is_query = (head < NUM_HEADS)[:, None] & (place >= 0)[None, :]
        target = out + (row * NUM_HEADS + head)[:, None] * DIM + place[None, :]
        tl.store(target, rotated, mask=is_query)
        is_value = head >= NUM_HEADS + NUM_KV_HEADS
        kept = tl.where(is_value[:, None], raw, rotated)
        number = head - NUM_HEADS - tl.where(is_value, NUM_KV_HEADS, 0)
        page = tl.load(page_of_row + row)
        slot = page * page_stride + tl.load(offset_of_row + row) * token_stride
        slot += number * head_stride + tl.where(is_value, kv_stride, 0)
        is_kept = there & ((head >= NUM_HEADS) & (page >= 0))[:, None]
        tl.store(pages + slot[:, None] + place[None, :], kept, mask=is_kept)
