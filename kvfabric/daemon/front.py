"""Where a node can be asked: gRPC for routers and administrators, HTTP for metrics and health.

Open while the node serves, shut while it is handed over. An address that somebody took meanwhile is no reason
to leave engines alone: it is asked for again until it is ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from kvfabric.config import NodeConfig, split_address
from kvfabric.daemon.admin import AdminServer, check_private
from kvfabric.daemon.peers import TcpListener, check_free, tcp_listener
from kvfabric.errors import ConfigError

if TYPE_CHECKING:
    from kvfabric.daemon.http import HttpServer

log = logging.getLogger(__name__)

_POLL_S = 0.2


class Front:
    """`open` it, `close` it, as often as needed; `run` it until the node stops."""

    def __init__(
        self,
        config: NodeConfig,
        *,
        admin: Callable[[TcpListener | None], AdminServer],
        http: Callable[[str, int], HttpServer],
        changing: asyncio.Lock,
    ) -> None:
        """`admin` and `http` make the servers; `changing` is held where this changes in the background."""
        self.http_address = ""
        """Where HTTP listens, or did: the port that was given for 0 is kept."""
        self._config = config
        self._make_admin = admin
        self._make_http = http
        self._changing = changing
        self._open = contextlib.AsyncExitStack()
        self._is_due = asyncio.Event()
        self._shut = self._parts()

    def __repr__(self) -> str:
        return f"<Front of {self._config.name}: {', '.join(self._shut) or 'nothing'} shut>"

    def _parts(self) -> dict[str, Callable[[], Awaitable[None]]]:
        return {"admin": self._open_admin, "http": self._open_http}

    @property
    def is_shut(self) -> bool:
        """Nobody can ask over gRPC now."""
        return "admin" in self._shut

    async def open(self) -> None:
        """Raises ConfigError; then what could be opened is open."""
        problems = []
        for name, part in list(self._shut.items()):
            try:
                await part()
            except ConfigError as exc:
                problems.append(str(exc))
            else:
                del self._shut[name]
        if problems:
            raise ConfigError("; ".join(problems))

    async def close(self) -> None:
        await self._open.aclose()
        self._shut = self._parts()

    async def reopen(self) -> None:
        """Of a node that serves engines already: what cannot be opened now is tried again."""
        try:
            await self.open()
        except ConfigError as exc:
            log.error("this node serves engines, and cannot be asked: %s", exc)  # noqa: TRY400
            self._is_due.set()

    async def run(self) -> None:
        """Whoever has an address that is ours may give it back."""
        while True:
            await self._is_due.wait()
            await asyncio.sleep(_POLL_S)
            async with self._changing:
                with contextlib.suppress(ConfigError):
                    await self.open()
                    self._is_due.clear()
                    log.info("this node can be asked again")

    def check(self) -> None:
        """Raises ConfigError if an address that this node is to have is somebody else's. The predecessor has
        given its own up."""
        check_private(self._config.admin_socket_path)
        if self._tcp is not None:
            check_free(self._tcp.address, "node.listen")
        if self._config.http:
            check_free(self._config.http, "node.http")

    @functools.cached_property
    def _tcp(self) -> TcpListener | None:
        """Raises ConfigError for files that do not read."""
        return tcp_listener(self._config)

    async def _open_admin(self) -> None:
        await self._open.enter_async_context(self._make_admin(self._tcp))

    async def _open_http(self) -> None:
        if not self._config.http:
            return
        host, port = split_address(self.http_address or self._config.http, "node.http")
        server = await self._open.enter_async_context(self._make_http(host, port))
        self.http_address = server.address
