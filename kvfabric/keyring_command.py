"""`kvfabric keyring`: what may be done to a keyring beside a node that runs on it.

Works on the files, as their owner: nodes and routers that have the keyring open read it again by themselves.
Nothing it prints is a secret.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kvfabric.cli import Command
from kvfabric.config import NodeConfig, load


def _configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, what in (
        ("show", "generation and key ids, no secret"),
        (
            "rotate-root",
            "seal it under a new root key; copies made before open with the old one only",
        ),
        ("rotate-handle-key", "routers sign with a new key; handles of the one before stay valid"),
    ):
        verb = verbs.add_parser(name, help=what)
        verb.add_argument("--keyring-dir", metavar="DIR", help="where it is (default: the node's)")
        verb.add_argument("--config", metavar="FILE", help="the node's TOML file")
        verb.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    from kvfabric.keyring import Keyring, hide_memory

    hide_memory()
    flags = {"keyring_dir": args.keyring_dir} if args.keyring_dir else {}
    config = load(NodeConfig, file=Path(args.config) if args.config else None, flags=flags)
    keyring = Keyring.open(config.keyring_path)  # only a node makes one
    if args.verb == "rotate-root":
        keyring.rotate_root_key()
    elif args.verb == "rotate-handle-key":
        keyring.rotate_handle_key()
    facts = {
        "generation": keyring.generation,
        "tenants": keyring.num_tenants,
        "handle_keys": sorted(keyring.handle_keys()),
        "current_handle_key": keyring.current_handle_key()[0],
    }
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print(
            f"keyring generation {facts['generation']}: {facts['tenants']} tenants, handle keys "
            f"{facts['handle_keys']}, signing with {facts['current_handle_key']}"
        )
    return 0


COMMAND = Command("keyring: show, rotate-root, rotate-handle-key", "node", _configure, _run)
