"""Prefill and decode apart, everything a process of its own: one engine computes prompts, another answers.
Answers are those of one engine alone, token for token, whatever dies or stands still meanwhile.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

import pytest
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.testing import ask

from kvfabric.config import EngineConfig
from kvfabric.demo.processes import free_addresses
from kvfabric.testing.apart import Answer, ApartFleet, apart_fleet
from kvfabric.testing.processes import NodeProcess, ReferenceProcess, until

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

MODEL: dict[str, Any] = {"hbm_blocks": 1024}
BLOCK = 64
LONG = 900
IN_TIME_S = 30.0
"""Longer than any deadline here, shorter than a hang."""


def tokens(count: int, *, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 259), k=count)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApartFleet]:
    listen = iter(free_addresses(2))  # a process that is started again is found where it was
    engines = {
        name: (node, {"role": role, "listen": next(listen), **MODEL})
        for name, node, role in (("p", "a", "prefill"), ("d", "b", "decode"))
    }
    with apart_fleet(tmp_path_factory.mktemp("apart"), engines) as found:
        yield found


@pytest.fixture(scope="module")
def alone() -> Iterator[Engine]:
    with Engine(EngineConfig(**MODEL)) as engine:
        yield engine


@dataclass
class Asked:
    """A request under way."""

    thread: threading.Thread
    began: float
    answers: list[Answer]
    faults: list[Exception]

    def answer(self) -> Answer:
        self.thread.join(IN_TIME_S)
        assert not self.thread.is_alive(), "hangs"
        if self.faults:
            raise self.faults[0]
        return self.answers[0]


def begin(fleet: ApartFleet, prompt: Sequence[int], **fields: Any) -> Asked:
    answers: list[Answer] = []
    faults: list[Exception] = []

    def run() -> None:
        try:
            answers.append(fleet.ask(prompt, **fields))
        except (OSError, HTTPException, RuntimeError) as exc:
            faults.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    return Asked(thread, time.monotonic(), answers, faults)


@contextmanager
def answers_in_progress(fleet: ApartFleet) -> Iterator[None]:
    """Meanwhile some stand at the decode engine, so that a prompt is better computed elsewhere."""
    stop = threading.Event()

    def keep(seed: int) -> None:
        while not stop.is_set():
            with suppress(OSError, HTTPException, RuntimeError):
                fleet.ask(tokens(20, seed=seed), max_tokens=80)

    threads = [threading.Thread(target=keep, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: fleet.router_metric("in_flight_requests") >= 3)
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def engine_metric(engine: ReferenceProcess, name: str) -> float:
    with urllib.request.urlopen(f"{engine.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def half_computed(fleet: ApartFleet) -> Callable[[], bool]:
    """Whether the prefill engine has computed half a long prompt more than now."""
    name = "kvfabric_engine_computed_prompt_tokens_total"
    before = engine_metric(fleet.engines["p"], name)
    return lambda: engine_metric(fleet.engines["p"], name) >= before + LONG / 2


def right(alone: Engine, prompt: Sequence[int]) -> tuple[int, ...]:
    return ask(alone, prompt, max_tokens=16).token_ids


def nothing_leaks(fleet: ApartFleet) -> None:
    until(lambda: fleet.router_metric("in_flight_requests") == 0)
    for node in fleet.nodes.values():
        until(lambda node=node: not node.metrics()["leased_bytes"])  # type: ignore[misc]
        until(lambda node=node: not node.metrics()["draining_bytes"])  # type: ignore[misc]
    fetching = 'kvfabric_engine_requests{result="fetching"}'
    for engine in fleet.engines.values():
        until(lambda engine=engine: not engine_metric(engine, fetching))  # type: ignore[misc]


def again(fleet: ApartFleet, process: NodeProcess) -> None:
    process.kill()
    process.start()
    fleet.wait_engines(len(fleet.engines))


def test_on_one_engine_where_nobody_waits(fleet: ApartFleet, alone: Engine) -> None:
    prompt = tokens(LONG, seed=10)
    answer = fleet.ask(prompt)
    assert answer.token_ids == right(alone, prompt)
    told = fleet.explain(answer.request_id)
    assert (told["engine"], told["prefill_engine"]) == ("d", None)
    pair = next(one for one in told["candidates"] if one["prefill_engine"])
    assert "handoff" in pair["why_not"]


def test_the_same_answers(fleet: ApartFleet, alone: Engine) -> None:
    """A hit of part of the prompt at the prefill engine too; and the answer says where what was."""
    first = tokens(LONG, seed=11)
    prompts = [first, first[:1000] + tokens(400, seed=12), tokens(700, seed=13)]
    with answers_in_progress(fleet):
        for prompt in prompts:
            answer = fleet.ask(prompt)
            assert answer.token_ids == right(alone, prompt)
            told = fleet.explain(answer.request_id)
            assert (told["engine"], told["prefill_engine"]) == ("d", "p"), told
            assert answer.cached_tokens == (len(prompt) - 1) // BLOCK * BLOCK
        together = [begin(fleet, tokens(600, seed=20 + n)) for n in range(3)]
        for n, asked in enumerate(together):
            assert asked.answer().token_ids == right(alone, tokens(600, seed=20 + n))
    assert fleet.router_metric("handoffs_total", result="computed") >= 3
    assert fleet.router_metric("handoffs_total", result="failed") == 0
    nothing_leaks(fleet)


@pytest.mark.parametrize("who", ["prefill engine", "its node"])
def test_killed_while_it_computes(fleet: ApartFleet, alone: Engine, who: str) -> None:
    process = fleet.engines["p"] if who == "prefill engine" else fleet.nodes["a"]
    prompt = tokens(LONG, seed=30 + len(who))
    with answers_in_progress(fleet):
        is_half = half_computed(fleet)
        asked = begin(fleet, prompt)
        until(is_half)
        process.kill()
        answer = asked.answer()
    assert answer.token_ids == right(alone, prompt)
    told = fleet.explain(answer.request_id)
    assert (told["engine"], told["prefill_engine"]) == ("d", "p")
    again(fleet, process)
    nothing_leaks(fleet)


def test_refused_by_a_prefill_engine_that_is_gone(fleet: ApartFleet, alone: Engine) -> None:
    """The router does not know yet; nobody waits for what will not come."""
    prompt = tokens(LONG, seed=40)
    with answers_in_progress(fleet):
        fleet.engines["p"].kill()
        answer = begin(fleet, prompt).answer()
        assert answer.token_ids == right(alone, prompt)
        following = fleet.ask(tokens(LONG, seed=41))
        assert fleet.explain(following.request_id)["prefill_engine"] is None
    again(fleet, fleet.engines["p"])
    nothing_leaks(fleet)


@pytest.mark.parametrize("who", ["prefill engine", "its node"])
def test_stands_still_while_it_computes(fleet: ApartFleet, alone: Engine, who: str) -> None:
    """Only the deadline says so: then the rest is computed where it is answered."""
    process = fleet.engines["p"] if who == "prefill engine" else fleet.nodes["a"]
    prompt = tokens(LONG, seed=50 + len(who))
    with answers_in_progress(fleet):
        is_half = half_computed(fleet)
        asked = begin(fleet, prompt)
        until(is_half)
        os.kill(process.pid, signal.SIGSTOP)
        try:
            answer = asked.answer()
        finally:
            os.kill(process.pid, signal.SIGCONT)
    assert answer.token_ids == right(alone, prompt)
    fleet.wait_engines(len(fleet.engines))
    nothing_leaks(fleet)


def test_decode_killed_before_it_answers(fleet: ApartFleet, alone: Engine) -> None:
    """Another engine answers: the one for prompts, there being no other."""
    prompt = tokens(LONG, seed=60)
    with answers_in_progress(fleet):
        is_half = half_computed(fleet)
        asked = begin(fleet, prompt)
        until(is_half)
        fleet.engines["d"].kill()
        answer = asked.answer()
        assert answer.token_ids == right(alone, prompt)
        assert not answer.error
        told = fleet.explain(answer.request_id)
        assert (told["engine"], told["prefill_engine"]) == ("p", None)
        again(fleet, fleet.engines["d"])
    nothing_leaks(fleet)


def test_decode_killed_while_it_answers(fleet: ApartFleet) -> None:
    """After the first byte nothing is told twice: the stream ends with an error."""
    prompt = tokens(LONG, seed=70)
    with answers_in_progress(fleet):
        answered = engine_metric(fleet.engines["p"], "kvfabric_engine_answer_tokens_total")
        asked = begin(fleet, prompt, max_tokens=1000)
        until(
            lambda: (
                engine_metric(fleet.engines["p"], "kvfabric_engine_answer_tokens_total") > answered
            )
        )
        time.sleep(0.5)
        fleet.engines["d"].kill()
        answer = asked.answer()
        assert "engine_lost" in answer.error
        assert answer.token_ids
        again(fleet, fleet.engines["d"])
    nothing_leaks(fleet)
