"""vLLM's KV tensors as parts: which bytes a block has, and how they get in and out of CPU memory (of a GPU:
`vllm_device`). Knows no vLLM type.

A page is one engine block of one layer, an opaque run of bytes (on CPU it is packed for the instruction set,
not token by token). A part is `pages_per_block` engine blocks in the order of their tokens:

    part     pages_per_block x [run 0 of that block, run 1, ...]      runs in the order of the layers

Layers that lie in one storage at equal distances, as vLLM allocates them on CPU, are one strided view, so a
block of all layers is one copy. Block 0 is vLLM's null block: nothing is stored from it or loaded into it.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvfabric.errors import ConfigError
from kvfabric_engine.staging import Fence, Mover, Pages

SKIP = -1
"""In Pages of a load: this page is not to be written (the engine has it)."""
NULL_BLOCK = 0

Bytes3D = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Run:
    """Where one contiguous piece of each block lies: bytes from the start of its storage."""

    layer: str
    offset: int
    stride: int
    num_bytes: int


def find_runs(layer: str, tensor: torch.Tensor, num_blocks: int) -> list[Run]:
    """The pieces of a block of `num_blocks` in a layer's tensor. Raises ConfigError for another form."""
    size = tensor.element_size()
    start = int(tensor.storage_offset()) * size
    if tensor.dim() and tensor.shape[0] == num_blocks:
        return [_run(layer, tensor, 0, start, size)]
    if tensor.dim() > 1 and tensor.shape[1] == num_blocks:  # keys and values apart
        step = int(tensor.stride(0)) * size
        return [_run(layer, tensor[i], 0, start + i * step, size) for i in range(tensor.shape[0])]
    raise ConfigError(f"{layer}: no block dimension of {num_blocks} in {tuple(tensor.shape)}")


def _run(layer: str, tensor: torch.Tensor, axis: int, start: int, size: int) -> Run:
    inner = [(n, tensor.stride(d)) for d, n in enumerate(tensor.shape) if d != axis and n > 1]
    count = 1
    for n, stride in sorted(inner, key=lambda item: item[1]):
        if stride != count:
            raise ConfigError(f"{layer}: a block is not contiguous, strides {tensor.stride()}")
        count *= n
    return Run(layer, start, tensor.stride(axis) * size, count * size)


class _Copied(Fence):
    """A copy of the blocks, in buffers that go back with `free`."""

    def __init__(self, parts: dict[tuple[int, ...], memoryview]) -> None:
        self.parts = parts

    def wait(self) -> None:
        return


class _Passed(Fence):
    def wait(self) -> None:
        return


class VllmPool(Mover):
    """What the connector's worker side needs of vLLM's tensors besides a mover."""

    num_blocks: int
    pages_per_block: int
    page_bytes: int
    form: str
    """16 hex digits: equal iff blocks have the same pieces of the same layers."""
    loads_after_step: bool = False
    """Whether what vLLM does to fresh blocks in a step may still come while that step is prepared."""

    @abstractmethod
    def snapshot(self, blocks: Sequence[Pages]) -> Fence:
        """After a step that computed blocks: a `gather` behind this fence reads them as they are now, however
        late, or fails. Give it back with `free`."""

    @abstractmethod
    def free(self, snapshot: Fence) -> None:
        """No gather behind `snapshot` comes any more."""

    @abstractmethod
    def reused(self, pages: Iterable[int]) -> None:
        """Before a step that writes to these pages, which it was given anew."""

    @abstractmethod
    def zero(self, pages: Pages) -> None:
        """What a failed load was to fill: whoever gets these blocks next must not find NaN."""


