"""LoRA adapters and prompt embeddings on a real vLLM and a real node: KV of the same tokens, never mixed up.

What decides is the weights that vLLM holds, whenever and from where it loaded them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kvfabric_engine.integrations.vllm_adapters import LoadedAdapters
from kvfabric_engine.integrations.vllm_digest import Unknown
from kvfabric_engine.integrations.vllm_inputs import RequestInputs
from safetensors.torch import load_file
from vllm.lora.request import LoRARequest

from kvfabric.testing.processes import NodeProcess
from kvfabric.types import ExtraInput
from tests.vllm.adapter import write_adapter
from tests.vllm.engines import Answer, Gate, Minter, Vllm, prompt, running, wait_for
from tests.vllm.test_llm import cached_with

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
NAMES = (*FOLDERS, "later", "added", *(f"crowd-{i}" for i in range(4)))
NEW = 99
LATER = {"later": 98, "added": 97, "between": 96}
TWIN = [prompt(600, seed=57), prompt(400, seed=58)]
"""Of the tests whose guards are taken out, as CONTROL: what they store is wrong."""
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
    late = {"new": NEW, **LATER}
    gates = {name: Gate() for name in ("", *FOLDERS, *late)}
    folder = tmp_path_factory.mktemp("later")
    with running(checkpoint, fabric=False, **ARGS) as alone:
        gates[""].learn(alone, [*PROMPTS, *CONTROL])
        for name, seed in late.items():
            lora = LoRARequest(name, seed, str(write_adapter(folder / name, seed=seed)))
            gates[name].learn(alone, PROMPTS, lora=lora)
        for number, name in enumerate(FOLDERS, 1):
            lora = LoRARequest(name, number, str(adapters / name))
            if name != "twin":
                gates[name].learn(alone, PROMPTS, lora=lora)
        for name in ("one", "two"):
            gates[name].learn(alone, [*CONTROL, *TWIN], lora=request(adapters, name))
    return gates


@pytest.fixture(scope="module")
def engine(checkpoint: Path, gates: dict[str, Gate]) -> Iterator[Vllm]:
    with running(checkpoint, **ARGS) as engine:
        yield engine


def known(engine: Vllm, lora: LoRARequest) -> LoRARequest:
    """Its first requests are computed: until its weights are loaded and read."""

    def is_found() -> bool:
        engine.answer(prompt(10, seed=1), lora=lora, max_tokens=1)
        try:
            engine.scheduler.connector._fabric.adapters.find(lora)
        except Unknown:
            return False
        return True

    wait_for(is_found)
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
    one = known(engine, request(adapters, "one"))
    gates["one"].check(CONTROL, after_reset(engine, CONTROL, lora=one))
    for name in ("two", ""):
        lora = known(engine, request(adapters, name)) if name else None
        answers = after_reset(engine, CONTROL, lora=lora)
        assert cached(answers) == [512, 384]
        assert gates[name].differing(CONTROL, answers) == 2


def test_files_count_for_nothing(
    engine: Vllm, gates: dict[str, Gate], adapters: Path, said: list[str]
) -> None:
    """vLLM has the old weights until it reads the new ones: each has its own blocks, under one id."""
    lora = known(engine, request(adapters, "changed"))
    after_reset(engine, lora=lora)
    write_adapter(adapters / "changed", seed=NEW)
    old = after_reset(engine, lora=lora)
    assert cached(old) == CACHED
    gates["changed"].check(PROMPTS, old)
    engine.drop_hbm()  # vLLM itself shares by name and path
    for expected in ([0, 0], [0, 0]):  # computed by each request that loads in place
        new = after_reset(engine, lora=request(adapters, "changed", load_inplace=True))
        assert cached(new) == expected
        gates["new"].check(PROMPTS, new)
    known(engine, lora)
    after_reset(engine, lora=lora)
    new = after_reset(engine, lora=lora)
    assert cached(new) == CACHED
    gates["new"].check(PROMPTS, new)
    assert said[1:] == [
        'fabric: adapter "changed" is loaded anew by each of its requests (load_inplace): such requests are '
        "computed without the fabric",
    ]


def test_weights_exchanged_while_a_request_runs(
    engine: Vllm, gates: dict[str, Gate], adapters: Path
) -> None:
    """Opened with one set of weights, computed with another: nothing of it is stored, or loaded."""
    lora = known(engine, request(adapters, "while"))
    gates["while"].check(PROMPTS[:1], after_reset(engine, PROMPTS[:1], lora=lora))
    write_adapter(adapters / "while", seed=LATER["between"])
    saved, loaded = engine.statistics().saved_blocks, engine.statistics().loaded_blocks
    opened: list[Any] = []
    side = engine.scheduler.connector._side
    take = side._opened

    def exchanges(tracked: Any) -> bool:
        taken: bool = take(tracked)
        if tracked.keys is not None and not opened:
            opened.append(tracked)
            add_lora(engine, request(adapters, "while", load_inplace=True))
        return taken

    side._opened = exchanges
    try:
        answers = after_reset(engine, PROMPTS[:1], lora=lora)
    finally:
        del side._opened
    gates["between"].check(PROMPTS[:1], answers)
    assert opened
    assert engine.statistics().saved_blocks == saved
    assert engine.statistics().loaded_blocks == loaded


def test_without_the_serial_number_exchanged_weights_are_stored(
    engine: Vllm, gates: dict[str, Gate], adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above has power: where workers do not look at what they hold, the old keys name new KV."""
    lora = known(engine, request(adapters, "two"))
    monkeypatch.setattr(LoadedAdapters, "has", lambda *_: True)
    monkeypatch.setattr(LoadedAdapters, "report", lambda _: None)
    add_lora(engine, LoRARequest("two", lora.lora_int_id, str(adapters / "one"), load_inplace=True))
    gates["one"].check(TWIN, after_reset(engine, TWIN, lora=lora))
    add_lora(engine, LoRARequest("two", lora.lora_int_id, lora.lora_path, load_inplace=True))
    answers = after_reset(engine, TWIN, lora=lora)
    assert cached(answers) == [512, 384]
    assert gates["two"].differing(TWIN, answers) == 2


