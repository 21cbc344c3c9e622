"""The engines' socket: accepts, shakes hands, and runs one `connection.Connection` per engine process.

Who an engine is, is in `sessions`; what is asked of it after the handshake in `connection` and `handlers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import mmap
import os
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvfabric.daemon.connection import Connection, ConnectionState, make_window, map_window
from kvfabric.daemon.handlers import Caller, Services
from kvfabric.daemon.sessions import Process, Session, Sessions, open_peer
from kvfabric.errors import (
    ConfigError,
    KVFabricError,
    Overloaded,
    PeerClosed,
    RemoteProtocolError,
)
from kvfabric.protocol import descriptors
from kvfabric.protocol.codec import MAX_HELLO_BYTES, FrameReader, decode_request, encode
from kvfabric.protocol.messages import (
    PROTOCOL_VERSION,
    Borrow,
    Done,
    Failed,
    Hello,
    Lend,
    Reply,
    Role,
    Welcome,
)

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
HELLO_DEADLINE_S = 5.0
_ACCEPT_PAUSE_S = 0.1
_FREEZE_POLL_S = 0.002
_FLUSH_S = 1.0
"""How long a connection that is handed over may take to read its last answers."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What Welcome says of the host tier. `arena_descriptor`: read-only, -1 while there is none."""

    arena_descriptor: int
    arena_bytes: int
    arena_adopted: bool


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Times in seconds, sizes in bytes. `offer` is asked at each handshake; `take_back` gets the arena
    descriptor that came with a hello, and owns it.
    """

    path: Path
    node_id: str
    boot_id: bytes
    window_bytes: int
    lease_s: float
    reservation_s: float
    offer: Callable[[], Offer]
    take_back: Callable[[int], None]


@dataclass(slots=True)
class ServerCounts:
    """Since start. `requests`: by result, `ok` or the code of an error."""

    requests: Counter[str] = field(default_factory=Counter)
    protocol_errors: int = 0
    refused_connections: int = 0


class EngineServer:
    """An async context manager: inside it, engines are served; leaving closes every connection."""

    def __init__(self, options: ServerOptions, services: Services, sessions: Sessions) -> None:
        self.options = options
        self.services = services
        self.sessions = sessions
        self.counts = ServerCounts()
        self._connections: set[Connection] = set()
        self._greetings: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._heirlooms: list[tuple[socket.socket, Connection]] = []
        self._abandoned = False
        self._group = asyncio.TaskGroup()
        self._accepting: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<EngineServer {self.options.path}: {len(self._connections)} connections>"

    async def __aenter__(self) -> EngineServer:
        if self._listener is None:
            self._listener = listen(self.options.path)
        await self._group.__aenter__()
        self._accepting = self._group.create_task(self._accept(self._listener))
        loop = asyncio.get_running_loop()
        for sock, connection in self._heirlooms:
            # Bound at once: the next turn of the loop has another.
            await loop.connect_accepted_socket(lambda connection=connection: connection, sock)  # type: ignore[misc]
        self._heirlooms.clear()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Stop accepting, close connections, end their requests. On cancellation likewise."""
        assert self._listener is not None
        assert self._accepting is not None
        for task in (self._accepting, *self._greetings):
            task.cancel()
        self._listener.close()
        if not self._abandoned:
            self.options.path.unlink(missing_ok=True)
        for connection in list(self._connections):
            connection.close()
        await self._group.__aexit__(None, None, None)
        self.sessions.close()
        for connection in list(self._connections):
            connection.abort()  # its engine reads nothing: what waits for it is lost

    # -- handing over --------------------------------------------------------------------------------

    async def freeze(self) -> None:
        """Accept nothing more, read nothing more, and finish what was read. On cancellation: `thaw`.

        A connection whose engine does not read its answers is closed: it comes back to the successor.
        """
        assert self._accepting is not None
        self._accepting.cancel()
        if self._greetings:
            await asyncio.wait(self._greetings)
        for connection in list(self._connections):
            connection.freeze()
        patience = asyncio.get_running_loop().time() + _FLUSH_S
        while busy := [one for one in self._connections if not one.is_at_rest()]:
            if asyncio.get_running_loop().time() > patience:
                for connection in busy:
                    if connection.is_unread():
                        connection.abort()
            await asyncio.sleep(_FREEZE_POLL_S)

    def thaw(self) -> None:
        """Go on after a `freeze`, finished or not."""
        assert self._listener is not None
        assert self._accepting is not None
        self._accepting.cancel()
        self._accepting = self._group.create_task(self._accept(self._listener))
        for connection in list(self._connections):
            connection.thaw()

    def describe(self, descriptors: list[int]) -> tuple[int, tuple[ConnectionState, ...]]:
        """(position of the listening socket, connections at rest); the descriptors stay ours."""
        assert self._listener is not None
        descriptors.append(self._listener.fileno())
        listener = len(descriptors) - 1
        return listener, tuple(one.describe(descriptors) for one in self._connections)

    def restore(
        self, listener: int, states: Sequence[ConnectionState], descriptors: list[int]
    ) -> None:
        """What `describe` said, before this is entered. Takes the descriptors over and leaves -1."""
        self._listener = _take_socket(listener, descriptors)
        for state in states:
            session, process = self.sessions.rejoin(state.session, state.process)
            window, kept = memoryview(b""), -1
            if state.window >= 0:
                kept, descriptors[state.window] = descriptors[state.window], -1
                window = map_window(kept, state.window_bytes)
            connection = Connection(
                self,
                Caller(self.services, session, window),
                process,
                has_arena=state.has_arena,
                window_descriptor=kept,
                unfinished=state.unfinished,
            )
            self._heirlooms.append((_take_socket(state.socket, descriptors), connection))

    def abandon(self) -> None:
        """A successor has everything: let go of it without a word to anybody."""
        self._abandoned = True
        self.sessions.close()
        for connection in list(self._connections):
            connection.abort()

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run a request of a connection; `work` raises nothing."""
        self._group.create_task(work)

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)

    def ended(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def drop_without_arena(self) -> None:
        """The host tier came: close connections that got no descriptor of it, so that they resume."""
        for connection in list(self._connections):
            if not connection.has_arena:
                connection.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as exc:
                if exc.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    raise
                log.warning("cannot accept an engine: %s", exc.strerror)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            sock.setblocking(False)
            greeting = self._group.create_task(self._greet(sock))
            self._greetings.add(greeting)
            greeting.add_done_callback(self._greetings.discard)

    async def _greet(self, sock: socket.socket) -> None:
        """Hello -> Welcome, then hand the socket to a Connection. Closes it in every other case."""
        received: list[int] = []
        try:
            async with asyncio.timeout(HELLO_DEADLINE_S):
                connection = await self._shake_hands(sock, received)
            if connection is None:
                sock.close()
                return
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, sock)
        except (KVFabricError, TimeoutError) as exc:
            self.counts.refused_connections += 1
            log.warning("engine refused: %s", str(exc) or "no hello in time")
            _send_error(sock, exc)
            sock.close()
        except Exception as exc:  # Hello is a request too: whatever it meets, the daemon lives on
            self.counts.refused_connections += 1
            log.exception("engine refused")
            _send_error(sock, KVFabricError(f"internal error: {exc!r}"))
            sock.close()
        except BaseException:
            sock.close()
            raise
        finally:
            descriptors.close_all(received)

    async def _shake_hands(self, sock: socket.socket, received: list[int]) -> Connection | None:
        """None if the connection was for one question, which is answered."""
        if len(self._connections) + len(self._greetings) > MAX_CONNECTIONS:
            raise Overloaded(f"{MAX_CONNECTIONS} connections are open")
        peer = open_peer(sock)
        try:
            reader = FrameReader(MAX_HELLO_BYTES)
            correlation, hello = await _receive_first(sock, reader, received)
            if not isinstance(hello, Hello):
                answer, sent = self._answer_once(hello, peer, received)
                descriptors.send(sock, encode(correlation, answer), sent)
                os.close(peer.pidfd)
                return None
            if received:
                self.options.take_back(received.pop())
            if hello.resumed:
                self._drop_lost(hello.session)
            session, process = self.sessions.join(hello, peer)
        except BaseException:
            os.close(peer.pidfd)
            raise
        descriptor = -1
        try:
            window, descriptor = make_window(self._window_bytes(hello))
            welcome, sent = self._welcome(session, len(window), descriptor)
            descriptors.send(sock, encode(correlation, welcome), sent)
        except BaseException:
            if descriptor >= 0:
                os.close(descriptor)
            self.sessions.leave(session, process, said_bye=True)  # it never got anything to touch
            raise
        return Connection(
            self,
            Caller(self.services, session, window),
            process,
            has_arena=bool(welcome.arena_bytes),
            window_descriptor=descriptor,
        )

    def _answer_once(
        self, message: Lend | Borrow, peer: Process, received: list[int]
    ) -> tuple[Reply, list[int]]:
        """The answer, and descriptors that go along and stay ours."""
        pools = self.services.pools

        def sends_for(session: Session) -> bool:
            return peer.id in session.processes

        if isinstance(message, Borrow):
            lent, descriptor = pools.borrow(message, sends_for)
            return lent, [descriptor]
        if len(received) != 1:
            raise RemoteProtocolError(f"a pool is lent with 1 descriptor, not {len(received)}")
        pools.lend(message, sends_for, received[0])
        received.clear()
        return Done(), []

    def _drop_lost(self, session: bytes) -> None:
        """A session comes back: end those of its connections that are over, though nobody has read their
        end yet because it comes after requests that wait."""
        for connection in list(self._connections):
            if connection.is_of(session) and connection.is_hung_up():
                connection.abort()

    def _window_bytes(self, hello: Hello) -> int:
        if not hello.role & Role.WORKER:
            return 0
        asked = min(max(0, hello.window_bytes), self.options.window_bytes)
        return -(-asked // mmap.PAGESIZE) * mmap.PAGESIZE

    def _welcome(
        self, session: Session, window_bytes: int, window_descriptor: int
    ) -> tuple[Welcome, list[int]]:
        offer = self.options.offer()
        sent = [offer.arena_descriptor] if offer.arena_bytes else []
        if window_bytes:
            sent.append(window_descriptor)
        welcome = Welcome(
            version=PROTOCOL_VERSION,
            session=session.id,
            boot_id=self.options.boot_id,
            node_id=self.options.node_id,
            arena_bytes=offer.arena_bytes,
            window_bytes=window_bytes,
            lease_s=self.options.lease_s,
            reservation_s=self.options.reservation_s,
            arena_adopted=offer.arena_adopted,
        )
        return welcome, sent


def listen(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """A listening socket that only our user can connect to. Replaces one that nobody listens on.

    Raises ConfigError if another node listens there, or the path does not do.
    """
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            taken = probe.connect_ex(str(path)) == 0
        except OSError as exc:  # too long a path
            raise ConfigError(f"cannot listen on {path}: {exc}") from exc
    if taken:
        raise ConfigError(f"another node listens on {path}")
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o600)  # before listen: nobody could connect so far
        listener.listen(64)
    except OSError as exc:
        listener.close()
        raise ConfigError(f"cannot listen on {path}: {exc.strerror or exc}") from exc
    return listener


def _take_socket(at: int, descriptors: list[int]) -> socket.socket:
    sock = socket.socket(fileno=descriptors[at])
    descriptors[at] = -1
    sock.setblocking(False)
    return sock


async def _receive_first(
    sock: socket.socket, reader: FrameReader, received: list[int]
) -> tuple[int, Hello | Lend | Borrow]:
    frames: list[tuple[int, bytes]] = []
    while not frames:
        await descriptors.readable(sock)
        with contextlib.suppress(BlockingIOError):
            frames = descriptors.receive(sock, reader, received)
    correlation, body = frames[0]
    hello = decode_request(body)
    if not isinstance(hello, Hello | Lend | Borrow):
        raise RemoteProtocolError(f"a connection begins with Hello, not {type(hello).__name__}")
    if len(frames) > 1 or reader.num_pending_bytes:
        raise RemoteProtocolError("nothing may follow Hello before Welcome")
    if isinstance(hello, Hello) and hello.version != PROTOCOL_VERSION:
        raise RemoteProtocolError(
            f"engine speaks version {hello.version}; this node speaks {PROTOCOL_VERSION}"
        )
    return correlation, hello


def _send_error(sock: socket.socket, error: BaseException) -> None:
    if isinstance(error, PeerClosed):
        return
    code = error.code if isinstance(error, KVFabricError) else RemoteProtocolError.code
    with contextlib.suppress(OSError):
        sock.send(encode(0, Failed(code, str(error) or "no hello in time")))