class PagedMover(VllmPool):
    """vLLM's tensors in CPU memory. A snapshot is a copy."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], *, num_blocks: int, pages_per_block: int
    ) -> None:
        """`tensors` by layer, in the engine's order. Raises ConfigError for what cannot be moved."""
        storages = unshared(tensors)
        self._runs = [run for t in storages for run in find_runs(t, storages[t], num_blocks)]
        self._views = _views(storages, self._runs, num_blocks)
        self.num_blocks = num_blocks
        self.pages_per_block = pages_per_block
        self.page_bytes = sum(run.num_bytes for run in self._runs)
        self.part_bytes = pages_per_block * self.page_bytes
        self.form = form_of(self._runs)
        self._lock = threading.Lock()
        self._spare: list[memoryview] = []

    def __repr__(self) -> str:
        return f"<PagedMover {self.num_blocks} blocks of {self.page_bytes} B, {len(self._views)} views>"

    def fence(self) -> Fence:
        return _Passed()

    def snapshot(self, blocks: Sequence[Pages]) -> Fence:
        parts = {tuple(pages): self._buffer() for pages in blocks}
        for pages, buffer in parts.items():
            self._gather(pages, buffer)
        return _Copied(parts)

    def free(self, snapshot: Fence) -> None:
        assert isinstance(snapshot, _Copied)
        with self._lock:
            self._spare += snapshot.parts.values()
        snapshot.parts = {}

    def reused(self, pages: Iterable[int]) -> None:
        return

    def gather(self, blocks: Sequence[Pages], out: Sequence[memoryview], *, after: Fence) -> None:
        for pages, target in zip(blocks, out, strict=True):
            if isinstance(after, _Copied):
                target[:] = after.parts[tuple(pages)]
            else:
                self._gather(pages, target)

    def scatter(self, data: Sequence[memoryview], blocks: Sequence[Pages]) -> None:
        for source, pages in zip(data, blocks, strict=True):
            whole = np.frombuffer(source, np.uint8).reshape(len(pages), self.page_bytes)
            for bytes_of_page, page in zip(whole, pages, strict=True):
                if page > NULL_BLOCK:
                    for view, piece in zip(self._views, self._pieces(bytes_of_page), strict=True):
                        view[page] = piece

    def zero(self, pages: Pages) -> None:
        for page in pages:
            if page > NULL_BLOCK:
                for view in self._views:
                    view[page] = 0

    def host_buffer(self, num_bytes: int) -> memoryview:
        return np.empty(num_bytes, np.uint8).data

    def pin(self, memory: memoryview) -> None:
        return

    def unpin(self, memory: memoryview) -> None:
        return

    def _gather(self, pages: Pages, target: memoryview) -> None:
        whole = np.frombuffer(target, np.uint8).reshape(len(pages), self.page_bytes)
        for bytes_of_page, page in zip(whole, pages, strict=True):
            for view, piece in zip(self._views, self._pieces(bytes_of_page), strict=True):
                piece[:] = view[page]

    def _pieces(self, page: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
        """The bytes of one page, cut as the views are."""
        pieces, start = [], 0
        for view in self._views:
            count = view.shape[1] * view.shape[2]
            pieces.append(page[start : start + count].reshape(view.shape[1:]))
            start += count
        return pieces

    def _buffer(self) -> memoryview:
        with self._lock:
            if self._spare:
                return self._spare.pop()
        return self.host_buffer(self.part_bytes)


class NoPool(Mover):
    """Of a process that moves nothing: the scheduler's."""

    def __init__(self, part_bytes: int) -> None:
        self.part_bytes = part_bytes

    def fence(self) -> Fence:
        return _Passed()

    def gather(self, blocks: Sequence[Pages], out: Sequence[memoryview], *, after: Fence) -> None:
        raise NotImplementedError

    def scatter(self, data: Sequence[memoryview], blocks: Sequence[Pages]) -> None:
        raise NotImplementedError

    def host_buffer(self, num_bytes: int) -> memoryview:
        raise NotImplementedError

    def pin(self, memory: memoryview) -> None:
        return

    def unpin(self, memory: memoryview) -> None:
        return


def prove(mover: VllmPool) -> None:
    """Store, load, compare on the real tensors, before anything is served. Zeroes the blocks that it used.

    Raises ConfigError if what comes back is not bit for bit what was there.
    """
    k = mover.pages_per_block
    if mover.num_blocks < 2 * k + 1:
        raise ConfigError(f"a pool of {mover.num_blocks} blocks holds no two fabric blocks of {k}")
    first, second = list(range(1, k + 1)), list(range(k + 1, 2 * k + 1))
    written = np.random.default_rng().integers(0, 256, mover.part_bytes, dtype=np.uint8)
    back = [mover.host_buffer(mover.part_bytes) for _ in range(3)]
    mover.scatter([written.data], [first])
    snapshot = mover.snapshot([first])
    mover.gather([first], back[:1], after=snapshot)
    mover.free(snapshot)
    mover.zero(first)
    mover.scatter(back[:1], [second])
    mover.gather([first, second], back[1:], after=mover.fence())
    mover.zero([*first, *second])
    if bytes(back[0]) != written.tobytes() or bytes(back[2]) != written.tobytes():
        raise ConfigError("blocks do not survive a store and a load on these tensors")
    if any(back[1]):
        raise ConfigError("two blocks of these tensors share memory")


def form_of(runs: Sequence[Run]) -> str:
    """16 hex digits of the pieces that a block has."""
    text = ";".join(f"{run.layer}:{run.num_bytes}" for run in runs)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without layers that use another layer's tensor."""
    by_address: dict[int, str] = {}
    for layer, tensor in tensors.items():
        by_address.setdefault(tensor.data_ptr(), layer)
    return {layer: tensors[layer] for layer in by_address.values()}


def _views(
    tensors: Mapping[str, torch.Tensor], runs: Sequence[Run], num_blocks: int
) -> list[Bytes3D]:
    """[blocks, runs, bytes] for runs of one storage at equal distances, else one view a run."""
    storages = {layer: _storage_bytes(tensor) for layer, tensor in tensors.items()}
    addresses = {storage.ctypes.data for storage in storages.values()}
    steps = {b.offset - a.offset for a, b in itertools.pairwise(runs)}
    sizes = {(run.stride, run.num_bytes) for run in runs}
    if len(addresses) == 1 and len(sizes) == 1 and len(steps) <= 1:
        whole = storages[runs[0].layer]
        return [_strided(whole, runs[0], num_blocks, len(runs), steps.pop() if steps else 0)]
    return [_strided(storages[run.layer], run, num_blocks, 1, 0) for run in runs]


def _storage_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    found: npt.NDArray[np.uint8] = storage.numpy()
    return found


def _strided(
    storage: npt.NDArray[np.uint8], run: Run, num_blocks: int, num_runs: int, step: int
) -> Bytes3D:
    ends = [run.offset + (num_blocks - 1) * run.stride + i * step for i in (0, num_runs - 1)]
    if min(run.offset, *ends) < 0 or max(ends) + run.num_bytes > storage.nbytes:
        raise ConfigError(f"{run.layer}: blocks reach beyond their storage")
    return np.lib.stride_tricks.as_strided(
        storage[run.offset :],
        shape=(num_blocks, num_runs, run.num_bytes),
        strides=(run.stride, step, 1),
    )
