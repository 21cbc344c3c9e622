"""Other engines: several ranks, several pages a block, half precision, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.checkpoint import write_checkpoint
from tests.vllm.engines import FLAG, Gate, prompt, running

PROMPTS = [prompt(700, seed=31), prompt(300, seed=32), prompt(520, seed=33)]
pytestmark = pytest.mark.usefixtures("node")


def learned(checkpoint: Path, **args: Any) -> Gate:
    gate = Gate()
    with running(checkpoint, fabric=False, **args) as alone:
        gate.learn(alone, PROMPTS)
    return gate


def round_trip(checkpoint: Path, gate: Gate, args: Mapping[str, Any]) -> list[int]:
    """Cold, then with an empty HBM cache, then by another engine: cached tokens of the last."""
    with running(checkpoint, **args) as first:
        gate.check(PROMPTS, first.store(PROMPTS))
        first.drop_hbm()
        gate.check(PROMPTS, [first.answer(p) for p in PROMPTS])
    with running(checkpoint, **args) as second:
        answers = [second.answer(p) for p in PROMPTS]
        gate.check(PROMPTS, answers)
    return [a.num_cached for a in answers]


def test_blocks_of_several_pages(checkpoint: Path) -> None:
    """Pages of 32 tokens, two a block; a prefix in HBM that ends inside a block is not written again."""
    args = {"block_size": 32}
    gate = learned(checkpoint, **args)
    assert round_trip(checkpoint, gate, args) == [640, 256, 512]
    with running(checkpoint, **args) as engine:
        engine.store(PROMPTS)
        engine.drop_hbm()
        engine.answer(PROMPTS[0][:100], max_tokens=1)  # leaves three pages in HBM
        before = engine.statistics().loaded_blocks
        answer = engine.answer(PROMPTS[0])
        gate.check(PROMPTS[:1], [answer])
        assert engine.statistics().loaded_blocks - before == 9
        assert answer.num_cached == 640


@pytest.mark.parametrize(
    "args",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        pytest.param(
            {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
            marks=pytest.mark.skipif(
                "avx512f" not in Path("/proc/cpuinfo").read_text(),
                reason="vLLM has no fp8 KV on CPUs without AVX-512",
            ),
        ),
    ],
    ids=["bf16", "fp16", "fp8"],
)
def test_fewer_bits(checkpoint: Path, args: dict[str, Any]) -> None:
    """Half precision, and fp8 KV with static scales."""
    assert round_trip(checkpoint, learned(checkpoint, **args), args) == [640, 256, 512]


@pytest.mark.parametrize("kind", ["sliding", "latent"])
def test_other_attention_is_refused(kind: str, tmp_path: Path, said: list[str]) -> None:
    """Windows and MLA: one line says so, and the engine answers without the fabric."""
    checkpoint = write_checkpoint(tmp_path / kind, kind=kind)
    args = {"num_gpu_blocks_override": 512}
    gate = learned(checkpoint, **args)
    with running(checkpoint, **args) as engine:
        assert engine.scheduler.connector.fabric is None
        gate.check(PROMPTS, [engine.answer(p) for p in PROMPTS])  # vLLM's MLA varies with the batch
    assert len(said) == 1
    assert said[0].endswith("Spec is not cached; this engine runs without the fabric")


def test_without_recompute_nothing_is_loaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """vLLM's default policy fails a request whose load failed: such an engine stores only, and says why."""
    monkeypatch.setitem(FLAG, "kv_load_failure_policy", "fail")
    gate = learned(checkpoint)
    with running(checkpoint) as engine:
        gate.check(PROMPTS, engine.store(PROMPTS))
        engine.drop_hbm()
        answers = engine.ask(PROMPTS)
        gate.check(PROMPTS, answers)
        assert [a.num_cached for a in answers] == [0, 0, 0]
        assert engine.statistics().loaded_blocks == 0
    assert 'kv_load_failure_policy is not "recompute"' in said[0]


def test_two_ranks(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallelism: each rank stores and loads its own part, in a process of its own."""
    gate = learned(checkpoint)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    args = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with running(checkpoint, **args) as engine:
        gate.check(PROMPTS, engine.ask(PROMPTS))
        engine.wait_matched(PROMPTS, (5, 2, 4))
        engine.drop_hbm()
        answers = [engine.answer(p) for p in PROMPTS]
        gate.check(PROMPTS, answers)
        assert [a.num_cached for a in answers] == [640, 256, 512]
