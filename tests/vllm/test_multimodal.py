"""Audio on a real vLLM and a real node: the same tokens with other sounds never share.

vLLM fills the place of every sound with the same token, and names a sound as its caller does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kvfabric_engine.integrations.vllm_inputs import RequestInputs

from kvfabric.types import ExtraInput
from tests.vllm.audio_checkpoint import AUDIO, AUDIO_BOS, AUDIO_EOS, RATE, write_audio_checkpoint
from tests.vllm.engines import Answer, Gate, Vllm, prompt, running

Sounds = tuple[int, ...]
HERE = [AUDIO_BOS, AUDIO, AUDIO_EOS]
TEXT = prompt(150, seed=81)
ONE_SOUND = [*TEXT, *HERE, *prompt(200, seed=82)]  # 452 tokens with four seconds of sound
TWO_SOUNDS = [*TEXT, *HERE, *HERE, *prompt(200, seed=83)]  # 554 tokens
CONTROL = [*prompt(140, seed=84), *HERE, *prompt(200, seed=85)]
ASKED: list[tuple[list[int], Sounds]] = [
    (ONE_SOUND, (1,)), (ONE_SOUND, (2,)), (TWO_SOUNDS, (1, 2)), (TWO_SOUNDS, (2, 1)),
    (TWO_SOUNDS, (1, 1)), (CONTROL, (1,)), (CONTROL, (2,)),
]  # fmt: skip
ARGS: dict[str, Any] = {
    "limit_mm_per_prompt": {"audio": 2},
    "mm_processor_cache_gb": 0,  # it would give the first sound of a name to all that have it
    "num_gpu_blocks_override": 64,
}
pytestmark = pytest.mark.usefixtures("node")


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_audio_checkpoint(tmp_path_factory.mktemp("model") / "audio")


@pytest.fixture(scope="module")
def gates(listener: Path) -> dict[Sounds, Gate]:
    """The right answers to each prompt with each sounds."""
    gates: dict[Sounds, Gate] = {sounds: Gate() for _, sounds in ASKED}
    with running(listener, fabric=False, **ARGS) as alone:
        for tokens, sounds in ASKED:
            gates[sounds].learn(alone, [tokens], items=items(sounds))
    return gates


@pytest.fixture(scope="module")
def engine(listener: Path, gates: dict[Sounds, Gate]) -> Iterator[Vllm]:
    with running(listener, **ARGS) as engine:
        yield engine


def items(sounds: Sounds) -> dict[str, Any]:
    """Four seconds of a tone that rises and falls, another for each number."""
    seconds = np.arange(4 * RATE) / RATE
    tones = [np.sin((900 * s**2 + 200 * np.sin(s * seconds)) * seconds) for s in sounds]
    return {"audio": [(tone.astype(np.float32), RATE) for tone in tones]}


def ask(engine: Vllm, tokens: Sequence[int], sounds: Sounds, **fields: Any) -> Answer:
    answer = engine.answer(tokens, items=items(sounds), **fields)
    engine.wait_saved()
    return answer


def asked(engine: Vllm, gates: dict[Sounds, Gate], tokens: list[int], sounds: Sounds) -> int:
    """Tokens that came from the node; the answer was right."""
    engine.drop_hbm()
    answer = ask(engine, tokens, sounds)
    gates[sounds].check([tokens], [answer])
    return answer.num_cached


def test_sounds_are_told_apart(engine: Vllm, gates: dict[Sounds, Gate]) -> None:
    """Only the text before the sound is shared."""
    assert gates[1,].right(ONE_SOUND).token_ids != gates[2,].right(ONE_SOUND).token_ids
    assert asked(engine, gates, ONE_SOUND, (1,)) == 0
    assert asked(engine, gates, ONE_SOUND, (2,)) == 128
    assert asked(engine, gates, ONE_SOUND, (1,)) == 384
    assert asked(engine, gates, ONE_SOUND, (2,)) == 384


def test_order_of_sounds(engine: Vllm, gates: dict[Sounds, Gate]) -> None:
    """Swapped sounds are other content; what begins alike shares the beginning."""
    assert asked(engine, gates, TWO_SOUNDS, (1, 2)) in (0, 128)
    assert asked(engine, gates, TWO_SOUNDS, (2, 1)) == 128
    assert asked(engine, gates, TWO_SOUNDS, (1, 1)) in (128, 256)
    for sounds in ((1, 2), (2, 1), (1, 1)):
        assert asked(engine, gates, TWO_SOUNDS, sounds) == 512


def test_the_callers_name_counts_for_nothing(engine: Vllm, gates: dict[Sounds, Gate]) -> None:
    """Two sounds under one name in vLLM's own caches: they share neither blocks nor the encoder's output."""
    engine.drop_hbm()
    for sounds in ((1,), (2,), (1,)):
        answer = ask(engine, ONE_SOUND, sounds, uuids={"audio": ["same"]})
        gates[sounds].check([ONE_SOUND], [answer])
    engine.drop_hbm()
    other = ask(engine, ONE_SOUND, (1,), uuids={"audio": ["another"]})
    assert other.num_cached == 384


def test_without_the_digest_answers_are_wrong(
    engine: Vllm, gates: dict[Sounds, Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests here have power: where the keys leave the sound out, the other one's KV is loaded."""
    find = RequestInputs._find

    def without_items(inputs: RequestInputs) -> tuple[ExtraInput, ...]:
        return tuple(extra for extra in find(inputs) if not extra.kind.startswith("mm:"))

    monkeypatch.setattr(RequestInputs, "_find", without_items)
    assert asked(engine, gates, CONTROL, (1,)) == 0
    engine.drop_hbm()
    answer = ask(engine, CONTROL, (2,))
    assert answer.num_cached == 384
    assert gates[2,].differing([CONTROL], [answer]) == 1


def test_without_data_it_is_computed(
    engine: Vllm, gates: dict[Sounds, Gate], said: list[str]
) -> None:
    """What says nothing of its content stands aside, with one line."""
    asked(engine, gates, ONE_SOUND, (1,))
    connector, sent = engine.scheduler.connector, []
    take = connector.on_new_request

    def without_data(request: Any) -> None:
        kept = [feature.data for feature in request.mm_features]
        for feature in request.mm_features:
            feature.data = None
        take(request)
        connector._side._tracked[request.request_id].opening.result()
        for feature, data in zip(request.mm_features, kept, strict=True):
            feature.data = data  # as vLLM would have it from its encoder cache
        sent.append(request)

    connector.on_new_request = without_data
    try:
        assert [asked(engine, gates, ONE_SOUND, (1,)) for _ in range(2)] == [0, 0]
    finally:
        del connector.on_new_request
    assert len(sent) == 2
    assert said == [
        "fabric: multimodal input that comes without its data is not cached: such requests are computed "
        "without the fabric"
    ]
