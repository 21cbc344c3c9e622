"""`kvfabric demo`: arguments, report file, exit code. The stories are `story.py` and `machines.py`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
from pathlib import Path

from kvfabric.cli import Command
from kvfabric.config import refuse_password
from kvfabric.errors import ConfigError


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="the first prefix groups of the slice only"
    )
    parser.add_argument(
        "--nodes",
        type=int,
        default=1,
        metavar="N",
        help="machines of the fleet, each a node and an engine; more than 1 needs --directory (default: 1)",
    )
    parser.add_argument(
        "--directory",
        default="",
        metavar="URL",
        help="the Redis of a fleet, redis://HOST:PORT or unix:///SOCKET; the demo leaves nothing in it",
    )
    parser.add_argument(
        "--report",
        type=Path,
        default=Path("demo-report.json"),
        metavar="PATH",
        help="where to write the JSON report (default: ./demo-report.json)",
    )


def _run(args: argparse.Namespace) -> int:
    # The processes of the story need all three extras: a missing one is one line here, not a dead child.
    needed = ["grpc", "aiohttp", "torch", *(["redis"] if args.directory else [])]
    for name in needed:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name=name)
    if args.directory and importlib.util.find_spec("ucxx") is None:
        raise ConfigError(
            "a fleet moves blocks with UCX: pip install 'kvfabric[ucx-cu12]' (no GPU is needed)"
        )
    refuse_password(args.directory)
    import asyncio

    from kvfabric.demo.progress import Progress
    from kvfabric.demo.report import Report
    from kvfabric.demo.run import tell

    progress = Progress(sys.stdout)

    async def main() -> Report:
        # A demo that is told to end takes its processes with it, as it does for SIGINT.
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await tell(
            progress, quick=args.quick, num_nodes=args.nodes, directory=args.directory
        )

    try:
        report = asyncio.run(main())
    except asyncio.CancelledError:
        progress.title("stopped")
        return 128 + signal.SIGTERM
    args.report.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    progress.title(f"{'All of it held' if report.passed else 'FAILED'}; report: {args.report}")
    return 0 if report.passed else 1


COMMAND = Command(
    help="replay a slice of a real log on a small fleet and prove what it promises",
    extra="node,router,redis,engine",
    configure=_configure,
    run=_run,
)
