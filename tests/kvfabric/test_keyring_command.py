"""`kvfabric keyring`, beside a process that has the keyring open."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from kvfabric import keyring_command
from kvfabric.cli import Command
from kvfabric.errors import ConfigError
from kvfabric.keyring import Keyring
from kvfabric.types import DEFAULT_TENANT


def run(command: Command, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args(arguments))


def test_rotations_reach_a_node_that_has_it_open_and_print_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = Keyring.create_or_open(tmp_path)
    there = ("--keyring-dir", str(tmp_path), "--json")
    secret, first = node.tenant_secret(DEFAULT_TENANT), node.current_handle_key()
    facts = {}
    for verb in ("show", "rotate-root", "rotate-handle-key", "rotate-root"):
        assert run(keyring_command.COMMAND, verb, *there) == 0
        out = capsys.readouterr().out
        facts = json.loads(out)
        for hidden in (secret, *node.handle_keys().values()):
            assert hidden.hex() not in out
    assert facts == {
        "generation": 5,
        "tenants": 2,
        "handle_keys": [1, 2],
        "current_handle_key": 2,
    }
    known = node.handle_keys()
    assert known[1] == first[1], "handles under way stay valid"
    assert node.current_handle_key()[0] == 2
    assert node.tenant_secret(DEFAULT_TENANT) == secret
    run(keyring_command.COMMAND, "rotate-handle-key", *there)
    assert sorted(node.handle_keys()) == [2, 3], "two generations, no more"


def test_where_there_is_no_keyring_none_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"root\.key"):
        run(keyring_command.COMMAND, "rotate-root", "--keyring-dir", str(tmp_path))
    assert list(tmp_path.iterdir()) == []
