"""Proof 1: what one tenant stored is there for it, and for nobody else: host, SSD, events, index, status.

Random probes against a real node over its socket, each pair of an owner's match that must hit and another's
that must not. Twins: keys without the tenant, and keys that alone decide.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvfabric.daemon.admin_client import AdminClient
from kvfabric.events.index import FleetIndex
from kvfabric.hashing import ROOT_PARENT, namespace_tag
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.protocol.messages import (
    Match,
    Matched,
    OpenHandle,
    Release,
    Request,
    Reserve,
    Reserved,
)
from kvfabric.testing.engine import DEADLINE_S, TinyEngine, tiny_hello
from kvfabric.testing.processes import until
from kvfabric.types import BlockKey, GrantState
from tests.torture.launcher import Launcher
from tests.torture.nodes import ForkedNode
from tests.torture.scale import at_most, count, record
from tests.torture.tenants import Tenants, create_tenants, pipelined

pytestmark = [pytest.mark.fleet, pytest.mark.slow]

PROBES = count(100_000, 1_000_000, "KVFABRIC_TORTURE_PROBES")
PROMPTS, BLOCKS = 48, 6
HOST_BYTES = 704 << 10  # less than is stored: a part of it is in SSD only
AT_ONCE = 128
HOST, SSD = 0, 1


@dataclass
class Stored:
    """A node on which every tenant stored prompts of its own; all of them know all texts."""

    node: ForkedNode
    admin: AdminClient
    tenants: Tenants
    owner: dict[str, str] = field(default_factory=dict)

    def keys(self, tenant: str, prompt: str) -> list[BlockKey]:
        return self.tenants.keys(tenant, prompt, BLOCKS)

    def store(self, prompts: Iterable[tuple[str, str]]) -> None:
        """And use them twice, so that they go to SSD; wait for that."""
        stored: set[BlockKey] = set()
        for prompt, owner in prompts:
            keys = self.keys(owner, prompt)
            assert self.tenants.store(owner, keys) == BLOCKS
            stored.update(keys)
            for _ in range(2):
                request = self.tenants.open(owner)
                client = self.tenants.engine.client
                assert client.match(request, keys, deadline_s=DEADLINE_S).num_blocks == BLOCKS
                client.release([request], deadline_s=DEADLINE_S)
        until(lambda: stored <= set(self.status().sealed_keys))

    def status(self) -> pb.NodeStatus:
        request = pb.StatusRequest(sealed_keys=True)
        found: pb.NodeStatus = self.admin.call(self.admin.admin.Status, request)
        return found


@contextlib.contextmanager
def stored(directory: Path, *changes: str, host_bytes: int = HOST_BYTES) -> Iterator[Stored]:
    with contextlib.ExitStack() as stack:
        launcher = stack.enter_context(Launcher())
        options: dict[str, Any] = {"host_bytes": host_bytes, "ssd_bytes": 64 << 20}
        node = stack.enter_context(ForkedNode(launcher, directory, changes=changes, **options))
        admin = stack.enter_context(AdminClient(directory / "admin.sock"))
        engine = TinyEngine.connect(node.socket, tiny_hello())
        stack.callback(engine.client.close)
        found = Stored(node, admin, Tenants(directory, engine, create_tenants(admin, 4)))
        for number in range(PROMPTS):
            found.owner[f"prompt {number}"] = found.tenants.names[number % 4]
        prompts = list(found.owner.items())
        for start in range(0, PROMPTS, 8):
            found.store(prompts[start : start + 8])
        yield found


@dataclass
class Probe:
    """A match. `kind`: whose keys; `expected`: how many blocks it must find."""

    kind: str
    tenant: str
    keys: list[BlockKey]
    expected: int


class Prober:
    """Draws probes and counts what came of them."""

    def __init__(self, found: Stored, seed: int = 5) -> None:
        self.asked: Counter[str] = Counter()
        self.foreign: Counter[str] = Counter()
        self.missed = 0
        self.tiers: Counter[int] = Counter()
        self._found = found
        self._chance = random.Random(seed)
        names = found.tenants.names
        self._requests = {name: found.tenants.open(name) for name in names}
        self._owned = list(found.owner.items())
        self._others = {name: [n for n in names if n != name] for name in names}
        self._of_others = {
            name: [known for known, whose in self._owned if whose != name] for name in names
        }
        self._leasing = {name: found.tenants.handle(name, f"leasing-{name}") for name in names}
        self._keys = {
            (name, prompt): found.keys(name, prompt) for name in names for prompt in found.owner
        }

    def draw(self) -> Probe:
        """One in sixteen is the owner's own, as the control; the others must find nothing of another's."""
        prompt, owner = self._chance.choice(self._owned)
        other = self._chance.choice(self._others[owner])
        first = self._chance.randrange(BLOCKS)
        of_owner, of_other = self._keys[owner, prompt], self._keys[other, prompt]
        match self._chance.randrange(16):
            case 0:
                return Probe("own", owner, of_owner, BLOCKS)
            case 1 | 2 | 3 | 4:  # the owner's very keys under another tenant's handle
                return Probe("stolen", other, of_owner[first:], 0)
            case 5:  # another's own blocks, and then the owner's
                mine = self._chance.choice(
                    [known for known, whose in self._owned if whose == other]
                )
                mixed = self._keys[other, mine][: first + 1] + of_owner[first + 1 :]
                return Probe("mixed", other, mixed, first + 1)
            case _:
                return Probe("same text", other, of_other[first:], 0)

    def run(self, number: int) -> None:
        client = self._found.tenants.engine.client
        for start in range(0, number, AT_ONCE):
            probes = [self.draw() for _ in range(min(AT_ONCE, number - start))]
            messages = [message for probe in probes for message in self._messages(probe)]
            answers = [a for a in pipelined(client, messages) if isinstance(a, Matched)]
            for probe, matched in zip(probes, answers, strict=True):
                self.asked[probe.kind] += 1
                self.tiers.update(matched.tiers if probe.kind == "own" else b"")
                self.foreign[probe.kind] += max(0, matched.num_blocks - probe.expected)
                self.missed += probe.kind == "own" and matched.num_blocks < probe.expected

    def run_reserving(self, number: int) -> None:
        """Would these blocks be new? Of texts that others stored, many keys at a time."""
        client = self._found.tenants.engine.client
        for _ in range(0, number, 4 * BLOCKS):
            tenant = self._chance.choice(self._found.tenants.names)
            prompts = self._chance.sample(self._of_others[tenant], 4)
            keys = b"".join(key for prompt in prompts for key in self._keys[tenant, prompt])
            message = Reserve(self._requests[tenant], ROOT_PARENT, keys, 0, 0)
            [reserved] = pipelined(client, [message])
            assert isinstance(reserved, Reserved)
            self.asked["reserving"] += len(reserved.states)
            self.foreign["reserving"] += sum(s != GrantState.GRANTED for s in reserved.states)
            if reserved.reservation:
                client.abort(reserved.reservation, deadline_s=DEADLINE_S)

    def _messages(self, probe: Probe) -> list[Request]:
        if not probe.expected:
            return [Match(self._requests[probe.tenant], b"".join(probe.keys))]
        # Answered in order: there is never more than one lease.
        request, handle = f"leasing-{probe.tenant}", self._leasing[probe.tenant]
        match = Match(request, b"".join(probe.keys))
        return [OpenHandle(request, handle), match, Release((request,))]


def probe(found: Stored, number: int) -> Prober:
    """Two fifths match; the others reserve, which evicts host memory to SSD."""
    prober = Prober(found)
    prober.run(number * 2 // 5)
    prober.run_reserving(number * 3 // 5)
    return prober


def test_random_probes_find_nothing_of_others(tmp_path: Path) -> None:
    with stored(tmp_path / "n") as found:
        prober = probe(found, PROBES)
    assert prober.missed == 0
    assert min(prober.tiers[HOST], prober.tiers[SSD]) > PROBES // 500
    crossed = sum(prober.foreign.values())
    assert crossed == 0, prober.foreign
    foreign = prober.asked.total() - prober.asked["own"]
    record(
        "tenants 1. random probes for what another tenant stored, in host memory and on SSD",
        prober.asked.total(),
        f"{at_most(crossed, foreign)} hits of {foreign} with another's keys or text "
        f"({prober.asked['reserving']} of them by reserving); {prober.asked['own']} matches of the "
        f"owners' own all hit: {prober.tiers[HOST]} blocks in host memory, {prober.tiers[SSD]} on SSD",
    )


def test_keys_without_the_tenant_are_found_out(tmp_path: Path) -> None:
    """The twin: all tenants have one secret and one name, and keys decide."""
    with stored(tmp_path / "n", "no_salt", "no_lineage") as found:
        prober = probe(found, 2000)
    assert prober.foreign["same text"] > 200
    assert prober.foreign["reserving"] == prober.asked["reserving"]


def test_keys_that_alone_decide_are_found_out(tmp_path: Path) -> None:
    """The twin of the second guard: a key that leaked is enough."""
    with stored(tmp_path / "n", "no_lineage") as found:
        prober = probe(found, 2000)
    assert prober.foreign["stolen"] > 100
    assert not prober.foreign["reserving"]
    assert prober.foreign["same text"] == 0


def test_without_the_salt_the_lineage_holds(tmp_path: Path) -> None:
    """Either guard alone keeps tenants apart."""
    with stored(tmp_path / "n", "no_salt") as found:
        prober = probe(found, 2000)
    del prober.foreign["reserving"]  # refused, as what is not one's own
    assert not sum(prober.foreign.values())


# ---------------------------------------------------------------------- events, index, status


def snapshot(node: ForkedNode) -> tuple[FleetIndex, list[pb.EventBatch]]:
    """What a router learns of the node."""
    index = FleetIndex()
    with grpc.insecure_channel(f"unix:{node.socket.parent}/admin.sock") as channel:
        events = pb_grpc.NodeEventsStub(channel)  # type: ignore[no-untyped-call]
        batches = list(events.Snapshot(pb.SnapshotRequest(), timeout=DEADLINE_S))
    for batch in batches:
        index.apply("n", batch)
    return index, batches


def in_index(found: Stored, tenant: str, prompt: str, index: FleetIndex, tag_of: str) -> int:
    """How many of a tenant's keys the index finds under the tag of `tag_of`."""
    tag = namespace_tag(found.tenants.namespace_key(tag_of))
    present = index.match(tag, found.keys(tenant, prompt))
    return max((int(there.sum()) for there in present.values()), default=0)


