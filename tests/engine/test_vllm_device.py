"""vLLM's tensors on a GPU as parts, in every form it makes of them there; the same code on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kvfabric_engine.integrations.vllm_device import DeviceMover
from kvfabric_engine.integrations.vllm_layout import SKIP, PagedMover, prove

from kvfabric.errors import ConfigError, TransferError

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
BLOCKS, TOKENS, HEADS, SIZE = 24, 16, 2, 32
Tensors = dict[str, torch.Tensor]


def flash_attention() -> Tensors:
    """[keys and values, blocks, tokens, heads, head], a storage a layer."""
    return {f"layer{i}": torch.randn(2, BLOCKS, TOKENS, HEADS, SIZE).bfloat16() for i in range(3)}


def flash_infer() -> Tensors:
    """[blocks, keys and values, tokens, heads, head]."""
    return {f"layer{i}": torch.randn(BLOCKS, 2, TOKENS, HEADS, SIZE).half() for i in range(3)}


def heads_first() -> Tensors:
    """HND: heads before tokens, shown as tokens before heads."""
    return {
        f"layer{i}": torch.randn(BLOCKS, 2, HEADS, TOKENS, SIZE).transpose(2, 3) for i in range(2)
    }


def fp8() -> Tensors:
    """One byte an element."""
    shape = (2, BLOCKS, TOKENS, HEADS, SIZE)
    return {f"layer{i}": torch.randint(0, 256, shape, dtype=torch.uint8) for i in range(3)}


def layers_of_a_block_together() -> Tensors:
    """BLHNC: one run of all layers."""
    whole = torch.randn(BLOCKS, 3, 2, TOKENS, HEADS, SIZE)
    return {f"layer{i}": whole[:, i] for i in range(3)}


FORMS = [flash_attention, flash_infer, heads_first, fp8, layers_of_a_block_together]


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    copy: torch.UntypedStorage = storage.clone()  # type: ignore[no-untyped-call] # untyped in torch
    return copy


def _to(device: str, tensors: Tensors) -> Tensors:
    """Copies on the device, views of one storage staying so."""
    storages: dict[int, torch.UntypedStorage] = {}
    moved = {}
    for layer, tensor in tensors.items():
        storage = tensor.untyped_storage()
        there = storages.setdefault(
            storage.data_ptr(), _clone(storage).to(device=torch.device(device))
        )
        empty = torch.empty(0, dtype=tensor.dtype, device=device)
        moved[layer] = empty.set_(there, tensor.storage_offset(), tensor.shape, tensor.stride())
    return moved


def _mover(tensors: Tensors) -> DeviceMover:
    mover = DeviceMover(tensors, num_blocks=BLOCKS, pages_per_block=2, stage_bytes=1 << 16)
    assert mover.part_bytes > 3 * TOKENS
    return mover


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_parts_are_those_of_the_cpu(form: Callable[[], Tensors], device: str) -> None:
    """Same bytes in the same order as `vllm_layout` makes of these tensors, and back to where they belong."""
    here = form()
    there = _to(device, here)
    plain, mover = PagedMover(here, num_blocks=BLOCKS, pages_per_block=2), _mover(there)
    assert (mover.form, mover.page_bytes) == (plain.form, plain.page_bytes)
    blocks = [[3, 17], [5, 4], [8, 9], [23, 1]]
    size = plain.part_bytes
    out, expected = (m.host_buffer(len(blocks) * size) for m in (mover, plain))
    cut = [slice(i * size, (i + 1) * size) for i in range(len(blocks))]
    plain.gather(blocks, [expected[part] for part in cut], after=plain.fence())
    mover.gather(blocks, [out[part] for part in cut], after=mover.snapshot(blocks))
    assert bytes(out) == bytes(expected)
    targets = [[10, SKIP], [12, 13], [0, 15], [20, 21]]
    plain.scatter([expected[part] for part in cut], targets)
    mover.scatter([out[part] for part in cut], targets)
    for layer, tensor in there.items():
        assert torch.equal(tensor.cpu(), here[layer]), layer
    mover.zero([12, 0, 13])
    plain.zero([12, 0, 13])
    for layer, tensor in there.items():
        assert torch.equal(tensor.cpu(), here[layer]), layer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_tensors_are_proved(form: Callable[[], Tensors], device: str) -> None:
    tensors = _to(device, form())
    prove(_mover(tensors))
    for tensor in tensors.values():
        axis = 0 if tensor.shape[0] == BLOCKS else 1
        assert not tensor.narrow(axis, 1, 4).any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_block_that_is_reused_is_not_saved(device: str) -> None:
    """vLLM gave a page to another request before its gather came: the save fails, others go on."""
    mover = _mover(_to(device, flash_attention()))
    out = [mover.host_buffer(mover.part_bytes)]
    lost, kept = mover.snapshot([[3, 4]]), mover.snapshot([[5, 6]])
    mover.reused([4, 9])
    with pytest.raises(TransferError, match="needed"):
        mover.gather([[3, 4]], out, after=lost)
    mover.gather([[5, 6]], out, after=kept)
    mover.free(lost)
    mover.free(kept)
    again = mover.snapshot([[3, 4]])
    mover.gather([[3, 4]], out, after=again)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_told", [True, False])
def test_what_a_later_step_writes_is_never_stored(device: str, is_told: bool) -> None:
    """Saves that run while pages are reused hold what was there before, or fail.

    With that guard removed (nobody tells of the reuse), another request's KV is stored.
    """
    tensors = _to(device, flash_attention())
    mover = _mover(tensors)
    before, after = mover.host_buffer(mover.part_bytes), mover.host_buffer(mover.part_bytes)
    mover.gather([[3, 4]], [before], after=mover.fence())
    snapshot = mover.snapshot([[3, 4]])
    if is_told:
        mover.reused([3])
    for tensor in tensors.values():
        tensor[:, 3] += 1
    try:
        mover.gather([[3, 4]], [after], after=snapshot)
        is_stored = True
    except TransferError:
        is_stored = False
    assert is_stored != is_told
    if is_stored:
        assert bytes(after) != bytes(before)


def test_layers_that_differ_are_refused() -> None:
    tensors = {"wide": torch.randn(BLOCKS, 2, 8), "narrow": torch.randn(BLOCKS, 1, 8)}
    with pytest.raises(ConfigError, match="one shape"):
        DeviceMover(tensors, num_blocks=BLOCKS, pages_per_block=2)
