"""vLLM in this process, a real node beside it: whatever happens, the answers are those of vLLM alone.

One engine serves most tests. Each test has prompts of its own, so that none finds what another stored.
"""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from kvfabric_engine.integrations import vllm_identity

from kvfabric.handle import HandleSegment
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.testing.processes import NodeProcess
from kvfabric.types import DEFAULT_TENANT, MissReason
from tests.vllm.conftest import make_node
from tests.vllm.engines import (
    Gate,
    Minter,
    Vllm,
    first_block_for_all,
    in_thread,
    parts_of,
    prompt,
    running,
    wait_for,
)

Prompts = list[list[int]]
NAMES = (
    "cold", "mid", "control", "corrupt", "ssd", "restart", "kill", "absent", "require", "reset",
    "abort", "preempt", "hbm", "version", "tenants", "template", "quota", "whole", "partial",
    "purged", "purged-other", "left", "left-other",
)  # fmt: skip


CROWD = (630, 500, 250)
"""Sizes of prompts that fill 11 of vLLM's blocks, and with their answers 14."""


def prompts_of(name: str, sizes: Sequence[int] = (700, 300, 520)) -> Prompts:
    return [prompt(n, seed=1000 * NAMES.index(name) + n) for n in sizes]


def tails_of(name: str) -> Prompts:
    """Prompts that leave those of `prompts_of` in the middle, of a block and of the prompt."""
    return [
        prompt(len(p) + 50, seed=5000 + i, start=p[: len(p) * 2 // 3])
        for i, p in enumerate(prompts_of(name))
    ]


@pytest.fixture(scope="module")
def gate(checkpoint: Path) -> Iterator[Gate]:
    """The right answers to everything that is asked here."""
    gate = Gate()
    with running(checkpoint, fabric=False) as alone:
        for name in NAMES:
            gate.learn(alone, prompts_of(name))
        gate.learn(alone, tails_of("mid"))
        gate.learn(alone, prompts_of("whole", (640,)))
        gate.learn(alone, prompts_of("preempt", CROWD))
    yield gate
    print(f"{gate.num_checked} answers compared, {gate.num_ties} ties")


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "parts"


@pytest.fixture(scope="module")
def shared(checkpoint: Path, gate: Gate, node: NodeProcess, audit: Path) -> Iterator[list[Vllm]]:
    """The engine that most tests use, in a list: `engine` replaces one that a test stopped."""
    engines: list[Vllm] = []
    yield engines
    for engine in engines:
        engine.stop()


@pytest.fixture
def engine(shared: list[Vllm], checkpoint: Path, audit: Path) -> Vllm:
    if not shared:
        shared.append(Vllm(checkpoint, extra={"audit_parts": str(audit)}))
        assert shared[0].statistics().is_up
    return shared[0]


@pytest.fixture
def alone(shared: list[Vllm]) -> None:
    """This test makes its own engine: the shared one ends first (a process holds one)."""
    for engine in shared:
        engine.stop()
    shared.clear()


def num_loaded(engine: Vllm, action: Callable[[], object]) -> int:
    before = engine.statistics().loaded_blocks
    action()
    return engine.statistics().loaded_blocks - before


def test_cold_then_hbm_then_host(engine: Vllm, gate: Gate, audit: Path) -> None:
    """Computed, found in HBM, loaded from the node: one answer; loaded bytes are the stored bytes."""
    prompts = prompts_of("cold")
    cold = engine.store(prompts)
    gate.check(prompts, cold)
    assert [a.num_cached for a in cold] == [0, 0, 0]
    hbm = [engine.answer(p) for p in prompts]
    gate.check(prompts, hbm)
    engine.drop_hbm()
    before = engine.statistics().loaded_blocks
    host = [engine.answer(p) for p in prompts]
    gate.check(prompts, host)
    assert engine.statistics().loaded_blocks - before == 5 + 2 + 4
    assert [a.num_cached for a in host] == [a.num_cached for a in hbm] == [640, 256, 512]
    assert parts_of(audit, 0, "load")
    assert parts_of(audit, 0, "load") <= parts_of(audit, 0, "store")


def test_hit_that_ends_in_the_middle(engine: Vllm, gate: Gate) -> None:
    """Other prompts with the same beginning load what is equal and compute the rest, in HBM too."""
    engine.store(prompts_of("mid"))
    engine.drop_hbm()
    answers = [engine.answer(p) for p in tails_of("mid")]
    gate.check(tails_of("mid"), answers)
    assert [a.num_cached for a in answers] == [384, 128, 256]
    again = engine.ask(tails_of("mid"))
    gate.check(tails_of("mid"), again)


def test_prompt_of_whole_blocks(engine: Vllm, gate: Gate) -> None:
    """Every token of the prompt is in the node: vLLM computes the last one again."""
    prompts = prompts_of("whole", (640,))
    gate.check(prompts, engine.store(prompts))
    engine.drop_hbm()
    gate.check(prompts, engine.store(prompts))
    engine.drop_hbm()
    gate.check(prompts, engine.ask(prompts))


def test_wrong_kv_changes_answers(engine: Vllm, gate: Gate) -> None:
    """The tests here have power: one block of another prompt in place of the right one is seen."""
    prompts = prompts_of("control")
    engine.store(prompts)
    engine.drop_hbm()
    with first_block_for_all(engine):
        answers = [engine.answer(p) for p in prompts]
    assert gate.differing(prompts, answers) == 2  # the first prompt got its own block
    engine.drop_hbm()
    gate.check(prompts, [engine.answer(p) for p in prompts])


def test_concurrent_requests_with_one_prefix(engine: Vllm, gate: Gate) -> None:
    """Several requests load the same blocks at once."""
    prompts = prompts_of("partial") * 3
    engine.store(prompts_of("partial"))
    engine.drop_hbm()
    gate.check(prompts, engine.ask(prompts))


def test_corrupt_parts_are_computed(
    engine: Vllm, gate: Gate, node: NodeProcess, said: list[str]
) -> None:
    """Bytes that changed in the arena are never used. The user reads one line."""
    prompts = prompts_of("corrupt")
    for _ in range(20):  # the node's scrubber may be faster: then the blocks are gone
        engine.store(prompts)
        engine.drop_hbm()
        corrupt_arena(node)
        answers = [engine.answer(p) for p in prompts]
        gate.check(prompts, answers)
        if said:
            break
        engine.drop_hbm()
    assert engine.statistics().misses[MissReason.CORRUPT] >= 1
    assert said == ["fabric: blocks are not loaded (corrupt); vLLM computes them"]


def corrupt_arena(node: NodeProcess) -> None:
    """One bit of every used page of the node's arena."""
    for name in os.listdir(f"/proc/{node.pid}/fd"):
        path = f"/proc/{node.pid}/fd/{name}"
        if not os.readlink(path).startswith("/memfd:") or os.stat(path).st_size != 64 << 20:
            continue
        descriptor = os.open(path, os.O_RDWR)
        with mmap.mmap(descriptor, 64 << 20) as arena:
            for page in range(0, len(arena), 4096):
                if arena[page : page + 64] != bytes(64):
                    arena[page] ^= 1
        os.close(descriptor)


def test_ssd(engine: Vllm, gate: Gate, node: NodeProcess) -> None:
    """What was used twice is on SSD and survives the node: loaded from there, the same answers."""
    prompts = prompts_of("ssd")
    engine.store(prompts)
    engine.drop_hbm()
    engine.ask(prompts)  # the second use
    node.stop()  # seals what is being written
    node.start()
    wait_for(lambda: engine.statistics().is_up and engine.fabric.statistics().is_up)
    engine.drop_hbm()
    assert num_loaded(engine, lambda: gate.check(prompts, engine.ask(prompts))) == 11


def test_node_killed_under_load(engine: Vllm, gate: Gate, node: NodeProcess) -> None:
    """Batches go on while the node dies and comes back at random moments: every answer is right."""
    prompts = prompts_of("kill")
    engine.store(prompts)
    dice = random.Random(7)
    is_done = False

    def kill_and_start() -> None:
        while not is_done:
            time.sleep(dice.uniform(0.05, 0.4))
            node.kill()
            time.sleep(dice.uniform(0.0, 0.2))
            node.start()

    killer = in_thread(kill_and_start)
    try:
        for _ in range(8):
            batch = [prompts[dice.randrange(3)] for _ in range(6)]
            engine.drop_hbm()
            gate.check(batch, engine.ask(batch))
    finally:
        is_done = True
        killer.join()
    wait_for(lambda: engine.statistics().is_up and engine.fabric.statistics().is_up)
    engine.drop_hbm()
    engine.store(prompts)
    engine.drop_hbm()
    assert num_loaded(engine, lambda: gate.check(prompts, engine.ask(prompts))) == 11


def test_abort_while_loading(engine: Vllm, gate: Gate) -> None:
    """Requests that end while their blocks are under way leave nothing behind."""
    prompts = prompts_of("abort")
    engine.store(prompts)
    llm = engine.llm.llm_engine
    from vllm import SamplingParams

    for steps in range(6):
        engine.drop_hbm()
        llm.add_request(
            f"aborted-{steps}", {"prompt_token_ids": prompts[0]}, SamplingParams(max_tokens=4)
        )
        for _ in range(steps):
            llm.step()
        llm.abort_request([f"aborted-{steps}"])
        while llm.has_unfinished_requests():
            llm.step()
        gate.check(prompts, engine.ask(prompts))
    side = engine.scheduler.connector._side
    assert not side._tracked
    assert not side._loading


def test_hbm_events(engine: Vllm, node: NodeProcess) -> None:
    """The node knows what HBM holds, by keys; a reset takes it back."""
    engine.drop_hbm()
    engine.store(prompts_of("hbm", (300,)))
    wait_for(lambda: num_hbm_keys(node, engine) == 2)
    engine.drop_hbm()
    engine.answer(prompt(10, seed=4))  # vLLM tells of its reset with the next step
    wait_for(lambda: num_hbm_keys(node, engine) == 0)


def num_hbm_keys(node: NodeProcess, engine: Vllm) -> int:
    with admin_channel(node) as channel:
        batches = node_events(channel).Snapshot(pb.SnapshotRequest(), timeout=30)
        runs = [run for batch in batches for run in batch.runs]
    session = engine.fabric.session
    return sum(len(r.keys) // 8 for r in runs if r.tier == pb.HBM and r.engine == session)


def node_events(channel: grpc.Channel) -> Any:
    return pb_grpc.NodeEventsStub(channel)  # type: ignore[no-untyped-call]


def registry(channel: grpc.Channel) -> Any:
    return pb_grpc.RegistryServiceStub(channel)  # type: ignore[no-untyped-call]


def admin_channel(node: NodeProcess) -> grpc.Channel:
    return grpc.insecure_channel(f"unix:{node.state_dir / 'admin.sock'}")


def cached_with(engine: Vllm, tokens: list[int], handle: str, **fields: object) -> int:
    """Tokens that a request found in HBM."""
    found = engine.answer(tokens, handles=[handle], **fields).num_cached
    engine.wait_saved()
    return found


def test_tenants_share_nothing(engine: Vllm, node: NodeProcess, gate: Gate) -> None:
    """Neither in HBM nor in the node, whatever salt a client sends; refused handles reuse nothing."""
    mint_for = Minter(engine, node)
    with admin_channel(node) as channel:
        stub = registry(channel)
        tenants = [
            stub.CreateTenant(pb.CreateTenantRequest(name=name), timeout=30).tenant.tenant_id
            for name in ("one", "two")
        ]
    tokens = prompts_of("tenants")[0]
    one, two = (mint_for(tenant=tenant) for tenant in tenants)
    assert cached_with(engine, tokens, one) == 0
    assert cached_with(engine, tokens, one) == 640
    assert cached_with(engine, tokens, two, cache_salt="guessed") == 0
    engine.drop_hbm()
    three = mint_for(tenant=tenants[0], cacheable_tokens=300)
    assert cached_with(engine, tokens, three) == 256
    assert cached_with(engine, tokens, mint_for(tenant=tenants[0], no_read=True)) == 0
    assert cached_with(engine, tokens, mint_for(tenant=tenants[0], expires_at=1)) == 0
    assert cached_with(engine, tokens, mint_for(tenant=tenants[0], audience=bytes(16))) == 0
    assert cached_with(engine, tokens, "forged") == 0
    assert cached_with(engine, tokens, "forged") == 0
    assert cached_with(engine, tokens, two) == 640
    answers = engine.ask([tokens] * 2, handles=[one, two])
    gate.check([tokens] * 2, answers)


def test_withdrawn_template_is_gone(engine: Vllm, node: NodeProcess, gate: Gate) -> None:
    """A version's blocks serve while it does; once retired neither HBM nor the node has them."""
    mint_for = Minter(engine, node)
    tokens = prompts_of("template")[0]
    with admin_channel(node) as channel:
        stub = registry(channel)
        first, second = (
            stub.RegisterTemplate(
                pb.RegisterTemplateRequest(name="support", version=v, text=b"text " + v.encode()),
                timeout=30,
            )
            for v in ("1", "2")
        )

        def handle(template: pb.Template) -> str:
            segment = HandleSegment("support", template.version, template.incarnation, 0)
            return mint_for(segments=(segment,))

        assert cached_with(engine, tokens, handle(first)) == 0
        assert cached_with(engine, tokens, handle(first)) == 640
        stub.PromoteTemplate(pb.PromoteTemplateRequest(name="support", version="2"), timeout=30)
        assert cached_with(engine, tokens, handle(second)) == 0
        stub.Invalidate(
            pb.InvalidateRequest(scope="template", name="support", version="1"), timeout=30
        )
    assert cached_with(engine, tokens, handle(first)) == 0
    assert cached_with(engine, tokens, handle(second)) == 640
    gate.check([tokens], engine.ask([tokens], handles=[handle(second)]))


@pytest.mark.parametrize("is_guarded", [True, False])
def test_purged_template_leaves_vllms_own_cache(
    engine: Vllm, node: NodeProcess, monkeypatch: pytest.MonkeyPatch, is_guarded: bool
) -> None:
    """Page by page, also what a request that runs meanwhile goes on to cache. Twin: a mirror that strikes
    nothing off leaves them."""
    mint_for = Minter(engine, node)
    name = "purged" if is_guarded else "left"
    tokens, other = prompts_of(name)[0], prompts_of(f"{name}-other")[0]
    mirror, pool = engine.scheduler.connector._side._mirror, engine.scheduler.connector._pool
    if not is_guarded:
        monkeypatch.setattr(mirror._events, "struck", lambda names: [])
    with admin_channel(node) as channel:
        stub = registry(channel)
        text = pb.RegisterTemplateRequest(name=name, version="1", text=name.encode())
        template = stub.RegisterTemplate(text, timeout=30)
        segment = HandleSegment(name, "1", template.incarnation, 0)
        cached_with(engine, tokens, mint_for(segments=(segment,)))
        pages = [
            page
            for page, (key, _) in mirror._by_page.items()
            if mirror._events._held[key].is_struck([bytes(template.incarnation)])
        ]
        assert len(pages) == 5
        assert all(pool.blocks[page].block_hash is not None for page in pages)
        purge = pb.InvalidateRequest(scope="template", name=name, purge=True, wait_s=20)
        receipt = stub.Invalidate(purge, timeout=30)
    [found] = [
        one for one in receipt.nodes[0].engines if one.session == engine.fabric.session.hex()[:8]
    ]
    assert (found.hbm, found.detail) == ("reset", "")
    cached_with(engine, other, mint_for())
    left = [page for page in pages if pool.blocks[page].block_hash is not None]
    assert left == ([] if is_guarded else pages)


def test_tenant_over_quota(engine: Vllm, node: NodeProcess, gate: Gate, said: list[str]) -> None:
    """A full tenant's requests are answered; a line says once that nothing is stored."""
    prompts = prompts_of("quota")
    with admin_channel(node) as channel:
        stub = registry(channel)
        stub.SetTenant(
            pb.SetTenantRequest(name=DEFAULT_TENANT, host=pb.TierQuota(max_bytes=1)), timeout=30
        )
        before = engine.statistics().saved_blocks
        gate.check(prompts, engine.store(prompts))
        stub.SetTenant(pb.SetTenantRequest(name=DEFAULT_TENANT, host=pb.TierQuota()), timeout=30)
    assert engine.statistics().saved_blocks == before
    assert said == ["fabric: blocks are not stored (over_quota); vLLM computes them"]


def test_reset_means_other_weights(engine: Vllm, gate: Gate) -> None:
    """vLLM asked to reset its connector: a new session that uses nothing of the old one."""
    prompts = prompts_of("reset")
    session = engine.fabric.session
    engine.store(prompts)
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    assert engine.fabric.session != session
    first = engine.store(prompts)
    gate.check(prompts, first)
    assert [a.num_cached for a in first] == [0, 0, 0]
    engine.drop_hbm()
    assert num_loaded(engine, lambda: gate.check(prompts, engine.ask(prompts))) == 11


def test_statistics_reach_vllm(engine: Vllm) -> None:
    """What the worker counted since the last step goes into vLLM's own statistics, once."""
    engine.store([prompt(300, seed=77)])
    engine.answer(prompt(10, seed=5))
    taken = engine.worker._stats._last
    assert taken["saved_blocks"] == engine.statistics().saved_blocks > 0
    assert engine.worker.get_kv_connector_stats() is None


@pytest.mark.usefixtures("alone")
def test_restarted_engine_is_warm(checkpoint: Path, gate: Gate) -> None:
    """Another engine on the same weights loads what the first stored, from its first request on."""
    prompts = prompts_of("restart")
    with running(checkpoint) as first:
        first.store(prompts)
    with running(checkpoint) as second:
        answers = second.ask(prompts)
        gate.check(prompts, answers)
        assert [a.num_cached for a in answers] == [640, 256, 512]


@pytest.mark.usefixtures("alone")
def test_preemption(checkpoint: Path, gate: Gate) -> None:
    """Answers outgrow the memory: requests are preempted, return and load again, and are right."""
    prompts = prompts_of("preempt", CROWD)
    with running(checkpoint, num_gpu_blocks_override=12, max_model_len=1024) as engine:
        preempt, preempted = engine.scheduler._preempt_request, []

        def counted(request: Any, *args: Any, **fields: Any) -> None:
            preempted.append(request.request_id)
            preempt(request, *args, **fields)

        engine.scheduler._preempt_request = counted
        for _ in range(3):
            gate.check(prompts, engine.store(prompts))
        assert preempted
        assert engine.statistics().loaded_blocks > 0


@pytest.mark.usefixtures("alone")
def test_node_that_comes_late(
    checkpoint: Path,
    gate: Gate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
) -> None:
    """No node at start costs nothing, and a line says so; from when it is there it is used."""
    late = make_node(tmp_path / "late")
    monkeypatch.setenv("KVFABRIC_ENGINE_NODE_SOCKET", str(late.socket))
    prompts = prompts_of("absent")
    with running(checkpoint) as engine:
        gate.check(prompts, engine.ask(prompts))
        (line,) = said
        assert line.startswith(f"fabric: connect failed (ConnectError: no node at {late.socket}")
        assert line.endswith("; computing instead")
        with late:
            wait_for(lambda: engine.fabric.statistics().is_up)
            engine.answer(prompt(10, seed=6))
            wait_for(lambda: engine.statistics().is_up)
            engine.drop_hbm()
            engine.store(prompts)
            engine.drop_hbm()
            assert num_loaded(engine, lambda: gate.check(prompts, engine.ask(prompts))) == 11


@pytest.mark.usefixtures("alone")
def test_node_that_requires_handles(
    checkpoint: Path, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests without a handle share nothing, in HBM neither; with one they do."""
    tokens = prompts_of("require")[0]
    with make_node(tmp_path / "strict", require_handle=True) as strict:
        monkeypatch.setenv("KVFABRIC_ENGINE_NODE_SOCKET", str(strict.socket))
        with running(checkpoint) as engine:
            answers = [engine.answer(tokens) for _ in range(2)]
            gate.check([tokens] * 2, answers)
            assert [a.num_cached for a in answers] == [0, 0]
            handle = Minter(engine, strict)()
            assert cached_with(engine, tokens, handle) == 0
            engine.drop_hbm()
            assert cached_with(engine, tokens, handle) == 640


@pytest.mark.usefixtures("alone")
def test_unknown_version_is_told_and_does_nothing(
    checkpoint: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """A vLLM that was never tried: one line, and an engine that answers."""
    monkeypatch.setattr(vllm_identity, "TESTED_VERSIONS", ("0.1",))
    prompts = prompts_of("version")
    with running(checkpoint) as engine:
        gate.check(prompts, engine.ask(prompts))
        assert engine.scheduler.connector.fabric is None
    assert len(said) == 1
    assert "is not supported (tested: 0.1.x); this engine runs without the fabric" in said[0]
