"""The admin plane of a node: gRPC on a 0600 Unix socket, for routers and administrators.

Serves `NodeEvents`, `RegistryService`, `NodeAdmin`, `KeyringService` and the standard health service. It
decides nothing about registry, leases or events: it translates. Whoever can open the socket is trusted as the
node's own user is (design 2); `kvfabric-requested-by` in the metadata is for the audit log, not for access.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvfabric.daemon.admin_sources import AdminSources
from kvfabric.daemon.node_services import KeyringService, NodeAdmin, NodeEvents
from kvfabric.daemon.peers import PeerCheck, TcpListener
from kvfabric.daemon.registry_service import RegistryService
from kvfabric.errors import ConfigError
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.registry.holders import Holders

SERVICES = tuple(
    f"kvfabric.v1.{name}"
    for name in ("NodeEvents", "RegistryService", "NodeAdmin", "KeyringService")
)
MAX_REQUEST_BYTES = 1 << 20
MAX_REPLY_BYTES = 16 << 20
_MAX_RPCS = 1024
_STOP_S = 0.5
_SOCKET_PATH_BYTES = 107


class AdminServer:
    """An async context manager: inside it, the socket is served. `clock`: seconds, CLOCK_BOOTTIME."""

    def __init__(
        self,
        path: Path,
        sources: AdminSources,
        *,
        node_id: str,
        epoch_lease_s: float,
        clock: Callable[[], float],
        tcp: TcpListener | None = None,
    ) -> None:
        self._tcp = tcp
        self.path = path
        self.holders = Holders(ttl_s=epoch_lease_s, clock=clock)
        self.node_id = node_id
        self._sources = sources
        self._clock = clock
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None

    def __repr__(self) -> str:
        return f"<AdminServer {self.path}: {self.holders!r}>"

    async def __aenter__(self) -> AdminServer:
        """Raises ConfigError if the socket cannot be ours alone."""
        server = grpc.aio.server(
            interceptors=[PeerCheck()],
            maximum_concurrent_rpcs=_MAX_RPCS,
            options=[
                ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
                ("grpc.max_send_message_length", MAX_REPLY_BYTES),
                ("grpc.so_reuseport", 0),
                # Routers ask now and then whether this node is still there: see `NodeLink`.
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),
            ],
        )
        registry = RegistryService(self._sources, self.holders, self.node_id, self._clock)
        pb_grpc.add_RegistryServiceServicer_to_server(registry, server)  # type: ignore[no-untyped-call]
        events = NodeEvents(self._sources, self.node_id)
        pb_grpc.add_NodeEventsServicer_to_server(events, server)  # type: ignore[no-untyped-call]
        admin = NodeAdmin(self._sources, self.node_id, self._clock)
        pb_grpc.add_NodeAdminServicer_to_server(admin, server)  # type: ignore[no-untyped-call]
        keys = KeyringService(self._sources)
        pb_grpc.add_KeyringServiceServicer_to_server(keys, server)  # type: ignore[no-untyped-call]
        if self._sources.sender is not None:
            pb_grpc.add_NodeTransferServicer_to_server(self._sources.sender, server)  # type: ignore[no-untyped-call]
        if self._sources.prefetches is not None:
            pb_grpc.add_NodeHintsServicer_to_server(self._sources.prefetches, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        bind_private(server, self.path)
        if self._tcp is not None:
            self._tcp.add_to(server)
        await server.start()
        self._server = server
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Answers what is under way for at most half a second, then ends it."""
        assert self._server is not None
        await self._health.enter_graceful_shutdown()
        self._sources.events.close()
        await self._server.stop(_STOP_S)
        self.path.unlink(missing_ok=True)


def bind_private(server: grpc.aio.Server, path: Path) -> None:
    """Make the socket so that only this user can open it, from its first moment on."""
    check_private(path)
    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
        mode = path.stat()
    except (RuntimeError, OSError) as exc:
        raise ConfigError(f"cannot listen on {path}: {exc}") from exc
    finally:
        os.umask(before)
    if stat.S_IMODE(mode.st_mode) & 0o077 or mode.st_uid != os.geteuid():
        raise ConfigError(f"{path} could be opened by others (mode {stat.S_IMODE(mode.st_mode):o})")


def check_private(path: Path) -> None:
    """Raises ConfigError for a path that cannot be a socket's, or is somebody else's."""
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
        raise ConfigError(f"the path of a Unix socket has at most 107 bytes: {path}")
    if _answers(path):
        raise ConfigError(f"another process serves {path}: stop it, or choose another admin_socket")


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(str(path))
        return True
    return False
