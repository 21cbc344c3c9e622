"""LoRA adapters and prompt embeddings on a real vLLM and a real node: KV of the same tokens, never mixed up.

Adapters are proven to be what vLLM loaded only if they lay on disk before the engine started.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kvfabric_engine.integrations.vllm_inputs import RequestInputs
from safetensors.torch import load_file
from vllm.lora.request import LoRARequest

from kvfabric.testing.processes import NodeProcess
from kvfabric.types import ExtraInput
from tests.vllm.adapter import write_adapter
from tests.vllm.engines import Answer, Gate, Vllm, prompt, running, wait_for
from tests.vllm.test_llm import Minter, cached_with

PROMPTS = [prompt(700, seed=51), prompt(300, seed=52)]
CACHED = [640, 256]
CONTROL = [prompt(600, seed=54), prompt(400, seed=55)]
ARGS: dict[str, Any] = {
    "enable_lora": True,
    "max_loras": 2,
    "max_lora_rank": 8,
    "max_cpu_loras": 4,
    "enable_prompt_embeds": True,
}
FOLDERS = {"one": 1, "two": 2, "twin": 1, "changed": 3, "while": 4, "id": 6, "id-other": 7}
"""Seeds of the adapters that lie there before the engine starts."""
NAMES = (*FOLDERS, "later")
NEW = 99
pytestmark = pytest.mark.usefixtures("node")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for name, seed in FOLDERS.items():
        write_adapter(folder / name, seed=seed)
    return folder


def request(adapters: Path, name: str, folder: str = "", **fields: Any) -> LoRARequest:
    return LoRARequest(name, NAMES.index(name) + 1, str(adapters / (folder or name)), **fields)


@pytest.fixture(scope="module")
def gates(checkpoint: Path, adapters: Path, tmp_path_factory: Any) -> dict[str, Gate]:
    """The right answers with each adapter, and ("") without one."""
    gates = {name: Gate() for name in ("", *FOLDERS, "new")}
    new = write_adapter(tmp_path_factory.mktemp("later") / "new", seed=NEW)
    with running(checkpoint, fabric=False, **ARGS) as alone:
        gates[""].learn(alone, [*PROMPTS, *CONTROL])
        gates["new"].learn(alone, PROMPTS, lora=LoRARequest("new", 99, str(new)))
        for number, name in enumerate(FOLDERS, 1):
            lora = LoRARequest(name, number, str(adapters / name))
            if name != "twin":
                gates[name].learn(alone, [*PROMPTS, *(CONTROL if name == "two" else ())], lora=lora)
        gates["one"].learn(alone, CONTROL, lora=request(adapters, "one"))
    return gates


@pytest.fixture(scope="module")
def engine(checkpoint: Path, gates: dict[str, Gate]) -> Iterator[Vllm]:
    with running(checkpoint, **ARGS) as engine:
        yield engine


def known(engine: Vllm, lora: LoRARequest) -> LoRARequest:
    """Its first request is computed while the adapter is read."""
    engine.answer(prompt(10, seed=1), lora=lora, max_tokens=1)
    digests = engine.scheduler.connector._fabric._adapters._digests
    wait_for(lambda: digests[lora.lora_path][1].done())
    return lora


def after_reset(
    engine: Vllm, prompts: Sequence[list[int]] = PROMPTS, **fields: Any
) -> list[Answer]:
    """What is found comes from the node."""
    engine.drop_hbm()
    answers = [engine.answer(p, **fields) for p in prompts]
    engine.wait_saved()
    return answers


def cached(answers: list[Answer]) -> list[int]:
    return [answer.num_cached for answer in answers]


def test_each_adapter_has_its_own_blocks(
    engine: Vllm, gates: dict[str, Gate], adapters: Path
) -> None:
    """One set of tokens with two adapters and with none: right answers, hits only of its own."""
    first, second = (known(engine, request(adapters, name)) for name in ("one", "two"))
    for name, lora in (("one", first), ("two", second), ("", None)):
        cold = after_reset(engine, lora=lora)
        assert cached(cold) == [0, 0]
        gates[name].check(PROMPTS, cold)
    for name, lora in (("one", first), ("two", second), ("", None)):
        loaded = after_reset(engine, lora=lora)
        assert cached(loaded) == CACHED
        gates[name].check(PROMPTS, loaded)
        in_hbm = [engine.answer(p, lora=lora) for p in PROMPTS]
        assert cached(in_hbm) == CACHED
        gates[name].check(PROMPTS, in_hbm)


@pytest.mark.usefixtures("gates")
def test_handles_keep_adapters_apart(engine: Vllm, node: NodeProcess, adapters: Path) -> None:
    """A handle's salt is one for all adapters: in HBM too each has its own."""
    tokens, handle = prompt(300, seed=56), Minter(engine, node)()
    for expected in (0, 256):
        for name in ("one", "two"):
            lora = known(engine, request(adapters, name))
            assert cached_with(engine, tokens, handle, lora=lora) == expected


def test_content_decides_not_the_name(engine: Vllm, gates: dict[str, Gate], adapters: Path) -> None:
    """The same files under another name, id and folder: the same blocks."""
    after_reset(engine, lora=known(engine, request(adapters, "one")))
    answers = after_reset(engine, lora=known(engine, request(adapters, "twin")))
    assert cached(answers) == CACHED
    gates["one"].check(PROMPTS, answers)


