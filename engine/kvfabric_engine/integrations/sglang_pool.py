"""SGLang's host pool as memory: where the bytes of a page lie, and how a page lies in parts.

Moves nothing and knows no node. A page is `logical_page_size` tokens of all layers that this rank holds; the
pool hands it out as runs (`get_page_buffer_meta`), by memory layout of `--hicache-mem-layout`:

    page_first, page_first_direct, page_head   2 runs: keys of all layers, values of all layers (MLA: 1)
    layer_first                                2 runs a layer (MLA: 1 a layer)

Few long runs are parts of their own, one KV group each: a part is then copied and verified between arena and
pool in one pass. Many short runs are one part, their bytes end to end, and go through a staging buffer.
"""

from __future__ import annotations

import ctypes
import secrets
from typing import Any

import torch

from kvfabric.errors import ConfigError, LocalProtocolError

MAX_GROUPS = 2
"""Runs of a page that are moved as parts of their own; with more, messages cost more than a copy."""

Runs = list[memoryview]


class HostPages:
    """Pages of one host pool. The pool must outlive every memoryview made of it."""

    def __init__(self, pool: Any) -> None:
        """Raises ConfigError for a pool whose pages cannot be reached as memory, or only in part."""
        self._pool = pool
        if pool.shared_allocation_domain is not None or pool.stores_page_envelope:
            raise ConfigError(f"pages of a {type(pool).__name__} move while they are copied")
        self.page_tokens = int(pool.logical_page_size)
        try:
            _, sizes = pool.get_page_buffer_meta(torch.arange(self.page_tokens))
        except (ValueError, NotImplementedError, AttributeError) as exc:
            raise ConfigError(
                f"{type(pool).__name__} with layout {pool.layout} gives its pages to no storage: {exc}"
            ) from exc
        self.run_bytes = tuple(int(size) for size in sizes)
        page_bytes = int(pool.get_size_per_token()) * self.page_tokens
        if sum(self.run_bytes) != page_bytes:
            raise ConfigError(
                f"a page of {type(pool).__name__} has {page_bytes} B, of which it hands out "
                f"{sum(self.run_bytes)}: what is missing could not be restored"
            )
        self.is_direct = len(self.run_bytes) <= MAX_GROUPS
        self.part_bytes = self.run_bytes if self.is_direct else (page_bytes,)

    def __repr__(self) -> str:
        name = type(self._pool).__name__
        return f"<HostPages {name} {self._pool.layout}, {len(self.run_bytes)} runs a page>"

    @property
    def form(self) -> str:
        """Which bytes a page's parts are, in which order: equal only for interchangeable ones."""
        pool = self._pool
        fields = (
            "layout",
            "head_num",
            "head_dim",
            "v_head_dim",
            "kv_lora_rank",
            "qk_rope_head_dim",
        )
        values = [f"{name}={getattr(pool, name, None)}" for name in fields]
        layers = f"layers={pool.start_layer}-{pool.end_layer} runs={len(self.run_bytes)}"
        return " ".join(["sglang", type(pool).__name__, *values, layers])

    def runs(self, num_pages: int, indices: torch.Tensor) -> list[list[Runs]]:
        """[page][part] -> runs, writable. `indices`: token slots of the pages, page after page, int64.

        Raises LocalProtocolError unless every page is a whole page of the pool.
        """
        self._check(num_pages, indices)
        pointers, sizes = self._pool.get_page_buffer_meta(indices)
        views = [_memory(at, size) for at, size in zip(pointers, sizes, strict=True)]
        count = len(self.run_bytes)
        pages = [views[start : start + count] for start in range(0, len(views), count)]
        if not self.is_direct:
            return [[page] for page in pages]
        return [[[run] for run in page] for page in pages]

    def prove(self) -> None:
        """A page written as SGLang writes it, carried over by its runs, must be read back by SGLang.

        On two free pages of the pool. Raises ConfigError if it is not, or if there are no two.
        """
        pool = self._pool
        slots = pool.alloc(2 * self.page_tokens)
        if slots is None:
            raise ConfigError("the host pool has no two free pages to try its layout on")
        try:
            written, carried = slots[: self.page_tokens], slots[self.page_tokens :]
            page = pool.get_dummy_flat_data_page()
            raw = page.view(torch.uint8)
            noise = bytearray(secrets.token_bytes(raw.numel()))  # torch's generator is the engine's
            raw.copy_(torch.frombuffer(noise, dtype=torch.uint8))
            pool.set_from_flat_data_page(int(written[0]), page)
            for source, target in zip(
                self.runs(1, written)[0], self.runs(1, carried)[0], strict=True
            ):
                part = memoryview(bytearray(sum(run.nbytes for run in source)))
                copy_out(source, part)
                copy_in(part, target)
            read = pool.get_data_page(int(carried[0])).contiguous().view(torch.uint8)
        except NotImplementedError as exc:
            raise ConfigError(f"the layout of {self!r} cannot be tried: {exc}") from exc
        finally:
            pool.free(slots)
        if not torch.equal(read.flatten(), raw.flatten()):
            raise ConfigError(f"{self!r}: pages do not lie where the pool says")

    def _check(self, num_pages: int, indices: torch.Tensor) -> None:
        if indices.numel() != num_pages * self.page_tokens:
            raise LocalProtocolError(f"{num_pages} pages, but {indices.numel()} token slots")
        slots = indices.cpu().reshape(num_pages, self.page_tokens)
        first = slots[:, :1]
        whole = (first % self.page_tokens == 0) & (slots - first == torch.arange(self.page_tokens))
        in_pool = (first >= 0) & (first < int(self._pool.logical_size))
        if not bool((whole & in_pool).all()):
            raise LocalProtocolError("token slots that are no whole pages of the host pool")


def _memory(address: int, num_bytes: int) -> memoryview:
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")


def copy_out(runs: Runs, out: memoryview) -> None:
    """Pool -> one contiguous part."""
    at = 0
    for run in runs:
        out[at : at + run.nbytes] = run
        at += run.nbytes


def copy_in(part: memoryview, runs: Runs) -> None:
    """One contiguous part -> pool."""
    at = 0
    for run in runs:
        run[:] = part[at : at + run.nbytes]
        at += run.nbytes
