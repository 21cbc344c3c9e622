"""UCX through ucxx: one worker of one process, tagged messages into and out of memory that is there already.

`Transport` is the asyncio side, `_Progress` the one thread that calls UCX (its objects are not shared between
threads). It sleeps on the worker's own descriptor and polls only while something is in flight. Requests come
as vectors and are answered as one: `Posted`.

What UCX does to memory ends when UCX says so. A deadline or a cancelled task ends a right, nothing more: a
receive may write until its completion, a send may read until then, and only `Posted.quiet` tells.
`Link.abort` makes UCX end what a link has in flight. Only a request that UCX completed with success counts as
one: a send that the end of its link cancelled failed.

UCX reads its settings when it starts. Which ones are set here, and why, is measured in
`benchmarks/README.md`: without `rndv/am/bcopy` excluded, what goes over TCP is copied in fragments at a
quarter of the speed. Never fork once this runs.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import importlib
import logging
import os
import select
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from kvfabric.errors import ClosedError, ConfigError, ConnectError
from kvfabric.transfer.ucp import (
    Information,
    describe_link,
    information,
    listening_sockets,
    map_memory,
    unmap_memory,
)

log = logging.getLogger(__name__)

WAKE_S = 0.02
"""UCX sometimes does not signal its descriptor: while something is in flight it is looked at this often."""

_SETTINGS = {
    "MAX_RNDV_RAILS": "1",
    "PROTOS": "^rndv/am/bcopy",
    "TCP_RX_SEG_SIZE": "512k",
    "RNDV_THRESH": "64k",
}
_GIVEN = {name: value for name, value in os.environ.items() if name.startswith("UCX_")}
"""By the user: importing ucxx sets variables of its own, meant for other work than this."""
_ROUNDS = 64
"""Of UCX's progress between two looks at what completed: while bytes come in, it always has more to do."""
_STOP_S = 10.0
_CLOSE_NS, _CLOSE_ATTEMPTS = 10**8, 5


@dataclass(frozen=True, slots=True)
class Settings:
    """`net_devices`: UCX's names, comma-separated ("lo", "mlx5_0:1", "eth0"); they are a zone of trust.

    `transports`: UCX_TLS; empty: `tcp` alone on loopback, elsewhere what UCX finds but shared memory, which
    does not tell that a peer died. Whoever sets UCX_* variables is obeyed. `is_sealed`: what goes there is to
    be sealed by those who use it.
    """

    net_devices: str = "lo"
    transports: str = ""
    is_sealed: bool = False

    def options(self, environment: Mapping[str, str]) -> dict[str, str]:
        """UCX's options, without those that the environment sets."""
        tls = self.transports or ("tcp" if self.net_devices == "lo" else "^sm")
        all_of_them = {"TLS": tls, "NET_DEVICES": self.net_devices, **_SETTINGS}
        return {name: v for name, v in all_of_them.items() if f"UCX_{name}" not in environment}


@dataclass(frozen=True, slots=True)
class Message:
    """Memory to send or to fill, and the 64 bits under which both sides know it. `buffer` is contiguous; a
    receive is at least as long as what is sent, or fails."""

    buffer: memoryview | Any
    tag: int


class Posted:
    """Requests that UCX has. `quiet`: it does not touch their memory any more."""

    def __init__(self, num_messages: int) -> None:
        self._ended: concurrent.futures.Future[tuple[str, ...]] = concurrent.futures.Future()
        self.num_messages = num_messages

    @property
    def quiet(self) -> bool:
        return self._ended.done()

    async def outcome(self) -> tuple[str, ...]:
        """Why each message failed, "" for those that arrived or went out. Cancelled, the requests go on."""
        return await asyncio.shield(asyncio.wrap_future(self._ended))

    def when_quiet(self, call: Callable[[], None]) -> None:
        """`call` once, on the running loop, when all requests have ended; on it now if they have."""
        loop = asyncio.get_running_loop()

        def ended(_: object) -> None:
            # A loop that is closed has nobody left who would be told.
            if not loop.is_closed():
                loop.call_soon_threadsafe(call)

        self._ended.add_done_callback(ended)


