"""`kvfabric replay JOURNAL`: recorded choices made again, and what another fleet would have made of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from kvfabric.cli import Command
from kvfabric.errors import ConfigError
from kvfabric_router import replay
from kvfabric_router.journal import Reading
from kvfabric_router.replay import Checked, Exchange, Model, Row, Sizes

POLICIES = ("cost", "least_loaded", "round_robin")


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("journal", metavar="JOURNAL", type=Path, help="its directory, or one file")
    parser.add_argument("--policy", choices=POLICIES, help="what if: another policy")
    parser.add_argument(
        "--host-times", type=float, metavar="X", help="what if: X times the host memory"
    )
    parser.add_argument(
        "--without", action="append", default=[], metavar="ENGINE", help="what if: one engine less"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(args: argparse.Namespace) -> int:
    times = 1.0 if args.host_times is None else args.host_times
    if not 0 <= times < float("inf"):
        raise ConfigError(f"--host-times is {times}; it must be 0 or more")
    reading = Reading(args.journal)
    found = replay.exchanges(reading)
    _check_engines(args.without, found)
    checked = replay.check(found)
    rows: list[Row] = []
    sizes, hosts = None, {}
    if args.policy or args.host_times is not None or args.without:
        sizes = replay.fitted(found)
        hosts = replay.recorded_hosts(found)
        wanted = Model(
            Sizes(sizes.hbm, int(sizes.host * times)),
            policy_name=args.policy or "",
            without=args.without,
            hosts=replay.recorded_hosts(found, times),
        )
        tried = (
            replay.happened(found),
            Model(sizes, hosts=hosts).run("model, as it was", found),
            wanted.run("model, what if", found),
        )
        rows = [row for row in tried if row is not None]
    if args.json:
        print(
            json.dumps(
                {
                    "choices": checked.num,
                    "reproduced": checked.num - len(checked.different),
                    "different": checked.different,
                    "damaged_lines": reading.num_damaged,
                    "sizes_blocks": sizes and dataclasses.asdict(sizes),
                    "recorded_host_blocks": hosts,
                    "rows": [dataclasses.asdict(row) for row in rows],
                }
            )
        )
    else:
        print(
            "\n".join(_lines(checked, reading.num_damaged, _sizes_told(sizes, hosts), rows)),
            file=sys.stdout,
        )
    return 1 if checked.different else 0


def _check_engines(without: list[str], found: list[Exchange]) -> None:
    known = {c.engine.engine_id for one in found for c in one.chosen.candidates}
    for engine in without:
        if engine not in known:
            raise ConfigError(f"--without {engine}: the journal knows {', '.join(sorted(known))}")


def _sizes_told(sizes: Sizes | None, hosts: dict[str, int]) -> list[str]:
    if sizes is None:
        return []
    told = [f"recorded: {blocks} blocks of host memory at {node}" for node, blocks in hosts.items()]
    fitted = f"fitted: {sizes.hbm} blocks of HBM an engine"
    return [*told, fitted if hosts else f"{fitted}, {sizes.host} of host memory"]


def _lines(checked: Checked, num_damaged: int, sizes: list[str], rows: list[Row]) -> list[str]:
    same = checked.num - len(checked.different)
    found = [f"{same} of {checked.num} choices come out as they were"]
    if num_damaged:
        found.append(f"{num_damaged} damaged lines left out")
    found += [f"  other: {one}" for one in checked.different[:10]]
    found += sizes
    if rows:
        found.append(f"{'':20}{'requests':>9}{'TTFT mean':>12}{'p95 ms':>10}{'reused':>9}")
    found += [
        f"{row.name:20}{row.num:>9}{row.ttft_ms_mean:>12.1f}{row.ttft_ms_p95:>10.1f}"
        f"{row.reused_share:>9.3f}"
        for row in rows
    ]
    return found


COMMAND = Command(
    help="make the choices of a router's journal again, or ask what if",
    extra="router",
    configure=_configure,
    run=_run,
)
