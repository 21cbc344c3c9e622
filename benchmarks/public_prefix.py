"""One public prompt of many tenants, on real engines: what they compute, against a namespace for each tenant.

The reference engine keys its own cache by block, so that tenants share it too. vLLM's is salted for each
tenant: there the first one computes the prompt, and the others load it from the node's host tier.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import harness
import vllm_process
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.testing import ask, small_config
from kvfabric_router.identity import Addressee, ModelIdentity, RequestIdentity
from kvfabric_router.prompt import Recognised

from kvfabric.daemon.admin_client import AdminClient
from kvfabric.hashing import layout_fingerprint
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.registry.state import RegistryState, Tenant
from kvfabric.testing.minting import segment_of
from kvfabric.testing.processes import NodeProcess, until

OWN_TOKENS = 16
VLLM_PYTHON = harness.ROOT / ".venv-vllm" / "bin" / "python"
SIDES = ("public", "one salt per tenant")


class Request(NamedTuple):
    tokens: list[int]
    handle: str
    salt: str
    request_id: str


@dataclass
class Fleet:
    """A node with tenants; requests as its router would send them."""

    node: NodeProcess
    admin: AdminClient
    state: RegistryState
    tenants: list[Tenant]
    keyring: Keyring
    prompt: list[int]
    source: random.Random

    def requests(self, side: str, model: ModelIdentity, session: bytes) -> Iterator[Request]:
        segment = segment_of(self.state, "p", "1")
        public = len(self.prompt) // model.block_tokens * model.block_tokens
        for tenant in self.tenants:
            tokens = self.prompt + self.source.choices(range(3, 259), k=OWN_TOKENS)
            identity = RequestIdentity(
                tenant=tenant,
                state=self.state,
                keyring=self.keyring,
                token_ids=tokens,
                recognised=Recognised((segment,), public_tokens=public if side == "public" else 0),
            )
            name = f"{side}-{tenant.name}".replace(" ", "-")
            handle = identity.mint(
                model, to=Addressee(session), request_id=name, expires_at=int(time.time()) + 600
            )
            yield Request(tokens, handle, identity.keys(model).salt, name)

    def num_blocks(self) -> int:
        status: pb.NodeStatus = self.admin.call(self.admin.admin.Status, pb.StatusRequest())
        return sum(tier.num_blocks for tier in status.tiers)


@contextlib.contextmanager
def fleet(home: Path, num_tenants: int, num_tokens: int) -> Iterator[Fleet]:
    source = random.Random(7)
    prompt = source.choices(range(3, 259), k=num_tokens)
    with (
        NodeProcess(home, epoch_lease_s=0.5) as node,
        AdminClient(node.state_dir / "admin.sock") as admin,
    ):
        text = pb.RegisterTemplateRequest(name="p", version="1", text=b"kind", is_public=True)
        admin.call(admin.registry.RegisterTemplate, text)
        for number in range(num_tenants):
            admin.call(admin.registry.CreateTenant, pb.CreateTenantRequest(name=f"t{number}"))
        state = admin.state()
        tenants = [t for t in state.tenants.values() if t.name not in ("default", "public")]
        keyring = Keyring.create_or_open(home)
        yield Fleet(node, admin, state, tenants, keyring, prompt, source)


def on_reference(home: Path, num_tenants: int, num_tokens: int) -> dict[str, float]:
    """Prompt tokens that the engine computes for all tenants together, either way."""
    rows: dict[str, float] = {}
    with fleet(home, num_tenants, num_tokens) as found:
        for side in SIDES:
            config = small_config(node_socket=str(found.node.socket), hbm_blocks=2048)
            with Engine(config) as engine:
                assert engine.connector is not None
                assert engine.connector.wait_connected(10)
                layout = engine.layout
                model = ModelIdentity(
                    engine.model.revision, layout_fingerprint(layout), layout.block_tokens
                )
                for request in found.requests(side, model, engine.connector.session):
                    ask(
                        engine,
                        request.tokens,
                        handle=request.handle,
                        request_id=request.request_id,
                        max_tokens=1,
                    )
                rows[side] = engine.statistics().computed_prompt_tokens
    return rows


def why_no_vllm() -> str:
    return "" if VLLM_PYTHON.exists() else "there is no .venv-vllm (`make .venv-vllm`)"


def on_vllm(home: Path, num_tenants: int, num_tokens: int) -> dict[str, float]:
    """As `on_reference`; each tenant asks when what the one before stored is there."""
    rows: dict[str, float] = {}
    with (
        fleet(home / "node", num_tenants, num_tokens) as found,
        started(home, found.node, num_tokens) as engine,
    ):
        engine.ask(range(3, 11), 1)  # the first step joins the worker to the session
        status = found.admin.call(found.admin.admin.Status, pb.StatusRequest())
        [known] = status.engines
        model = ModelIdentity(known.model_revision, known.layout_fingerprint, known.block_tokens)
        for side in SIDES:
            stored = found.num_blocks()
            rows[side] = 0.0
            engine.do("drop_hbm")  # a tenant has one salt on both sides
            for number, request in enumerate(found.requests(side, model, known.session)):
                answer = engine.ask(
                    request.tokens,
                    1,
                    handle=request.handle,
                    salt=request.salt,
                    request_id=request.request_id,
                )
                rows[side] += len(request.tokens) - answer["cached"]
                prompts = 1 if side == "public" else number + 1
                blocks = stored + prompts * (num_tokens // known.block_tokens)
                until(at_least(found.num_blocks, blocks))
    return rows


def at_least(count: Callable[[], int], number: int) -> Callable[[], bool]:
    return lambda: count() >= number


@contextlib.contextmanager
def started(home: Path, node: NodeProcess, num_tokens: int) -> Iterator[vllm_process.EngineProcess]:
    checkpoint = vllm_process.write_checkpoint(
        home / "model", layers=2, hidden=128, kv_heads=2, seed=0
    )
    arguments: vllm_process.Row = {
        "model": str(checkpoint),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": num_tokens + vllm_process.BLOCK_TOKENS,
        "max_num_seqs": 4,
        "num_gpu_blocks_override": 64,
        "seed": 0,
        "kv_transfer_config": vllm_process.FABRIC,
    }
    environment = vllm_process.environment_of(node.socket, 1)
    with vllm_process.EngineProcess(
        "vllm", arguments, home, environment, python=str(VLLM_PYTHON)
    ) as engine:
        engine.wait_ready()
        yield engine


def saving(computed: dict[str, float]) -> float:
    """Of the prompt tokens that are computed with a namespace for each tenant."""
    public, salted = (computed[side] for side in SIDES)
    return (salted - public) / salted
