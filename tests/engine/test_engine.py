"""The reference engine without a node: equal answers, its own prefix cache, preemption, abort."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
from kvfabric_engine.reference import scheduler
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.reference.sequence import Finish
from kvfabric_engine.testing import Answer, ask, begin, small_config

from kvfabric.errors import CapacityError, ClosedError, ConfigError
from kvfabric.hashing import block_keys
from kvfabric.testing.processes import until


def tokens(count: int, *, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(3, 259), k=count)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(small_config()) as engine:
        yield engine


def answers_alone(prompts: Sequence[Sequence[int]], **options: object) -> list[Answer]:
    """Each prompt on a fresh engine: nothing to reuse, no company."""
    found = []
    for prompt in prompts:
        with Engine(small_config()) as fresh:
            found.append(ask(fresh, prompt, **options))
    return found


def test_prefix_hit_changes_no_token(engine: Engine) -> None:
    """Greedy answers with HBM hits equal those without, token for token, at every length of the hit."""
    base = tokens(70)
    prompts = [base[:n] + tokens(5, seed=n) for n in (70, 48, 33, 16, 64)]
    expected = answers_alone(prompts, max_tokens=8)
    got = [ask(engine, prompt, max_tokens=8) for prompt in prompts]
    assert [a.token_ids for a in got] == [a.token_ids for a in expected]
    assert [a.reused.hbm for a in got] == [0, 48, 32, 16, 64]
    assert all(a.reused.total == 0 for a in expected)


def test_last_token_is_always_computed(engine: Engine) -> None:
    """A prompt of whole blocks that is cached entirely computes its last block again."""
    prompt = tokens(48)
    first, second = ask(engine, prompt, max_tokens=4), ask(engine, prompt, max_tokens=4)
    assert second.reused.hbm == 32
    assert second.token_ids == first.token_ids


def test_company_changes_no_token() -> None:
    """In deterministic mode an answer is the same alone and among others."""
    prompts = [tokens(n, seed=n) for n in (5, 16, 40, 65, 90)]
    expected = answers_alone(prompts, max_tokens=12)
    with Engine(small_config(max_batch=3)) as engine:
        pending = [begin(engine, prompt, max_tokens=12) for prompt in prompts]
        got = [p.answer() for p in pending]
    assert [a.token_ids for a in got] == [a.token_ids for a in expected]


def test_two_engines_have_one_model() -> None:
    """Equal configuration: equal revision and equal answers; another seed: neither."""
    prompt = tokens(40)
    with Engine(small_config()) as a, Engine(small_config()) as b:
        assert a.model.revision == b.model.revision
        assert ask(a, prompt).token_ids == ask(b, prompt).token_ids
    with Engine(small_config(seed=1)) as other:
        assert other.model.revision != a.model.revision


def test_preemption_changes_no_token() -> None:
    """Sequences that outgrow the pool give way, replay in equal shapes and answer as if alone."""
    prompts = [tokens(40, seed=n) for n in range(4)]
    expected = answers_alone(prompts, max_tokens=60)
    with Engine(small_config(hbm_blocks=32)) as engine:  # 256 tokens; 400 are needed in the end
        pending = [begin(engine, prompt, max_tokens=60) for prompt in prompts]
        got = [p.answer() for p in pending]
        # The last token is out a moment before its pages are free.
        until(lambda: engine.statistics().pool.used == 0)
        statistics = engine.statistics()
    assert [a.token_ids for a in got] == [a.token_ids for a in expected]
    assert statistics.scheduler.preemptions > 0


def test_preemption_in_batched_mode_caches_under_the_right_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sequence that replays its answer in chunks names no block by other tokens than its own."""
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS_A_STEP", 16)
    prompts = [tokens(40, seed=n) for n in range(4)]
    with Engine(small_config(hbm_blocks=32, deterministic="off")) as engine:
        pending = [begin(engine, prompt, max_tokens=70) for prompt in prompts]
        got = [p.answer() for p in pending]
        preemptions = engine.statistics().scheduler.preemptions
        local = engine._local.open("")
        cached = set(engine._blocks._cached)
    assert preemptions > 0
    expected = set()
    for prompt, answer in zip(prompts, got, strict=True):
        expected |= set(block_keys([*prompt, *answer.token_ids], 16, local.namespace_key))
    assert cached <= expected


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6])
def test_the_coldest_sampling_is_greedy(engine: Engine, temperature: float) -> None:
    """No temperature takes the logits out of their range, and the engine with them."""
    prompt = tokens(20)
    cold, greedy = ask(engine, prompt, temperature=temperature), ask(engine, prompt)
    assert cold.token_ids == greedy.token_ids
    assert engine.is_healthy