class Link:
    """The way to one worker, known by its `number`. Made by a `Transport`."""

    def __init__(self, progress: _Progress, number: int) -> None:
        self._progress = progress
        self.number = number

    def send(self, messages: Sequence[Message]) -> Posted:
        """In the order given. Memory must not change until `Posted.quiet`."""
        return self._progress.post(self.number, messages, is_send=True)

    def receive(self, messages: Sequence[Message]) -> Posted:
        """What arrives under these tags, from whoever knows them. Post it before the sender is asked."""
        return self._progress.post(self.number, messages, is_send=False)

    def close(self) -> None:
        """Take nothing more, and end when what is in flight has."""
        self._progress.submit(_Close(self.number))

    def abort(self) -> None:
        """End what is in flight as failed, as soon as UCX can. The link is of no use afterwards."""
        self._progress.submit(_Abort(self.number))

    @property
    def is_alive(self) -> bool:
        """False once UCX found the peer gone, and after `close` or `abort`."""
        return self._progress.is_alive(self.number)


class Transport:
    """An async context manager; `async with await Transport.start(settings) as transport`.

    Leaving aborts what is in flight and waits until UCX has let go of all memory.
    """

    def __init__(self, progress: _Progress) -> None:
        self._progress = progress
        self._known: dict[bytes, concurrent.futures.Future[int]] = {}

    @classmethod
    async def start(cls, settings: Settings) -> Transport:
        """Raises ConfigError: ucxx is not installed, or UCX does not start with these settings."""
        return cls(await asyncio.to_thread(_Progress.start, settings))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.shield(asyncio.to_thread(self._progress.stop))

    @property
    def address(self) -> bytes:
        """What a peer connects to; some hundred bytes."""
        return self._progress.address

    @property
    def settings(self) -> Settings:
        return self._progress.settings

    @property
    def is_sealed(self) -> bool:
        return self._progress.settings.is_sealed

    @property
    def num_in_flight(self) -> int:
        return self._progress.num_in_flight

    def register(self, memory: memoryview) -> None:
        """Where most messages will come from and go to: made known to the network once, instead of with each
        message. Not to be unmapped before the end."""
        self._progress.submit(_Register(memory))

    @property
    def information(self) -> Information:
        return self._progress.information

    async def describe(self, link: Link) -> str:
        """What UCX uses for a link: transports, devices, protocols by size of what was sent so far."""
        done: concurrent.futures.Future[str] = concurrent.futures.Future()
        self._progress.submit(_Describe(link.number, done))
        return await asyncio.wrap_future(done)

    async def connect(self, address: bytes) -> Link:
        """A link to the worker at `address`. Nothing is sent yet: a dead one shows at the first message.
        Raises ConnectError: the address is none of UCX's, or no transport reaches it."""
        done: concurrent.futures.Future[int] = concurrent.futures.Future()
        self._progress.submit(_Connect(address, done))
        return Link(self._progress, await asyncio.wrap_future(done))

    async def link_to(self, address: bytes) -> Link:
        """As `connect`, but one link for all who want one to this address, until it is ended. Whoever is
        cancelled meanwhile leaves the attempt to those who come later."""
        known = self._known.get(address)
        if known is None or not self._is_good(known):
            self._known = {a: k for a, k in self._known.items() if self._is_good(k)}
            known = concurrent.futures.Future()
            self._progress.submit(_Connect(address, known))
            self._known[address] = known
        # Shielded: to cancel the wrapper would cancel what others wait for.
        return Link(self._progress, await asyncio.shield(asyncio.wrap_future(known)))

    def _is_good(self, known: concurrent.futures.Future[int]) -> bool:
        """Or not known to be bad yet."""
        if not known.done():
            return True
        return known.exception() is None and self._progress.is_alive(known.result())


# ---------------------------------------------------------------------- the thread


@dataclass(frozen=True, slots=True)
class _Connect:
    address: bytes
    done: concurrent.futures.Future[int]


@dataclass(frozen=True, slots=True)
class _Register:
    memory: memoryview


@dataclass(frozen=True, slots=True)
class _Describe:
    link: int
    done: concurrent.futures.Future[str]


@dataclass(frozen=True, slots=True)
class _Close:
    link: int


@dataclass(frozen=True, slots=True)
class _Abort:
    link: int


@dataclass(slots=True)
class _Post:
    link: int
    messages: Sequence[Message]
    is_send: bool
    posted: Posted
    requests: list[Any] = field(default_factory=list)
    """UCX's, or why it did not take one."""
    errors: list[str] = field(default_factory=list)
    """Of those that ended, in order."""


