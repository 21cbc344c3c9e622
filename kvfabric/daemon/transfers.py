"""What a node has for moving blocks to and from other nodes: a UCX worker, and both sides' parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from kvfabric.daemon.fetching import Fetches
from kvfabric.daemon.handlers import Services
from kvfabric.daemon.link_check import measured_links
from kvfabric.daemon.sending import Sender
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.tls import Security
from kvfabric.transfer.ucx import Settings, Transport


class Transfers:
    """An async context manager: leaving ends what moves. `peers`: as `Fetches`."""

    fetches: Fetches
    sender: Sender
    transport: Transport

    def __init__(
        self,
        settings: Settings,
        services: Services,
        security: Security,
        peers: Callable[[], Mapping[str, str]],
    ) -> None:
        self._settings = settings
        self._services = services
        self._security = security
        self._peers = peers
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Transfers:
        """Raises ConfigError: UCX does not start."""
        async with contextlib.AsyncExitStack() as stack:
            self.transport = await stack.enter_async_context(await Transport.start(self._settings))
            self.sender = await stack.enter_async_context(Sender(self._services, self.transport))
            assert self._services.meters is not None
            fetches = Fetches(
                self._services.store,
                self.transport,
                self._security,
                peers=self._peers,
                meter=self._services.meters.peer,
            )
            self.fetches = await stack.enter_async_context(fetches)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def measure(self) -> pb.MeasuredLinks:
        """The ways to the other nodes, for `kvfabric doctor`."""
        return await measured_links(self.transport, self._peers(), self._security)

    async def pause(self) -> None:
        """Nothing reads or writes the arena any more, until `resume`."""
        await self.fetches.pause()
        await self.sender.pause()

    def resume(self) -> None:
        self.fetches.resume()
        self.sender.resume()

    def counts(self) -> Iterator[tuple[str, int]]:
        yield from self.fetches.counts.items()
        yield from self.sender.counts.items()