def look(found: Stored) -> tuple[dict[str, int], dict[str, int]]:
    """Places where an owner finds its prompts, and where another finds them by the same text."""
    own: Counter[str] = Counter()
    others: Counter[str] = Counter()
    index, batches = snapshot(found.node)
    sent = b"".join(run.keys for batch in batches for run in batch.runs)
    events = {sent[start : start + 8] for start in range(0, len(sent), 8)}
    sealed = set(found.status().sealed_keys)
    for prompt, owner in found.owner.items():
        for tenant in found.tenants.names:
            counts = own if tenant == owner else others
            keys = found.keys(tenant, prompt)
            counts["events"] += len(events & {key[:8] for key in keys})
            counts["index"] += in_index(found, tenant, prompt, index, tenant)
            counts["index, the owner's keys"] += in_index(found, owner, prompt, index, tenant)
            counts["status"] += len(sealed & set(keys))
    return own, others


def test_events_index_and_status_name_blocks_to_nobody_else(tmp_path: Path) -> None:
    with stored(tmp_path / "n", host_bytes=8 << 20) as found:
        own, others = look(found)
        usage = {row.tenant_id: row for row in found.status().usage}
    assert own == dict.fromkeys(own, PROMPTS * BLOCKS)
    assert not sum(others.values()), others
    for name in found.tenants.names:
        assert usage[name].host_bytes == usage[name].host_bytes == PROMPTS // 4 * BLOCKS * 4096


def test_without_the_salt_they_do(tmp_path: Path) -> None:
    """The twin: equal keys, equal tags."""
    with stored(tmp_path / "n", "no_salt", host_bytes=8 << 20) as found:
        _, others = look(found)
    assert min(others.values()) > 0
