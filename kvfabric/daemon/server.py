"""The engines' socket: accepts, shakes hands, and runs one `Connection` per engine process.

Sockets, windows and backpressure are here; what a request means is in `handlers`, who an engine is in
`sessions`. A connection that breaks the wire contract gets one `Failed` and is closed; a request that
fails gets `Failed` and its connection lives.

Backpressure: a connection has at most `MAX_RUNNING` requests under way and `MAX_OUTPUT_BYTES` of answers
waiting; beyond that it is not read, so its engine's own socket fills. Connections take turns with each other
and with the store's own work (`kvfabric.store.turns`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import mmap
import os
import select
import socket
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvfabric.daemon.handlers import CONCURRENT, IN_ORDER, Caller, Services
from kvfabric.daemon.sessions import Process, Session, Sessions, open_peer
from kvfabric.errors import (
    ConfigError,
    KVFabricError,
    Overloaded,
    PeerClosed,
    ProtocolError,
    RemoteProtocolError,
)
from kvfabric.protocol import descriptors
from kvfabric.protocol.codec import MAX_HELLO_BYTES, FrameReader, decode_request, encode
from kvfabric.protocol.messages import (
    PROTOCOL_VERSION,
    Bye,
    Done,
    Failed,
    Hello,
    Reply,
    Request,
    Role,
    Welcome,
)

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
MAX_RUNNING = 64
MAX_OUTPUT_BYTES = 1 << 20
HELLO_DEADLINE_S = 5.0
_ACCEPT_PAUSE_S = 0.1


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
        self._group = asyncio.TaskGroup()
        self._accepting: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<EngineServer {self.options.path}: {len(self._connections)} connections>"

    async def __aenter__(self) -> EngineServer:
        self._listener = listen(self.options.path)
        await self._group.__aenter__()
        self._accepting = self._group.create_task(self._accept(self._listener))
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Stop accepting, close connections, end their requests. On cancellation likewise."""
        assert self._listener is not None
        assert self._accepting is not None
        for task in (self._accepting, *self._greetings):
            task.cancel()
        self._listener.close()
        self.options.path.unlink(missing_ok=True)
        for connection in list(self._connections):
            connection.close()
        await self._group.__aexit__(None, None, None)
        self.sessions.close()
        for connection in list(self._connections):
            connection.abort()  # its engine reads nothing: what waits for it is lost

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

    async def _shake_hands(self, sock: socket.socket, received: list[int]) -> Connection:
        if len(self._connections) + len(self._greetings) > MAX_CONNECTIONS:
            raise Overloaded(f"{MAX_CONNECTIONS} connections are open")
        peer = open_peer(sock)
        try:
            reader = FrameReader(MAX_HELLO_BYTES)
            correlation, hello = await _receive_hello(sock, reader, received)
            if received:
                self.options.take_back(received.pop())
            if hello.resumed:
                self._drop_lost(hello.session)
            session, process = self.sessions.join(hello, peer)
        except BaseException:
            os.close(peer.pidfd)
            raise
        try:
            window, descriptor = make_window(self._window_bytes(hello))
            welcome, sent = self._welcome(session, len(window), descriptor)
            try:
                descriptors.send(sock, encode(correlation, welcome), sent)
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
        except BaseException:
            self.sessions.leave(session, process, said_bye=True)  # it never got anything to touch
            raise
        caller = Caller(self.services, session, window)
        return Connection(self, caller, process, has_arena=bool(welcome.arena_bytes))

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


