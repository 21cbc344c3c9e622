"""The OpenAI server with the fabric's one flag, in which a router finds its address; its node is in its
default place.

It takes LoRA adapters at run time too: one start serves all tests here.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from vllm.lora.request import LoRARequest

from kvfabric.handle import Handoff
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.testing.processes import NodeProcess, RouterProcess, until
from tests.vllm.adapter import write_adapter
from tests.vllm.conftest import PYTHON, make_node
from tests.vllm.engines import FLAG, Gate, Minter, in_thread, prompt, running, wait_for

START_S = 400.0
ANSWER_S = 60.0
PROMPTS = [prompt(700, seed=91), prompt(300, seed=92), prompt(520, seed=93)]
HANDED_OVER = [prompt(1500, seed=94 + n) for n in range(3)]


class Server:
    """`python -m vllm.entrypoints.openai.api_server` in a process group of its own."""

    def __init__(self, checkpoint: Path, state_home: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(checkpoint), "--served-model-name", "small"]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
        command += ["--num-gpu-blocks-override", "128", "--max-num-batched-tokens", "512"]
        command += ["--enable-prompt-tokens-details", "--enable-lora", "--max-lora-rank", "8"]
        endpoint = {"endpoint": f"http://127.0.0.1:{self._port}"}  # for a router
        flag = FLAG | {"kv_connector_extra_config": endpoint}
        command += ["--kv-transfer-config", json.dumps(flag)]
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("VLLM_ENABLE_V1_MULTIPROCESSING", "KVFABRIC_ENGINE_NODE_SOCKET")
        }
        environment |= {"XDG_STATE_HOME": str(state_home), "VLLM_LOGGING_LEVEL": "INFO"}
        environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        self.log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def wait_ready(self) -> None:
        until(self._is_ready, deadline_s=START_S)

    def _is_ready(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{self.log.read_text()[-4000:]}")
        try:
            self.get("/health")
        except OSError:
            return False
        return True

    def get(self, path: str) -> str:
        url = f"http://127.0.0.1:{self._port}{path}"
        with urllib.request.urlopen(url, timeout=ANSWER_S) as answer:
            text: str = answer.read().decode()
        return text

    def post(self, path: str, body: dict[str, Any], *, answer_s: float = ANSWER_S) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=answer_s) as answer:
            text: str = answer.read().decode()
        return text

    def load_adapter(self, name: str, folder: Path, **fields: Any) -> None:
        """By vLLM's dynamic endpoint."""
        body = {"lora_name": name, "lora_path": str(folder)}
        assert self.post("/v1/load_lora_adapter", body | fields).startswith("Success")

    def complete(
        self, tokens: list[int], *, answer_s: float = ANSWER_S, **fields: Any
    ) -> tuple[tuple[int, ...], int]:
        """(token ids of the answer, tokens of the prompt that were cached)."""
        body = self.body(tokens) | fields
        return _read(self.post("/v1/completions", body, answer_s=answer_s))

    def body(self, tokens: list[int]) -> dict[str, Any]:
        """Of a request for 16 tokens."""
        return {
            "model": "small",
            "prompt": tokens,
            "max_tokens": 16,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }

    def counter(self, name: str) -> float:
        """A counter of /metrics, all its labels together."""
        lines = self.get("/metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _read(text: str | bytes) -> tuple[tuple[int, ...], int]:
    """(token ids of the answer, tokens of the prompt that were cached)."""
    answer = json.loads(text)
    assert answer.get("kv_transfer_params") is None
    details = answer["usage"]["prompt_tokens_details"] or {}
    return tuple(answer["choices"][0]["token_ids"]), details.get("cached_tokens") or 0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def default_node(home: Path) -> Iterator[NodeProcess]:
    with make_node(home / "kvfabric") as node:
        yield node


@pytest.fixture(scope="module")
def server(
    checkpoint: Path,
    home: Path,
    default_node: NodeProcess,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    server = Server(checkpoint, home, tmp_path_factory.mktemp("server") / "log")
    try:
        yield server  # starts while the right answers are computed
    finally:
        server.stop()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(folder / name, seed=n) for n, name in enumerate(("one", "two"), 1)}


@pytest.fixture(scope="module")
def gates(server: Server, checkpoint: Path, adapters: dict[str, Path]) -> dict[str, Gate]:
    """The right answers with each adapter and ("") without one."""
    gates = {name: Gate() for name in ("", *adapters)}
    with running(checkpoint, fabric=False, enable_lora=True, max_lora_rank=8) as alone:
        gates[""].learn(alone, PROMPTS + HANDED_OVER)
        for number, (name, folder) in enumerate(adapters.items(), 1):
            gates[name].learn(alone, PROMPTS[:1], lora=LoRARequest(name, number, str(folder)))
    server.wait_ready()
    return gates


@pytest.fixture
def gate(gates: dict[str, Gate]) -> Gate:
    return gates[""]


def right(gate: Gate, tokens: list[int]) -> tuple[int, ...]:
    return gate.right(tokens).token_ids


def test_two_engines_share_one_node(
    server: Server, gate: Gate, checkpoint: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server stored an engine in this process loads, and the other way round."""
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    monkeypatch.delenv("KVFABRIC_ENGINE_NODE_SOCKET", raising=False)
    assert server.complete(PROMPTS[0]) == (right(gate, PROMPTS[0]), 0)
    assert server.complete(PROMPTS[0]) == (right(gate, PROMPTS[0]), 640)
    with running(checkpoint) as engine:
        engine.wait_matched(PROMPTS[:1], (5,))
        answer = engine.answer(PROMPTS[0])
        assert (answer.token_ids, answer.num_cached) == (right(gate, PROMPTS[0]), 640)
        gate.check(PROMPTS, engine.store(PROMPTS))
    assert server.complete(PROMPTS[1]) == (right(gate, PROMPTS[1]), 256)
    assert server.complete(PROMPTS[2]) == (right(gate, PROMPTS[2]), 512)


def test_prefill_in_the_server_answers_here(
    server: Server,
    gate: Gate,
    checkpoint: Path,
    home: Path,
    default_node: NodeProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunk by chunk; then a prompt that its client takes back at the server, and one that it never gets."""
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    monkeypatch.delenv("KVFABRIC_ENGINE_NODE_SOCKET", raising=False)
    whole, taken_back, never = HANDED_OVER
    with running(checkpoint) as engine:
        minter = Minter(engine, default_node)
        here = minter.session

        node_id, there = others(default_node, here)

        def handle(name: str, *, wait_ms: int = 0) -> str:
            handoff = Handoff(name, node_id, wait_ms)
            return minter(audience=here if wait_ms else there, handoff=handoff)

        def prefill(tokens: list[int], name: str, answer_s: float = ANSWER_S) -> None:
            params = {"kvfabric": handle(name)}
            with contextlib.suppress(TimeoutError):
                server.complete(tokens, answer_s=answer_s, max_tokens=1, kv_transfer_params=params)

        first = in_thread(lambda: prefill(whole, "whole"))
        answer = engine.answer(whole, handles=[handle("whole", wait_ms=20_000)])
        first.join()
        gate.check([whole], [answer])
        assert answer.num_cached == 1408  # eleven blocks: all but the tail

        first = in_thread(lambda: prefill(taken_back, "taken back", answer_s=0.2))
        began = time.monotonic()
        answer = engine.answer(taken_back, handles=[handle("taken back", wait_ms=60_000)])
        first.join()
        gate.check([taken_back], [answer])
        assert time.monotonic() - began < 30

        answer = engine.answer(never, handles=[handle("never", wait_ms=60_000)])
        gate.check([never], [answer])
        assert answer.num_cached == 0
        assert time.monotonic() - began < 50


def others(node: NodeProcess, session: bytes) -> tuple[str, bytes]:
    """The node's id, and the session of its only other engine."""
    with grpc.insecure_channel(f"unix:{node.state_dir / 'admin.sock'}") as channel:
        events = pb_grpc.NodeEventsStub(channel)  # type: ignore[no-untyped-call]
        described = events.Describe(pb.DescribeRequest(), timeout=10)
    (other,) = {bytes(engine.session) for engine in described.engines} - {session}
    return described.node_id, other


def test_behind_a_router(
    server: Server, gate: Gate, default_node: NodeProcess, tmp_path: Path
) -> None:
    """vLLM takes the router's handle and salt: reuse within a tenant and none across, out of HBM and, when
    others have pushed it out there, out of the node; the router is told how much it was."""
    admin = default_node.state_dir / "admin.sock"
    tokens, state = PROMPTS[0], str(default_node.state_dir)
    with (
        RouterProcess(tmp_path, python=PYTHON, nodes=str(admin), keyring_dir=state) as router,
        grpc.insecure_channel(f"unix:{admin}") as channel,
    ):
        registry = pb_grpc.RegistryServiceStub(channel)  # type: ignore[no-untyped-call]
        keys = [
            registry.CreateTenant(pb.CreateTenantRequest(name=name), timeout=10).api_key
            for name in ("one", "two")
        ]

        def ask(key: str, prompt: list[int]) -> tuple[tuple[int, ...], int, str]:
            body = server.body(prompt)
            request = urllib.request.Request(
                f"{router.url}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
            )
            with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
                return *_read(answer.read()), answer.headers["X-Request-Id"]

        def is_taking() -> bool:
            try:
                return ask(keys[1], prompt(20, seed=7))[1] == 0
            except urllib.error.HTTPError:
                return False

        until(is_taking, deadline_s=ANSWER_S)
        saved = server.counter("kvfabric_engine_saved_blocks_total")
        expected = right(gate, tokens)
        assert ask(keys[0], tokens)[:2] == (expected, 0)
        assert ask(keys[0], tokens)[:2] == (expected, 640)
        assert ask(keys[1], tokens)[:2] == (expected, 0)
        for number in range(9):  # 128 pages of 128 tokens are all there are
            ask(keys[1], prompt(1900, seed=700 + number))
        wait_for(lambda: server.counter("kvfabric_engine_saved_blocks_total") >= saved + 10)
        loaded = server.counter("kvfabric_engine_loaded_blocks_total")
        found, cached, request_id = ask(keys[0], tokens)
        assert (found, cached) == (expected, 640)
        assert server.counter("kvfabric_engine_loaded_blocks_total") >= loaded + 5
        asked = urllib.request.Request(
            f"{router.url}/v1/explain/{request_id}", headers={"Authorization": f"Bearer {keys[0]}"}
        )
        with urllib.request.urlopen(asked, timeout=ANSWER_S) as answer:
            told = json.load(answer)
        assert told["node"]["host_blocks"] == 5
        assert told["actual"]["prompt_tokens"] == len(tokens)
        assert sum(told["actual"]["reuse_tokens"].values()) == 640


def test_counts_are_in_metrics(server: Server, gate: Gate) -> None:
    """/metrics of vLLM has what was loaded and stored, and why not."""
    server.complete(PROMPTS[1])
    wait_for(lambda: server.counter("kvfabric_engine_saved_blocks_total") >= 5)
    assert server.counter("kvfabric_engine_loaded_blocks_total") >= 6
    assert server.counter("kvfabric_engine_misses_total") > 0


def test_forged_handles_and_odd_params_are_harmless(server: Server, gate: Gate) -> None:
    """Whatever a client puts into the fields of the router: an answer, and nothing shared."""
    for params in ({"kvfabric": "forged"}, {"kvfabric": 7}, {"kvfabric": ["x"]}, {"other": 1}):
        found, cached = server.complete(PROMPTS[0], kv_transfer_params=params)
        assert found == right(gate, PROMPTS[0])
        assert cached == 0 or params["kvfabric" if "kvfabric" in params else "other"] != "forged"
    assert server.complete(PROMPTS[0], cache_salt="mine")[1] == 0


def test_adapters_of_the_dynamic_endpoint(
    server: Server, gates: dict[str, Gate], adapters: dict[str, Path]
) -> None:
    """Loaded while the server runs: cached by content from then on, under any name; exchanged in place."""
    tokens = PROMPTS[0]
    fresh = [prompt(300, seed=s) for s in range(300, 360)]

    def is_stored(name: str) -> bool:
        before = server.counter("kvfabric_engine_saved_blocks_total")
        server.complete(fresh.pop(), model=name)
        server.complete(prompt(8, seed=1))
        return server.counter("kvfabric_engine_saved_blocks_total") > before

    server.load_adapter("first", adapters["one"])
    assert server.complete(tokens, model="first") == (right(gates["one"], tokens), 0)
    wait_for(lambda: is_stored("first"))
    assert server.complete(tokens, model="first")[0] == right(gates["one"], tokens)
    server.load_adapter("second", adapters["one"])  # which shares nothing in HBM
    wait_for(lambda: is_stored("second"))
    assert server.complete(tokens, model="second") == (right(gates["one"], tokens), 640)
    server.load_adapter("second", adapters["two"], load_inplace=True)
    assert server.complete(tokens, model="second")[0] == right(gates["two"], tokens)


def test_node_killed_under_the_server(
    server: Server, gate: Gate, default_node: NodeProcess
) -> None:
    """Without its node the server answers, and comes back to it; its log says so in one line."""
    default_node.kill()
    for tokens in PROMPTS:
        assert server.complete(tokens)[0] == right(gate, tokens)
    default_node.start()
    fresh = [prompt(300, seed=s) for s in range(200, 230)]

    def is_back() -> bool:
        before = server.counter("kvfabric_engine_saved_blocks_total")
        server.complete(fresh.pop())
        server.complete(prompt(8, seed=1))
        return server.counter("kvfabric_engine_saved_blocks_total") > before

    wait_for(is_back)
    assert "fabric: connected to the node" in server.log.read_text()
