"""`kvfabric audit`: the log of every change, from the node's own copy of the registry, running or not."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from kvfabric import config as configuration
from kvfabric.cli import Command
from kvfabric.config import NodeConfig
from kvfabric.errors import ConfigError, Conflict

if TYPE_CHECKING:
    from kvfabric.registry.database import Entry


def _configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    listing = verbs.add_parser("list", help="every change, oldest first")
    verify = verbs.add_parser(
        "verify", help="does the chain hold, and does it have these receipts?"
    )
    verify.add_argument(
        "--head",
        action="append",
        default=[],
        metavar="HEX",
        help="audit head of a receipt that was kept elsewhere; may be given several times",
    )
    for verb, run in ((listing, _list), (verify, _verify)):
        verb.add_argument("--state-dir", metavar="DIR", help="of the node (default: its own)")
        verb.add_argument("--config", metavar="FILE", help="the node's TOML file")
        verb.add_argument("--json", action="store_true", help="print JSON")
        verb.set_defaults(run_verb=run)


def _read(args: argparse.Namespace) -> tuple[list[Entry], bytes]:
    from kvfabric.registry.database import read_audit_log

    flags = {"state_dir": args.state_dir} if args.state_dir else {}
    file = Path(args.config) if args.config else None
    config = configuration.load(NodeConfig, file=file, flags=flags)
    return read_audit_log(config.state_dir / "registry")


def _list(args: argparse.Namespace) -> int:
    from kvfabric.registry import audit

    entries, _ = _read(args)
    rows = [(audit.decode(record), head.hex()) for record, head in entries]
    if args.json:
        plain = [
            {name: getattr(record, name) for name in record.__struct_fields__} | {"head": head}
            for record, head in rows
        ]
        print(json.dumps({"audit": plain}, indent=2))
        return 0
    for record, head in rows:
        at = datetime.fromtimestamp(record.at, UTC).isoformat(timespec="milliseconds")
        print(
            f"{record.sequence}  {at}  {record.who or '-'}  {record.action} {record.scope} "
            f"{record.old_epoch} -> {record.new_epoch}  {record.detail}  {head}"
        )
    return 0


def _verify(args: argparse.Namespace) -> int:
    from kvfabric.registry import audit

    heads = [_head(text) for text in args.head]
    entries, end = _read(args)
    problem = audit.problem_with(entries, end, heads)
    if problem:
        raise Conflict(problem)
    if args.json:
        print(json.dumps({"records": len(entries), "head": end.hex(), "receipts": len(heads)}))
        return 0
    print(f"{len(entries)} records hold, up to {end.hex()}; {len(heads)} receipts are among them")
    return 0


def _head(text: str) -> bytes:
    try:
        head = bytes.fromhex(text)
    except ValueError:
        head = b""
    if len(head) != 32:
        raise ConfigError(f"--head: 64 hex digits, as a receipt prints them, not {text!r}")
    return head


def _run(args: argparse.Namespace) -> int:
    code: int = args.run_verb(args)
    return code


COMMAND = Command("the log of every change: list, verify", "node", _configure, _run)
