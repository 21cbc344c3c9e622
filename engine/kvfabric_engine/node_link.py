"""Keeps one NodeClient connected to the node, from a thread of its own. Decides nothing about blocks.

    DOWN --connect--> UP --call too late--> STALLED --ping answered--> UP
      ^               |                        |
      +-- connection lost, also when the node closes it to hand out its arena anew

A connection is replaced only when no call uses the old one: then no copy from the old arena is under way and
the old window is not written any more, which is what a resumed session states (`messages.Hello`). While DOWN
or STALLED every use fails at once, so a dead or hanging node costs each request nothing.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvfabric.client import EngineHello, NodeClient
from kvfabric.errors import DeadlineExceeded, NotFound, ProtocolError
from kvfabric_engine.boundary import Boundary, NotConnected

CONNECT_S = 1.0
PING_S = 1.0
TICK_S = 0.25
"""Longest time between two ticks: how soon a silent end of the connection is noticed."""
BATCH_S = 0.02
"""How long what `wake` announced is gathered before the tick."""
BACKOFF_S = (0.1, 5.0)


@dataclass(frozen=True, slots=True)
class LinkCalls:
    """What the link calls on its thread. They may raise: that ends what was tried."""

    connected: Callable[[NodeClient], None]
    """Before the first use of a client."""

    gone: Callable[[], None]
    """After the last use of a client and before its memory is unmapped. May come more than once."""

    tick: Callable[[NodeClient], None]
    """From time to time while UP, and soon after `wake`."""

    ping: Callable[[NodeClient], object] = lambda client: client.ping(deadline_s=PING_S)
    """Before each tick: ask whether the node is there, within `PING_S`."""


class NodeLink:
    """`use()` gives the client to whoever calls the node."""

    def __init__(
        self,
        socket_path: str,
        hello: EngineHello,
        *,
        boundary: Boundary,
        session: bytes = b"",
        calls: LinkCalls,
    ) -> None:
        """`session`: the instance to join, when another process of this engine opened it."""
        self._socket_path = socket_path
        self._hello = hello
        self._boundary = boundary
        self._joined = session
        self._calls = calls
        self._condition = threading.Condition()  # guards all below
        self._client: NodeClient | None = None
        self._previous: NodeClient | None = None  # lost; its session is to be resumed
        self._num_uses = 0
        self._is_stalled = False
        self._is_closing = False
        self._is_woken = False
        self._thread = threading.Thread(target=self._run, name="kvf-link", daemon=True)

    def __repr__(self) -> str:
        state = "down" if self._client is None else "stalled" if self._is_stalled else "up"
        return f"<NodeLink {self._socket_path} {state}, {self._num_uses} in use>"

    @property
    def is_up(self) -> bool:
        return self._client is not None and not self._is_stalled

    @property
    def session(self) -> bytes:
        """Of the current or the last connection; empty before the first."""
        client = self._client or self._previous
        return client.session if client is not None else self._joined

    @property
    def lease_s(self) -> float:
        client = self._client
        return client.lease_s if client is not None else float("inf")

    def start(self) -> None:
        self._thread.start()

    def wait_up(self, timeout_s: float) -> bool:
        """Wait until connected; False after `timeout_s`."""
        with self._condition:
            return self._condition.wait_for(lambda: self.is_up, timeout_s)

    def wake(self) -> None:
        """Something is to be done: tick soon. Any thread."""
        with self._condition:
            self._is_woken = True
            self._condition.notify_all()

    @contextlib.contextmanager
    def use(self) -> Iterator[NodeClient]:
        """The client, which stays this connection until the block ends. Raises NotConnected when not UP."""
        with self._condition:
            client = self._client
            if client is None or self._is_stalled:
                raise NotConnected(f"no connection to the node at {self._socket_path}")
            self._num_uses += 1
        try:
            yield client
        except DeadlineExceeded:
            self._is_stalled = True
            self.wake()
            raise
        finally:
            with self._condition:
                self._num_uses -= 1
                if client.closed:
                    self._lose(client)
                self._condition.notify_all()

    def close(self) -> None:
        """A last tick, then goodbye. Nothing may be using the client. Idempotent."""
        with self._condition:
            if self._is_closing:
                return
            self._is_closing = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._boundary.run("close", self._calls.gone, lambda _: None)
        for client in (self._client, self._previous):
            if client is not None:
                self._boundary.run("close", client.close, lambda _: None)

    def _lose(self, client: NodeClient) -> None:
        """Under the condition: this connection is over."""
        if self._client is client:
            self._client, self._previous = None, client
            self._is_stalled = False

    def _run(self) -> None:
        backoff = BACKOFF_S[0]
        while not self._is_closing:
            client = self._client
            if client is None:
                if self._boundary.run("connect", self._connect, lambda _: False):
                    backoff = BACKOFF_S[0]
                    continue
                self._pause(backoff * random.uniform(0.5, 1.0))
                backoff = min(2 * backoff, BACKOFF_S[1])
                continue
            self._care(client)
            self._pause(TICK_S, until_woken=True)
        if self._client is not None:
            self._care(self._client)

    def _pause(self, seconds: float, *, until_woken: bool = False) -> None:
        with self._condition:
            self._condition.wait_for(
                lambda: self._is_closing or (until_woken and self._is_woken), seconds
            )
            if self._is_woken and until_woken:
                self._condition.wait_for(lambda: self._is_closing, BATCH_S)
            self._is_woken = False

    def _connect(self) -> bool:
        with self._condition:
            if not self._condition.wait_for(
                lambda: self._num_uses == 0 or self._is_closing, CONNECT_S
            ):
                return False
            previous = self._previous
        self._calls.gone()
        try:
            client = NodeClient.connect(
                self._socket_path,
                self._hello,
                deadline_s=CONNECT_S,
                session=self._joined,
                resume_from=previous,
            )
        except (NotFound, ProtocolError):
            # The node does not want this session back: the next attempt opens a new one.
            if previous is not None:
                previous.close()
                self._previous = None
            raise
        try:
            self._calls.connected(client)
        except BaseException:
            client.close()
            raise
        with self._condition:
            self._client, self._previous = client, None
            self._is_stalled = False
            self._condition.notify_all()
        self._boundary.forgive()
        return True

    def _care(self, client: NodeClient) -> None:
        """One round: is it alive, and whatever the connector has to send."""
        alive = self._boundary.run("ping", lambda: self._ping(client), lambda _: False)
        if alive:
            self._boundary.run("tick", lambda: self._calls.tick(client), lambda _: None)
        with self._condition:
            self._is_stalled = not alive
            self._condition.notify_all()
            if client.closed:
                self._lose(client)

    def _ping(self, client: NodeClient) -> bool:
        self._calls.ping(client)
        return True
