"""Sessions: one engine instance each, made of the connections of its processes.

Two things end apart (design 4). *Rights* end with the last connection: no commit, no renewal, no new
match. *Memory* is quiet only when nobody can touch it any more: every process of the session has exited
(its pidfd says so; end of file on a socket proves nothing), or said Bye on each of its connections, or
the session came back and declared itself quiet.

    LIVE --last connection gone--> RIGHTS ENDED --all processes quiet--> forgotten
      ^                                |
      +--------- hello, resumed -------+

Runs on the daemon's event loop; everything here is synchronous.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from kvfabric.daemon.adoption import ProcessId, start_time
from kvfabric.errors import AccessError, NotFound, PeerClosed, RemoteProtocolError
from kvfabric.hashing import layout_fingerprint
from kvfabric.protocol.messages import Hello, WireLayout
from kvfabric.types import BlockLayout, PartSpec, RecomputeCost, SessionId

log = logging.getLogger(__name__)

SESSION_BYTES = 16
MAX_NUMBER = 1 << 31
"""Of layers, heads, tokens and the like: what any format that they go into can hold."""
MAX_BLOCK_BYTES = 1 << 40
_SO_PEERPIDFD = 77
_CREDENTIALS = struct.Struct("=iII")


class SessionSink(Protocol):
    """What the store is told (`BlockStore` is one)."""

    def open_session(
        self, session: SessionId, layout: BlockLayout, recompute: RecomputeCost
    ) -> None: ...
    def end_rights(self, session: SessionId) -> None: ...
    def quiet(self, session: SessionId) -> None: ...


class SessionObserver(Protocol):
    """Who else wants to know (the node is one)."""

    def session_opened(self, session: Session) -> None:
        """A session began or came back."""

    def session_ended(self, session: Session) -> None:
        """Its last connection is gone."""

    def processes_changed(self) -> None:
        """`Sessions.processes` may answer otherwise now."""


@dataclass(slots=True)
class Process:
    """A process of a session. Quiet: it cannot touch arena or window on behalf of the session."""

    id: ProcessId
    pidfd: int
    num_open: int = 0
    num_unclean: int = 0  # connections that ended without Bye
    exited: bool = False

    @property
    def is_quiet(self) -> bool:
        return self.exited or (self.num_open == 0 and self.num_unclean == 0)


@dataclass(slots=True)
class Session:
    """One engine instance, as its first hello described it."""

    id: SessionId
    hello: Hello
    layout: BlockLayout
    fingerprint: bytes
    processes: dict[ProcessId, Process] = field(default_factory=dict)

    @property
    def num_open(self) -> int:
        return sum(process.num_open for process in self.processes.values())


class ProcessState(msgspec.Struct, frozen=True):
    """A process, for a successor. `pidfd`: its position among the descriptors that go along, -1: none."""

    id: ProcessId
    num_unclean: int
    exited: bool
    pidfd: int


class SessionState(msgspec.Struct, frozen=True):
    """A session, for a successor; its connections say themselves whose they are."""

    id: bytes
    hello: Hello
    processes: tuple[ProcessState, ...]


def to_layout(wire: WireLayout) -> BlockLayout:
    """Raises RemoteProtocolError for a layout that no engine can have."""
    if wire.block_tokens <= 0 or not wire.parts or any(p.num_bytes <= 0 for p in wire.parts):
        raise RemoteProtocolError("a layout has block tokens, and parts with bytes")
    if len({(p.group, p.shard) for p in wire.parts}) != len(wire.parts):
        raise RemoteProtocolError("a layout declares each (group, shard) once")
    shape = (wire.num_layers, wire.num_kv_heads, wire.head_dim)
    tokens = (wire.block_tokens, wire.engine_block_tokens)
    numbers = (*shape, *tokens, *(number for p in wire.parts for number in (p.group, p.shard)))
    if min(numbers) < 0 or max(numbers) > MAX_NUMBER:
        raise RemoteProtocolError(f"the numbers of a layout are at most {MAX_NUMBER}")
    if sum(p.num_bytes for p in wire.parts) > MAX_BLOCK_BYTES:
        raise RemoteProtocolError(f"a block has at most {MAX_BLOCK_BYTES} bytes")
    return BlockLayout(
        num_layers=wire.num_layers,
        num_kv_heads=wire.num_kv_heads,
        head_dim=wire.head_dim,
        dtype=wire.dtype,
        block_tokens=wire.block_tokens,
        engine_block_tokens=wire.engine_block_tokens,
        parts=tuple(PartSpec(p.group, p.shard, p.num_bytes) for p in wire.parts),
        kv_scales=wire.kv_scales,
        packing=wire.packing,
        parallel=wire.parallel,
        rope=wire.rope,
        attention=wire.attention,
    )


def to_recompute(hello: Hello) -> RecomputeCost:
    """Raises RemoteProtocolError for what no engine can have measured."""
    if not (0 <= hello.us_per_token < math.inf and 0 <= hello.growth < math.inf):
        raise RemoteProtocolError(
            f"recomputing takes {hello.us_per_token} us a token and {hello.growth} more with each"
        )
    return RecomputeCost(hello.us_per_token, hello.growth)


def open_peer(sock: socket.socket) -> Process:
    """The process at the other end. Raises AccessError if it is another user's."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    if uid != os.geteuid():
        raise AccessError(f"uid {uid} may not connect to the node of uid {os.geteuid()}")
    try:
        try:
            pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError:  # before Linux 6.5
            pidfd = os.pidfd_open(pid)
    except OSError as exc:
        raise PeerClosed(f"process {pid} is gone") from exc
    started = start_time(pid)
    if started is None:
        os.close(pidfd)
        raise PeerClosed(f"process {pid} is gone")
    return Process(ProcessId(pid, started), pidfd)


