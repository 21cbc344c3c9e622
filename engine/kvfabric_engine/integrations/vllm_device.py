"""vLLM's KV tensors on a GPU as parts. Knows no vLLM type.

The same bytes in the same order as `vllm_layout` says, moved as the reference engine's are: one kernel for
all layers of a chunk through buffers in device memory, DMA beside it, loads verified where they land
(`staging`).

    save   a step computes blocks -> `snapshot` marks that point -> the save thread gathers behind it
    reuse  vLLM gives such a block to another request while its gather is still to come: `reused` abandons
           what was not gathered, and lets the step wait, on the device, for what was
    load   after the step that ordered it, so behind whatever vLLM does to fresh blocks in it

So a save neither copies in the step nor holds vLLM's blocks, and never stores what came after.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

import torch

from kvfabric.errors import ConfigError, TransferError
from kvfabric_engine.integrations.vllm_layout import (
    NULL_BLOCK,
    SKIP,
    Run,
    VllmPool,
    find_runs,
    form_of,
    unshared,
)
from kvfabric_engine.kernels import PagedRuns
from kvfabric_engine.lanes import wait_here
from kvfabric_engine.staging import STAGE_BYTES, Fence, Pages, StagedMover


class _Snapshot(Fence):
    """Blocks as a step left them, until one of them is reused."""

    def __init__(self, computed: Fence, pages: frozenset[int]) -> None:
        self.computed = computed
        self.pages = pages
        self.last_read: Fence | None = None
        self.is_reused = False

    def wait(self) -> None:
        self.computed.wait()

    def is_passed(self) -> bool:
        return self.computed.is_passed()


class DeviceMover(StagedMover, VllmPool):
    """`snapshot`, `reused` and `zero` are the engine's thread's; gathers and scatters any thread's."""

    loads_after_step = True

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        num_blocks: int,
        pages_per_block: int,
        stage_bytes: int = STAGE_BYTES,
    ) -> None:
        """`tensors` by layer, in the engine's order. Raises ConfigError for what cannot be moved."""
        storages = unshared(tensors)
        found = {layer: find_runs(layer, storages[layer], num_blocks) for layer in storages}
        runs = [run for some in found.values() for run in some]
        self._regions = [_region(storages[run.layer], run, num_blocks) for run in runs]
        paged = PagedRuns(self._regions)
        super().__init__(paged, pages_per_block, stage_bytes=stage_bytes)
        self.num_blocks = num_blocks
        self.pages_per_block = pages_per_block
        self.form = form_of(runs)
        self._lock = (
            threading.Lock()
        )  # guards the snapshots, against an engine that reuses meanwhile
        self._snapshots: set[_Snapshot] = set()

    def __repr__(self) -> str:
        return f"<DeviceMover {self.num_blocks} blocks of {self.page_bytes} B>"

    def snapshot(self, blocks: Sequence[Pages]) -> Fence:
        taken = _Snapshot(self.fence(), frozenset(page for pages in blocks for page in pages))
        with self._lock:
            self._snapshots.add(taken)
        return taken

    def free(self, snapshot: Fence) -> None:
        assert isinstance(snapshot, _Snapshot)
        with self._lock:
            self._snapshots.discard(snapshot)

    def reused(self, pages: Iterable[int]) -> None:
        fresh = set(pages)
        with self._lock:
            for snapshot in self._snapshots:
                if snapshot.is_reused or fresh.isdisjoint(snapshot.pages):
                    continue
                snapshot.is_reused = True
                if snapshot.last_read is not None:
                    wait_here(self.device, snapshot.last_read)

    def zero(self, pages: Pages) -> None:
        there = torch.tensor([page for page in pages if page > NULL_BLOCK], device=self.device)
        for region in self._regions:
            region[there] = 0

    def _read(self, pages: torch.Tensor, buffer: torch.Tensor, after: Fence) -> None:
        if not isinstance(after, _Snapshot):
            super()._read(pages, buffer, after)
            return
        with self._lock:
            if after.is_reused:
                raise TransferError("the engine needed these blocks before they were saved")
            super()._read(pages, buffer, after)
            after.last_read = self.fence()

    def _index(self, blocks: Sequence[Pages]) -> torch.Tensor:
        return super()._index(
            [[page if page > NULL_BLOCK else SKIP for page in pages] for pages in blocks]
        )


def _region(tensor: torch.Tensor, run: Run, num_blocks: int) -> torch.Tensor:
    """uint8 [num_blocks, run bytes] over the tensor's storage."""
    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    storage.set_(tensor.untyped_storage())
    last = run.offset + (num_blocks - 1) * run.stride + run.num_bytes
    if run.offset < 0 or run.stride < 0 or last > len(storage):
        raise ConfigError(f"{run.layer}: blocks reach beyond their storage")
    return storage.as_strided((num_blocks, run.num_bytes), (run.stride, 1), run.offset)
