"""A running daemon hands everything to its successor: memory, index, connections, locks. `--takeover`.

    successor                                predecessor
        |---- Ask (versions, layout) ---------->|  closes admin and HTTP, reads no engine, finishes what runs
        |<--- Given (descriptors, state) -------|  at rest, ready to go on
     restores, serves nobody                    |
        |---- Ready --------------------------->|
        |<--- Go -------------------------------|  from here on it only waits for the end of the other
        |---- Serving ------------------------->|  exits
     serves; opens SSD when the other has exited

Who serves is decided by the predecessor alone: it goes on unless `Serving` came, and sends no `Go` to one it
has given up. It gives up one that is late by killing it (pidfd), and one that hung up or died by itself. The
successor serves after `Go`, or when the predecessor has provably exited. So whoever dies at whatever step,
one daemon serves, and there is one arena: it has no name, and both map the same.

A successor of another format, or whose index is too small, says so: the predecessor then stops as at SIGTERM,
and the successor starts from SSD with a line in its log.

What is said and given is in `takeover_wire`. The socket is 0600, and peer credentials are checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from kvfabric.daemon.server import listen
from kvfabric.daemon.sessions import Process, open_peer
from kvfabric.daemon.takeover_wire import (
    LAYOUT,
    MAX_DESCRIPTORS,
    VERSION,
    Ask,
    Channel,
    Given,
    Go,
    NodeState,
    Packet,
    Ready,
    Refused,
    Serving,
    Unusable,
    exited,
    pack,
    unpack,
)
from kvfabric.errors import (
    KVFabricError,
    PeerClosed,
    RemoteProtocolError,
    TransferError,
)
from kvfabric.failpoints import failpoint
from kvfabric.protocol import descriptors
from kvfabric.supervisor import notify

log = logging.getLogger(__name__)

FREEZE_S = 10.0
"""How long the predecessor may take to come to rest; after that it goes on and the successor is told."""
READY_S = 60.0
"""How long the successor may take to restore, and how long it waits for each answer."""

_ASK_S = 5.0


class Predecessor(Protocol):
    """What the daemon that hands over must do (the node does)."""

    def why_not(self) -> str:
        """Why there is nothing to hand over; empty if there is."""

    async def freeze(self) -> None:
        """Come to rest: nothing is accepted, read, copied or evicted. On cancellation: `thaw`."""

    def describe(self, numbered: list[int]) -> NodeState:
        """Of a daemon at rest; descriptors, which stay its own, are appended."""

    async def thaw(self) -> None:
        """Serve on after a `freeze`, finished or not."""

    def hand_over(self) -> None:
        """The successor serves: exit, and touch nothing that it has."""

    def end(self) -> None:
        """Stop as at SIGTERM."""


# ---------------------------------------------------------------------- the predecessor


class TakeoverServer:
    """An async context manager: inside it a successor may ask. One conversation at a time."""

    def __init__(self, path: Path, node: Predecessor, *, listener: socket.socket | None) -> None:
        """`listener`: the socket of an earlier daemon, which becomes ours."""
        self._path = path
        self._node = node
        self._listener = listener
        self._abandoned = False
        self._group = asyncio.TaskGroup()
        self._serving: asyncio.Task[None] | None = None

    @property
    def descriptor(self) -> int:
        """Of the listening socket."""
        assert self._listener is not None
        return self._listener.fileno()

    async def __aenter__(self) -> TakeoverServer:
        """Raises ConfigError if the socket cannot be had."""
        if self._listener is None:
            self._listener = listen(self._path, socket.SOCK_SEQPACKET)
        await self._group.__aenter__()
        self._serving = self._group.create_task(self._accept(self._listener))
        return self

    async def __aexit__(self, *exc: object) -> None:
        """A conversation before `Go` is broken off, and the node thawed; one after it is left as it is."""
        assert self._serving is not None
        assert self._listener is not None
        self._serving.cancel()
        await self._group.__aexit__(None, None, None)
        self._listener.close()
        if not self._abandoned:
            self._path.unlink(missing_ok=True)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while not self._abandoned:
            await descriptors.readable(listener)
            try:
                sock, _ = listener.accept()
            except OSError as exc:
                log.warning("cannot accept a successor: %s", exc.strerror)
                await asyncio.sleep(1.0)
                continue
            sock.setblocking(False)
            began = loop.time()
            with sock:
                try:
                    await self._converse(sock)
                except (KVFabricError, TimeoutError, OSError) as exc:
                    log.warning("takeover broken off: %s", str(exc) or "no answer in time")
            log.info("conversation with a successor took %.3f s", loop.time() - began)

    async def _converse(self, sock: socket.socket) -> None:
        peer = open_peer(sock)
        try:
            channel = Channel(sock)
            ask = await channel.expect(Ask, within_s=_ASK_S)
            reason = _mismatch(ask) or self._node.why_not()
            if reason:
                await self._end_for(channel, peer, reason)
                return
            log.info("process %d takes over", peer.id.pid)
            await self._at_rest(channel, peer)
        finally:
            os.close(peer.pidfd)

    async def _end_for(self, channel: Channel, peer: Process, reason: str) -> None:
        log.warning(
            "nothing is handed to process %d: %s. This node stops; the next one starts from SSD",
            peer.id.pid,
            reason,
        )
        await _send_with_pidfd(channel, Refused(reason, ends=True))
        self._end_in_favour_of(peer)

    def _end_in_favour_of(self, peer: Process) -> None:
        """Before this process ends its service manager must know which one to watch."""
        notify(f"MAINPID={peer.id.pid}")
        self._node.end()

    async def _at_rest(self, channel: Channel, peer: Process) -> None:
        """Freeze, hand over, and go on if that came to nothing."""
        try:
            try:
                async with asyncio.timeout(FREEZE_S):
                    await self._node.freeze()
            except TimeoutError:
                reason = f"the node did not come to rest in {FREEZE_S:g} s"
                await _send_with_pidfd(channel, Refused(reason, ends=False))
                raise TransferError(reason) from None
            failpoint("takeover.frozen")
            self._abandoned = await self._hand_over(channel, peer)
        finally:
            if self._abandoned:
                log.info("process %d serves now", peer.id.pid)
                notify(f"MAINPID={peer.id.pid}")
                self._node.hand_over()
            else:
                await self._node.thaw()

    async def _hand_over(self, channel: Channel, peer: Process) -> bool:
        """True: the successor serves."""
        await self._give(channel)
        failpoint("takeover.given")
        try:
            answer: Ready | Unusable = await channel.expect(Ready, Unusable, within_s=READY_S)
        except TimeoutError:
            await _kill(peer)
            raise
        if isinstance(answer, Unusable):
            log.warning("the successor cannot use it: %s. This node stops", answer.reason)
            self._end_in_favour_of(peer)
            return False
        failpoint("takeover.agreed")
        await channel.send(Go())
        failpoint("takeover.gone")
        try:
            await channel.expect(Serving, within_s=None)
        except PeerClosed:
            await exited(peer.pidfd)
            log.warning("the successor died before it served")
            return False
        except asyncio.CancelledError:
            self._abandoned = True  # it may serve already: from `Go` on it is not ours to say
            raise
        return True

    async def _give(self, channel: Channel) -> None:
        numbered: list[int] = []
        state = self._node.describe(numbered)
        own, blob = os.pidfd_open(os.getpid()), -1
        try:
            blob = pack(state)
            every = [own, blob, *numbered]
            for start in range(0, len(every), MAX_DESCRIPTORS):
                some = every[start : start + MAX_DESCRIPTORS]
                await channel.send(Given(last=start + len(some) == len(every)), some)
        finally:
            for descriptor in (own, blob):
                if descriptor >= 0:
                    os.close(descriptor)


def _mismatch(ask: Ask) -> str:
    if ask.version != VERSION:
        return f"it speaks version {ask.version} of the takeover, not {VERSION}"
    if ask.layout != LAYOUT:
        return f"its formats (protocol, page, key) are {ask.layout}, not {LAYOUT}"
    return ""


async def _send_with_pidfd(channel: Channel, packet: Packet) -> None:
    own = os.pidfd_open(os.getpid())
    try:
        await channel.send(packet, [own])
    finally:
        os.close(own)


async def _kill(peer: Process) -> None:
    """A successor that is late must not come alive later."""
    log.warning("process %d is late and is killed", peer.id.pid)
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(peer.pidfd, signal.SIGKILL)
    await exited(peer.pidfd)


# ---------------------------------------------------------------------- the successor


class Estate:
    """What a predecessor gave. `descriptors` are ours; whoever takes one over leaves -1 in its place. `lock`,
    `takeover_listener`, `ssd_lock`: positions among them, as in NodeState."""

    def __init__(
        self, channel: Channel, predecessor: int, state: NodeState, received: list[int]
    ) -> None:
        self.lock, self.takeover_listener, self.ssd_lock = (
            state.lock,
            state.takeover_listener,
            state.ssd_lock,
        )
        self.descriptors = received
        self.is_accepted = False
        self._state: NodeState | None = state
        self._channel = channel
        self._predecessor = predecessor
        self._began = time.monotonic()

    def take_state(self) -> NodeState:
        """What was given, once: it is large, and of no use when it is restored."""
        state, self._state = self._state, None
        assert state is not None
        return state

    def take(self, at: int) -> int:
        """A descriptor, which is the caller's now; -1 for position -1, and for one that was taken."""
        if at < 0:
            return -1
        descriptor, self.descriptors[at] = self.descriptors[at], -1
        return descriptor

    async def accept(self) -> None:
        """Everything is restored: become the one that serves. Returns after `Go`, or when the predecessor
        has exited. Raises TransferError if it does neither: then this process must not serve."""
        failpoint("takeover.restored")
        try:
            await self._channel.send(Ready())
            failpoint("takeover.ready")
            await self._channel.expect(Go, within_s=READY_S)
            failpoint("takeover.going")
            await self._channel.send(Serving())
        except PeerClosed:
            log.warning("the predecessor is gone before it let go")
            await self._gone()
        except TimeoutError as exc:
            raise TransferError("the predecessor does not let go") from exc
        self.is_accepted = True
        self._channel.close()
        failpoint("takeover.serving")
        log.info("took over in %.3f s", time.monotonic() - self._began)

    async def give_back(self, reason: str) -> None:
        """It is of no use here: have the predecessor stop, and wait for that."""
        with contextlib.suppress(PeerClosed):
            await self._channel.send(Unusable(reason))
        descriptors.close_all([one for one in self.descriptors if one >= 0])
        self.descriptors = []
        await self._gone()

    async def _gone(self) -> None:
        try:
            async with asyncio.timeout(READY_S):
                await exited(self._predecessor)
        except TimeoutError as exc:
            raise TransferError("the predecessor does not exit") from exc

    async def predecessor_exited(self) -> None:
        """However long it takes: only then is what it has on disk ours."""
        await exited(self._predecessor)

    def close(self) -> None:
        """Idempotent."""
        self._channel.close()
        descriptors.close_all([one for one in (*self.descriptors, self._predecessor) if one >= 0])
        self.descriptors, self._predecessor = [], -1


