"""What the commands that ask a node share: how they reach it, and how they print what it says."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfabric.config import NodeConfig, load, split_address

if TYPE_CHECKING:
    from kvfabric.daemon.admin_client import AdminClient

Run = Callable[[argparse.Namespace], int]
DIGEST_DIGITS = 8


def common(parser: argparse.ArgumentParser, run: Run) -> None:
    parser.add_argument("--admin-socket", metavar="PATH", help="of the node (default: its own)")
    parser.add_argument("--node", metavar="HOST:PORT", help="ask this one, over mTLS")
    parser.add_argument("--tls-dir", metavar="DIR", help="of this administrator (`kvfabric pki`)")
    parser.add_argument("--config", metavar="FILE", help="the node's TOML file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run_verb=run)


def client(args: argparse.Namespace) -> AbstractContextManager[AdminClient]:
    from kvfabric.daemon.admin_client import AdminClient
    from kvfabric.tls import Security

    if args.node:
        split_address(args.node, "--node")
        tls_dir = Path(args.tls_dir).expanduser() if args.tls_dir else None
        return AdminClient(args.node, security=Security("admin", tls_dir))
    flags = {"admin_socket": args.admin_socket} if args.admin_socket else {}
    config = load(NodeConfig, file=Path(args.config) if args.config else None, flags=flags)
    return AdminClient(config.admin_socket_path)


def size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines with aligned columns; none without rows."""
    cells = [tuple(str(cell) for cell in row) for row in rows]
    if not cells:
        return []
    cells.insert(0, tuple(header))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def print_lines(lines: Iterable[str]) -> int:
    print("\n".join(lines) or "nothing")
    return 0


def print_json(message: Any) -> int:
    from kvfabric.daemon.admin_client import to_plain

    return dump(to_plain(message))


def dump(plain: dict[str, Any]) -> int:
    print(json.dumps(plain, indent=2))
    return 0
