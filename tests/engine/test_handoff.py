"""One reference engine computes a prompt, another answers it, over one real node: the answers are those of
one engine alone, token for token, whatever becomes of the first.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.reference.model import NOTHING, Span
from kvfabric_engine.testing import Answer, Pending, ask, begin, small_config

from kvfabric.daemon import handoffs
from kvfabric.handle import Handoff
from kvfabric.testing.processes import NodeProcess, until
from tests.engine.test_connector import make_handle, statistics

pytestmark = pytest.mark.slow

BLOCK = 16
MAX_TOKENS = 8
HOLD_S = 3.0
"""Longer than a test waits for anything that is to end by itself."""


def tokens(count: int, *, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 259), k=count)


@dataclass
class SlowModel:
    """Stops a model after so many spans of a prompt, until `go` is set."""

    engine: Engine
    after: int
    go: threading.Event = field(default_factory=threading.Event)
    num_spans: int = 0

    def __enter__(self) -> SlowModel:
        forward = self.engine.model.forward

        def slow(pool: torch.Tensor, spans: Sequence[Span], before: Any = NOTHING) -> torch.Tensor:
            self.num_spans += 1
            if self.num_spans > self.after:
                self.go.wait(HOLD_S)
            return forward(pool, spans, before)

        self.engine.model.forward = slow  # type: ignore[method-assign]
        return self

    def __exit__(self, *exc: object) -> None:
        self.go.set()
        del self.engine.model.forward


@dataclass
class Apart:
    node: NodeProcess
    prefill: Engine
    decode: Engine
    number: int = 0

    def begin(
        self, prompt: Sequence[int], *, wait_s: float = 10.0, is_computed: bool = True
    ) -> tuple[Pending | None, Pending]:
        """At both engines, as a router would."""
        self.number += 1
        name = f"h{self.number}"
        first = None
        if is_computed:
            handle = self._handle(self.prefill, f"{name}-p", Handoff(name, "n"))
            first = begin(self.prefill, prompt, max_tokens=1, handle=handle, request_id=f"{name}-p")
        handle = self._handle(self.decode, name, Handoff(name, "n", int(wait_s * 1e3)))
        second = begin(self.decode, prompt, max_tokens=MAX_TOKENS, handle=handle, request_id=name)
        return first, second

    def _handle(self, engine: Engine, request_id: str, handoff: Handoff) -> str:
        return make_handle(self.node, engine, request_id, handoff=handoff)

    def nothing_leaks(self) -> None:
        """No page, no lease."""
        until(lambda: self.decode.statistics().pool.used == 0)
        until(lambda: self.prefill.statistics().pool.used == 0)
        until(lambda: not self.node.metrics()["leased_bytes"])
        assert not self.node.metrics()["draining_bytes"]


@contextmanager
def engines_on(directory: Path) -> Iterator[Apart]:
    with ExitStack() as stack:
        node = stack.enter_context(NodeProcess(directory / "node", node_id="n", http="127.0.0.1:0"))
        config = small_config(node_socket=str(node.socket), hbm_blocks=512)
        found = [stack.enter_context(Engine(config)) for _ in range(2)]
        for engine in found:
            assert engine.connector is not None
            assert engine.connector.wait_connected(5)
        yield Apart(node, found[0], found[1])


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    with engines_on(tmp_path_factory.mktemp("handoff")) as found:
        yield found


def alone(prompt: Sequence[int]) -> tuple[int, ...]:
    with Engine(small_config()) as engine:
        return ask(engine, prompt, max_tokens=MAX_TOKENS).token_ids


def whole_blocks(prompt: Sequence[int]) -> int:
    """Tokens that can be handed over: the last one is computed where it is answered."""
    return (len(prompt) - 1) // BLOCK * BLOCK


def check(answer: Answer, prompt: Sequence[int], *, reused: int | None = None) -> None:
    assert answer.token_ids == alone(prompt)
    if reused is not None:
        assert answer.reused.host == reused


@pytest.mark.parametrize("length", [17, 100, 256, 257, 480])
def test_the_answer_is_that_of_one_engine(apart: Apart, length: int) -> None:
    """And what the first computed, the second did not."""
    prompt = tokens(length, seed=length)
    first, second = apart.begin(prompt)
    check(second.answer(), prompt, reused=whole_blocks(prompt))
    assert first is not None
    assert first.answer().finish == "length"
    apart.nothing_leaks()


def test_blocks_are_loaded_while_the_rest_is_computed(apart: Apart) -> None:
    prompt = tokens(480, seed=1)
    loaded = statistics(apart.decode).loaded_blocks
    with SlowModel(apart.prefill, after=BLOCK) as slow:  # 256 tokens are a step
        _, second = apart.begin(prompt)
        until(lambda: statistics(apart.decode).loaded_blocks - loaded >= 256 // BLOCK)
        slow.go.set()
        check(second.answer(), prompt, reused=whole_blocks(prompt))
    apart.nothing_leaks()


def test_several_at_once(apart: Apart) -> None:
    prompts = [tokens(n, seed=n) for n in (300, 301, 302, 303)]
    begun = [apart.begin(prompt) for prompt in prompts]
    for prompt, (_, second) in zip(prompts, begun, strict=True):
        check(second.answer(), prompt)
    apart.nothing_leaks()


@pytest.mark.parametrize("after", [0, 16], ids=["before", "during"])
def test_prefill_is_given_up(apart: Apart, after: int) -> None:
    """What was stored is used, the rest computed at once."""
    prompt = tokens(480, seed=50 + after)
    with SlowModel(apart.prefill, after=after) as slow:
        first, second = apart.begin(prompt)
        assert first is not None
        until(lambda: slow.num_spans > after)
        apart.prefill.abort(first.name)
        slow.go.set()
        began = time.monotonic()
        check(second.answer(), prompt)
        assert time.monotonic() - began < HOLD_S
    apart.nothing_leaks()


def test_prefill_hangs(apart: Apart) -> None:
    """Nothing is waited for beyond the deadline."""
    prompt, wait_s = tokens(480, seed=60), 1.0
    with SlowModel(apart.prefill, after=16):
        _, second = apart.begin(prompt, wait_s=wait_s)
        began = time.monotonic()
        check(second.answer(), prompt, reused=256)
        assert wait_s < time.monotonic() - began < wait_s + 1.0
    apart.nothing_leaks()


def test_prefill_never_gets_the_prompt(apart: Apart) -> None:
    prompt = tokens(100, seed=61)
    _, second = apart.begin(prompt, is_computed=False)
    began = time.monotonic()
    check(second.answer(), prompt, reused=0)
    assert time.monotonic() - began < handoffs.OPEN_S + 1.0
    apart.nothing_leaks()


def test_a_client_that_leaves_while_its_prompt_is_computed(apart: Apart) -> None:
    prompt = tokens(480, seed=62)
    with SlowModel(apart.prefill, after=16):
        _, second = apart.begin(prompt)
        apart.decode.abort(second.name)
        assert second.answer().finish == "abort"
    apart.nothing_leaks()


def test_the_node_dies(tmp_path: Path) -> None:
    prompt = tokens(480, seed=63)
    with engines_on(tmp_path) as apart, SlowModel(apart.prefill, after=16):
        _, second = apart.begin(prompt)
        until(lambda: statistics(apart.decode).loaded_blocks >= 16)
        apart.node.kill()
        began = time.monotonic()
        check(second.answer(), prompt, reused=256)
        assert time.monotonic() - began < 1.0
