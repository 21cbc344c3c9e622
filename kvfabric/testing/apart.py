"""A fleet of real processes in which one engine computes prompts and another answers: two nodes with a Redis
between them, an engine at each (`kvfabric engine`), a router in front. For tests and benchmarks.
"""

from __future__ import annotations

import itertools
import json
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc

from kvfabric.handle import FORMAT_VERSION, Handle, Handoff, mint
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.testing.processes import (
    NodeProcess,
    ReferenceProcess,
    RouterProcess,
    start_all,
    until,
)
from kvfabric.testing.redis import RedisServer
from kvfabric.types import DEFAULT_TENANT

READY_S = 60.0
ANSWER_S = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """`at`: when each token came, seconds after the request. `usage` as the engine told it; `error`: the
    stream ended with one."""

    request_id: str
    token_ids: tuple[int, ...]
    at: tuple[float, ...]
    usage: Mapping[str, Any]
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.at[0]

    @property
    def cached_tokens(self) -> int:
        return int(self.usage["prompt_tokens_details"]["cached_tokens"])


def ask(
    url: str,
    prompt: Sequence[int],
    *,
    key: str = "",
    model: str = "reference",
    request_id: str = "",
    **fields: Any,
) -> Answer:
    """Greedy, streamed. Raises OSError, HTTPException and RuntimeError (a status that is no 200)."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    headers |= {"X-Request-Id": request_id} if request_id else {}
    connection = HTTPConnection(urlsplit(url).netloc, timeout=ANSWER_S)
    try:
        began = time.monotonic()
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}: {answer.read().decode()[:500]}")
        request_id = answer.getheader("X-Request-Id", "")
        tokens: list[int] = []
        at: list[float] = []
        usage: dict[str, Any] = {}
        error = ""
        for line in answer:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            error = json.dumps(event["error"]) if "error" in event else error
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                fresh = choice.get("token_ids") or []
                tokens += fresh
                at += [time.monotonic() - began] * len(fresh)
        return Answer(request_id, tuple(tokens), tuple(at), usage, error)
    finally:
        connection.close()


@dataclass
class ApartFleet:
    """`nodes` and `engines` by name. `key`: of the one tenant."""

    nodes: dict[str, NodeProcess]
    engines: dict[str, ReferenceProcess]
    router: RouterProcess
    key: str = ""
    model: str = "reference"
    requests: list[Answer] = field(default_factory=list)

    def ask(self, prompt: Sequence[int], **fields: Any) -> Answer:
        return ask(self.router.url, prompt, key=self.key, model=self.model, **fields)

    def explain(self, request_id: str) -> dict[str, Any]:
        asked = urllib.request.Request(
            f"{self.router.url}/v1/explain/{request_id}",
            headers={"Authorization": f"Bearer {self.key}"},
        )
        with urllib.request.urlopen(asked, timeout=READY_S) as answer:
            told: dict[str, Any] = json.load(answer)
        return told

    def router_metric(self, name: str, **labels: str) -> float:
        """0 if it is not there."""
        with urllib.request.urlopen(f"{self.router.url}/metrics", timeout=READY_S) as answer:
            lines = answer.read().decode().splitlines()
        said = ",".join(f'{label}="{value}"' for label, value in labels.items())
        wanted = f"kvfabric_router_{name}" + (f"{{{said}}} " if said else " ")
        return next((float(line.split()[-1]) for line in lines if line.startswith(wanted)), 0.0)

    def wait_engines(self, count: int) -> None:
        """Until so many engines take requests, with the fabric."""
        until(
            lambda: (
                self.router_metric("engines", result="taking") == count
                and self.router_metric("epoch_lease_valid") == 1
            ),
            deadline_s=READY_S,
        )


@contextmanager
def apart_fleet(
    directory: Path,
    engines: Mapping[str, tuple[str, Mapping[str, object]]],
    *,
    node: Mapping[str, object] | None = None,
    router: Mapping[str, object] | None = None,
) -> Iterator[ApartFleet]:
    """`engines`: by name, the node that each is at and its options; `node`, `router`: options of these. One
    node needs no Redis, and none is started."""
    with ExitStack() as stack:
        names = sorted({name for name, _ in engines.values()})
        shared: dict[str, object] = {"http": "127.0.0.1:0", "host_bytes": 1 << 30}
        front: dict[str, object] = dict(router or {})
        if len(names) > 1:
            redis = stack.enter_context(RedisServer(directory / "redis"))
            shared |= {"directory": redis.url, "keyring_dir": directory / "keys"}
            shared |= {"ucx_net_devices": "lo"}
            front |= {"directory": redis.url}
        else:
            admin = directory / names[0] / "admin.sock"
            front |= {"nodes": admin, "keyring_dir": directory / names[0]}
        nodes = {
            name: NodeProcess(directory / name, node_id=name, **(shared | dict(node or {})))  # type: ignore[arg-type]
            for name in names
        }
        processes = {
            name: ReferenceProcess(
                directory / name,
                engine_id=name,
                node_socket=nodes[where].socket,
                **options,
            )
            for name, (where, options) in engines.items()
        }
        first = nodes[names[0]]
        first.start()
        stack.push(first.__exit__)
        rest = [one for one in nodes.values() if one is not first]
        entry = RouterProcess(directory / "router", **front)  # type: ignore[arg-type]
        stack.enter_context(start_all([*rest, *processes.values(), entry]))
        found = ApartFleet(nodes, processes, entry)
        with grpc.insecure_channel(f"unix:{first.state_dir / 'admin.sock'}") as channel:
            registry = pb_grpc.RegistryServiceStub(channel)  # type: ignore[no-untyped-call]
            created = registry.CreateTenant(
                pb.CreateTenantRequest(name="one"), timeout=READY_S, wait_for_ready=True
            )
        found.key = created.api_key
        found.wait_engines(len(engines))
        yield found


class EngineHandles:
    """Handles for the engines themselves, as a router would mint them: (request id, handle). `node`: where
    prompts are computed."""

    def __init__(self, fleet: ApartFleet, *, node: str) -> None:
        keys = fleet.nodes[node].options.get("keyring_dir") or fleet.nodes[node].state_dir
        self._key_id, self._key = Keyring.open(Path(str(keys))).current_handle_key()
        self._node = node
        self._told = {name: _told_of(engine.url) for name, engine in fleet.engines.items()}
        self._numbers = itertools.count()

    def plain(self, engine: str) -> tuple[str, str]:
        return self._mint(engine, None)

    def prefill(self, engine: str, name: str) -> tuple[str, str]:
        """For the engine that computes the prompt of hand-off `name`."""
        return self._mint(engine, Handoff(name, self._node))

    def decode(self, engine: str, name: str, wait_ms: int) -> tuple[str, str]:
        """For the one that answers it."""
        return self._mint(engine, Handoff(name, self._node, wait_ms))

    def _mint(self, engine: str, handoff: Handoff | None) -> tuple[str, str]:
        told, request_id = self._told[engine], f"r{next(self._numbers)}"
        handle = Handle(
            version=FORMAT_VERSION,
            key_id=self._key_id,
            tenant=DEFAULT_TENANT,
            model_revision=told["model_revision"],
            adapter="",
            adapter_revision="",
            layout_fingerprint=bytes.fromhex(told["layout_fingerprint"]),
            segments=(),
            public_tokens=0,
            cacheable_tokens=-1,
            epochs=(),
            audience=bytes.fromhex(told["session"]),
            request_id=request_id,
            expires_at=int(time.time()) + 3600,
            handoff=handoff,
        )
        return request_id, mint(handle, self._key)


def _told_of(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=READY_S) as answer:
        told: dict[str, Any] = json.load(answer)["data"][0]["kvfabric"]
    return told
