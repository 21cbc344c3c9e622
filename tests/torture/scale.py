"""How much a torture test does, and where its count goes.

`make test` runs every test under `tests/torture` at its small count; `make torture` sets KVFABRIC_TORTURE
to `full` and collects what `record` was told into tests/TORTURE.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

FULL = os.environ.get("KVFABRIC_TORTURE", "") == "full"
RESULTS = os.environ.get("KVFABRIC_TORTURE_RESULTS", "")
"""File that gets a JSON line for each result; empty: results are printed only."""


def count(small: int, full: int, name: str = "") -> int:
    """The number for this run. `name`: environment variable that may set another, for a part of it."""
    return int(os.environ.get(name, "") or (full if FULL else small))


def at_most(found: int, n: int) -> str:
    """What `found` of `n` says: nothing found in n tries bounds the rate at 3/n (95 %)."""
    return f"{found}" if found else f"0 (at most 3/{n}, 95 %)"


def record(proof: str, n: int, result: str) -> None:
    """A row of tests/TORTURE.md. `proof`: number and what was tried; `n`: of what `result` counts."""
    row = {"proof": proof, "n": n, "result": result}
    print(json.dumps(row))
    if RESULTS:
        with Path(RESULTS).open("a") as file:
            file.write(json.dumps(row) + "\n")
