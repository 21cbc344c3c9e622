"""Starts and stops the reference engine as a process: logging, socket, engine, HTTP server, signals."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys

from aiohttp import web

from kvfabric.config import EngineConfig, split_address
from kvfabric.errors import ConfigError
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.reference.server import create_app

NODE_WAIT_S = 2.0
"""How long a start waits for the node before it serves without."""
SHUTDOWN_S = 5.0
"""How long requests under way may still take after SIGTERM."""


async def serve(config: EngineConfig) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError if the address cannot be had."""
    logging.basicConfig(
        level=config.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    sock = _listen(config)
    host, port = sock.getsockname()[:2]
    endpoint = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    engine = Engine(config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    engine.start(endpoint=endpoint)
    try:
        if engine.connector is not None:
            await asyncio.to_thread(engine.connector.wait_connected, NODE_WAIT_S)
        runner = web.AppRunner(
            create_app(engine),
            access_log=None,
            shutdown_timeout=SHUTDOWN_S,
            handler_cancellation=True,
        )
        await runner.setup()
        try:
            await web.SockSite(runner, sock).start()
            print(f"kvfabric engine ready: {endpoint}", file=sys.stderr, flush=True)
            await stop.wait()
        finally:
            await runner.cleanup()
    finally:
        await asyncio.to_thread(engine.stop)


def _listen(config: EngineConfig) -> socket.socket:
    host, port = split_address(config.listen, "engine.listen")
    try:
        return socket.create_server((host, port), family=_family(host), backlog=512)
    except OSError as exc:
        raise ConfigError(
            f"engine.listen: cannot listen on {config.listen}: {exc.strerror}"
        ) from exc


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
