"""What loading and computing take on this machine, measured before the engine serves."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from kvfabric.types import TierName
from kvfabric_engine.layout import PoolShape
from kvfabric_engine.plan import Rates, fit_prefill
from kvfabric_engine.reference.model import Model, Span
from kvfabric_engine.staging import Mover

PREFILLS = (256, 1024, 4096)
LOAD_BYTES = 256 << 20
ROUNDS = 2
"""Of each; the first is slower, since the device's libraries load what they need for the shape."""


def measure_rates(model: Model, pool: torch.Tensor, shape: PoolShape, mover: Mover) -> Rates:
    """Prefill of some lengths, and host memory to pool. Uses and zeroes pages; takes about a second."""
    bytes_per_s = _load_rate(shape, mover)
    prefills = [
        (n, _best_of(lambda n=n: _prefill(model, pool, shape, n)))  # type: ignore[misc]
        for n in PREFILLS
        if n <= min(model.config.max_model_tokens, shape.num_pages * shape.page_tokens)
    ]
    pool.zero_()
    rates = Rates(bytes_per_s={TierName.HOST: bytes_per_s})
    return fit_prefill(rates, prefills) if len(prefills) == len(PREFILLS) else rates


def _load_rate(shape: PoolShape, mover: Mover) -> float:
    """Bytes a second from page-locked memory into the pool."""
    k = shape.pages_per_block
    count = max(1, min(shape.num_pages // k, LOAD_BYTES // shape.part_bytes))
    host = mover.host_buffer(count * shape.part_bytes)
    parts = [host[i * shape.part_bytes : (i + 1) * shape.part_bytes] for i in range(count)]
    blocks = [range(i * k, (i + 1) * k) for i in range(count)]
    return count * shape.part_bytes / _best_of(lambda: mover.scatter(parts, blocks))


def _prefill(model: Model, pool: torch.Tensor, shape: PoolShape, num_tokens: int) -> None:
    pages = range(-(-num_tokens // shape.page_tokens))
    logits = model.forward(pool, [Span([1] * num_tokens, 0, pages, sample=True)])
    logits.cpu()  # waits until it is computed


def _best_of(action: Callable[[], None]) -> float:
    """Seconds of the fastest round."""
    taken = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        action()
        taken.append(time.perf_counter() - begun)
    return min(taken)
