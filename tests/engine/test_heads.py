"""Heads go where they belong, the kernel's as torch's."""

from __future__ import annotations

import pytest
import torch
from kvfabric_engine.reference.heads import HeadShape, Norms, Places, place_heads

ROWS, NUM_PAGES, PAGE_TOKENS = 37, 6, 8


def _placed(
    device: str, dtype: torch.dtype, shape: HeadShape, *, has_norm: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(queries, pages) on the CPU in float32, of the same random heads on every device."""
    random = torch.Generator().manual_seed(3)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random).to(device, dtype)

    total = shape.num_heads + 2 * shape.num_kv_heads
    heads = draw(ROWS, total, shape.head_dim)
    norms: Norms = (draw(shape.head_dim), draw(shape.head_dim)) if has_norm else None
    slots = torch.randperm(NUM_PAGES * PAGE_TOKENS, generator=random)[:ROWS].to(device)
    angles = torch.rand(ROWS, shape.head_dim // 2, generator=random)
    cos, sin = angles.cos(), angles.sin()
    places = Places(
        slots // PAGE_TOKENS,
        slots % PAGE_TOKENS,
        torch.cat([cos, cos], dim=1).to(device, dtype),
        torch.cat([-sin, sin], dim=1).to(device, dtype),
    )
    pool = torch.zeros(
        NUM_PAGES, 3, 2, PAGE_TOKENS, shape.num_kv_heads, shape.head_dim, dtype=dtype, device=device
    )
    queries = place_heads(heads, shape, norms, places, pool[:, 1])
    assert not pool[:, 0].any()
    assert not pool[:, 2].any()
    return queries.float().cpu(), pool[:, 1].float().cpu()


@pytest.mark.parametrize("has_norm", [True, False])
def test_values_are_kept_and_lengths_of_queries_and_keys(has_norm: bool) -> None:
    """A rotation changes no length, a norm makes it that of the weights; nothing else is written."""
    shape = HeadShape(4, 2, 16, 1e-6)
    queries, pages = _placed("cpu", torch.float32, shape, has_norm=has_norm)
    assert queries.shape == (ROWS, 4, 16)
    written = pages.abs().sum(dim=(1, 3, 4)) > 0
    assert int(written.sum()) == ROWS
    plain, _ = _placed("cpu", torch.float64, shape, has_norm=has_norm)
    assert torch.allclose(queries, plain, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("shape", [HeadShape(32, 8, 128, 1e-6), HeadShape(4, 2, 16, 1e-5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_torch_up_to_rounding_cuda(
    dtype: torch.dtype, shape: HeadShape, has_norm: bool
) -> None:
    """Within a few units of the last place: it rounds once where torch rounds thrice."""
    atol, rtol = (1e-5, 1e-5) if dtype is torch.float32 else (0.06, 0.03)
    found, expected = (_placed(d, dtype, shape, has_norm=has_norm) for d in ("cuda", "cpu"))
    for mine, right in zip(found, expected, strict=True):
        assert torch.allclose(mine, right, atol=atol, rtol=rtol)