def add_lora(engine: Vllm, lora: LoRARequest) -> None:
    """As the dynamic LoRA endpoint does."""
    assert engine.llm.llm_engine.add_lora(lora)


def test_id_with_other_weights(engine: Vllm, gates: dict[str, Gate], adapters: Path) -> None:
    """vLLM keeps weights by id: after another folder was loaded in place, the old name means the new ones."""
    lora = known(engine, request(adapters, "id"))
    after_reset(engine, lora=lora)
    assert cached(after_reset(engine, lora=lora)) == CACHED
    add_lora(engine, request(adapters, "id", "id-other", load_inplace=True))
    known(engine, lora)
    for expected in ([0, 0], CACHED):
        answers = after_reset(engine, lora=lora)
        assert cached(answers) == expected
        gates["id-other"].check(PROMPTS, answers)


@pytest.mark.parametrize("name", ["later", "added"])
def test_adapter_that_comes_later(
    engine: Vllm, gates: dict[str, Gate], adapters: Path, name: str
) -> None:
    """Written after the engine started, and loaded by its first request or as the dynamic endpoint does."""
    write_adapter(adapters / name, seed=LATER[name])
    lora = request(adapters, name)
    if name == "added":
        add_lora(engine, lora)
    first = after_reset(engine, lora=lora)
    gates[name].check(PROMPTS, first)
    assert cached(first)[0] == 0
    known(engine, lora)
    after_reset(engine, lora=lora)
    answers = after_reset(engine, lora=lora)
    gates[name].check(PROMPTS, answers)
    assert cached(answers) == CACHED


def test_adapter_that_vllm_dropped(engine: Vllm, gates: dict[str, Gate], adapters: Path) -> None:
    """Known again when vLLM read it again: its blocks are still there."""
    lora = known(engine, request(adapters, "one"))
    after_reset(engine, lora=lora)
    for i in range(4):  # more than vLLM keeps
        write_adapter(adapters / f"crowd-{i}", seed=20 + i)
        engine.answer(prompt(10, seed=1), lora=request(adapters, f"crowd-{i}"), max_tokens=1)
    assert lora.lora_int_id not in engine.llm.llm_engine.list_loras()
    gates["one"].check(PROMPTS, after_reset(engine, lora=lora))
    known(engine, lora)
    answers = after_reset(engine, lora=lora)
    assert cached(answers) == CACHED
    gates["one"].check(PROMPTS, answers)


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
