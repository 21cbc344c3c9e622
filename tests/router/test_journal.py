"""The journal: what a real router wrote is read back, replays exactly, and holds nothing of a prompt."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
from pathlib import Path

import msgspec
import pytest
from kvfabric_router import policy, replay
from kvfabric_router.decision import Decision, Outcome
from kvfabric_router.journal import Capacity, Chosen, Journal, Reading, files_of
from kvfabric_router.policy import Candidate, EngineView, Reuse
from kvfabric_router.rates import Rates, Work
from kvfabric_router.replay import Exchange, Model, Sizes

from kvfabric.cli import main
from kvfabric.errors import ConfigError, NotFound
from kvfabric.types import NodeId, TenantId
from tests.router.standin import (
    client_of,
    config_for,
    engines,
    keyring_with,
    registry_state,
    tenant,
)

KEY = "kvf-" + "k" * 43
SECRET = "the words that nobody may find on any disk"


def candidate(name: str, *, waiting_ms: float = 0.0) -> Candidate:
    engine = EngineView(
        endpoint=f"http://{name}",
        engine_id=name,
        model_name="m",
        node_id=NodeId("n"),
        waiting_ms=waiting_ms,
        rates=Rates(token_ms=0.1, host_ms=0.001),
    )
    return Candidate(engine, 128, Reuse(hbm_tokens=16))


def decision(draw: int = 1) -> Decision:
    ranked = policy.choose("cost", [candidate("e0"), candidate("e1")], draw)
    return Decision(TenantId("t-1"), ranked, "", draw=draw, made_at=float(draw))


def journal_at(
    path: Path, *, max_bytes: int = 1 << 20, dropped: list[int] | None = None
) -> Journal:
    lost = [] if dropped is None else dropped
    return Journal(path / "j", state_dir=path, max_bytes=max_bytes, dropped=lost.append)


async def write(path: Path, count: int, *, max_bytes: int = 1 << 20) -> None:
    journal = journal_at(path, max_bytes=max_bytes)
    async with journal.writing():
        for number in range(count):
            journal.chosen(f"req-{number}", "m", decision(number), b"x" * 64, 16)
            journal.answered(f"req-{number}", Outcome(128, Work(112, hbm=16), 3.0))


# ---------------------------------------------------------------------- a real router's


@pytest.mark.parametrize("name", ["cost", "least_loaded", "round_robin"])
async def test_live_choices_come_out_as_they_were(tmp_path: Path, name: str) -> None:
    keyring_with(tmp_path, ["t-1"])
    state = registry_state([tenant("t-1", KEY)])
    async with engines(4) as found:
        urls = [engine.url for engine in found]
        config = config_for(tmp_path, urls, policy=name, journal_dir=str(tmp_path / "j"))
        async with client_of(config, state) as client:
            bodies = [
                {"model": "reference", "prompt": f"{SECRET} {number}", "stream": number % 2 == 0}
                for number in range(60)
            ]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(client.post(body, key=KEY)) for body in bodies]
            ids = [task.result()[2]["X-Request-Id"] for task in tasks]

    exchanges = replay.exchanges(Reading(tmp_path / "j"))
    assert len(exchanges) == 60
    assert all(one.outcome is not None for one in exchanges)
    assert {len(one.chosen.candidates) for one in exchanges} == {4}
    assert replay.check(exchanges).different == ()
    # The check can fail: with other draws other choices are made.
    others = [
        Exchange(msgspec.structs.replace(one.chosen, draw=one.chosen.draw + 1), one.outcome)
        for one in exchanges
    ]
    assert replay.check(others).different

    raw = b"".join(file.read_bytes() for file in files_of(tmp_path / "j"))
    for secret in ("the words", "t-1", KEY, *ids):
        assert secret.encode() not in raw


# ---------------------------------------------------------------------- on disk


async def test_torn_and_changed_lines_are_left_out_and_a_start_begins_a_new_file(
    tmp_path: Path,
) -> None:
    await write(tmp_path, 4)
    (first,) = files_of(tmp_path / "j")
    raw = bytearray(first.read_bytes())
    raw[20] ^= 1  # in the first line
    first.write_bytes(raw[:-10])  # the last is torn
    await write(tmp_path, 4)
    reading = Reading(tmp_path / "j")
    assert len(list(reading)) == 6 + 8
    assert reading.num_damaged == 2
    assert len(files_of(tmp_path / "j")) == 2


async def test_it_is_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    for _ in range(6):
        await write(tmp_path, 100, max_bytes=64 << 10)
    sizes = [file.stat().st_size for file in files_of(tmp_path / "j")]
    assert 32 << 10 < sum(sizes) <= 64 << 10
    last = [record for record in Reading(tmp_path / "j") if isinstance(record, Chosen)][-1]
    assert last.at == 99.0
    assert all(file.stat().st_mode & 0o077 == 0 for file in files_of(tmp_path / "j"))


async def test_a_disk_that_fails_costs_lines_and_is_tried_again(tmp_path: Path) -> None:
    dropped: list[int] = []
    journal = journal_at(tmp_path, dropped=dropped)
    async with journal.writing():
        os.close(journal._file)
        journal._file = os.open("/dev/full", os.O_WRONLY)  # a disk without room
        journal.answered("req-1", Outcome(1, Work(1), None))
        journal._write(journal._take())
        assert dropped == [1]
        journal.answered("req-2", Outcome(1, Work(1), None))
        journal._write(journal._take())
    assert dropped == [1]
    assert len(list(Reading(tmp_path / "j"))) == 1


async def test_two_routers_do_not_share_one(tmp_path: Path) -> None:
    async with journal_at(tmp_path).writing():
        with pytest.raises(ConfigError, match="another router"):
            async with journal_at(tmp_path).writing():
                pass


async def test_more_than_fits_in_memory_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvfabric_router.journal.MAX_BUFFERED_BYTES", 1000)
    dropped: list[int] = []
    journal = journal_at(tmp_path, dropped=dropped)
    async with journal.writing():
        for number in range(20):
            journal.answered(f"req-{number}", Outcome(1, Work(1), None))
    assert len(dropped) + len(list(Reading(tmp_path / "j"))) == 20
    assert dropped


def test_what_is_no_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotFound):
        Reading(tmp_path)
    assert main(["replay", str(tmp_path / "nowhere")]) == 1
    assert "is no journal" in capsys.readouterr().err


# ---------------------------------------------------------------------- what if


def history(num_prompts: int, rounds: int) -> list[Exchange]:
    """Prompts of 8 blocks, each asked again `rounds` times, 20 ms apart. Only the model reuses."""
    found = []
    for number in range(num_prompts * rounds):
        prompt = number % num_prompts
        blocks = b"".join(bytes([prompt, block, 0, 0, 0, 0, 0, 0]) for block in range(8))
        made = decision(number)
        chosen = Chosen(
            id=str(number),
            tenant="t",
            at=number * 0.02,
            model="m",
            policy="cost",
            draw=number,
            reason="",
            waited_ms=0.0,
            candidates=tuple(ranked.candidate for ranked in made.ranked),
            blocks=blocks,
            block_tokens=16,
        )
        found.append(Exchange(chosen, Outcome(129, Work(129), 14.0, completion_tokens=1)))
    return found


def test_more_host_memory_reuses_more_and_an_engine_less_waits_longer() -> None:
    found = history(20, 10)
    small = Model(Sizes(hbm=16, host=64)).run("small", found)
    large = Model(Sizes(hbm=16, host=256)).run("large", found)
    alone = Model(Sizes(hbm=16, host=64), without=["e1"]).run("alone", found)
    assert small is not None
    assert large is not None
    assert alone is not None
    assert small.reused_share < 0.5 < large.reused_share
    assert large.ttft_ms_mean < small.ttft_ms_mean
    assert alone.num == small.num
    crowded = [
        dataclasses.replace(one, chosen=msgspec.structs.replace(one.chosen, at=one.chosen.at / 3))
        for one in found
    ]
    two = Model(Sizes(hbm=16, host=64)).run("two", crowded)
    one = Model(Sizes(hbm=16, host=64), without=["e1"]).run("one", crowded)
    assert two is not None
    assert one is not None
    assert one.ttft_ms_mean > 2 * two.ttft_ms_mean
    assert Model(Sizes(16, 64), without=["e0", "e1"]).run("none", found) is None


def test_sizes_are_found_again() -> None:
    """A history that the model itself made under known sizes."""
    found, engine = [], Model(Sizes(hbm=32, host=256))
    asked = history(40, 8)
    random.Random(1).shuffle(asked)
    for one in asked:
        first = engine._engine(one.chosen.candidates[0].engine)
        blocks = replay._blocks(one.chosen.blocks)
        reuse = first.reuse(blocks, 16)
        first.hbm.use(blocks)
        first.host.use(blocks)
        work = Work(129 - reuse.tokens, hbm=reuse.hbm_tokens, host=reuse.host_tokens)
        found.append(Exchange(one.chosen, Outcome(129, work, 14.0)))
    assert replay.fitted(found) == Sizes(hbm=32, host=256)


def told_of(found: list[Exchange], blocks: int) -> list[Exchange]:
    """The same history, recorded beside a node that said that it holds so many blocks of 4 KiB."""
    told = []
    for one in found:
        candidates = tuple(
            msgspec.structs.replace(c, engine=msgspec.structs.replace(c.engine, block_bytes=4096))
            for c in one.chosen.candidates
        )
        chosen = msgspec.structs.replace(
            one.chosen, candidates=candidates, capacity={"n": Capacity(blocks * 4096, 0)}
        )
        told.append(dataclasses.replace(one, chosen=chosen))
    return told


def test_twice_the_host_memory_is_twice_what_the_nodes_said() -> None:
    """Prompts come round after 160 blocks: 128 do not keep them, 256 do."""
    found = told_of(history(20, 10), 128)
    assert replay.recorded_hosts(found) == {"n": 128}
    assert replay.recorded_hosts(found, 2.0) == {"n": 256}
    rows = [
        Model(Sizes(hbm=16, host=0), hosts=replay.recorded_hosts(found, times)).run("", found)
        for times in (1.0, 2.0)
    ]
    assert rows[0] is not None
    assert rows[1] is not None
    assert rows[0].reused_share < 0.5 < rows[1].reused_share
    # The twin: without what they said it is guessed by what was reused, and here nothing was.
    silent = history(20, 10)
    assert replay.recorded_hosts(silent) == {}
    assert 2 * replay.fitted(silent).host < 160


async def test_what_a_node_holds_is_recorded_beside_the_choice(tmp_path: Path) -> None:
    journal = journal_at(tmp_path)
    journal.capacities = lambda nodes: {node: Capacity(1 << 30, 4 << 30) for node in set(nodes)}
    async with journal.writing():
        journal.chosen("req-1", "m", decision(1), b"x" * 64, 16)
    (record,) = Reading(tmp_path / "j")
    assert isinstance(record, Chosen)
    assert record.capacity == {"n": Capacity(1 << 30, 4 << 30)}
