"""What transfers promise beside right bytes: how messages look, bounds, refusals, new starts."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvfabric.daemon.peers import is_allowed
from kvfabric.pki import Identity
from kvfabric.testing.engine import DEADLINE_S, wrong_blocks
from kvfabric.testing.processes import NodeProcess
from tests.fleet.test_peers import LARGE, SMALL, Pair, fetched, found_after, nodes_on, stored, wait

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

BOTH = ("notes_messages",)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    receiver = (*BOTH, "notes_bytes_in_flight", "has_little_room")
    with nodes_on(
        tmp_path_factory.mktemp("pair"), sender=(*BOTH, "is_busy_when_told"), receiver=receiver
    ) as found:
        yield found


def messages(node: NodeProcess, what: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (node.state_dir / "messages").read_text().splitlines()]
    return [line for line in lines if line["what"] == what]


def test_small_parts_go_together_from_arena_to_arena_under_fresh_tags(pair: Pair) -> None:
    for node in (pair.a, pair.b):
        (node.state_dir / "messages").write_text("")
    for prompt, num_blocks, part_bytes in (("s", 200, SMALL), ("l", 4, LARGE), ("t", 200, SMALL)):
        assert found_after(pair, prompt, num_blocks, part_bytes) == (num_blocks, 0)
    sent, received = messages(pair.a, "send"), messages(pair.b, "receive")
    wanted = [[200 * SMALL], *[[LARGE]] * 4, [200 * SMALL]]
    for vectors in (sent, received):
        assert sorted(vector["sizes"] for vector in vectors) == sorted(wanted)
        assert all(all(vector["in_arena"]) for vector in vectors)
    tags = [tag for vector in received for tag in vector["tags"]]
    assert sorted(tags) == sorted(tag for vector in sent for tag in vector["tags"])
    assert len(set(tags)) == len(tags) == 6
    assert max(tags) > 1 << 56  # of 64 bits: all six below once in 10^14 runs


def test_what_is_in_flight_is_bounded_in_bytes(pair: Pair) -> None:
    assert found_after(pair, "many", 24, LARGE) == (24, 0)
    assert int((pair.b.state_dir / "in_flight").read_text()) <= 2 << 20


def test_without_the_bound_there_is_more(tmp_path: Path) -> None:
    """The twin."""
    with nodes_on(tmp_path, receiver=("notes_bytes_in_flight",)) as pair:
        assert found_after(pair, "many", 24, LARGE) == (24, 0)
        assert int((pair.b.state_dir / "in_flight").read_text()) > 2 << 20


def test_who_asks_for_the_same_at_once_has_it_sent_once(pair: Pair) -> None:
    stored(pair, 24, LARGE, "shared")
    engines = [pair.engine(pair.b, LARGE) for _ in range(3)]
    name = 'transfers_total{result="sent_blocks"}'
    before = pair.a.metrics()[name]
    results: list[tuple[int, int]] = []

    def ask(number: int) -> None:
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until:
            keys, found = fetched(pair, engines[number], 24, "shared")
            if len(found) == 24:
                results.append((len(found), wrong_blocks(keys, found)))
                return

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(24, 0)] * 3
    assert pair.a.metrics()[name] - before == 24


def test_an_owner_under_load_refuses_and_is_asked_again(pair: Pair) -> None:
    stored(pair, 8, LARGE, "wanted")
    engine = pair.engine(pair.b, LARGE)
    busy, name = pair.a.state_dir / "busy", 'transfers_total{result="refused"}'
    before, num_lines = pair.b.metrics().get(name, 0), len(pair.b.log)
    busy.touch()
    began = time.monotonic()
    assert fetched(pair, engine, 8, "wanted")[1] == []
    assert time.monotonic() - began < 1.0  # the engine computes
    assert pair.b.metrics()[name] == before + 1
    assert not [line for line in pair.b.log[num_lines:] if re.search("WARNING|ERROR", line)]
    busy.unlink()
    wait(lambda: len(fetched(pair, engine, 8, "wanted")[1]) == 8)


def test_a_peer_that_starts_anew_is_fetched_from_again(pair: Pair) -> None:
    """Its worker has another address: the link to the old one is not used any more."""
    assert found_after(pair, "before", 8, LARGE) == (8, 0)
    pair.a.kill()
    pair.a.start()  # without an arena: engines of this process have the earlier one
    pair.stack.close()
    pair.a.stop()
    pair.a.start()
    wait(lambda: pair.a.metrics()["epoch_lease_valid"])
    deadline = time.monotonic() + DEADLINE_S
    stored(pair, 8, LARGE, "after")
    engine = pair.engine(pair.b, LARGE)
    while not (found := fetched(pair, engine, 8, "after"))[1]:
        assert time.monotonic() < deadline, pair.told()
    assert wrong_blocks(*found) == 0
    assert len(found[1]) == 8


def test_only_nodes_are_told_where_to_send() -> None:
    """UCX addresses are in `NodeTransfer` alone, which needs a node's certificate."""
    assert is_allowed(Identity("node", "a"), "/kvfabric.v1.NodeTransfer/Hold")
    for role in ("router", "engine"):
        assert not is_allowed(Identity(role, "a"), "/kvfabric.v1.NodeTransfer/Hold")
    assert not is_allowed(None, "/kvfabric.v1.NodeTransfer/Hold")