class Sessions:
    """All sessions of this daemon. Call `close` at the end."""

    def __init__(self, sink: SessionSink, observer: SessionObserver) -> None:
        self._sink = sink
        self._observer = observer
        self._sessions: dict[SessionId, Session] = {}

    def __repr__(self) -> str:
        return f"<Sessions: {len(self._sessions)}, {self.num_connections} connections>"

    @property
    def num_connections(self) -> int:
        return sum(session.num_open for session in self._sessions.values())

    @property
    def num_ended(self) -> int:
        """Sessions whose rights ended and whose processes are not all quiet."""
        return sum(session.num_open == 0 for session in self._sessions.values())

    def live(self) -> list[Session]:
        return [session for session in self._sessions.values() if session.num_open]

    def find_live(self, name: bytes) -> Session | None:
        """None for one whose rights ended, or that never was."""
        session = self._sessions.get(SessionId(name))
        return session if session is not None and session.num_open else None

    def processes(self) -> set[ProcessId]:
        """Every process that may have the arena mapped."""
        return {
            process.id
            for session in self._sessions.values()
            for process in session.processes.values()
            if not process.exited
        }

    def join(self, hello: Hello, peer: Process) -> tuple[Session, Process]:
        """A connection of `peer` opens. Takes the peer's pidfd over unless it raises.

        Raises NotFound for a session that is over or never was, RemoteProtocolError for a hello that
        contradicts the session's first.
        """
        session = self._find(hello)
        process = session.processes.get(peer.id)
        if process is None:
            process = session.processes[peer.id] = peer
            asyncio.get_running_loop().add_reader(peer.pidfd, self._exited, session, peer)
        else:
            os.close(peer.pidfd)
        if hello.resumed:
            process.num_unclean = 0  # it says itself that nothing of those is under way
        process.num_open += 1
        self._observer.processes_changed()
        return session, process

    def leave(self, session: Session, process: Process, *, said_bye: bool) -> None:
        """A connection ended. After `close` that changes nothing: what was noted of it stays."""
        if self._sessions.get(session.id) is not session:
            return
        process.num_open -= 1
        if not said_bye:
            process.num_unclean += 1
        if session.num_open == 0:
            self._end(session)
        self._settle(session)
        self._observer.processes_changed()

    def close(self) -> None:
        """Stop watching processes. Rights of live sessions end."""
        for session in self._sessions.values():
            if session.num_open:
                self._end(session)
            for process in session.processes.values():
                self._unwatch(process)
        self._sessions.clear()

    # -- handing over --------------------------------------------------------------------------------

    def describe(self, descriptors: list[int]) -> tuple[SessionState, ...]:
        """All sessions; their pidfds, which stay ours, are appended to `descriptors`."""
        return tuple(
            SessionState(
                session.id,
                session.hello,
                tuple(_describe(process, descriptors) for process in session.processes.values()),
            )
            for session in self._sessions.values()
        )

    def restore(self, states: Sequence[SessionState], descriptors: list[int]) -> None:
        """What `describe` said, while none has a connection yet. Takes the pidfds over and leaves -1."""
        for state in states:
            layout = to_layout(state.hello.layout)
            name = SessionId(state.id)
            session = Session(name, state.hello, layout, layout_fingerprint(layout))
            self._sessions[name] = session
            for known in state.processes:
                process = Process(known.id, -1, 0, known.num_unclean, known.exited)
                session.processes[known.id] = process
                if known.pidfd >= 0:
                    process.pidfd, descriptors[known.pidfd] = descriptors[known.pidfd], -1
                    loop = asyncio.get_running_loop()
                    loop.add_reader(process.pidfd, self._exited, session, process)

    def rejoin(self, name: bytes, peer: ProcessId) -> tuple[Session, Process]:
        """A connection that was handed over. Raises RemoteProtocolError for one that is not known."""
        session = self._sessions.get(SessionId(name))
        process = None if session is None else session.processes.get(peer)
        if session is None or process is None:
            raise RemoteProtocolError("a connection was handed over without its session")
        process.num_open += 1
        if session.num_open == 1:
            self._observer.session_opened(session)
        return session, process

    def _find(self, hello: Hello) -> Session:
        layout, recompute = to_layout(hello.layout), to_recompute(hello)
        if not hello.session:
            if hello.resumed:
                raise RemoteProtocolError("a resumed session has an id")
            name = SessionId(secrets.token_bytes(SESSION_BYTES))
            return self._open(name, hello, layout, recompute)
        name = SessionId(hello.session)
        known = self._sessions.get(name)
        if known is not None and known.num_open:
            _check_same(known, hello, layout)
            return known
        if not hello.resumed:
            raise NotFound(f"no session {name.hex()[:8]} is open here")
        if len(name) != SESSION_BYTES:
            raise RemoteProtocolError(f"a session id has {SESSION_BYTES} bytes")
        if known is None:
            return self._open(name, hello, layout, recompute)
        _check_same(known, hello, layout)
        for process in known.processes.values():
            process.num_unclean = 0  # it says itself that nothing of it is under way
        self._sink.quiet(name)
        self._sink.open_session(name, layout, recompute)
        self._observer.session_opened(known)
        return known

    def _open(
        self, name: SessionId, hello: Hello, layout: BlockLayout, recompute: RecomputeCost
    ) -> Session:
        self._sink.open_session(name, layout, recompute)
        session = Session(name, hello, layout, layout_fingerprint(layout))
        self._sessions[name] = session
        self._observer.session_opened(session)
        return session

    def _end(self, session: Session) -> None:
        self._sink.end_rights(session.id)
        self._observer.session_ended(session)

    def _exited(self, session: Session, process: Process) -> None:
        self._unwatch(process)
        process.exited = True
        log.info("process %d of session %s exited", process.id.pid, session.id.hex()[:8])
        self._settle(session)
        self._observer.processes_changed()

    def _settle(self, session: Session) -> None:
        quiet = all(process.is_quiet for process in session.processes.values())
        if quiet and session.num_open == 0 and session.id in self._sessions:
            self._forget(session)

    def _forget(self, session: Session) -> None:
        del self._sessions[session.id]
        for process in session.processes.values():
            self._unwatch(process)
        self._sink.quiet(session.id)

    def _unwatch(self, process: Process) -> None:
        if process.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(process.pidfd)
            os.close(process.pidfd)
            process.pidfd = -1


def _describe(process: Process, descriptors: list[int]) -> ProcessState:
    at = -1
    if process.pidfd >= 0:
        at = len(descriptors)
        descriptors.append(process.pidfd)
    return ProcessState(process.id, process.num_unclean, process.exited, at)


def _check_same(session: Session, hello: Hello, layout: BlockLayout) -> None:
    first = session.hello
    if session.layout != layout:
        raise RemoteProtocolError("another layout than the session's first hello declared")
    same = (first.engine_id, first.model_revision, first.adapter, first.adapter_revision)
    if same != (hello.engine_id, hello.model_revision, hello.adapter, hello.adapter_revision):
        raise RemoteProtocolError("another engine, model or adapter than the session's first hello")
