"""Saves overlap: the next piece is on its way into the window while the node copies the one before."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from kvfabric_engine.lanes import Fence
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.staging import Pages
from kvfabric_engine.testing import ask, small_config

from kvfabric.client import NodeClient
from kvfabric.errors import TransferError
from kvfabric.testing.processes import NodeProcess, until

pytestmark = pytest.mark.slow
PROMPT = random.Random(1).choices(range(3, 259), k=200)
NUM_BLOCKS = len(PROMPT) // 16
PART_BYTES = 2 * 2 * 2 * 16 * 4 * 16


class Watched:
    """An engine whose saves are watched, and may fail: `steps` of begin, end, commit and abort."""

    def __init__(self, node: NodeProcess, patch: pytest.MonkeyPatch, *, window_parts: int) -> None:
        size = window_parts * PART_BYTES
        self.engine = Engine(small_config(node_socket=str(node.socket), window_bytes=size))
        assert self.engine.shape.part_bytes == PART_BYTES
        self.steps: list[str] = []
        self.failing = 0
        mover = self.engine._mover
        begin, commit, abort = mover.begin_gather, NodeClient.commit, NodeClient.abort

        def begin_watched(
            blocks: Sequence[Pages], out: Sequence[memoryview], *, after: Fence
        ) -> Fence:
            self.steps.append("begin")
            if self.steps.count("begin") == self.failing:
                raise TransferError("no copy today")
            return _Watched(begin(blocks, out, after=after), self.steps)

        def commit_watched(client: NodeClient, *args: Any, **options: Any) -> Any:
            self.steps.append("commit")
            return commit(client, *args, **options)

        def abort_watched(client: NodeClient, *args: Any, **options: Any) -> Any:
            self.steps.append("abort")
            return abort(client, *args, **options)

        patch.setattr(NodeClient, "abort", abort_watched)
        patch.setattr(mover, "begin_gather", begin_watched)
        patch.setattr(NodeClient, "commit", commit_watched)

    def save(self) -> int:
        """Ask, and wait until all is saved: the blocks that the node took. The window is free after it."""
        with self.engine as engine:
            connector = engine.connector
            assert connector is not None
            assert connector.wait_connected(10)
            ask(engine, PROMPT, max_tokens=1)
            until(lambda: connector.statistics().saving_bytes == 0)
            with connector._link.use() as client:
                assert client.window.num_free_bytes == client.window.num_bytes
            return connector.statistics().saved_blocks


class _Watched(Fence):
    def __init__(self, fence: Fence, steps: list[str]) -> None:
        self._fence, self._steps = fence, steps

    def wait(self) -> None:
        self._steps.append("end")
        self._fence.wait()


def test_a_piece_is_begun_before_the_one_before_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with NodeProcess(tmp_path / "node") as node:
        watched = Watched(node, monkeypatch, window_parts=16)
        assert watched.save() == NUM_BLOCKS == 12
    one_ahead = ["begin", "begin", "end", "commit", "begin", "end", "commit", "end", "commit"]
    assert watched.steps == one_ahead


@pytest.mark.parametrize("window_parts", [1, 3])
def test_a_window_without_room_ahead_is_used_piece_by_piece(
    window_parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with NodeProcess(tmp_path / "node") as node:
        watched = Watched(node, monkeypatch, window_parts=window_parts)
        assert watched.save() == NUM_BLOCKS
    assert watched.steps == ["begin", "end", "commit"] * NUM_BLOCKS


@pytest.mark.parametrize(("failing", "stored"), [(2, 4), (3, 8)])
def test_what_was_begun_is_stored_though_the_next_piece_fails(
    failing: int, stored: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what failed is given up at once; the next engine stores it."""
    with NodeProcess(tmp_path / "node") as node:
        with monkeypatch.context() as patch:
            broken = Watched(node, patch, window_parts=16)
            broken.failing = failing
            broken.save()
            assert broken.steps.count("commit") == stored // 4
            assert broken.steps.count("abort") == 1
        assert Watched(node, monkeypatch, window_parts=16).save() == NUM_BLOCKS - stored
