"""Failures that nobody would notice: each found, and none found where all is well."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from kvfabric_router.diagnosis import FAIL, OK, WARN, EngineSight, NodeSight, Totals, examine
from kvfabric_router.identity import ModelIdentity
from kvfabric_router.policy import EngineView
from kvfabric_router.tokenizers import TokenCounts

from kvfabric import __version__
from tests.router.standin import client_of, config_for, engines, keyring_with, registry_state

VIEW = EngineView("http://e", "e", "m", model=ModelIdentity("r", bytes(32), 16), tokenizer="byte")
OTHER = msgspec.structs.replace(
    VIEW, engine_id="other", model=ModelIdentity("r", bytes([1]) * 32, 32), endpoint="http://o"
)
NODE = NodeSight("unix:/n", True, __version__, 0.1)
ENGINE = EngineSight(VIEW, (), ("n",), ours="byte")
SAYS_NOTHING = msgspec.structs.replace(VIEW, tokenizer="")
TOTALS = Totals(10_000, 5_000, 4_000, 0, 100)


def test_where_all_is_well_nothing_is_found() -> None:
    assert {finding.result for finding in examine([NODE], [ENGINE], TOTALS)} == {OK}
    fresh = Totals(0, 0, 0, 0, 0)
    assert {finding.result for finding in examine([NODE], [ENGINE], fresh)} == {OK}


def sight(**changes: object) -> EngineSight:
    return dataclasses.replace(ENGINE, **changes)  # type: ignore[arg-type]


def changed(**changes: object) -> Totals:
    return dataclasses.replace(TOTALS, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "sights", "totals", "result", "words"),
    [
        ([], [ENGINE], TOTALS, FAIL, "no node is linked"),
        ([dataclasses.replace(NODE, connected=False)], [ENGINE], TOTALS, FAIL, "no events"),
        ([dataclasses.replace(NODE, version="0.0.1")], [ENGINE], TOTALS, WARN, "runs 0.0.1"),
        ([dataclasses.replace(NODE, clock_ahead_s=-60.0)], [ENGINE], TOTALS, FAIL, "-60.0 s"),
        ([dataclasses.replace(NODE, stale_serves=2)], [ENGINE], TOTALS, FAIL, "withdrawn blocks"),
        ([NODE], [sight(nodes=("a", "b"))], TOTALS, FAIL, "registered at 2 nodes"),
        ([NODE], [sight(nodes=())], TOTALS, WARN, "no node speaks for it"),
        ([NODE], [sight(view=SAYS_NOTHING, ours="")], TOTALS, WARN, "routed approximately"),
        ([NODE], [sight(ours="")], TOTALS, WARN, "'byte'"),
        ([NODE], [sight(expected="hf:1")], TOTALS, FAIL, "byte is not hf:1"),
        ([NODE], [sight(counts=TokenCounts(1, 3))], TOTALS, FAIL, "in 3 prompts of 4"),
        ([NODE], [sight(differs=("block_tokens",))], TOTALS, FAIL, "block_tokens"),
        ([NODE], [ENGINE, sight(view=OTHER)], TOTALS, WARN, "share nothing"),
        ([NODE], [ENGINE], changed(reused_tokens=0), FAIL, "none was reused"),
        ([NODE], [ENGINE], changed(index_blocks=0), FAIL, "the index is empty"),
        ([NODE], [ENGINE], changed(no_handle=3), FAIL, "3 requests"),
    ],
)
def test_each_is_found(
    nodes: Sequence[NodeSight],
    sights: Sequence[EngineSight],
    totals: Totals,
    result: str,
    words: str,
) -> None:
    wrong = [finding for finding in examine(nodes, sights, totals) if finding.result != OK]
    assert [finding.result for finding in wrong] == [result]
    assert words in wrong[0].text
    assert wrong[0].advice


async def test_a_router_tells_its_own(tmp_path: Path) -> None:
    """Engines that no node speaks for, and no node to link to."""
    keyring_with(tmp_path)
    async with (
        engines(2) as found,
        client_of(config_for(tmp_path, [e.url for e in found]), registry_state()) as client,
    ):
        _, told, _ = await client.get("/doctor")
    texts = [finding["text"] for finding in told["findings"]]
    assert texts[0] == "no events: not connected"
    assert sum("no node speaks for it" in text for text in texts) == 2
