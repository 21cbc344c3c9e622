"""The paged KV pool and how a fabric block lies in it: every shape, stride and byte order.

Owns no memory, moves nothing (`staging.py` does) and knows no engine.

    pool     [num_pages, num_layers, 2, page_tokens, num_kv_heads, head_dim]   contiguous, on one device
             a page is the engine's own block; index 2 is 0 for keys (after RoPE) and 1 for values

One page is one contiguous run of `page_bytes`. A fabric block is `pages_per_block` pages in the order of
their tokens, so its part is that many runs end to end:

    part     pages_per_block x [num_layers, 2, page_tokens, num_kv_heads, head_dim]   as the pool's own bytes

Layers lie inside the page and not outside: a block is then moved in k runs and not in k x 2 x layers of them
(a layer-first pool gathers 144 KiB a token of an 8B model in 4 KiB pieces).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvfabric.errors import ConfigError
from kvfabric.types import BlockLayout, PartSpec

MIN_BLOCK_TOKENS = 64
"""Smallest fabric block that is chosen unasked (design 3)."""


@dataclass(frozen=True, slots=True)
class PoolShape:
    """What fixes the pool's memory. `page_tokens` tokens a page, `block_tokens` a fabric block."""

    num_pages: int
    num_layers: int
    page_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_tokens: int

    def __post_init__(self) -> None:
        if self.block_tokens % self.page_tokens:
            raise ConfigError(
                f"a fabric block of {self.block_tokens} tokens is no multiple of a page of "
                f"{self.page_tokens}"
            )

    @property
    def pages_per_block(self) -> int:
        return self.block_tokens // self.page_tokens

    @property
    def page_bytes(self) -> int:
        elements = self.num_layers * 2 * self.page_tokens * self.num_kv_heads * self.head_dim
        return elements * self.dtype.itemsize

    @property
    def part_bytes(self) -> int:
        """Bytes of one fabric block of this pool (its only part: one KV group, one shard)."""
        return self.pages_per_block * self.page_bytes

    def create(self, device: torch.device) -> torch.Tensor:
        """A zeroed pool, shape as in the module's docstring.

        Zeroed because attention reads whole pages: what it masks out must not be NaN.
        """
        return torch.zeros(
            self.num_pages,
            self.num_layers,
            2,
            self.page_tokens,
            self.num_kv_heads,
            self.head_dim,
            dtype=self.dtype,
            device=device,
        )

    def over(self, memory: torch.Tensor) -> torch.Tensor:
        """The same pool in `memory`: uint8 [num_pages * page_bytes], zeroed, aligned for `dtype`."""
        return memory.view(self.dtype).view(
            self.num_pages,
            self.num_layers,
            2,
            self.page_tokens,
            self.num_kv_heads,
            self.head_dim,
        )

    def block_layout(self, *, rope: str, packing: str, attention: str = "full") -> BlockLayout:
        """How this pool's blocks are declared to the node: one group, one shard."""
        return BlockLayout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=str(self.dtype).removeprefix("torch."),
            block_tokens=self.block_tokens,
            engine_block_tokens=self.page_tokens,
            parts=(PartSpec(group=0, shard=0, num_bytes=self.part_bytes),),
            packing=packing,
            rope=rope,
            attention=attention,
        )


def default_block_tokens(page_tokens: int) -> int:
    """The smallest multiple of a page that has at least 64 tokens."""
    return -(-MIN_BLOCK_TOKENS // page_tokens) * page_tokens


def pages_as_bytes(pool: torch.Tensor) -> torch.Tensor:
    """The pool as uint8 [num_pages, page_bytes]: a view, row p is page p's run."""
    return pool.view(pool.shape[0], -1).view(torch.uint8)
