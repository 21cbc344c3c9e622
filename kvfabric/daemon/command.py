"""`kvfabric node`: run the daemon in the foreground until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys

from kvfabric.cli import Command
from kvfabric.config import NodeConfig, add_arguments, from_args


def _configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, NodeConfig)


def _run(args: argparse.Namespace) -> int:
    from kvfabric.keyring import hide_memory

    config = from_args(NodeConfig, args)
    hide_memory()
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    asyncio.run(_serve(config))
    return 0


async def _serve(config: NodeConfig) -> None:
    from kvfabric.daemon.node import Node

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with Node(config) as node:
        print(
            f"kvfabric node ready: socket {config.socket_path}, admin {config.admin_socket_path}, "
            f"http {node.http_address or 'off'}",
            file=sys.stderr,
            flush=True,
        )
        await stop.wait()


COMMAND = Command(
    help="run the node daemon of this machine", extra="node", configure=_configure, run=_run
)
