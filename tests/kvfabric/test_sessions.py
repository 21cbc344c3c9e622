"""Sessions by themselves: what ends whose rights, and what counts as proof of quiet."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Iterator

import msgspec
import pytest

from kvfabric.daemon.sessions import Process, Session, Sessions, open_peer, to_layout
from kvfabric.errors import RemoteProtocolError
from kvfabric.protocol import messages as m
from kvfabric.testing.engine import tiny_hello
from kvfabric.types import BlockLayout, RecomputeCost, SessionId


class Recorder:
    """Store and node at once: what they are told, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.listed: list[int] = []
        self.sessions: Sessions | None = None

    def open_session(
        self, session: SessionId, layout: BlockLayout, recompute: RecomputeCost
    ) -> None:
        self.told.append("open")

    def end_rights(self, session: SessionId) -> None:
        self.told.append("end")

    def quiet(self, session: SessionId) -> None:
        self.told.append("quiet")

    def session_opened(self, session: Session) -> None: ...

    def session_ended(self, session: Session) -> None: ...

    def processes_changed(self) -> None:
        assert self.sessions is not None
        self.listed.append(len(self.sessions.processes()))


@pytest.fixture
def recorder() -> Recorder:
    found = Recorder()
    found.sessions = Sessions(found, found)
    return found


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    """A socket whose other end is this process."""
    one, other = socket.socketpair()
    with one, other:
        yield one


def hello(session: bytes = b"", *, resumed: bool = False) -> m.Hello:
    return tiny_hello().to_wire(session=session, resumed=resumed)


def join(
    recorder: Recorder, peer: socket.socket, session: bytes = b"", *, resumed: bool = False
) -> tuple[Session, Process]:
    assert recorder.sessions is not None
    return recorder.sessions.join(hello(session, resumed=resumed), open_peer(peer))


async def test_lost_connection_is_quiet_only_when_its_process_says_so(
    recorder: Recorder, peer: socket.socket
) -> None:
    assert recorder.sessions is not None
    session, process = join(recorder, peer)
    recorder.sessions.leave(session, process, said_bye=False)
    assert recorder.told == ["open", "end"]
    session, process = join(recorder, peer, session.id, resumed=True)
    assert recorder.told == ["open", "end", "quiet", "open"]
    recorder.sessions.leave(session, process, said_bye=True)
    assert recorder.told[-1] == "quiet"
    assert not recorder.sessions.processes()


async def test_resumed_hello_says_nothing_of_connections_that_live(
    recorder: Recorder, peer: socket.socket
) -> None:
    """Two clients of one process come back one after the other. The first is lost again later, without
    Bye: it may be copying, so the goodbye of the second makes nothing quiet."""
    assert recorder.sessions is not None
    first, process = join(recorder, peer)
    recorder.sessions.leave(first, process, said_bye=False)
    session, process = join(recorder, peer, first.id, resumed=True)
    join(recorder, peer, first.id, resumed=True)
    recorder.told.clear()
    recorder.sessions.leave(session, process, said_bye=False)
    recorder.sessions.leave(session, process, said_bye=True)
    assert recorder.told == ["end"]
    recorder.sessions.close()


async def test_connection_that_ends_after_the_stop_changes_nothing(
    recorder: Recorder, peer: socket.socket
) -> None:
    """The last list of who has the arena stands, though an engine's connection ends after it: without
    it the next daemon would make a second arena beside the one that is mapped."""
    assert recorder.sessions is not None
    session, process = join(recorder, peer)
    recorder.sessions.close()
    recorder.sessions.leave(session, process, said_bye=False)
    assert recorder.told == ["open", "end"]
    assert recorder.listed == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": -1},
        {"num_kv_heads": 1 << 40},
        {"block_tokens": 0},
        {"engine_block_tokens": -16},
        {"parts": (m.WirePart(-1, 0, 4096),)},
        {"parts": (m.WirePart(0, 1 << 63, 4096),)},
        {"parts": (m.WirePart(0, 0, 0),)},
        {"parts": (m.WirePart(0, 0, (1 << 64) - 1), m.WirePart(0, 1, 1))},
    ],
    ids=str,
)
def test_layout_that_no_engine_can_have_is_refused(changes: dict[str, object]) -> None:
    layout = msgspec.structs.replace(hello().layout, **changes)
    with pytest.raises(RemoteProtocolError):
        to_layout(layout)


def test_layout_is_what_the_engine_declared() -> None:
    assert to_layout(hello().layout) == dataclasses.replace(tiny_hello().layout)


def test_peer_is_the_process_at_the_other_end(peer: socket.socket) -> None:
    process = open_peer(peer)
    os.close(process.pidfd)
    assert process.id.pid == os.getpid()
