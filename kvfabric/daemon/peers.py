"""Who may ask a node what, over TCP: by who its certificate says it is. The Unix socket is its user's own."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from kvfabric.config import NodeConfig, split_address
from kvfabric.errors import ConfigError
from kvfabric.pki import Identity
from kvfabric.tls import Reloaded, peer_identity, server_credentials

_NAMES = "x509_subject_alternative_name"
_HEALTH = "/grpc.health."
_SECRETS = "/kvfabric.v1.KeyringService/"
_ALLOWED = {
    "admin": ("/",),
    "router": (
        "/kvfabric.v1.NodeEvents/",
        "/kvfabric.v1.NodeHints/",
        "/kvfabric.v1.RegistryService/Watch",
        "/kvfabric.v1.RegistryService/RenewLease",
        "/kvfabric.v1.RegistryService/ShareLoad",
        _SECRETS,
    ),
    "node": ("/kvfabric.v1.NodeEvents/", "/kvfabric.v1.NodeTransfer/", _SECRETS),
}
_HOLDERS_OF_SECRETS = ("node", "router")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TcpListener:
    """`address`: HOST:PORT. `credentials` None: plain."""

    address: str
    credentials: Any

    def add_to(self, server: Any) -> None:
        """Raises ConfigError if the address cannot be listened on."""
        try:
            if self.credentials is None:
                server.add_insecure_port(self.address)
            else:
                server.add_secure_port(self.address, self.credentials)
        except RuntimeError as exc:
            raise ConfigError(f"node.listen: cannot listen on {self.address}: {exc}") from exc


def check_free(address: str, setting: str) -> None:
    """Raises ConfigError if HOST:PORT cannot be listened on now. What this tries nobody can connect to."""
    host, port = split_address(address, setting)
    problems, num_free = [], 0
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as exc:
        raise ConfigError(f"{setting}: no such address as {address}: {exc.strerror}") from exc
    for family, kind, protocol, _, place in found:
        try:
            with socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                tried.bind(place)
        except OSError as exc:
            problems.append(exc)
        else:
            num_free += 1
    taken = [exc for exc in problems if exc.errno == errno.EADDRINUSE]
    if taken or not num_free:
        why = (taken or problems)[0].strerror
        raise ConfigError(f"{setting}: cannot listen on {address}: {why}")


def tcp_listener(config: NodeConfig) -> TcpListener | None:
    """What `listen` asks for. Raises ConfigError for plain TCP that was not asked for, and bad files."""
    if not config.listen:
        return None
    split_address(config.listen, "node.listen")
    if config.tls_dir:
        source = Reloaded(config.tls_path, "node")
        log.info("gRPC on %s as %s", config.listen, source.material.identity)
        return TcpListener(config.listen, server_credentials(source))
    if not config.insecure:
        raise ConfigError(
            "node.listen is TCP and needs node.tls_dir (`kvfabric pki init DIR` makes one for "
            "development), or --insecure"
        )
    log.warning(
        "INSECURE: gRPC on %s is plain: whoever reaches it administers this node and its fleet",
        config.listen,
    )
    return TcpListener(config.listen, None)


def identity_in(context: Any) -> Identity | None:
    """None on the Unix socket and on plain TCP."""
    return peer_identity(context.auth_context().get(_NAMES, ()))


def is_allowed(identity: Identity | None, method: str) -> bool:
    """`identity` None: a certificate that says nothing of ours."""
    if method.startswith(_HEALTH):
        return identity is not None
    if method.startswith(_SECRETS) and getattr(identity, "role", "") not in _HOLDERS_OF_SECRETS:
        return False
    prefixes = _ALLOWED.get(identity.role, ()) if identity is not None else ()
    return method.startswith(prefixes)


class PeerCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses with PERMISSION_DENIED what a peer on TLS may not ask."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        handler = await continuation(details)
        method: str = details.method
        if handler is None or method.startswith(_HEALTH):
            return handler
        if handler.unary_unary is not None:

            async def unary(request: Any, context: Any) -> Any:
                await _check(context, method)
                return await handler.unary_unary(request, context)

            return grpc.unary_unary_rpc_method_handler(
                unary, handler.request_deserializer, handler.response_serializer
            )

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            await _check(context, method)
            async for reply in handler.unary_stream(request, context):
                yield reply

        return grpc.unary_stream_rpc_method_handler(
            stream, handler.request_deserializer, handler.response_serializer
        )


async def _check(context: Any, method: str) -> None:
    if b"ssl" not in context.auth_context().get("transport_security_type", ()):
        # The Unix socket, or plain TCP where that was asked for: not for secrets.
        if method.startswith(_SECRETS) and not context.peer().startswith("unix:"):
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED, "keys go over mTLS only: give nodes a tls_dir"
            )
        return
    identity = identity_in(context)
    if not is_allowed(identity, method):
        who = identity or "a certificate without kvfabric://ROLE/NAME"
        log.warning("%s refused to %s", method, who)
        needs = "node or router" if method.startswith(_SECRETS) else "admin"
        await context.abort(
            grpc.StatusCode.PERMISSION_DENIED, f"{who} may not call {method}: it needs role {needs}"
        )
