"""Why a lookup missed, at a real node: each missing block counts once, under the right reason."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kvfabric.errors import Fenced
from kvfabric.handle import Handle, from_segments, mint
from kvfabric.hashing import ROOT_PARENT, layout_fingerprint
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.protocol.messages import MAX_KEYS
from kvfabric.testing.engine import BLOCK_TOKENS, DEADLINE_S, TinyEngine, tiny_hello
from kvfabric.testing.processes import NodeProcess, until
from kvfabric.testing.redis import RedisServer
from kvfabric.types import DEFAULT_TENANT, BlockKey, Incarnation, MissReason, Segment

pytestmark = pytest.mark.fleet

PART_BYTES = 64 << 10
HOST_BLOCKS = 128


class Rig:
    """A node with room for HOST_BLOCKS blocks, and an engine of 64 KiB a block."""

    def __init__(self, node: NodeProcess) -> None:
        self.node = node
        self.engine = TinyEngine.connect(node.socket, tiny_hello(part_bytes=PART_BYTES))
        channel = grpc.insecure_channel(f"unix:{node.state_dir}/admin.sock")
        self.events = pb_grpc.NodeEventsStub(channel)  # type: ignore[no-untyped-call]
        self.registry = pb_grpc.RegistryServiceStub(channel)  # type: ignore[no-untyped-call]
        self._close = channel.close

    def close(self) -> None:
        self.engine.client.close()
        del self.engine  # its window is mapped as long as it is there
        self._close()

    def misses(self) -> dict[str, float]:
        found = self.node.metrics()
        prefix, suffix = 'misses_total{reason="', '"}'
        return {
            name.removeprefix(prefix).removesuffix(suffix): value
            for name, value in found.items()
            if name.startswith(prefix)
        }

    @contextlib.contextmanager
    def counts(self, reason: MissReason, blocks: int) -> Iterator[None]:
        """In here so many blocks miss for this reason, and none for another."""
        before = self.misses()
        yield
        after = self.misses()
        grown = {name: after[name] - before.get(name, 0) for name in after}
        assert {name: by for name, by in grown.items() if by} == {reason.value: blocks}

    def store(self, request: str, prompt: str, blocks: int, **changes: object) -> list[BlockKey]:
        keys = self.engine.open(request, prompt, blocks, self.handle(request, **changes))
        assert self.engine.store(request, keys) == blocks
        self.engine.release(request)
        return keys

    def handle(self, request: str, **changes: object) -> str:
        key_id, key = Keyring.open(self.node.state_dir).current_handle_key()
        fields: dict[str, object] = {
            "version": 1,
            "key_id": key_id,
            "tenant": DEFAULT_TENANT,
            "model_revision": self.engine.hello.model_revision,
            "adapter": "",
            "adapter_revision": "",
            "layout_fingerprint": layout_fingerprint(self.engine.hello.layout),
            "segments": (),
            "public_tokens": 0,
            "cacheable_tokens": -1,
            "epochs": (),
            "audience": self.engine.client.session,
            "request_id": request,
            "expires_at": int(time.time()) + 60,
        }
        return mint(Handle(**(fields | changes)), key)  # type: ignore[arg-type]

    def match(self, request: str, keys: list[BlockKey]) -> tuple[int, str]:
        matched = self.engine.client.match(request, keys, deadline_s=DEADLINE_S)
        return matched.num_blocks, matched.reason


@contextlib.contextmanager
def rig_at(state_dir: Path, host_blocks: int = HOST_BLOCKS, **options: object) -> Iterator[Rig]:
    size = host_blocks * PART_BYTES
    with NodeProcess(state_dir, http="127.0.0.1:0", host_bytes=size, **options) as node:  # type: ignore[arg-type]
        made = Rig(node)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig_at(tmp_path_factory.mktemp("node")) as made:
        yield made


def test_never_stored_another_is_storing_and_stored(rig: Rig) -> None:
    keys = rig.engine.open("r", "prompt 0", 4)
    with rig.counts(MissReason.ABSENT, 4):
        assert rig.match("r", keys) == (0, "absent")
    reserved = rig.engine.client.reserve(
        "r", ROOT_PARENT, keys[:2], group=0, shard=0, deadline_s=DEADLINE_S
    )
    with rig.counts(MissReason.PENDING, 4):
        assert rig.match("r", keys) == (0, "pending")
    rig.engine.client.abort(reserved.reservation, deadline_s=DEADLINE_S)
    assert rig.engine.store("r", keys) == 4
    assert rig.match("r", keys) == (4, "none")


def test_evicted(rig: Rig) -> None:
    keys = rig.store("first", "first", 8)
    for number in range(24):
        rig.store(f"other {number}", f"other {number}", 8)
    rig.engine.open("again", "first", 8)
    with rig.counts(MissReason.EVICTED, 8):
        assert rig.match("again", keys) == (0, "evicted")


def test_older_than_the_tenants_max_age(rig: Rig) -> None:
    tenant = rig.registry.CreateTenant(pb.CreateTenantRequest(name="aging")).tenant.tenant_id
    rig.registry.SetTenant(pb.SetTenantRequest(name="aging", max_age_s=1.0))
    keys = rig.store("r", "prompt 2", 4, tenant=tenant)
    rig.engine.open("soon", "prompt 2", 4, rig.handle("soon", tenant=tenant))
    assert rig.match("soon", keys)[0] == 4
    rig.engine.release("soon")
    time.sleep(2.1)
    rig.engine.open("late", "prompt 2", 4, rig.handle("late", tenant=tenant))
    with rig.counts(MissReason.EXPIRED, 4):
        assert rig.match("late", keys) == (0, "expired")


def test_behind_a_withdrawn_templates_text(rig: Rig) -> None:
    keys = rig.engine.open("r", "prompt 3", 4, rig.handle("r", cacheable_tokens=BLOCK_TOKENS))
    assert rig.engine.store("r", keys) == 1
    with rig.counts(MissReason.WITHDRAWN, 3):
        assert rig.match("r", keys) == (1, "withdrawn")


def test_the_tenant_may_hold_no_more(rig: Rig) -> None:
    quota = pb.TierQuota(max_bytes=4 * PART_BYTES)
    created = rig.registry.CreateTenant(pb.CreateTenantRequest(name="small", host=quota))
    tenant = created.tenant.tenant_id
    keys = rig.engine.open("r", "prompt 4", 8, rig.handle("r", tenant=tenant))
    assert rig.engine.store("r", keys) == 4
    rig.engine.release("r")
    rig.engine.open("again", "prompt 4", 8, rig.handle("again", tenant=tenant))
    with rig.counts(MissReason.OVER_QUOTA, 4):
        assert rig.match("again", keys) == (4, "over_quota")


def test_no_handle_no_read_and_too_many(rig: Rig) -> None:
    keys = rig.store("r", "prompt 5", 4)
    with rig.counts(MissReason.NO_HANDLE, 4):
        assert rig.match("never opened", keys) == (0, "no_handle")
    rig.engine.open("private", "prompt 5", 4, rig.handle("private", no_read=True))
    with rig.counts(MissReason.NO_READ, 4):
        assert rig.match("private", keys) == (0, "no_read")
    rig.engine.open("long", "prompt 5", 4)
    with rig.counts(MissReason.ABSENT, MAX_KEYS + 1):
        many = [BlockKey(os.urandom(32)) for _ in range(MAX_KEYS + 1)]
        assert rig.match("long", many) == (0, "absent")


def test_leased_as_much_as_it_may_and_a_lease_that_ended(tmp_path: Path) -> None:
    with rig_at(tmp_path, host_blocks=40, lease_s=0.2) as rig:
        keys = rig.store("r", "prompt 6", 8)
        rig.engine.open("again", "prompt 6", 8)
        with rig.counts(MissReason.LEASE_BUDGET, 4):
            assert rig.match("again", keys) == (4, "lease_budget")
        time.sleep(0.4)
        with rig.counts(MissReason.DEADLINE, 4):
            for _ in range(2):  # asked again: the same blocks are lost only once
                load = rig.engine.client.load(
                    "again", keys[:4], group=0, shard=0, deadline_s=DEADLINE_S
                )
                assert (load.num_blocks, load.reason) == (0, "deadline")


def test_corrupt(rig: Rig) -> None:
    """Bytes that changed under a reader's lease: the reader does not use them, and the node says why."""
    keys = rig.store("r", "prompt 7", 3)
    rig.engine.open("reader", "prompt 7", 3)
    located = rig.engine.locate("reader", keys)
    assert located.num_blocks == 3
    _flip_everywhere(rig.node.pid)
    buffers = [memoryview(bytearray(PART_BYTES)) for _ in keys]
    assert rig.engine.client.read(located, buffers) == 0
    found = rig.engine.client.recheck("reader", keys, group=0, shard=0, deadline_s=DEADLINE_S)
    assert found.num_corrupt == 3
    with rig.counts(MissReason.CORRUPT, 3):
        load = rig.engine.client.load("reader", keys, group=0, shard=0, deadline_s=DEADLINE_S)
        assert (load.num_blocks, load.reason) == (0, "corrupt")


