"""The model over a paged pool computes what a model without pages does, and its KV matters."""

from __future__ import annotations

import random

import pytest
import torch
from kvfabric_engine.layout import PoolShape
from kvfabric_engine.reference.model import Model, Span
from kvfabric_engine.testing import small_config

CONFIG = small_config()
MODEL = Model(CONFIG)
SHAPE = PoolShape(64, 2, 8, 2, 16, torch.float32, block_tokens=16)
TOKENS = random.Random(1).choices(range(3, 259), k=50)


def pool() -> torch.Tensor:
    return SHAPE.create(torch.device("cpu"))


def pages(seed: int) -> list[int]:
    return random.Random(seed).sample(range(64), 8)


def in_chunks(chunk: int, kv: torch.Tensor, where: list[int]) -> torch.Tensor:
    """Logits after the last token, computed `chunk` tokens at a time."""
    for start in range(0, len(TOKENS), chunk):
        end = min(start + chunk, len(TOKENS))
        last = MODEL.forward(kv, [Span(TOKENS[start:end], start, where, end == len(TOKENS))])
    return last[0]


@pytest.mark.parametrize("chunk", [7, 16, 50])
def test_chunks_and_pages_do_not_matter(chunk: int) -> None:
    """Any chunking over any pages is one causal pass, but for rounding."""
    whole = in_chunks(50, pool(), list(range(8)))
    torch.testing.assert_close(in_chunks(chunk, pool(), pages(chunk)), whole, rtol=1e-4, atol=1e-4)


def test_equal_shapes_are_equal_bits() -> None:
    """What the deterministic mode rests on: same chunks, other pages, same bits."""
    first = in_chunks(16, pool(), pages(1))
    assert torch.equal(first, in_chunks(16, pool(), pages(2)))


def test_batch_is_its_sequences() -> None:
    """Sequences in one forward do not see each other."""
    kv, kv_alone = pool(), pool()
    spans = [Span(TOKENS[:20], 0, [0, 1, 2], True), Span(TOKENS[20:33], 0, [5, 4], True)]
    together = MODEL.forward(kv, spans)
    alone = torch.cat([MODEL.forward(kv_alone, [span]) for span in spans])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert torch.argmax(together[0]) != torch.argmax(together[1])


def test_another_prompts_kv_changes_the_answer() -> None:
    """Weights are strong enough: with a page of somebody else's KV the best token changes."""
    changed = 0
    for seed in range(10):
        prompt, others = random.Random(seed).choices(range(3, 259), k=49), TOKENS[:16]
        kv = pool()
        MODEL.forward(kv, [Span(others, 0, [6, 7], False)])
        for start in (0, 16, 32):
            MODEL.forward(kv, [Span(prompt[start : start + 16], start, range(6), False)])
        right = MODEL.forward(kv, [Span(prompt[48:], 48, [0, 1, 2, 3, 4, 5, 8], True)])
        wrong = MODEL.forward(kv, [Span(prompt[48:], 48, [0, 1, 6, 7, 4, 5, 8], True)])
        changed += int(right.argmax() != wrong.argmax())
    assert changed >= 5
