"""Other engines: several ranks, several pages a block, half precision, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.checkpoint import write_checkpoint
from tests.vllm.engines import FLAG, Gate, first_block_for_all, parts_of, prompt, running

PROMPTS = [prompt(700, seed=31), prompt(300, seed=32), prompt(520, seed=33)]
LATENT_ARGS: dict[str, Any] = {
    "num_gpu_blocks_override": 512,  # of 16 tokens
    "attention_backend": "CPU_MLA",  # not the one of CPUs with AMX, which knows bfloat16 only
}
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


REFUSED = {
    "sliding": "KV of SlidingWindowSpec is not cached",
    "hybrid": "models with 2 KV cache groups (hybrid) are not cached",
    "unscaled": "KV of MLA with RoPE of type default is not cached on a CPU",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_attention_is_refused(kind: str, tmp_path: Path, said: list[str]) -> None:
    """Windows, hybrids, MLA that vLLM computes wrongly: one line says so; answers come without the fabric."""
    checkpoint = write_checkpoint(tmp_path / kind, kind=kind)
    args = LATENT_ARGS if kind == "unscaled" else {"num_gpu_blocks_override": 512}
    gate = learned(checkpoint, **args)
    with running(checkpoint, **args) as engine:
        assert engine.scheduler.connector.fabric is None
        # One at a time: what vLLM makes of such MLA varies with the batch, without a connector too.
        gate.check(PROMPTS, [engine.answer(p) for p in PROMPTS])
    assert said == [f"fabric: {REFUSED[kind]}; this engine runs without the fabric"]


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "latent", kind="latent")


@pytest.fixture(scope="module")
def latent_gate(latent: Path) -> Gate:
    return learned(latent, **LATENT_ARGS)


def test_latent_attention(latent: Path, latent_gate: Gate, tmp_path: Path) -> None:
    """MLA: cold and loaded, alone and in a batch, the same answers; loaded bytes are the stored bytes."""
    gate, audit = latent_gate, tmp_path / "parts"
    with running(latent, extra={"audit_parts": str(audit)}, **LATENT_ARGS) as engine:
        cold = engine.store(PROMPTS)
        gate.check(PROMPTS, cold)
        assert [a.num_cached for a in cold] == [0, 0, 0]
        loaded = [engine.answer(p) for p in PROMPTS]  # vLLM itself caches no prefix of MLA on a CPU
        gate.check(PROMPTS, loaded)
        assert [a.num_cached for a in loaded] == [640, 256, 512]
        gate.check(PROMPTS, engine.ask(PROMPTS))
        assert engine.statistics().loaded_blocks == 2 * (10 + 4 + 8)
        assert len(parts_of(audit, 0, "load")) == 10 + 4 + 8
        assert parts_of(audit, 0, "load") < parts_of(
            audit, 0, "store"
        )  # which has an answer's block too
        with first_block_for_all(engine):
            wrong = [engine.answer(p) for p in PROMPTS]
        assert [a.num_cached for a in wrong] == [640, 256, 512]
        assert gate.differing(PROMPTS, wrong) == 2  # the first prompt got its own block


def test_latent_attention_on_two_ranks(
    latent: Path, latent_gate: Gate, two_ranks: dict[str, Any], tmp_path: Path
) -> None:
    """All ranks hold the same: one of them stores, both load what it stored."""
    audit = tmp_path / "parts"
    args = LATENT_ARGS | two_ranks
    with running(latent, extra={"audit_parts": str(audit)}, **args) as engine:
        latent_gate.check(PROMPTS, engine.ask(PROMPTS))
        engine.wait_matched_by_ranks(PROMPTS, (10, 4, 8))
        answers = [engine.answer(p) for p in PROMPTS]
        latent_gate.check(PROMPTS, answers)
        assert [a.num_cached for a in answers] == [640, 256, 512]
    loaded = parts_of(audit, 0, "load")
    assert len(loaded) == 10 + 4 + 8
    assert loaded == parts_of(audit, 1, "load")
    assert loaded < parts_of(audit, 0, "store")
    assert parts_of(audit, 1, "store") == set()


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


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of an engine of two worker processes."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    return {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def test_two_ranks(checkpoint: Path, two_ranks: dict[str, Any], tmp_path: Path) -> None:
    """Tensor parallelism: each rank stores and loads its own part, in a process of its own."""
    gate, audit = learned(checkpoint), tmp_path / "parts"
    with running(checkpoint, extra={"audit_parts": str(audit)}, **two_ranks) as engine:
        gate.check(PROMPTS, engine.ask(PROMPTS))
        engine.wait_matched_by_ranks(PROMPTS, (5, 2, 4))
        engine.drop_hbm()
        answers = [engine.answer(p) for p in PROMPTS]
        gate.check(PROMPTS, answers)
        assert [a.num_cached for a in answers] == [640, 256, 512]
    stored = [parts_of(audit, rank, "store") for rank in (0, 1)]
    assert [parts_of(audit, rank, "load") for rank in (0, 1)] == stored
    keys = [{key for key, _ in parts} for parts in stored]
    assert keys[0] == keys[1]
    assert len(keys[0]) == 5 + 2 + 4
    assert stored[0].isdisjoint(stored[1])