def _flip_everywhere(pid: int) -> None:
    """Change the first byte of each page of the node's arena, as rotten memory would."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        with contextlib.suppress(OSError):
            if "memfd:kvfabric-arena" in os.readlink(path):
                with open(path, "r+b") as arena:
                    for place in range(0, os.fstat(arena.fileno()).st_size, 4096):
                        found = os.pread(arena.fileno(), 1, place)
                        os.pwrite(arena.fileno(), bytes([found[0] ^ 1]), place)
                return
    raise AssertionError("no arena found")


def test_without_an_epoch_lease(tmp_path: Path) -> None:
    with (
        RedisServer(tmp_path / "redis") as redis,
        rig_at(tmp_path / "node", directory=redis.url, insecure="true") as rig,
    ):
        until(lambda: rig.node.metrics()["epoch_lease_valid"] == 1)
        keys = rig.store("r", "prompt 8", 3)
        rig.engine.open("again", "prompt 8", 3)
        assert rig.match("again", keys)[0] == 3
        redis.pause()
        until(lambda: rig.node.metrics()["epoch_lease_valid"] == 0)
        with rig.counts(MissReason.NO_EPOCH_LEASE, 3):
            assert rig.match("again", keys) == (0, "no_epoch_lease")
        redis.go_on()


# ---------------------------------------------------------------------- told afterwards


def test_a_lookup_is_told_to_who_names_its_request_and_tenant(rig: Rig) -> None:
    keys = rig.engine.open("cmpl-req-1-0", "prompt 9", 4, rig.handle("req-1"))
    assert rig.engine.store("cmpl-req-1-0", keys[:2]) == 2
    assert rig.match("cmpl-req-1-0", keys) == (2, "absent")
    assert rig.match("cmpl-req-1-0", keys[:2])[0] == 2  # a renewal changes nothing
    rig.engine.release("cmpl-req-1-0")

    def find(request: str, tenant: str) -> pb.Lookup:
        asked = pb.FindLookupRequest(request_id=request, tenant_id=tenant)
        found: pb.Lookup = rig.events.FindLookup(asked)
        return found

    told = find("req-1", DEFAULT_TENANT)
    assert told == pb.Lookup(known=True, num_asked=4, num_host=2, reason="absent")
    assert find("req-1", "another") == find("req-2", DEFAULT_TENANT) == pb.Lookup()


def test_a_handle_of_what_was_withdrawn_is_told(rig: Rig) -> None:
    gone = Segment("helper", "1", Incarnation(b"x" * 16), 0)
    handle = rig.handle("req-1", segments=from_segments((gone,)))
    with pytest.raises(Fenced):
        rig.engine.open("req-1", "prompt 10", 4, handle)
    asked = pb.FindLookupRequest(request_id="req-1", tenant_id=DEFAULT_TENANT)
    assert rig.events.FindLookup(asked) == pb.Lookup(known=True, reason="withdrawn")
