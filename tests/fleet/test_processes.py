"""Children of the demo: they become ready, end when told, and say why they failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfabric.demo.processes import Children, DemoError, free_addresses, run_command

pytestmark = [pytest.mark.slow, pytest.mark.fleet]


async def _never() -> bool:
    return False


async def test_a_child_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    """Waiting for a process that ended raises at once, with its last words."""
    async with Children(tmp_path) as children:
        child = await children.start("router", ["router", "--no-such-key", "1"])
        with pytest.raises(DemoError, match=r"(?s)exited 2> before it was ready.*no-such-key"):
            await child.wait_ready(_never, deadline_s=30)


async def test_children_end_with_the_block(tmp_path: Path) -> None:
    """Whatever still runs is stopped when the block is left, also by an error."""
    async with Children(tmp_path) as children:
        child = await children.start("node", ["demo", "--help"])
        assert "running" in repr(child)
    assert not child.is_running


async def test_a_failing_command_raises_with_its_message() -> None:
    """Standard error of the command is in the error."""
    with pytest.raises(DemoError, match=r"unrecognized arguments|invalid choice"):
        await run_command(["demo", "--no-such-flag"])


def test_free_addresses_are_different() -> None:
    """Ports are taken together, so none is given twice."""
    assert len(set(free_addresses(8))) == 8
