"""`kvfabric router`."""

from __future__ import annotations

import argparse

from kvfabric import config as configuration
from kvfabric.cli import Command
from kvfabric.config import RouterConfig


def _configure(parser: argparse.ArgumentParser) -> None:
    configuration.add_arguments(parser, RouterConfig)


def _run(args: argparse.Namespace) -> int:
    import logging

    import uvloop

    from kvfabric.keyring import hide_memory
    from kvfabric_router.app import serve_until_stopped

    config = configuration.from_args(RouterConfig, args)
    hide_memory()
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    uvloop.run(serve_until_stopped(config))
    return 0


COMMAND = Command(
    help="serve the OpenAI API in front of engines, where reuse makes answers fastest",
    extra="router",
    configure=_configure,
    run=_run,
)
