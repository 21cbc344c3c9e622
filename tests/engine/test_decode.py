"""A captured step computes what the model computes, wherever the pages lie, and writes where it should."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from kvfabric_engine.layout import PoolShape
from kvfabric_engine.reference.decode import DecodeGraphs, supports
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.reference.model import Model, Span
from kvfabric_engine.reference.sampler import Sampler, SamplingParams
from kvfabric_engine.reference.scores import Scorer, Scores
from kvfabric_engine.testing import ask, begin, small_config

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
MAX_BATCH = 4
LENGTHS = (1, 8, 57, 450)


def _model(**changes: object) -> tuple[Model, torch.Tensor]:
    """A model and a pool of noise."""
    config = small_config(device="cuda", dtype="bfloat16", max_batch=MAX_BATCH, **changes)
    model = Model(config)
    shape = model.shape
    pool = PoolShape(
        config.hbm_blocks,
        shape.num_layers,
        config.engine_block_tokens,
        shape.num_kv_heads,
        shape.head_dim,
        model.dtype,
        config.block_tokens,
    ).create(model.device)
    return model, pool.normal_()


def _spans(page_tokens: int, num_pages: int, lengths: tuple[int, ...]) -> list[Span]:
    """The last token of sequences of these lengths, their pages in any order."""
    draw = random.Random(5)
    pages = draw.sample(range(num_pages), num_pages)
    spans = []
    for length in lengths:
        count = -(-length // page_tokens)
        own, pages = pages[:count], pages[count:]
        spans.append(Span([draw.randrange(3, 259)], length - 1, own, sample=True))
    return spans


def test_models_on_the_cpu_are_not_captured() -> None:
    assert not supports(Model(small_config()))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize(("heads", "dim"), [((4, 2), 16), ((8, 8), 64), ((32, 2), 128)])
def test_a_step_is_the_models_up_to_rounding_cuda(
    count: int, heads: tuple[int, int], dim: int
) -> None:
    """Logits and KV, for batches that fill a graph and one that does not; other pages keep every bit."""
    model, pool = _model(num_heads=heads[0], num_kv_heads=heads[1], head_dim=dim)
    assert supports(model)
    before = pool.clone()
    graphs = DecodeGraphs(model, pool, max_batch=MAX_BATCH)
    assert torch.equal(pool, before)
    for lengths in (LENGTHS[:count], LENGTHS[::-1][:count]):
        spans = _spans(pool.shape[3], len(pool), lengths)
        assert graphs.takes(spans)
        expected_pool = before.clone()
        expected = model.forward(expected_pool, spans)
        pool.copy_(before)
        found = graphs.step(spans)
        assert found.logits.shape == expected.shape
        scale = float(expected.std())
        assert torch.allclose(found.logits, expected, atol=0.1 * scale, rtol=0.05)
        best = [found.pick(row, Sampler(SamplingParams())) for row in range(count)]
        assert best == found.logits.argmax(dim=-1).tolist()
        assert torch.allclose(pool, expected_pool, atol=0.1, rtol=0.05)
        written = (pool != before).any(dim=(1, 2, 4, 5)).nonzero().tolist()
        places = [[s.pages[-1], s.start % pool.shape[3]] for s in spans]
        assert sorted(written) == sorted(places)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]
)
def test_the_likeliest_token_is_the_first_of_the_highest(device: str) -> None:
    """Of rows of which many are on their way at a time, ties included; sampling sees all logits."""
    logits = torch.randint(0, 50, (64, 3, 300), generator=torch.Generator().manual_seed(2)).float()
    scorer, greedy = Scorer(torch.device(device)), Sampler(SamplingParams())
    found = [scorer.of(some) for some in logits.to(device)]
    picked = [[scores.pick(row, greedy) for row in range(3)] for scores in found]
    assert picked == [[row.tolist().index(row.max()) for row in some] for some in logits]
    seeded = SamplingParams(temperature=2.0, seed=3)
    tokens = [Sampler(seeded).pick(logits[0, 1]), found[0].pick(1, Sampler(seeded))]
    assert tokens[0] == tokens[1]


@pytest.mark.gpu
@needs_cuda
def test_what_is_not_a_step_is_not_taken_cuda() -> None:
    model, pool = _model()
    graphs = DecodeGraphs(model, pool, max_batch=2)
    one, two, three = _spans(pool.shape[3], len(pool), (5, 9, 17))
    assert graphs.takes([one, two])
    assert not graphs.takes([])
    assert not graphs.takes([one, two, three])
    assert not graphs.takes([Span([4, 5], 3, one.pages, sample=True)])
    assert not graphs.takes([Span([4], 3, one.pages, sample=False)])


@pytest.mark.gpu
@needs_cuda
def test_the_engine_decodes_by_graphs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four sequences of different lengths together: each step is what the model says of the same pool."""
    prompts = [random.Random(n).choices(range(3, 259), k=n) for n in (9, 40, 70, 130)]
    with Engine(small_config(device="cuda", dtype="bfloat16", max_batch=MAX_BATCH)) as engine:
        graphs = engine._graphs
        assert graphs is not None
        step, steps = graphs.step, []

        def checked(spans: Sequence[Span]) -> Scores:
            expected = engine.model.forward(engine.pool.clone(), spans)
            found = step(spans)
            near = torch.allclose(
                found.logits, expected, atol=0.1 * float(expected.std()), rtol=0.05
            )
            steps.append((len(spans), near))
            return found

        monkeypatch.setattr(graphs, "step", checked)
        pending = [begin(engine, prompt, max_tokens=24) for prompt in prompts]
        answers = [one.answer().token_ids for one in pending]
        seeded = [
            ask(engine, prompts[0], max_tokens=8, temperature=0.7, seed=11).token_ids
            for _ in range(2)
        ]
    assert [len(answer) for answer in answers] == [24] * 4
    assert seeded[0] == seeded[1]
    assert max(size for size, _ in steps) == len(prompts)
    assert all(near for _, near in steps)
