"""NodeClient: the blocking driver, for engine processes."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from kvfabric.client.link import (
    BYE_DEADLINE_S,
    Attached,
    Client,
    EngineHello,
    R,
    again,
    attach,
    discard,
    expect,
    pack_u32,
    pack_u64,
)
from kvfabric.errors import (
    ClosedError,
    ConnectError,
    DeadlineExceeded,
    KVFabricError,
    PeerClosed,
    ProtocolError,
    from_wire,
)
from kvfabric.protocol import descriptors
from kvfabric.protocol.codec import FrameReader, decode_reply, encode
from kvfabric.protocol.messages import (
    MAX_PLACED,
    Abort,
    Bye,
    Commit,
    Committed,
    Confirm,
    Confirmed,
    Done,
    EngineEvents,
    Failed,
    HandleOpened,
    Load,
    Located,
    Match,
    Matched,
    OpenHandle,
    Ping,
    Placed,
    Pong,
    Recheck,
    Rechecked,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
)
from kvfabric.types import BlockKey

_RECEIVE_BYTES = 256 << 10


class NodeClient(Client):
    """Blocking driver. Any thread may call; calls of several threads run side by side.

    Every call takes `deadline_s` (seconds from now) and raises DeadlineExceeded (a late answer is
    dropped), PeerClosed (connect again), ClosedError after `close`, or what the node answered. Whoever
    waits reads for all: there is no thread of our own between the socket and the caller.
    """

    def __init__(self, sock: socket.socket, attached: Attached) -> None:
        super().__init__(attached)
        self._sock = sock
        self._send_lock = threading.Lock()
        self._condition = threading.Condition()  # guards the three below
        self._reading = False
        self._replies: dict[int, Reply | None] = {}  # None: awaited
        self._broken: KVFabricError | None = None
        self._closing = False

    @classmethod
    def connect(
        cls,
        socket_path: str | Path,
        hello: EngineHello,
        *,
        deadline_s: float,
        session: bytes = b"",
        resume_from: NodeClient | None = None,
    ) -> NodeClient:
        """Connect, say hello and map arena and window.

        `session`: join an engine instance that another connection opened. `resume_from`: a client whose
        node was lost; with it the caller states that no copy from the old arena is under way in any
        process of the session and that the old window is not written any more. Its arena goes back to
        the node, and its memory is given up here when the new connection stands.
        """
        deadline = time.monotonic() + deadline_s
        resumed = resume_from is not None
        returned: list[int] = []
        if resume_from is not None:
            session = resume_from.session
            resume_from._break(ClosedError("this connection was resumed by another"))
            if resume_from._arena_descriptor >= 0:
                returned = [resume_from._arena_descriptor]
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        received: list[int] = []
        try:
            connect_socket(sock, socket_path, deadline)
            frame = encode(0, hello.to_wire(session=session, resumed=resumed))
            descriptors.send(sock, frame, returned)
            client = cls(sock, attach(first_reply(sock, received, deadline), received))
        except BaseException:
            discard(sock, received)
            raise
        if resume_from is not None:
            resume_from._give_up()
        return client

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<NodeClient {state}: session {self.session.hex()[:8]}, {self.window!r}>"

    def __enter__(self) -> NodeClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """True after `close`, and once the node is known to be gone."""
        return self._broken is not None

    def open_handle(self, request_id: str, handle: str, *, deadline_s: float) -> HandleOpened:
        return self._call(OpenHandle(request_id, handle), HandleOpened, deadline_s)

    def match(
        self,
        request_id: str,
        keys: Sequence[BlockKey],
        *,
        deadline_s: float,
        beyond: int = 0,
        wait_s: float = 0.0,
    ) -> Matched:
        """`beyond`, `wait_s`: of a request whose blocks another engine computes, see `messages.Match`."""
        message = Match(request_id, b"".join(keys), beyond, wait_s)
        return self._call(message, Matched, deadline_s)

    def load(
        self,
        request_id: str,
        keys: Sequence[BlockKey],
        *,
        group: int,
        shard: int,
        deadline_s: float,
    ) -> Located:
        return self._call(Load(request_id, b"".join(keys), group, shard), Located, deadline_s)

    def read(self, located: Located, destinations: Sequence[memoryview]) -> int:
        """Copy located parts into `destinations`; how many leading ones hold what was stored.

        Only after a later `confirm` says so may they be used.
        """
        return self._reader.read(located, destinations)

    def confirm(
        self,
        request_id: str,
        keys: Sequence[BlockKey],
        located: Located,
        *,
        group: int,
        shard: int,
        deadline_s: float,
    ) -> Confirmed:
        """`keys`: those of the parts that were read, a prefix of what was located."""
        generations = located.generations[: 4 * len(keys)]
        message = Confirm(request_id, b"".join(keys), generations, group, shard)
        return self._call(message, Confirmed, deadline_s)

    def recheck(
        self,
        request_id: str,
        keys: Sequence[BlockKey],
        *,
        group: int,
        shard: int,
        deadline_s: float,
    ) -> Rechecked:
        """Tell the node that these leased parts did not verify; it looks for itself."""
        message = Recheck(request_id, b"".join(keys), group, shard)
        return self._call(message, Rechecked, deadline_s)

    def reserve(
        self,
        request_id: str,
        parent: BlockKey,
        keys: Sequence[BlockKey],
        *,
        group: int,
        shard: int,
        deadline_s: float,
    ) -> Reserved:
        message = Reserve(request_id, parent, b"".join(keys), group, shard)
        return self._call(message, Reserved, deadline_s)

    def commit(
        self, reservation: int, indexes: Sequence[int], offsets: Sequence[int], *, deadline_s: float
    ) -> Committed:
        """Store window parts at `offsets`. Until this answers, however late, the node reads them."""
        message = Commit(reservation, pack_u32(indexes), pack_u64(offsets))
        return self._call(message, Committed, deadline_s)

    def place(
        self,
        shard: int,
        keys: Sequence[BlockKey],
        pages: Sequence[Sequence[int]],
        *,
        deadline_s: float,
    ) -> None:
        """Say which pages of the pool that this process lends hold the parts of `keys`."""
        for at in range(0, len(keys), MAX_PLACED):
            some = [page for block in pages[at : at + MAX_PLACED] for page in block]
            message = Placed(shard, b"".join(keys[at : at + MAX_PLACED]), pack_u32(some))
            self._call(message, Done, deadline_s)

    def abort(self, reservation: int, *, deadline_s: float) -> None:
        self._call(Abort(reservation), Done, deadline_s)

    def release(self, request_ids: Sequence[str], *, deadline_s: float) -> None:
        self._call(Release(tuple(request_ids)), Done, deadline_s)

    def publish(self, events: EngineEvents, *, deadline_s: float) -> None:
        self._call(events, Done, deadline_s)

    def ping(self, *, deadline_s: float, dropped: int = -1, kept: str = "") -> Pong:
        """Is the node there? And what was struck off after version `dropped`: see `messages.Ping`."""
        return self._call(Ping(dropped, kept), Pong, deadline_s)

    def close(self) -> None:
        """Say goodbye if there is anyone to say it to. Nothing may be in flight. Idempotent."""
        if not self.closed:
            # Unanswered, the node learns of our end by the exit of this process.
            with contextlib.suppress(KVFabricError):
                self._call(Bye(), Done, BYE_DEADLINE_S)
        self._break(ClosedError("this client was closed"))
        self._give_up()

    def _give_up(self) -> None:
        """Close socket and descriptors; the last call still under way closes the socket."""
        with self._condition:
            self._closing = True
            if not self._replies:
                self._sock.close()
        self._drop_memory()

    def _call(self, message: Request, expected: type[R], deadline_s: float) -> R:
        deadline = time.monotonic() + deadline_s
        with self._condition:
            if self._broken is not None:
                raise again(self._broken)
            correlation, frame = self._exchange.start(message)
            self._replies[correlation] = None  # from here on the socket stays open
        try:
            self._send(correlation, frame, deadline)
            reply = self._wait(correlation, deadline)
        except DeadlineExceeded as exc:
            name = type(message).__name__
            raise DeadlineExceeded(f"{name} was not answered in {deadline_s:g} s") from exc
        finally:
            with self._condition:
                del self._replies[correlation]
                # A descriptor number is given away only when no thread polls it any more.
                if self._closing and not self._replies:
                    self._sock.close()
        return expect(reply, expected)

    def _send(self, correlation: int, frame: bytes, deadline: float) -> None:
        if not self._send_lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            self._exchange.never_sent(correlation)
            raise DeadlineExceeded("another request is still being sent")
        rest = memoryview(frame)
        try:
            while rest:
                try:
                    rest = rest[self._sock.send(rest) :]
                except BlockingIOError:
                    self._make_room(deadline)
        except DeadlineExceeded:
            if len(rest) == len(frame):
                self._exchange.never_sent(correlation)
            else:  # the stream is cut in the middle of a frame
                self._break(PeerClosed("the node stopped reading in the middle of a frame"))
            raise
        except OSError as exc:
            self._break(PeerClosed(f"cannot send to the node: {exc.strerror}"))
            raise again(self._broken) from exc
        finally:
            self._send_lock.release()

    def _make_room(self, deadline: float) -> None:
        """Wait until the socket takes bytes; read meanwhile, or both sides might wait for ever."""
        with self._condition:
            leads = not self._reading
            self._reading = True
        if leads:
            self._read(deadline, select.POLLIN | select.POLLOUT)
        else:
            _poll(self._sock, select.POLLOUT, deadline)
        if time.monotonic() >= deadline:
            raise DeadlineExceeded

    def _wait(self, correlation: int, deadline: float) -> Reply:
        while True:
            with self._condition:
                while True:
                    reply = self._replies[correlation]
                    if reply is not None:
                        return reply
                    if self._broken is not None:
                        raise again(self._broken)
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        raise DeadlineExceeded
                    if not self._reading:
                        self._reading = True
                        break
                    self._condition.wait(remaining)
            self._read(deadline, select.POLLIN)

    def _read(self, deadline: float, events: int) -> None:
        """Read once for everybody. The caller has set `_reading`, which this clears."""
        replies: list[tuple[int, Reply]] = []
        broken: KVFabricError | None = None
        try:
            if _poll(self._sock, events, deadline) & ~select.POLLOUT:
                data = self._sock.recv(_RECEIVE_BYTES)
                if data:
                    replies = self._exchange.feed(data)
                else:
                    broken = PeerClosed("the node closed the connection")
        except BlockingIOError:
            pass
        except OSError as exc:
            broken = PeerClosed(f"connection to the node lost: {exc.strerror}")
        except ProtocolError as exc:
            broken = exc
        finally:
            with self._condition:
                self._reading = False
                for correlation, reply in replies:
                    if correlation in self._replies:
                        self._replies[correlation] = reply
                    elif correlation == 0 and isinstance(reply, Failed):
                        broken = from_wire(reply.code, reply.message)
                self._condition.notify_all()
        if broken is not None:
            self._break(broken)

    def _break(self, error: KVFabricError) -> None:
        with self._condition:
            if self._broken is None:
                self._broken = error
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)  # wakes whoever polls
            self._condition.notify_all()


def _poll(sock: socket.socket, events: int, deadline: float) -> int:
    """Events that are there, 0 at the deadline (monotonic seconds)."""
    waiter = select.poll()
    waiter.register(sock, events)
    ready = waiter.poll(max(0.0, (deadline - time.monotonic()) * 1000 + 0.5))
    return ready[0][1] if ready else 0


def connect_socket(sock: socket.socket, path: str | Path, deadline: float) -> None:
    """Connect by `deadline` (monotonic seconds); not blocking afterwards. Raises ConnectError and
    DeadlineExceeded."""
    sock.settimeout(max(0.001, deadline - time.monotonic()))
    try:
        sock.connect(str(path))
    except TimeoutError as exc:
        raise DeadlineExceeded(f"no answer on {path}") from exc
    except OSError as exc:
        raise ConnectError(f"no node at {path}: {exc.strerror}") from exc
    sock.setblocking(False)


def first_reply(sock: socket.socket, received: list[int], deadline: float) -> Reply:
    """The answer to a connection's first frame; descriptors that come along are appended to `received`.
    Raises DeadlineExceeded, PeerClosed, RemoteProtocolError."""
    reader = FrameReader()
    while True:
        if not _poll(sock, select.POLLIN, deadline):
            raise DeadlineExceeded("the node did not answer the first frame in time")
        frames = descriptors.receive(sock, reader, received)
        if frames:
            return decode_reply(frames[0][1])
