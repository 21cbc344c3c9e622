"""`kvfabric engine`: the reference engine behind its HTTP server, until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse

from kvfabric.cli import Command
from kvfabric.config import EngineConfig, add_arguments, from_args


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, EngineConfig)


def run(args: argparse.Namespace) -> int:
    config = from_args(
        EngineConfig, args
    )  # torch takes seconds to import: what is wrong is said before

    import asyncio

    from kvfabric_engine.reference.serve import serve

    asyncio.run(serve(config))
    return 0


COMMAND = Command(
    help="run the reference engine: a random or a local Hugging Face model with an OpenAI API",
    extra="engine",
    configure=configure,
    run=run,
)