def test_batched_mode_reuses_answers() -> None:
    """Without deterministic mode the blocks of an answer are cached too, and answers still come."""
    with Engine(small_config(deterministic="off")) as engine:
        prompt = tokens(30)
        first = ask(engine, prompt, max_tokens=20)
        again = ask(engine, [*prompt, *first.token_ids, 7], max_tokens=4)
        others = [begin(engine, tokens(50, seed=n), max_tokens=5) for n in range(6)]
        assert [len(p.answer().token_ids) for p in others] == [5] * 6
    assert again.reused.hbm == 48


def test_deterministic_mode_caches_no_answer(engine: Engine) -> None:
    """KV of an answered token has another shape than a prompt's: it is not reused as one."""
    prompt = tokens(30)
    first = ask(engine, prompt, max_tokens=20)
    again = ask(engine, [*prompt, *first.token_ids, 7], max_tokens=4)
    assert again.reused.hbm == 16


def test_salts_share_nothing(engine: Engine) -> None:
    """Another salt is another namespace: the same prompt reuses nothing, and the answer is the same."""
    prompt = tokens(40)
    mine = ask(engine, prompt, salt="a")
    assert ask(engine, prompt, salt="a").reused.hbm == 32
    theirs = ask(engine, prompt, salt="b")
    assert theirs.reused.total == 0
    assert theirs.token_ids == mine.token_ids


def test_without_handle_by_order_nothing_is_kept(engine: Engine) -> None:
    """handle=None: nothing reused, nothing left behind."""
    prompt = tokens(40)
    assert ask(engine, prompt, handle=None).reused.total == 0
    assert engine.statistics().pool.idle == 0
    ask(engine, prompt)
    assert ask(engine, prompt, handle=None).reused.total == 0


def test_full_pool_evicts_what_is_oldest() -> None:
    """Room for one prompt and a half: the older one goes, its end first."""
    with Engine(small_config(hbm_blocks=16)) as engine:  # 128 tokens
        old, new = tokens(64, seed=1), tokens(64, seed=2)
        for prompt in (old, new):
            ask(engine, [*prompt, 5], max_tokens=1)
        assert ask(engine, [*new, 5], max_tokens=1).reused.hbm == 64
        assert ask(engine, [*old, 5], max_tokens=1).reused.hbm < 64
        assert engine.statistics().pool.evicted_blocks > 0


def test_abort_ends_and_frees(engine: Engine) -> None:
    """An aborted request says so once and leaves its pages; the others go on."""
    long = begin(engine, tokens(40), max_tokens=400)
    other = begin(engine, tokens(20), max_tokens=5)
    long.next()
    engine.abort(long.name)
    assert long.answer().finish is Finish.ABORT
    assert other.answer().finish is Finish.LENGTH
    engine.abort(long.name)  # late: nothing happens
    until(lambda: engine.statistics().pool.used == 0)


def test_stop_aborts_what_runs() -> None:
    """Stopping ends each request with ABORT; afterwards requests are refused."""
    with Engine(small_config()) as engine:
        running = begin(engine, tokens(40), max_tokens=400)
        running.next()
    assert running.answer().finish is Finish.ABORT
    with pytest.raises(ClosedError):
        begin(engine, tokens(4))


def test_oversized_requests_are_refused(engine: Engine) -> None:
    """What can never run is refused at once."""
    with pytest.raises(CapacityError, match="512"):
        begin(engine, tokens(500), max_tokens=13)


def test_seeded_sampling_repeats(engine: Engine) -> None:
    """Equal seeds give equal answers, other seeds others."""
    prompt = tokens(20)

    def sample(seed: int) -> tuple[int, ...]:
        return ask(engine, prompt, temperature=1.0, top_p=0.9, seed=seed).token_ids

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize("device", ["gpu9", "cuda:99"])
def test_a_device_that_is_not_there_names_its_key(device: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.device"):
        Engine(small_config(device=device))
