"""The two frames that carry file descriptors: Hello (an arena returned) and Welcome (arena, window).

Descriptors travel as SCM_RIGHTS beside the bytes of the frame. `send` and `receive` are one non-blocking
step each: they raise BlockingIOError where a driver has to wait, and the drivers do the waiting.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence

from kvfabric.errors import PeerClosed, RemoteProtocolError
from kvfabric.protocol.codec import FrameReader

MAX_DESCRIPTORS = 2
_STEP_BYTES = 32 << 10


def send(sock: socket.socket, frame: bytes, descriptors: Sequence[int]) -> None:
    """Send a whole small frame at once. The receiver gets duplicates; ours stay open and ours.

    Raises BlockingIOError (nothing was sent) and PeerClosed.
    """
    try:
        sent = socket.send_fds(sock, [frame], list(descriptors))
    except BlockingIOError:
        raise
    except OSError as exc:
        raise PeerClosed(f"cannot send the first frame: {exc.strerror}") from exc
    if sent != len(frame):
        # The first frame of a direction meets an empty buffer that is larger than any such frame.
        raise PeerClosed(f"only {sent} of {len(frame)} bytes of the first frame could be sent")


def receive(
    sock: socket.socket, reader: FrameReader, descriptors: list[int]
) -> list[tuple[int, bytes]]:
    """One read: frames that are whole now; what came beside them is appended to `descriptors`.

    The caller owns `descriptors`, also when this raises BlockingIOError, PeerClosed or
    RemoteProtocolError. More than `MAX_DESCRIPTORS` beside one read are closed by the kernel, and more
    of them in all are an error: a frame that trickles in would bring some with each byte.
    """
    try:
        data, received, _, _ = socket.recv_fds(
            sock, _STEP_BYTES, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
    except BlockingIOError:
        raise
    except OSError as exc:
        raise PeerClosed(f"connection lost: {exc.strerror}") from exc
    descriptors.extend(received)
    if len(descriptors) > MAX_DESCRIPTORS:
        raise RemoteProtocolError(f"more than {MAX_DESCRIPTORS} descriptors beside one frame")
    if not data:
        raise PeerClosed("the other side closed the connection before it answered")
    return reader.feed(data)


async def readable(sock: socket.socket) -> None:
    """Wait until `sock` has something to read. On cancellation nothing was read."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)


def close_all(descriptors: list[int]) -> None:
    """Close and forget every descriptor of the list."""
    while descriptors:
        os.close(descriptors.pop())