class Connection(asyncio.Protocol):
    """One engine process after its handshake. Its window is unmapped when the last copy of it ended."""

    def __init__(
        self, server: EngineServer, caller: Caller, process: Process, *, has_arena: bool
    ) -> None:
        self.has_arena = has_arena
        self._server = server
        self._caller = caller
        self._process = process
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._frames: deque[tuple[int, bytes]] = deque()
        self._running = 0
        self._output_full = False
        self._turn_due = False
        self._said_bye = False
        self._has_left = False

    def __repr__(self) -> str:
        name = self._caller.session.id.hex()[:8]
        return (
            f"<Connection of session {name}: {self._running} running, {len(self._frames)} queued>"
        )

    def close(self) -> None:
        """Send what is waiting and close. Idempotent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End now, without sending what is waiting. Idempotent."""
        if self._transport is not None:
            self._transport.abort()
        self._leave()

    def is_of(self, session: bytes) -> bool:
        return self._caller.session.id == session

    def is_hung_up(self) -> bool:
        """Whether the other end is closed, read or not."""
        if self._transport is None:
            return True
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=MAX_OUTPUT_BYTES)
        self._server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._leave()

    def _leave(self) -> None:
        if self._has_left:
            return
        self._has_left = True
        self._frames.clear()
        self._server.ended(self)
        clean = self._said_bye and not self._running
        self._server.sessions.leave(self._caller.session, self._process, said_bye=clean)

    def pause_writing(self) -> None:
        self._output_full = True

    def resume_writing(self) -> None:
        self._output_full = False
        self._work()

    def data_received(self, data: bytes) -> None:
        try:
            self._frames.extend(self._reader.feed(data))
        except RemoteProtocolError as exc:
            self._break(0, exc)
            return
        self._work()

    def eof_received(self) -> None:
        if self._reader.num_pending_bytes:
            self._break(0, RemoteProtocolError("the stream ends in the middle of a frame"))

    def _work(self) -> None:
        """Answer what is queued, as far as backpressure and this turn allow."""
        turns = self._server.services.store.turns
        while self._frames and self._may_work():
            if self._turn_due or not turns.is_open():
                self._work_soon()
                break
            self._answer(*self._frames.popleft())
        if self._transport is None or self._transport.is_closing():
            self._frames.clear()
        elif self._frames:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _work_soon(self) -> None:
        if not self._turn_due:
            self._turn_due = True
            self._server.services.store.turns.call(self._next_turn)

    def _next_turn(self) -> None:
        self._turn_due = False
        if self._frames and self._may_work():
            self._answer(*self._frames.popleft())
        self._work()

    def _may_work(self) -> bool:
        if self._transport is None or self._transport.is_closing():
            return False
        return self._running < MAX_RUNNING and not self._output_full

    def _answer(self, correlation: int, body: bytes) -> None:
        try:
            request = decode_request(body)
        except RemoteProtocolError as exc:
            self._break(correlation, exc)
            return
        kind = type(request)
        if kind in CONCURRENT:
            self._running += 1
            self._server.spawn(self._finish(correlation, request))
        elif kind in IN_ORDER:
            with self._failing(correlation):
                self._reply(correlation, IN_ORDER[kind](self._caller, request))
        elif isinstance(request, Bye):
            self._said_bye = True
            self._reply(correlation, Done())
            self.close()
        else:
            self._break(correlation, RemoteProtocolError("a connection says hello once"))

    async def _finish(self, correlation: int, request: Request) -> None:
        try:
            with self._failing(correlation):
                await self._server.services.store.turns.wait()
                self._reply(correlation, await CONCURRENT[type(request)](self._caller, request))
        finally:
            self._running -= 1
        if self._frames:
            self._work_soon()

    @contextlib.contextmanager
    def _failing(self, correlation: int) -> Iterator[None]:
        """Top of one request: whatever goes wrong in it becomes its answer."""
        try:
            yield
        except ProtocolError as exc:
            self._break(correlation, exc)
        except KVFabricError as exc:
            self._reply(correlation, Failed(exc.code, str(exc)))
        except Exception as exc:  # one of the two places that may: the daemon lives on
            log.exception("request of session %s failed", self._caller.session.id.hex()[:8])
            self._reply(correlation, Failed(KVFabricError.code, f"internal error: {exc!r}"))

    def _reply(self, correlation: int, reply: Reply) -> None:
        result = reply.code if isinstance(reply, Failed) else "ok"
        self._server.counts.requests[result] += 1
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(correlation, reply))

    def _break(self, correlation: int, error: ProtocolError) -> None:
        """One error frame, then the end of the connection."""
        self._server.counts.protocol_errors += 1
        log.warning("session %s: %s", self._caller.session.id.hex()[:8], error)
        self._reply(correlation, Failed(error.code, str(error)))
        self.close()


def listen(path: Path) -> socket.socket:
    """A listening socket that only our user can connect to. Replaces one that nobody listens on.

    Raises ConfigError if another node listens there, or the path does not do.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            taken = probe.connect_ex(str(path)) == 0
        except OSError as exc:  # too long a path
            raise ConfigError(f"cannot listen on {path}: {exc}") from exc
    if taken:
        raise ConfigError(f"another node listens on {path}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o600)  # before listen: nobody could connect so far
        listener.listen(64)
    except OSError as exc:
        listener.close()
        raise ConfigError(f"cannot listen on {path}: {exc.strerror or exc}") from exc
    return listener


def make_window(num_bytes: int) -> tuple[memoryview, int]:
    """(our mapping, descriptor for the engine) of fresh memory that nobody can shrink; (empty, -1) for 0."""
    if num_bytes == 0:
        return memoryview(b""), -1
    descriptor = os.memfd_create("kvfabric-window", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, num_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        mapping = mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    except BaseException:
        os.close(descriptor)
        raise
    return memoryview(mapping), descriptor


async def _receive_hello(
    sock: socket.socket, reader: FrameReader, received: list[int]
) -> tuple[int, Hello]:
    frames: list[tuple[int, bytes]] = []
    while not frames:
        await descriptors.readable(sock)
        with contextlib.suppress(BlockingIOError):
            frames = descriptors.receive(sock, reader, received)
    correlation, body = frames[0]
    hello = decode_request(body)
    if not isinstance(hello, Hello):
        raise RemoteProtocolError(f"a connection begins with Hello, not {type(hello).__name__}")
    if len(frames) > 1 or reader.num_pending_bytes:
        raise RemoteProtocolError("nothing may follow Hello before Welcome")
    if hello.version != PROTOCOL_VERSION:
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