def test_without_the_digest_answers_are_wrong(
    engine: Vllm, gates: dict[str, Gate], adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests here have power: where the keys leave the adapter out, the other one's KV is loaded."""
    find = RequestInputs._find

    def without_adapter(inputs: RequestInputs) -> tuple[ExtraInput, ...]:
        return tuple(extra for extra in find(inputs) if extra.kind != "adapter")

    monkeypatch.setattr(RequestInputs, "_find", without_adapter)
    gates["one"].check(CONTROL, after_reset(engine, CONTROL, lora=request(adapters, "one")))
    for name in ("two", ""):
        lora = request(adapters, name) if name else None
        answers = after_reset(engine, CONTROL, lora=lora)
        assert cached(answers) == [512, 384]
        assert gates[name].differing(CONTROL, answers) == 2


def test_files_that_change_stand_aside(
    engine: Vllm, gates: dict[str, Gate], adapters: Path, said: list[str]
) -> None:
    """vLLM has the old weights until it is told to read the new ones: neither hits what was stored before."""
    lora = known(engine, request(adapters, "changed"))
    after_reset(engine, lora=lora)
    assert cached(after_reset(engine, lora=lora)) == CACHED
    saved = engine.statistics().saved_blocks
    write_adapter(adapters / "changed", seed=NEW)
    old = after_reset(engine, lora=lora)
    gates["changed"].check(PROMPTS, old)
    engine.drop_hbm()  # vLLM itself shares by name and path
    new = after_reset(engine, lora=request(adapters, "changed", load_inplace=True))
    gates["new"].check(PROMPTS, new)
    assert cached(old) == cached(new) == [0, 0]
    assert engine.statistics().saved_blocks == saved
    assert said[1:] == [
        'fabric: adapter "changed" changed on disk since this engine started: such requests are computed '
        "without the fabric",
        'fabric: adapter "changed" was loaded in place, or its id was given to another: such requests are '
        "computed without the fabric",
    ]


def test_files_that_change_while_a_request_runs(
    engine: Vllm, gates: dict[str, Gate], adapters: Path, said: list[str]
) -> None:
    """Opened before the files changed, computed after: neither stored nor loaded."""
    lora = known(engine, request(adapters, "while"))
    gates["while"].check(PROMPTS[:1], after_reset(engine, PROMPTS[:1], lora=lora))
    saved = engine.statistics().saved_blocks
    opened: list[Any] = []
    side = engine.scheduler.connector._side
    take = side._opened

    def changes(tracked: Any) -> bool:
        taken: bool = take(tracked)
        if tracked.keys is not None and not opened:
            opened.append(tracked)
            (adapters / "while" / "adapter_config.json").touch()
        return taken

    side._opened = changes
    try:
        answers = after_reset(engine, PROMPTS[:2], lora=lora)
    finally:
        del side._opened
    gates["while"].check(PROMPTS[:2], answers)
    assert opened
    assert engine.statistics().saved_blocks == saved
    assert any(line.endswith("while changed on disk; vLLM computes it") for line in said)


def test_id_with_other_weights_stands_aside(
    engine: Vllm, gates: dict[str, Gate], adapters: Path
) -> None:
    """vLLM keeps weights by id: after another folder was loaded in place, the old name means the new ones."""
    old = known(engine, request(adapters, "id"))
    after_reset(engine, lora=old)
    assert cached(after_reset(engine, lora=old)) == CACHED
    for lora in (request(adapters, "id", "id-other", load_inplace=True), old):
        answers = after_reset(engine, lora=lora)
        assert cached(answers) == [0, 0]
        gates["id-other"].check(PROMPTS, answers)


def test_adapter_that_comes_later_stands_aside(
    engine: Vllm, gates: dict[str, Gate], adapters: Path, said: list[str]
) -> None:
    """Nothing proves when vLLM read its files."""
    write_adapter(adapters / "later", seed=NEW)
    lora = request(adapters, "later")
    for _ in range(2):
        answers = after_reset(engine, lora=lora)
        assert cached(answers) == [0, 0]
        gates["new"].check(PROMPTS, answers)
    assert said == [
        'fabric: adapter "later" changed on disk since this engine started: such requests are computed '
        "without the fabric"
    ]


def test_prompt_embeddings(engine: Vllm, gates: dict[str, Gate], checkpoint: Path) -> None:
    """vLLM's tokens of such prompts are all 0; what is shared is what begins with the same rows."""
    table = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    tokens, other = PROMPTS[0], CONTROL[0]
    for prompts, expected in (([tokens], [0]), ([tokens, other], [640, 0])):
        engine.drop_hbm()
        answers = [engine.answer(p, embeddings=[table[torch.tensor(p)]]) for p in prompts]
        engine.wait_saved()
        gates[""].check(prompts, answers)
        assert cached(answers) == expected
    engine.drop_hbm()
    mixed = torch.cat([table[torch.tensor(tokens[:300])], table[torch.tensor(other[:300])]])
    assert engine.answer(tokens, embeddings=[mixed]).num_cached == 256
