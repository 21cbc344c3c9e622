"""The command line: one clear line for every failure, and the right exit code."""

from __future__ import annotations

import argparse
from importlib.metadata import EntryPoint

import pytest

from kvfabric import cli
from kvfabric.cli import Command
from kvfabric.errors import ConfigError, NoSpace


def _nothing(parser: argparse.ArgumentParser) -> None:
    del parser


def _raise(error: Exception) -> Command:
    def run(args: argparse.Namespace) -> int:
        raise error

    return Command(help="fails", extra="node", configure=_nothing, run=run)


MISSING = _raise(ModuleNotFoundError("No module named 'grpc'", name="grpc"))
FULL = _raise(NoSpace("the host tier is full: raise node.host_bytes"))
WRONG = _raise(ConfigError("unknown key node.x"))
STOPPED = Command(help="waits", extra="", configure=_nothing, run=lambda args: _interrupt())
FINE = Command(help="works", extra="", configure=_nothing, run=lambda args: 0)


def _interrupt() -> int:
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "missing": "MISSING",
        "full": "FULL",
        "wrong": "WRONG",
        "wait": "STOPPED",
        "ok": "FINE",
    }
    commands = {name: globals()[variable] for name, variable in names.items()}
    points = [EntryPoint(name=name, value="nowhere:X", group=cli.GROUP) for name in names]
    monkeypatch.setattr(cli, "entry_points", lambda group: points)
    monkeypatch.setattr(cli, "_load", lambda point: commands[point.name])


@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("ok", 0, ""),
        ("missing", 1, "kvfabric: `kvfabric missing` needs grpc, which the extra 'node' brings"),
        ("full", 1, "kvfabric: the host tier is full: raise node.host_bytes"),
        ("wrong", 2, "kvfabric: unknown key node.x"),
        ("wait", 130, ""),
    ],
)
def test_exit_code_and_one_line(
    name: str, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([name]) == code
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == (1 if line else 0)


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["ok", "--no-such-flag"]])
def test_wrong_use_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: kvfabric" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("missing", "full", "wrong", "wait", "ok"))
