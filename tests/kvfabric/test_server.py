"""The engines' server by itself, where a whole node could not be brought into the state that is tested."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvfabric.daemon import handlers
from kvfabric.daemon.connection import MAX_RUNNING
from kvfabric.daemon.handlers import Caller, Services
from kvfabric.daemon.server import EngineServer, Offer, ServerOptions
from kvfabric.daemon.sessions import Session, Sessions
from kvfabric.events.stream import EventStream
from kvfabric.keyring import Keyring
from kvfabric.protocol import messages as m
from kvfabric.protocol.codec import FrameReader, decode_reply, encode
from kvfabric.registry.state import RegistryState
from kvfabric.store.store import BlockStore, StoreLimits
from kvfabric.testing.engine import tiny_hello


class Observer:
    def session_opened(self, session: Session) -> None: ...

    def session_ended(self, session: Session) -> None: ...

    def processes_changed(self) -> None: ...


@contextlib.asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[tuple[EngineServer, BlockStore]]:
    events = EventStream(boot_id=bytes(16))
    state = RegistryState()
    async with BlockStore(
        limits=StoreLimits(host_bytes=1 << 20, max_blocks=64),
        registry=lambda: state,
        clock=lambda: 1.0,
        events=events,
        ssd=None,
    ) as store:
        options = ServerOptions(
            path=directory / "node.sock",
            node_id="n",
            boot_id=bytes(16),
            window_bytes=1 << 20,
            lease_s=1.0,
            reservation_s=1.0,
            offer=lambda: Offer(-1, 0, arena_adopted=False),
            take_back=lambda descriptor: None,
        )
        services = Services(
            store=store,
            keyring=Keyring.create_or_open(directory),
            registry=lambda: state,
            events=events,
            require_handle=False,
            wall_clock=lambda: 1.0,
        )
        sessions = Sessions(store, Observer())
        async with EngineServer(options, services, sessions) as server:
            yield server, store


async def connect(
    server: EngineServer, session: bytes = b"", *, resumed: bool = False
) -> tuple[socket.socket, m.Welcome]:
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    await loop.sock_connect(sock, str(server.options.path))
    hello = tiny_hello(window_bytes=0).to_wire(session=session, resumed=resumed)
    await loop.sock_sendall(sock, encode(0, hello))
    [(_, body)] = FrameReader().feed(await loop.sock_recv(sock, 1 << 16))
    welcome = decode_reply(body)
    assert isinstance(welcome, m.Welcome)
    return sock, welcome


async def test_session_comes_back_past_a_connection_whose_end_nobody_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection with as many requests as may run is not read, so its end is not either. What the
    session had is free all the same when it comes back and says that it copies nothing.
    """
    running, go_on = asyncio.Event(), asyncio.Event()
    started = itertools.count(1)

    async def slow_load(caller: Caller, message: m.Load) -> m.Located:
        if next(started) == MAX_RUNNING:
            running.set()
        await go_on.wait()
        return m.Located(0, 0, b"", b"", b"", "none")

    slow: dict[Any, Any] = {**handlers.CONCURRENT, m.Load: slow_load}
    monkeypatch.setattr("kvfabric.daemon.connection.CONCURRENT", slow)
    async with serving(tmp_path) as (server, store):
        loop = asyncio.get_running_loop()
        lost, welcome = await connect(server)
        load = m.Load("r", bytes(32), 0, 0)
        await loop.sock_sendall(lost, encode(1, m.OpenHandle("r", "")))
        await loop.sock_sendall(lost, encode(2, load) * (MAX_RUNNING + 1))
        await asyncio.wait_for(running.wait(), 5)
        lost.close()
        await asyncio.sleep(0.01)
        assert store.statistics().num_requests == 1
        assert server.sessions.num_connections == 1  # the end is behind what waits
        with contextlib.ExitStack() as stack:
            stack.callback(go_on.set)
            back, again = await connect(server, welcome.session, resumed=True)
            stack.callback(back.close)
            assert again.session == welcome.session
            assert server.sessions.num_connections == 1
            assert store.statistics().num_requests == 0
