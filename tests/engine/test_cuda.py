"""The reference engine on a GPU against a real node: what one engine stored, the next one loads.

In deterministic mode a hit changes no shape, so answers are compared token for token here too.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.testing import Answer, ask, small_config

from kvfabric.testing.processes import NodeProcess, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPTS = [random.Random(n).choices(range(3, 259), k=n) for n in (70, 100, 37, 450)]
WAIT_S = 30.0


def _answers(node: NodeProcess | None, audit: Path | None, dtype: str) -> list[Answer]:
    changes = {"device": "cuda", "deterministic": "on", "dtype": dtype, "hbm_blocks": 512}
    changes |= {"node_socket": str(node.socket)} if node else {}
    changes |= {"audit_parts": str(audit)} if audit else {}
    with Engine(small_config(**changes)) as engine:
        connector = engine.connector
        assert node is None or (connector is not None and connector.wait_connected(WAIT_S))
        found = [ask(engine, prompt, max_tokens=16) for prompt in PROMPTS]
        deadline = time.monotonic() + WAIT_S
        while connector is not None and connector.statistics().saving_bytes:
            assert time.monotonic() < deadline, "blocks are still being saved"
            time.sleep(0.01)
    return found


def _parts(audit: Path, op: str) -> set[tuple[str, str]]:
    lines = map(json.loads, audit.read_text().splitlines())
    return {(line["key"], line["checksum"]) for line in lines if line["op"] == op}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_restarted_engine_on_a_gpu_is_warm_and_answers_alike(tmp_path: Path, dtype: str) -> None:
    """Loaded parts are bitwise what was stored, and the answers those of an engine without fabric."""
    alone = _answers(None, None, dtype)
    with NodeProcess(tmp_path / "node") as node:
        first = _answers(node, tmp_path / "first", dtype)
        second = _answers(node, tmp_path / "second", dtype)
    assert [a.token_ids for a in first] == [a.token_ids for a in alone]
    assert [a.token_ids for a in second] == [a.token_ids for a in alone]
    assert [a.reused.total for a in first] == [0, 0, 0, 0]
    assert all(a.reused.host > 0 for a in second)
    loaded = _parts(tmp_path / "second", "load")
    assert loaded
    assert loaded <= _parts(tmp_path / "first", "store")


def test_kv_comes_out_of_another_engines_hbm(tmp_path: Path) -> None:
    """Bit for bit as computed, and after the other engine has ended out of the arena."""
    alone = [a.token_ids for a in _answers(None, None, "bfloat16")]
    config = {"device": "cuda", "deterministic": "on", "dtype": "bfloat16", "hbm_blocks": 512}
    with NodeProcess(tmp_path / "node") as node:
        config["node_socket"] = str(node.socket)
        with Engine(small_config(**config)) as second:
            borrower = second.connector
            assert borrower is not None
            with Engine(small_config(**config)) as first:
                lender = first.connector
                assert lender is not None
                until(lambda: lender._saves.lends)
                assert [ask(first, prompt, max_tokens=16).token_ids for prompt in PROMPTS] == alone
                until(lambda: lender.statistics().saving_bytes == 0)
                direct = borrower._loads.direct
                assert direct is not None
                until(lambda: len(direct.landing.borrowed.owners) == 1)
                warm = [ask(second, prompt, max_tokens=16) for prompt in PROMPTS]
                assert [a.token_ids for a in warm] == alone
                seen = borrower.statistics()
                assert seen.borrowed_blocks == seen.loaded_blocks == 4 + 6 + 2 + 28
                assert seen.stale_blocks == 0
            until(lambda: not direct.landing.borrowed.owners)
            second.clear_prefix_cache()
            again = [ask(second, prompt, max_tokens=16) for prompt in PROMPTS]
            assert [a.token_ids for a in again] == alone
            assert borrower.statistics().borrowed_blocks == seen.borrowed_blocks
