"""Requests whose handle was made for an engine that ended, at the one that took its place."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web, web_app
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.reference.server import create_app
from kvfabric_engine.testing import small_config

from kvfabric.handle import SESSION_HEADER
from kvfabric.testing.processes import NodeProcess


@pytest.mark.fleet
def test_a_request_for_another_session_is_sent_back(tmp_path: Path) -> None:
    """A handle made for an engine that ended is of no use to the one that took its place: it says so before
    it computes, with what the router needs to make another. Its own requests are answered."""
    with (
        NodeProcess(tmp_path) as node,
        Engine(small_config(node_socket=str(node.socket))) as engine,
    ):
        assert engine.connector is not None
        assert engine.connector.wait_connected(10)
        own = engine.connector.session.hex()
        answers = asyncio.run(_ask(engine, [own, "", "00" * 16]))
        assert [status for status, _ in answers] == [200, 200, 421]
        assert answers[2][1]["data"][0]["kvfabric"]["session"] == own


async def _ask(engine: Engine, sessions: list[str]) -> list[tuple[int, dict[str, Any]]]:
    runner = web.AppRunner(create_app(engine))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    answers = []
    async with ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as http:
        for session in sessions:
            headers = {SESSION_HEADER: session} if session else {}
            body = {"model": "reference", "prompt": "hello", "max_tokens": 2}
            async with http.post("/v1/completions", json=body, headers=headers) as response:
                answers.append((response.status, await response.json()))
    await runner.cleanup()
    web_app._cached_build_middleware.cache_clear()  # aiohttp keeps the application, and that our engine
    return answers
