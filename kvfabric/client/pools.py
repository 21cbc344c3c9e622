"""Lending HBM to the other engines of the host, and borrowing theirs: one question a connection, blocking.

Apart from `NodeClient` because descriptors go along: they travel beside a connection's first frame only.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from kvfabric.client.blocking import connect_socket, first_reply
from kvfabric.client.link import expect
from kvfabric.errors import RemoteProtocolError
from kvfabric.protocol import descriptors
from kvfabric.protocol.codec import encode
from kvfabric.protocol.messages import Borrow, Done, Lend, Lent, PoolName, Reply


@dataclass(frozen=True, slots=True)
class LentPool:
    """Somebody's pool of KV pages. `descriptor`: of its memory, the receiver's to close."""

    num_pages: int
    page_bytes: int
    descriptor: int


def lend(socket_path: str | Path, message: Lend, descriptor: int, *, deadline_s: float) -> None:
    """Let others of the node borrow a pool; `descriptor` stays ours. Raises what the node answered,
    ConnectError, PeerClosed, DeadlineExceeded."""
    received: list[int] = []
    try:
        expect(_ask(socket_path, message, [descriptor], received, deadline_s), Done)
    finally:
        descriptors.close_all(received)


def borrow(
    socket_path: str | Path, borrower: bytes, name: PoolName, *, deadline_s: float
) -> LentPool:
    """Raises as `lend`; NotFound for a pool that is not lent (any more)."""
    received: list[int] = []
    try:
        lent = expect(_ask(socket_path, Borrow(borrower, name), [], received, deadline_s), Lent)
        if len(received) != 1:
            raise RemoteProtocolError(f"{len(received)} descriptors came with a pool")
        return LentPool(lent.num_pages, lent.page_bytes, os.dup(received[0]))
    finally:
        descriptors.close_all(received)


def _ask(
    socket_path: str | Path,
    message: Lend | Borrow,
    sent: list[int],
    received: list[int],
    deadline_s: float,
) -> Reply:
    deadline = time.monotonic() + deadline_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        connect_socket(sock, socket_path, deadline)
        descriptors.send(sock, encode(0, message), sent)
        return first_reply(sock, received, deadline)
