"""`kvfabric node`: run the daemon in the foreground until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import logging
import resource
import signal
import sys

from kvfabric.cli import Command
from kvfabric.config import NodeConfig, add_arguments, from_args


def _configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, NodeConfig)
    parser.add_argument(
        "--takeover",
        action="store_true",
        help="go on where the node that runs on this state directory is (upgrade); it hands over its "
        "memory and connections and exits. Without one this is an ordinary start",
    )


def _run(args: argparse.Namespace) -> int:
    from kvfabric.keyring import hide_memory

    config = from_args(NodeConfig, args)
    hide_memory()
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    # A connection takes four descriptors, and a takeover needs them all at once.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(_serve(config, takeover=args.takeover))
    return 0


async def _serve(config: NodeConfig, *, takeover: bool) -> None:
    from kvfabric.daemon.node import Node
    from kvfabric.supervisor import notify

    node = Node(config, takeover=takeover)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, node.end)
    async with node:
        print(
            f"kvfabric node ready: socket {config.socket_path}, admin {config.admin_socket_path}, "
            f"http {node.front.http_address or 'off'}",
            file=sys.stderr,
            flush=True,
        )
        notify("READY=1")
        await node.ended.wait()


COMMAND = Command(
    help="run the node daemon of this machine", extra="node", configure=_configure, run=_run
)