_Command = _Connect | _Register | _Describe | _Close | _Abort | _Post


class _Progress:
    """All that touches UCX, on a thread of its own. `submit`, `post` and `stop` may be called from any."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._mapped: list[int] = []
        self._commands: collections.deque[_Command] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # of `_is_closed` beside `_commands`
        self._is_closed = False
        self._is_stopping = False
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="kvfabric-ucx", daemon=True)
        self._links: dict[int, Any] = {}
        self._dead: set[int] = set()  # that take nothing more
        self._closed: set[int] = set()  # that UCX was told to end
        self._context: Any = None
        self._worker: Any = None
        self._next_link = 1
        self._running: list[_Post] = []
        self.address = b""
        self.information = Information()

    @classmethod
    def start(cls, settings: Settings) -> _Progress:
        self = cls(settings)
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            self._thread.join()
            os.close(self._wake)
            raise
        return self

    def submit(self, command: _Command) -> None:
        with self._lock:
            if self._is_closed:
                if isinstance(command, _Register | _Close | _Abort):
                    return
                raise ClosedError("the transport was closed")
            self._commands.append(command)
            os.eventfd_write(self._wake, 1)

    def post(self, link: int, messages: Sequence[Message], *, is_send: bool) -> Posted:
        posted = Posted(len(messages))
        self.submit(_Post(link, messages, is_send, posted))
        return posted

    @property
    def num_in_flight(self) -> int:
        return sum(len(post.requests) - len(post.errors) for post in [*self._running])

    def is_alive(self, link: int) -> bool:
        return link in self._links and link not in self._dead

    def stop(self) -> None:
        """Returns when the thread has ended, and with it every request. Idempotent."""
        with self._lock:
            if self._is_stopping:
                return
            self._is_closed = self._is_stopping = True
            os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    # -- on the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._open()
        except ConfigError as exc:
            self._started.set_exception(exc)
            return
        except BaseException as exc:
            self._started.set_exception(exc)
            raise
        self._started.set_result(None)
        try:
            self._serve()
        finally:
            # Also if this thread fails: who waits hears of it, and who comes later.
            with self._lock:
                self._is_closed = True
            self._refuse_commands()
            self._close()

    def _open(self) -> None:
        options = self.settings.options(_GIVEN)
        os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
        try:
            api = importlib.import_module("ucxx._lib.libucxx")
            array = importlib.import_module("ucxx._lib.arr")
        except ImportError as exc:
            raise ConfigError(
                f"moving blocks between nodes needs ucxx: pip install 'kvfabric[ucx-cu12]' ({exc})"
            ) from exc
        self._api, self._array = api, array.Array
        # UCX's own errors, which share a base that has no public name, and what ucxx says of bad arguments.
        self._failures = (
            api.UCXError,
            *api.UCXBusyError.__bases__,
            ValueError,
            IndexError,
            RuntimeError,
        )
        before = listening_sockets()
        try:
            self._context = api.UCXContext(options, (api.Feature.TAG, api.Feature.WAKEUP))
            self._worker = api.UCXWorker(
                self._context, enable_delayed_submission=False, enable_python_future=False
            )
            self._worker.init_blocking_progress_mode()
        except self._failures as exc:
            self._context = self._worker = None
            devices = self.settings.net_devices
            raise ConfigError(
                f"UCX does not start on ucx.net_devices = {devices!r}: {exc}"
            ) from exc
        self.address = self._worker.address.tobytes()
        self.information = information(self._context.info, options | _GIVEN, before)
        self._poller = select.epoll()
        self._poller.register(self._worker.epoll_file_descriptor, select.EPOLLIN)
        self._poller.register(self._wake, select.EPOLLIN)

    def _serve(self) -> None:
        while not (self._is_stopping and not self._commands):
            self._take_commands()
            self._progress()
            # What came in while UCX was asked is asked for again before anybody sleeps.
            if not self._commands and not self._is_stopping and self._worker.arm():
                self._poller.poll(WAKE_S if self._running else None)
            self._clear_wake()

    def _refuse_commands(self) -> None:
        """What UCX was never asked."""
        while self._commands:
            match self._commands.popleft():
                case _Connect(done=done) | _Describe(done=done):
                    done.set_exception(ClosedError("the transport was closed"))
                case _Post() as post:
                    post.posted._ended.set_result(
                        ("the transport was closed",) * len(post.messages)
                    )

    def _clear_wake(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return

    def _take_commands(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            match command:
                case _Post():
                    self._post(command)
                case _Connect():
                    self._connect(command)
                case _Register():
                    self._register(command.memory)
                case _Describe():
                    link = self._links.get(command.link)
                    command.done.set_result("" if link is None else describe_link(link.handle))
                case _Close():
                    self._dead.add(command.link)
                case _Abort():
                    self._end_link(command.link)

    def _register(self, memory: memoryview) -> None:
        try:
            self._mapped.append(map_memory(self._context.handle, memory))
        except ConfigError as exc:
            log.warning("transfers are slower than they could be: %s", exc)

    def _connect(self, command: _Connect) -> None:
        try:
            address = self._api.UCXAddress.create_from_buffer(command.address)
            link = self._worker.create_endpoint_from_worker_address(address, True)
        except self._failures as exc:
            command.done.set_exception(ConnectError(f"UCX does not reach this address: {exc}"))
            return
        number = self._next_link
        self._next_link += 1
        self._links[number] = link
        command.done.set_result(number)

    def _post(self, command: _Post) -> None:
        link = None if command.link in self._dead else self._links.get(command.link)
        for message in command.messages:
            if link is None:
                command.requests.append("the link was ended")
                continue
            try:
                memory = self._array(message.buffer)
                tag = self._api.UCXXTag(message.tag)
                ask = link.tag_send if command.is_send else link.tag_recv
                command.requests.append(ask(memory, tag))
            except self._failures as exc:
                command.requests.append(f"UCX did not take it: {exc}")
        self._running.append(command)

    def _progress(self) -> None:
        worker = self._worker
        for _ in range(_ROUNDS):
            if not worker.progress_once():
                break
        self._running = [post for post in self._running if not self._has_ended(post)]
        self._reap()

    def _reap(self) -> None:
        """End links whose peer is gone; forget those of which nothing is in flight any more."""
        for number in [number for number, link in self._links.items() if not link.alive]:
            self._end_link(number)
        for number in self._dead - {post.link for post in self._running}:
            self._end_link(number)
            self._links.pop(number, None)
            self._dead.discard(number)
            self._closed.discard(number)

    def _has_ended(self, post: _Post) -> bool:
        """In the order of its messages: whoever waits, waits for the last, and what is in between need not
        be looked at before its turn."""
        while len(post.errors) < len(post.requests):
            request = post.requests[len(post.errors)]
            if isinstance(request, str):
                post.errors.append(request)
            elif not request.completed:
                return False
            else:
                post.errors.append(self._error_of(request))
        post.posted._ended.set_result(tuple(post.errors))
        return True

    def _error_of(self, request: Any) -> str:
        try:
            request.check_error()
        except self._failures as exc:
            return f"{type(exc).__name__}: {exc}"
        return ""

    def _end_link(self, number: int) -> None:
        if number not in self._links or number in self._closed:
            return
        self._dead.add(number)
        self._closed.add(number)
        # Not `close`: of a link whose peer is gone ucxx 0.52 crashes in it.
        self._links[number].close_blocking(period=_CLOSE_NS, max_attempts=_CLOSE_ATTEMPTS)
        # What was in flight is cancelled in here, and not in `progress_once`.
        self._worker.progress()

    def _close(self) -> None:
        """Memory is let go of when UCX has completed everything: it is waited for, and said if it takes."""
        for number in list(self._links):
            self._end_link(number)
        told = False
        waited = 0.0
        while self._running:
            self._progress()
            if self._running and self._worker.arm():
                self._poller.poll(WAKE_S)
                waited += WAKE_S
            if waited > _STOP_S and not told:
                told = True
                log.error("UCX still has %d requests in flight after the end", self.num_in_flight)
        self._links.clear()
        # ucxx keeps a worker whose links were ended in a transfer until it has been asked for these.
        self._worker.cancel_inflight_requests(period=_CLOSE_NS, max_attempts=_CLOSE_ATTEMPTS)
        self._progress()
        self._poller.close()
        for handle in self._mapped:
            unmap_memory(self._context.handle, handle)
        self._context = self._worker = None
