"""Put the results of a full run into tests/TORTURE.md: `publish.py RESULTS COMMAND`.

A row replaces the row of the same proof; the others stay as they were measured.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "TORTURE.md"
_HEAD = "| proof | command | N | result | machine | commit |"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = models[0] if models else platform.machine()
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB"


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def merged(page: str, rows: list[dict[str, object]], *, command: str, on: str, at: str) -> str:
    """`page` with a row for each of `rows`, in the order of their names. Pure."""
    before, head, table = page.partition(_HEAD)
    lines = {line.split("|")[1].strip(): line for line in table.splitlines()[2:] if line}
    for row in rows:
        cells = (row["proof"], f"`{command}`", row["n"], row["result"], on, at)
        lines[str(row["proof"])] = "| " + " | ".join(map(str, cells)) + " |"
    return "\n".join([before + head, "|---|---|--:|---|---|---|", *sorted(lines.values())]) + "\n"


def main() -> None:
    results, command = sys.argv[1:]
    rows = [json.loads(line) for line in Path(results).read_text().splitlines()]
    PAGE.write_text(merged(PAGE.read_text(), rows, command=command, on=machine(), at=commit()))


if __name__ == "__main__":
    main()
