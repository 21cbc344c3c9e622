"""What an engine says of its prefill, and what its node makes of it. Real processes and sockets."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import msgspec
import pytest

from kvfabric.client import EngineHello
from kvfabric.errors import RemoteProtocolError
from kvfabric.protocol import messages as m
from kvfabric.testing.engine import TinyEngine, tiny_hello
from kvfabric.testing.processes import NodeProcess
from kvfabric.types import UNKNOWN_COST, RecomputeCost

NUM_SLOTS = 256
DEAR = RecomputeCost(us_per_token=1000.0, growth=1e-4)
CHEAP = RecomputeCost(us_per_token=1.0)


def hello_of(model: str, cost: RecomputeCost) -> EngineHello:
    """Of a model whose layout no other has."""
    hello = tiny_hello(revision=model)
    layout = dataclasses.replace(hello.layout, rope=model)
    return dataclasses.replace(hello, layout=layout, recompute=cost)


def stored(node: NodeProcess, hello: EngineHello, prompt: str, num_blocks: int) -> None:
    engine = TinyEngine.connect(node.socket, hello)
    assert engine.store("s", engine.open("s", prompt, num_blocks)) == num_blocks
    engine.client.close()


def kept(node: NodeProcess, hello: EngineHello, prompt: str, num_blocks: int) -> int:
    engine = TinyEngine.connect(node.socket, hello)
    located = engine.locate("l", engine.open("l", prompt, num_blocks))
    engine.client.close()
    return located.num_blocks


@pytest.mark.fleet
@pytest.mark.parametrize("said", [True, False], ids=["said", "guard removed"])
def test_of_two_models_the_blocks_of_the_dear_one_go_later(tmp_path: Path, said: bool) -> None:
    """The dear ones are the older: without their cost they go first."""
    dear = hello_of("dear", DEAR if said else UNKNOWN_COST)
    cheap = hello_of("cheap", CHEAP if said else UNKNOWN_COST)
    with NodeProcess(tmp_path, host_bytes=NUM_SLOTS * 4096) as node:
        stored(node, dear, "dear", 20)
        stored(node, cheap, "cheap", 100)
        for number in range(3):
            stored(node, cheap, f"stream {number}", 50)
        assert (kept(node, dear, "dear", 20) == 20) == said


@pytest.mark.fleet
@pytest.mark.parametrize(
    ("us_per_token", "growth"), [(-1.0, 0.0), (math.nan, 0.0), (1.0, math.inf), (1.0, -1e-9)]
)
def test_a_cost_that_nobody_can_have_measured_is_refused(
    tmp_path: Path, us_per_token: float, growth: float
) -> None:
    with NodeProcess(tmp_path) as node:
        with pytest.raises(RemoteProtocolError, match="recomputing takes"):
            TinyEngine.connect(node.socket, hello_of("m", RecomputeCost(us_per_token, growth)))
        stored(node, hello_of("m", RecomputeCost(1e300, 1e-300)), "p", 2)


def test_older_engines_and_older_nodes_do_without() -> None:
    hello = hello_of("m", DEAR).to_wire(session=b"", resumed=False)
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(hello))
    known = 1 + m.Hello.__struct_fields__.index("us_per_token")  # behind the name of the message
    older = msgspec.msgpack.decode(msgspec.msgpack.encode(fields[:known]), type=m.Hello)
    assert (older.us_per_token, older.growth) == (0.0, 0.0)
    assert older.window_bytes == hello.window_bytes
    # What a newer engine adds at the end, this node passes over.
    newer = msgspec.msgpack.decode(msgspec.msgpack.encode([*fields, "more"]), type=m.Hello)
    assert newer == hello
