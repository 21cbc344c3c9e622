"""The console script `kvfabric`: finds its commands by entry point, so it imports none of them.

Exit codes: 0 done, 1 it failed (one line on standard error says what and what to do), 2 wrong use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from kvfabric import __version__
from kvfabric.errors import ConfigError, KVFabricError

GROUP = "kvfabric.commands"


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand. Its module is imported to list it, so heavy imports belong into `run`.

    `extra` names the optional dependencies it needs (empty: none); a module missing in `run` is
    reported as one line that names it.
    """

    help: str
    extra: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    found = {point.name: point for point in entry_points(group=GROUP)}
    # Only the command that is asked for is loaded; all of them only for the overview.
    wanted = [name for name in arguments[:1] if name in found] or sorted(found)
    parser = argparse.ArgumentParser(
        prog="kvfabric", description="A distributed KV-cache tier and prefix-cache fabric."
    )
    parser.add_argument("--version", action="version", version=f"kvfabric {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands = {}
    for name in wanted:
        commands[name] = command = _load(found[name])
        command.configure(subparsers.add_parser(name, help=command.help, description=command.help))
    args = parser.parse_args(arguments)
    return _run(args.command, commands[args.command], args)


def _load(point: EntryPoint) -> Command:
    command = point.load()
    assert isinstance(command, Command), f"entry point {point.name} is no Command"
    return command


def _run(name: str, command: Command, args: argparse.Namespace) -> int:
    try:
        return command.run(args)
    except ModuleNotFoundError as exc:
        if not command.extra or (exc.name or "").split(".")[0].startswith("kvfabric"):
            raise
        return _fail(
            f"`kvfabric {name}` needs {exc.name}, which the extra '{command.extra}' brings: "
            f"pip install 'kvfabric[{command.extra}]'"
        )
    except KVFabricError as exc:
        return _fail(str(exc), code=2 if isinstance(exc, ConfigError) else 1)
    except KeyboardInterrupt:
        return 130


def _fail(message: str, *, code: int = 1) -> int:
    print(f"kvfabric: {message}", file=sys.stderr)
    return code
