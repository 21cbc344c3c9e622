"""Gather and scatter between paged KV and parts: a Triton kernel on CUDA, torch elsewhere.

Paged KV is a number of regions, each [num_pages, run_bytes] with any distance between rows: one for a pool
that is page-major, one a layer (or two, keys and values) for pools that are layer-major. A part is

    pages_per_block x num_regions x run_bytes       page by page, in each page region by region

so with one region it is the pages' own bytes end to end. Everything is enqueued on the current stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvfabric.errors import ConfigError

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU comes without it
    triton = None

HAS_KERNELS = triton is not None
WORD_BYTES = 8
VECTOR_BYTES = 16
"""What a thread moves at once: every base, row and run must be a multiple of it."""
PIECE_WORDS = 2048
"""Words that one program moves: 16 KiB."""
NUM_WARPS = 8


class PagedRuns:
    """Where the pages lie. `gather` and `scatter` move the pages that an index names.

    `regions`: uint8 [num_pages, run_bytes] views of the engine's own tensors, all alike; rows contiguous.
    """

    def __init__(self, regions: Sequence[torch.Tensor]) -> None:
        first = regions[0]
        if any(r.shape != first.shape or r.stride() != first.stride() for r in regions):
            raise ConfigError("the regions of a paged KV cache must have one shape and stride")
        if first.dtype != torch.uint8 or first.dim() != 2 or first.stride(1) != 1:
            raise ConfigError("a region is uint8 [num_pages, run_bytes] with contiguous rows")
        self._regions = tuple(regions)
        self.device = first.device
        self.num_pages, self.run_bytes = first.shape
        self.page_bytes = len(regions) * self.run_bytes
        self._bases = torch.tensor([r.data_ptr() for r in regions], device=self.device)
        self.uses_kernel = triton is not None and first.is_cuda and self._is_aligned()

    @property
    def only_region(self) -> torch.Tensor | None:
        return self._regions[0] if len(self._regions) == 1 else None

    def gather(self, pages: torch.Tensor, out: torch.Tensor) -> None:
        """`pages`: int64 [n] on the device. `out`: contiguous uint8, n * page_bytes long."""
        self._move(pages, out, to_parts=True)

    def scatter(self, data: torch.Tensor, pages: torch.Tensor) -> None:
        """The reverse. `pages` must not name a page twice; a negative one gets nothing."""
        self._move(pages, data, to_parts=False)

    def _is_aligned(self) -> bool:
        numbers = [r.data_ptr() for r in self._regions]
        numbers += [self._regions[0].stride(0), self.run_bytes]
        return all(number % VECTOR_BYTES == 0 for number in numbers)

    def _move(self, pages: torch.Tensor, parts: torch.Tensor, *, to_parts: bool) -> None:
        if self.uses_kernel:
            launch(self._bases, pages, parts, self._regions[0].stride(0), self.run_bytes, to_parts)
            return
        rows = parts.view(len(pages), len(self._regions), self.run_bytes)
        for number, region in enumerate(self._regions):
            if to_parts:
                rows[:, number] = region[pages]
            else:
                region[pages[pages >= 0]] = rows[pages >= 0, number]


def copy_words(source: torch.Tensor, target: torch.Tensor) -> None:
    """int64, contiguous, equally many; either may be page-locked memory of the host. A kernel, so it does not
    queue behind the fabric's DMA as a copy would. CUDA with Triton only."""
    count = source.numel()
    _copy_words[(triton.cdiv(count, PIECE_WORDS // 2),)](source, target, count, PIECE_WORDS // 2)


def copy_pages(
    source: int, source_pages: torch.Tensor, target: torch.Tensor, target_pages: torch.Tensor
) -> None:
    """Pages of one pool into pages of another. `source`: address that the device reads, where rows as long as
    the target's lie end to end; `target`: uint8 [num_pages, page_bytes], contiguous rows. CUDA only."""
    words = target.shape[1] // WORD_BYTES
    grid = (len(source_pages), triton.cdiv(words, PIECE_WORDS))
    _copy_pages[grid](
        source,
        source_pages,
        target.view(torch.int64),
        target_pages,
        target.stride(0) // WORD_BYTES,
        words,
        PIECE=PIECE_WORDS,
        VECTOR=VECTOR_BYTES,
        num_warps=NUM_WARPS,
    )


def launch(
    bases: torch.Tensor,
    pages: torch.Tensor,
    parts: torch.Tensor,
    stride_bytes: int,
    run_bytes: int,
    to_parts: bool,
) -> None:
    """Run the kernel. Sizes in bytes; alignment as `VECTOR_BYTES` says."""
    num_runs = len(pages) * len(bases)
    if num_runs == 0:
        return
    words = run_bytes // WORD_BYTES
    grid = (num_runs, triton.cdiv(words, PIECE_WORDS))
    _copy_runs[grid](
        bases,
        pages,
        parts.view(torch.int64),
        len(bases),
        stride_bytes // WORD_BYTES,
        words,
        TO_PARTS=to_parts,
        PIECE=PIECE_WORDS,
        VECTOR=VECTOR_BYTES,
        num_warps=NUM_WARPS,
    )


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore] # triton is untyped
    def _copy_words(source, target, count, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
        word = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
        tl.store(target + word, tl.load(source + word, mask=word < count), mask=word < count)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore] # triton is untyped
    def _copy_pages(  # type: ignore[no-untyped-def] # noqa: PLR0913 - triton evaluates annotations
        source,
        source_pages,
        target,
        target_pages,
        target_words,
        words,
        PIECE: tl.constexpr,
        VECTOR: tl.constexpr,
    ):
        """Program (i, j) moves piece j of page i. `source` is an address: no tensor of ours lies there."""
        number = tl.program_id(0)
        word = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
        begin = tl.load(source_pages + number) * words
        there = tl.multiple_of(source.to(tl.pointer_type(tl.int64)) + begin, VECTOR) + word
        row = tl.load(target_pages + number) * target_words
        here = tl.multiple_of(target + row, VECTOR) + word
        tl.store(here, tl.load(there, mask=word < words), mask=word < words)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore] # triton is untyped
    def _copy_runs(  # type: ignore[no-untyped-def] # noqa: PLR0913 - triton evaluates annotations
        bases,
        pages,
        parts,
        num_regions,
        stride_words,
        run_words,
        TO_PARTS: tl.constexpr,
        PIECE: tl.constexpr,
        VECTOR: tl.constexpr,
    ):
        """Program (i, j) moves piece j of run i: region i % num_regions of page pages[i // num_regions]."""
        run = tl.program_id(0).to(tl.int64)
        page = tl.load(pages + run // num_regions)
        base = tl.load(bases + run % num_regions).to(tl.pointer_type(tl.int64))
        word = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
        inside = (word < run_words) & (page >= 0)
        paged = tl.multiple_of(base + page * stride_words, VECTOR) + word
        linear = tl.multiple_of(parts + run * run_words, VECTOR) + word
        if TO_PARTS:
            tl.store(linear, tl.load(paged, mask=inside), mask=inside)
        else:
            tl.store(paged, tl.load(linear, mask=inside), mask=inside)