async def take_over(path: Path) -> Estate | None:
    """Everything that the daemon listening on `path` has; None if it is to be started from SSD: there is no
    such daemon, it died meanwhile, or it stopped because the two do not fit.

    Raises TransferError if there is one and it goes on serving.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(str(path))
    except OSError as exc:
        sock.close()
        log.info("no daemon to take over from (%s): an ordinary start", exc.strerror)
        return None
    sock.setblocking(False)
    received: list[int] = []
    try:
        state = await _inherit(Channel(sock), received)
        if state is not None:
            os.close(received[1])  # the memory of what was unpacked
            return Estate(Channel(sock), received[0], state, received[2:])
    except BaseException:
        descriptors.close_all([one for one in received if one >= 0])
        sock.close()
        raise
    descriptors.close_all(received)
    sock.close()
    return None


async def _inherit(channel: Channel, received: list[int]) -> NodeState | None:
    try:
        await channel.send(Ask(VERSION, LAYOUT))
        failpoint("takeover.asked")
        packet = await _collect(channel, received)
    except PeerClosed:
        log.warning("the predecessor died before it gave anything: starting from SSD")
        return None
    if isinstance(packet, Refused):
        if not packet.ends:
            raise TransferError(f"nothing was handed over: {packet.reason}. The old node serves on")
        log.warning("nothing is handed over: %s. Starting from SSD", packet.reason)
        await _wait_briefly(lambda: exited(received[0]))
        return None
    failpoint("takeover.received")
    try:
        return unpack(received[1])
    except RemoteProtocolError as exc:
        log.warning("%s. Starting from SSD", exc)
        await channel.send(Unusable(str(exc)))
        await _wait_briefly(lambda: exited(received[0]))
        return None


async def _collect(channel: Channel, received: list[int]) -> Packet:
    """The last Given, or Refused. Raises PeerClosed."""
    while True:
        try:
            async with asyncio.timeout(READY_S):
                packet = await channel.receive(received)
        except TimeoutError as exc:
            raise TransferError("the predecessor does not answer") from exc
        if isinstance(packet, Refused) or (isinstance(packet, Given) and packet.last):
            return packet
        if not isinstance(packet, Given):
            raise RemoteProtocolError(f"{type(packet).__name__} comes at the wrong time")


async def _wait_briefly(wait: Callable[[], Awaitable[None]]) -> None:
    try:
        async with asyncio.timeout(READY_S):
            await wait()
    except TimeoutError as exc:
        raise TransferError("the predecessor does not exit") from exc
