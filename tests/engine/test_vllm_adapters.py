"""Which LoRA weights run: what workers hold decides, nothing else. With stand-ins for vLLM's LoRAModel."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from kvfabric_engine.integrations.vllm_adapters import (
    Adapters,
    LoadedAdapters,
    Weights,
    weights_digest,
)
from kvfabric_engine.integrations.vllm_digest import Unknown


@dataclass
class Layer:
    lora_a: Any
    lora_b: Any
    scaling: Any = 1.0


@dataclass(eq=False)
class Model:
    """Two loadings are two objects."""

    id: int
    loras: dict[str, Layer]
    rank: int = 8
    is_3d_lora_weight: bool = False


@dataclass
class Lora:
    lora_int_id: int
    lora_name: str = "name"
    load_inplace: bool = False


def model(number: int = 1, *, seed: int = 0, **fields: Any) -> Model:
    random = torch.Generator().manual_seed(seed)
    layers = {
        name: Layer(*(torch.randn(4, 4, generator=random) for _ in range(2))) for name in ("q", "k")
    }
    return Model(number, **({"loras": layers} | fields))


@dataclass
class Worker:
    """A worker, what vLLM holds in it, and the scheduler that it tells."""

    scheduler: Adapters
    rank: int = 0
    held: dict[int, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loaded = LoadedAdapters(lambda: self.held, rank=self.rank)

    def look(self) -> None:
        """And tell when all of it is digested."""
        self.loaded.look()
        deadline = time.monotonic() + 10
        while not all(held.digest.done() for held in self.loaded._held.values()):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if (report := self.loaded.report()) is not None:
            self.scheduler.learn({self.rank: report})


@pytest.fixture
def scheduler() -> Adapters:
    return Adapters(num_ranks=1, settings="", tell=lambda line: None)


@pytest.fixture
def worker(scheduler: Adapters) -> Iterator[Worker]:
    worker = Worker(scheduler)
    yield worker
    worker.loaded.close()


def test_content_decides() -> None:
    """Any bit, shape, type, scale or name of a layer; not the id, nor the order of layers."""
    plain = model()
    q, k = plain.loras["q"], plain.loras["k"]
    others = [
        model(seed=1),
        model(rank=4),
        model(is_3d_lora_weight=True),
        model(loras={"q": q}),
        model(loras={"q": k, "k": q}),
        model(loras={"q": q, "v": k}),
        model(loras={"q": q, "k": Layer(k.lora_a, k.lora_b, 2.0)}),
        model(loras={"q": q, "k": Layer(k.lora_a, k.lora_b.view(torch.int32))}),
        model(loras={"q": q, "k": Layer(k.lora_a, k.lora_b.reshape(2, 8))}),
        model(loras={"q": q, "k": Layer([k.lora_a, None], [k.lora_b, None])}),
    ]
    digests = [weights_digest(m) for m in (plain, *others)]
    assert len(set(digests)) == len(digests)
    assert weights_digest(model(2, loras={"k": k, "q": q})) == digests[0]


def test_what_cannot_be_read_is_never_known(worker: Worker, scheduler: Adapters) -> None:
    worker.held[1] = model(loras={"q": Layer({1, 2}, None)})
    worker.look()
    with pytest.raises(Unknown):
        scheduler.find(Lora(1))


def test_known_from_when_it_is_loaded(worker: Worker, scheduler: Adapters) -> None:
    """However it came; until vLLM drops it. The same content has the same digest under any id."""
    with pytest.raises(Unknown):
        scheduler.find(Lora(1))
    worker.held |= {1: model(), 2: model(2), 3: model(3, seed=1)}
    worker.look()
    one, two, three = (scheduler.find(Lora(number)) for number in (1, 2, 3))
    assert one.digest == two.digest != three.digest
    assert all(scheduler.is_trusted(a) and worker.loaded.has(a) for a in (one, two, three))
    del worker.held[1]
    worker.look()
    assert not scheduler.is_trusted(one)
    assert not worker.loaded.has(one)
    with pytest.raises(Unknown):
        scheduler.find(Lora(1))


def test_exchanged_weights(worker: Worker, scheduler: Adapters) -> None:
    """What was opened before is not believed again, also not when the old weights come back."""
    worker.held[1] = model()
    worker.look()
    first = scheduler.find(Lora(1))
    worker.held[1] = model(seed=1)
    worker.loaded.look()
    assert not worker.loaded.has(first)  # at once: the scheduler hears of it later
    worker.look()
    second = scheduler.find(Lora(1))
    worker.held[1] = model()
    worker.look()
    third = scheduler.find(Lora(1))
    assert first.digest == third.digest != second.digest
    for old in (first, second):
        assert not scheduler.is_trusted(old)
        assert not worker.loaded.has(old)
    assert scheduler.is_trusted(third)
    assert worker.loaded.has(third)


def test_without_the_serial_number_old_requests_would_be_believed(
    worker: Worker, scheduler: Adapters
) -> None:
    """The test above has power: by their digests alone the first and the third loading are one."""
    worker.held[1] = model()
    worker.look()
    first = scheduler.find(Lora(1))
    for seed in (1, 0):
        worker.held[1] = model(seed=seed)
        worker.look()
    assert scheduler.find(Lora(1)).digest == first.digest


def test_news_are_told_once(worker: Worker) -> None:
    worker.held[1] = model()
    worker.look()
    assert worker.loaded.report() is None
    worker.held.clear()
    worker.loaded.look()
    assert worker.loaded.report() == {}
    assert worker.loaded.report() is None


def test_load_in_place_is_not_known(worker: Worker, scheduler: Adapters) -> None:
    """vLLM reads such an adapter again with every step that has such a request."""
    worker.held[1] = model()
    worker.look()
    with pytest.raises(Unknown, match="load_inplace"):
        scheduler.find(Lora(1, load_inplace=True))


def test_all_ranks_must_hold_the_same() -> None:
    scheduler = Adapters(num_ranks=2, settings="", tell=lambda line: None)
    scheduler.learn({0: {1: Weights(1, b"a"), 2: Weights(2, b"b")}})
    with pytest.raises(Unknown):
        scheduler.find(Lora(1))
    scheduler.learn({1: {1: Weights(5, b"a"), 2: Weights(6, b"c")}})
    assert scheduler.find(Lora(1)).serials == (1, 5)
    with pytest.raises(Unknown, match="other weights on other ranks"):
        scheduler.find(Lora(2))


def test_settings_of_the_engine_decide_too(worker: Worker, scheduler: Adapters) -> None:
    other = Adapters(num_ranks=1, settings="other", tell=lambda line: None)
    for each in (scheduler, other):
        each.learn({0: {1: Weights(1, b"a")}})
    assert scheduler.find(Lora(1)).digest != other.find(Lora(1)).digest
