"""Engines and a real node: warm after a restart, bit for bit; answers whatever happens to the node."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from kvfabric_engine.connector import ConnectorStatistics
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.staging import Mover, Pages
from kvfabric_engine.testing import Answer, ask, begin, small_config

from kvfabric.client import NodeClient
from kvfabric.daemon.admin_client import AdminClient
from kvfabric.handle import Handle, from_segments, mint
from kvfabric.hashing import layout_fingerprint
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.protocol.messages import Located, Rechecked
from kvfabric.testing.processes import NodeProcess
from kvfabric.types import DEFAULT_TENANT, PUBLIC_TENANT, BlockKey, MissReason

pytestmark = pytest.mark.slow
WAIT_S = 15.0


def tokens(count: int, *, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(3, 259), k=count)


PROMPTS = [tokens(n, seed=n) for n in (70, 100, 37)]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def statistics(engine: Engine) -> ConnectorStatistics:
    assert engine.connector is not None
    return engine.connector.statistics()


def wait_saved(engine: Engine) -> None:
    """Until nothing is being saved and the requests' releases are through."""
    wait_for(lambda: statistics(engine).saving_bytes == 0 and engine.statistics().pool.used == 0)


def answers(engine: Engine, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[Answer]:
    found = [ask(engine, prompt, max_tokens=8) for prompt in prompts]
    wait_saved(engine)
    return found


@pytest.fixture(scope="module")
def cold() -> list[tuple[int, ...]]:
    """The right answers: a fresh engine, no node, one after the other."""
    with Engine(small_config()) as engine:
        return [ask(engine, prompt, max_tokens=8).token_ids for prompt in PROMPTS]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    with NodeProcess(tmp_path / "node") as node:
        yield node


Connect = Callable[..., Engine]


@pytest.fixture
def connected(node: NodeProcess) -> Iterator[Connect]:
    """connected(**changes): an engine of that configuration, started and connected to the node."""
    with contextlib.ExitStack() as engines:

        def start(**changes: object) -> Engine:
            engine = Engine(small_config(node_socket=str(node.socket), **changes))
            engines.callback(engine.stop)
            engine.start(endpoint="http://127.0.0.1:1")
            assert engine.connector is not None
            assert engine.connector.wait_connected(WAIT_S)
            return engine

        yield start


def audit(path: Path) -> dict[str, list[tuple[str, str]]]:
    """(key, checksum) of each line, by op."""
    found: dict[str, list[tuple[str, str]]] = {"store": [], "load": []}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        found[entry["op"]].append((entry["key"], entry["checksum"]))
    return found


def test_restarted_engine_is_warm_and_answers_alike(
    connected: Connect, tmp_path: Path, cold: list[tuple[int, ...]]
) -> None:
    """What one engine stored, another loads bit for bit, and answers token for token as if alone."""
    first = connected(audit_parts=str(tmp_path / "first"))
    stored = answers(first)
    first.stop()
    assert [a.token_ids for a in stored] == cold
    assert all(a.reused.total == 0 for a in stored)
    second = connected(audit_parts=str(tmp_path / "second"))
    warm = answers(second)
    assert second.connector is not None
    assert second.connector.session != first.connector.session  # type: ignore[union-attr]
    second.stop()
    assert [a.token_ids for a in warm] == cold
    assert [(a.reused.host, a.reused.hbm) for a in warm] == [(64, 0), (96, 0), (32, 0)]
    loads, stores = audit(tmp_path / "second")["load"], audit(tmp_path / "first")["store"]
    assert len(loads) == 12
    assert set(loads) <= set(stores)


def test_the_node_is_told_of_what_does_not_verify(
    connected: Connect, cold: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks for itself: bytes that only came wrong stay, and the answers are right all the same."""
    first = connected()
    answers(first)
    first.stop()
    read, recheck = NodeClient.read, NodeClient.recheck
    found: list[tuple[list[BlockKey], int]] = []

    def misread(client: NodeClient, located: Located, buffers: Sequence[memoryview]) -> int:
        return max(0, read(client, located, buffers) - 1)

    def tell(client: NodeClient, name: str, keys: list[BlockKey], **options: Any) -> Rechecked:
        answer = recheck(client, name, keys, **options)
        found.append((keys, answer.num_corrupt))
        return answer

    monkeypatch.setattr(NodeClient, "read", misread)
    monkeypatch.setattr(NodeClient, "recheck", tell)
    second = connected()
    assert [a.token_ids for a in answers(second)] == cold
    assert [(len(keys), num_corrupt) for keys, num_corrupt in found] == [(1, 0)] * len(cold)
    monkeypatch.undo()
    third = connected()
    assert [a.reused.host for a in answers(third)] == [64, 96, 32]
    second.stop()
    third.stop()


def test_swapped_blocks_change_answers(connected: Connect, cold: list[tuple[int, ...]]) -> None:
    """The test above has power: another prompt's block in place of a verified one changes answers."""
    first = connected()
    answers(first)
    first.stop()
    second = connected()
    _give_each_the_first_ones_block(second._mover)
    wrong = answers(second)
    second.stop()
    assert all(a.reused.host > 0 for a in wrong)
    assert wrong[0].token_ids == cold[0]
    assert all(a.token_ids != right for a, right in zip(wrong[1:], cold[1:], strict=True))


def _give_each_the_first_ones_block(mover: Mover) -> None:
    """Every prompt gets the first prompt's block 0. (Swapping blocks within a prompt would change nothing:
    attention sums over keys that carry their own positions.)"""
    scatter = mover.scatter
    kept: list[bytes] = []

    def swapped(data: Sequence[memoryview], blocks: Sequence[Pages]) -> None:
        if not kept:
            kept.append(bytes(data[0]))
        scatter([memoryview(kept[0]), *data[1:]], blocks)

    mover.scatter = swapped  # type: ignore[method-assign]


def test_small_window_saves_in_pieces(connected: Connect, cold: list[tuple[int, ...]]) -> None:
    """A window of few parts: a prompt is saved in several reservations, and all of it arrives."""
    first = connected(window_bytes=64 << 10)  # four blocks, two a reservation
    answers(first)
    assert statistics(first).saved_blocks == 12
    first.stop()
    second = connected()
    assert [a.token_ids for a in answers(second)] == cold
    assert statistics(second).loaded_blocks == 12
    second.stop()


def test_batched_mode_stores_answers_too(connected: Connect) -> None:
    """Out of deterministic mode the blocks of an answer are saved, and another engine loads them."""
    first = connected(deterministic="off")
    prompt = tokens(30)
    answer = ask(first, prompt, max_tokens=20)
    wait_saved(first)
    first.stop()
    second = connected(deterministic="off")
    again = ask(second, [*prompt, *answer.token_ids, 7], max_tokens=4)
    second.stop()
    assert again.reused.host == 48


def test_without_a_node_requests_are_answered(
    tmp_path: Path, cold: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    """No node at start: answers come, misses are counted, one line is logged, nothing is shared without a
    salt."""
    with Engine(small_config(node_socket=str(tmp_path / "none.sock"))) as engine:
        assert [a.token_ids for a in answers(engine)] == cold
        assert ask(engine, PROMPTS[0]).reused.total == 0
        assert statistics(engine).misses[MissReason.NODE_DOWN] >= 4
        handle = "not read by anyone"
        ask(engine, PROMPTS[0], handle=handle, salt="minted")
        assert ask(engine, PROMPTS[0], handle=handle, salt="minted").reused.hbm == 64
        assert ask(engine, PROMPTS[0], handle=handle, salt="another").reused.total == 0
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert line.startswith("fabric: connect failed (ConnectError: no node at")


def test_node_that_comes_late_is_used(tmp_path: Path) -> None:
    """The engine keeps trying in the background and uses the node when it is there."""
    with NodeProcess(tmp_path / "node") as node:
        node.stop()
        engine = Engine(small_config(node_socket=str(node.socket)))
        engine.start(endpoint="")
        assert ask(engine, PROMPTS[0]).reused.total == 0
        node.start()
        wait_for(lambda: statistics(engine).is_up)
        answers(engine)
        assert statistics(engine).saved_blocks == 12
        engine.stop()


def test_killed_node_fails_no_request(
    connected: Connect, node: NodeProcess, cold: list[tuple[int, ...]]
) -> None:
    """SIGKILL under load: every answer comes and is right; the session resumes, returns the arena, stores."""
    engine = connected()
    assert engine.connector is not None
    session = engine.connector.session
    early = begin(engine, PROMPTS[0], max_tokens=8)
    pending = [begin(engine, PROMPTS[i % 3], max_tokens=8) for i in range(12)]
    early.next()
    node.kill()
    assert [p.answer().token_ids for p in pending] == [cold[i % 3] for i in range(12)]
    assert [a.token_ids for a in answers(engine)] == cold
    node.start()
    wait_for(lambda: statistics(engine).is_up)
    assert engine.connector.session == session
    wait_for(lambda: any("adopted the earlier arena" in line for line in node.log))
    again = answers(engine)  # in HBM, and missing in the node: handed over again
    assert [a.token_ids for a in again] == cold
    wait_for(lambda: statistics(engine).saved_blocks >= 9)
    other = connected()
    assert [a.token_ids for a in answers(other)] == cold
    assert statistics(other).loaded_blocks >= 9
    other.stop()


def test_stopped_node_costs_one_deadline(
    connected: Connect, node: NodeProcess, cold: list[tuple[int, ...]]
) -> None:
    """SIGSTOP: the first request waits for its deadline, the rest do not; SIGCONT mends it."""
    engine = connected()
    node.send(signal.SIGSTOP)
    begun = time.monotonic()
    assert [a.token_ids for a in answers(engine)] == cold
    assert time.monotonic() - begun < 3
    assert statistics(engine).misses[MissReason.DEADLINE] >= 1
    node.send(signal.SIGCONT)
    wait_for(lambda: statistics(engine).is_up)
    answers(engine)
    assert statistics(engine).saved_blocks == 12


def make_handle(node: NodeProcess, engine: Engine, request_id: str, **fields: object) -> str:
    """What a router would mint for this engine, with some `fields` different."""
    keyring = Keyring.open(node.state_dir)
    key_id, key = keyring.current_handle_key()
    assert engine.connector is not None
    values: dict[str, object] = {
        "version": 1,
        "key_id": key_id,
        "tenant": DEFAULT_TENANT,
        "model_revision": engine.model.revision,
        "adapter": "",
        "adapter_revision": "",
        "layout_fingerprint": layout_fingerprint(engine.layout),
        "segments": from_segments(()),
        "public_tokens": 0,
        "cacheable_tokens": -1,
        "epochs": (),
        "audience": engine.connector.session,
        "request_id": request_id,
        "expires_at": int(time.time()) + 60,
    }
    return mint(Handle(**(values | fields)), key)  # type: ignore[arg-type]


def test_handles_decide_what_is_shared(connected: Connect, node: NodeProcess) -> None:
    """In HBM and in the node: equal namespaces share, another tenant and a refused handle do not."""
    engine = connected()

    def reused(request_id: str, **fields: object) -> int:
        handle = make_handle(node, engine, request_id, **fields)
        answer = ask(engine, PROMPTS[0], handle=handle, request_id=request_id)
        wait_saved(engine)
        return answer.reused.total

    assert reused("a") == 0
    assert reused("b") == 64
    assert reused("c", tenant=PUBLIC_TENANT) == 0  # any tenant but the first's
    assert reused("d", tenant=PUBLIC_TENANT) == 64
    assert reused("e", cacheable_tokens=40) == 32
    assert reused("f", no_read=True) == 0
    assert reused("g", expires_at=1) == 0
    assert reused("h", audience=bytes(16)) == 0
    assert reused("i", epochs=(("fabric", 9),)) == 0  # what HBM holds is no exception
    assert ask(engine, PROMPTS[0], handle="forged").reused.total == 0


def test_over_quota_is_a_refused_store_and_no_failed_request(
    connected: Connect, node: NodeProcess, cold: list[tuple[int, ...]]
) -> None:
    """A tenant that may store nothing gets its answers; what is refused is counted."""
    engine = connected()
    with AdminClient(node.state_dir / "admin.sock") as client:
        request = pb.SetTenantRequest(name=DEFAULT_TENANT, host=pb.TierQuota(max_bytes=1))
        client.call(client.registry.SetTenant, request)
    assert [a.token_ids for a in answers(engine)] == cold
    assert statistics(engine).saved_blocks == 0
    with AdminClient(node.state_dir / "admin.sock") as client:
        request = pb.SetTenantRequest(name=DEFAULT_TENANT, host=pb.TierQuota())
        client.call(client.registry.SetTenant, request)
    answers(engine)
    assert statistics(engine).saved_blocks == 12


def test_no_store_leaves_nothing_behind(connected: Connect, node: NodeProcess) -> None:
    """A request that must not be stored is found nowhere afterwards."""
    engine = connected()
    handle = make_handle(node, engine, "a", no_store=True)
    ask(engine, PROMPTS[0], handle=handle, request_id="a")
    wait_saved(engine)
    assert statistics(engine).saved_blocks == 0
    assert ask(engine, PROMPTS[0]).reused.total == 0


def test_salt_without_handle_stays_local(connected: Connect) -> None:
    """A router that may not vouch sends a salt and no handle: the node's default tenant is not used."""
    engine = connected()
    ask(engine, PROMPTS[0])
    wait_saved(engine)
    assert ask(engine, PROMPTS[0], salt="one-time").reused.total == 0
    assert statistics(engine).misses.get(MissReason.NODE_DOWN, 0) == 0


def hbm_keys(node: NodeProcess, session: bytes) -> bytes:
    """8-byte prefixes of what the node says the engine's HBM pool holds, one chain after another."""
    with grpc.insecure_channel(f"unix:{node.state_dir / 'admin.sock'}") as channel:
        stub = pb_grpc.NodeEventsStub(channel)  # type: ignore[no-untyped-call]
        batches = stub.Snapshot(pb.SnapshotRequest(), timeout=WAIT_S)
        runs = [run for batch in batches for run in batch.runs]
    return b"".join(run.keys for run in runs if run.tier == pb.HBM and run.engine == session)


def test_node_knows_what_hbm_holds(connected: Connect, node: NodeProcess) -> None:
    """Cached and evicted blocks reach the node; a restarted node is told everything again."""
    engine = connected(hbm_blocks=16)  # eight blocks
    assert engine.connector is not None
    session = engine.connector.session
    answers(engine, [tokens(64, seed=1)])
    wait_for(lambda: len(hbm_keys(node, session)) == 4 * 8)
    answers(engine, [tokens(100, seed=2)])
    wait_for(lambda: engine.statistics().pool.idle == len(hbm_keys(node, session)) // 4)
    held = hbm_keys(node, session)
    node.kill()
    wait_for(lambda: not statistics(engine).is_up)
    node.start()
    wait_for(lambda: statistics(engine).is_up)
    wait_for(lambda: sorted(hbm_keys(node, session)) == sorted(held))


def test_aborted_while_loading(connected: Connect) -> None:
    """Aborting at any moment of a fetch frees the pages, and the next request is served."""
    first = connected()
    answers(first)
    first.stop()
    engine = connected()
    for _ in range(5):
        pending = begin(engine, PROMPTS[1], max_tokens=8)
        engine.abort(pending.name)
        pending.answer()
    wait_saved(engine)
    assert ask(engine, PROMPTS[1], max_tokens=8).reused.total == 96
