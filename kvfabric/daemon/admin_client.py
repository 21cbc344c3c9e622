"""A blocking client of a node's admin socket, for commands. Imports grpc: import it inside `run`."""

from __future__ import annotations

import getpass
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvfabric.errors import AccessError, ConnectError, DeadlineExceeded, KVFabricError, from_wire
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.registry.state import RegistryState
from kvfabric.registry.wire import state_from_pb
from kvfabric.tls import Security, diagnose, open_channel

Reply = TypeVar("Reply")

DEADLINE_S = 30.0
"""Longer than any epoch lease that an invalidation may have to wait out."""
MAX_REPLY_BYTES = 64 << 20
REQUESTED_BY = "kvfabric-requested-by"
"""Metadata of a call: who asks, for the audit log."""
ERROR_CODE = "kvfabric-code"
"""Trailing metadata of an error: which class of `kvfabric.errors` it is."""
LOCAL = Security("admin")
"""Only the Unix socket: without a certificate nobody is asked over TCP."""
_TEXT_FIELDS = {"text"}


class AdminClient:
    """A context manager. Every call raises KVFabricErrors: what the node said, or that none answers."""

    def __init__(
        self,
        where: Path | str,
        *,
        deadline_s: float = DEADLINE_S,
        security: Security = LOCAL,
    ) -> None:
        """`where`: the node's admin socket, or HOST:PORT, for which `security` says who we are.

        Raises ConfigError if it does not.
        """
        self._path = where
        self._target = f"unix:{where}" if isinstance(where, Path) else where
        self._security = security
        self._deadline_s = deadline_s
        self._channel = open_channel(
            self._target,
            security,
            [
                ("grpc.max_receive_message_length", MAX_REPLY_BYTES),
                ("grpc.use_local_subchannel_pool", 1),
            ],
            blocking=True,
        )
        self.registry: Any = pb_grpc.RegistryServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self.admin: Any = pb_grpc.NodeAdminStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def call(self, method: Any, request: Message) -> Any:
        """One unary call of a stub's `method`."""
        who = f"{_user()}@{socket.gethostname()}".encode("ascii", "replace").decode()
        try:
            return method(request, timeout=self._deadline_s, metadata=((REQUESTED_BY, who),))
        except grpc.RpcError as exc:
            raise self._error(exc) from exc

    def state(self) -> RegistryState:
        """The registry as it is now."""
        watch = self.registry.Watch(
            pb.WatchRegistryRequest(holder_id=f"command-{os.getpid()}"), timeout=self._deadline_s
        )
        try:
            return state_from_pb(next(watch))
        except grpc.RpcError as exc:
            raise self._error(exc) from exc
        finally:
            watch.cancel()

    def is_serving(self) -> bool:
        health = health_pb2_grpc.HealthStub(self._channel)
        reply = self.call(health.Check, health_pb2.HealthCheckRequest())
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def _error(self, error: Any) -> KVFabricError:
        status, details = error.code(), error.details() or "no reason given"
        codes = [str(v) for k, v in (error.trailing_metadata() or ()) if k == ERROR_CODE]
        if codes:
            return from_wire(codes[0], details)
        if status is grpc.StatusCode.PERMISSION_DENIED:
            return AccessError(_line(details))
        if status is grpc.StatusCode.UNAVAILABLE and (
            why := diagnose(self._target, self._security)
        ):
            return ConnectError(why)
        if status is grpc.StatusCode.UNAVAILABLE:
            return ConnectError(
                f"no node answers at {self._path}: start one with `kvfabric node`, "
                "or name its socket with --admin-socket"
            )
        if status is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(
                f"the node at {self._path} did not answer within {self._deadline_s:.0f} s: "
                "what was asked may still be done; `kvfabric status` shows whether the node lives"
            )
        return KVFabricError(f"the node at {self._path} failed: {status.name}: {_line(details)}")


def _line(details: str) -> str:
    return details.splitlines()[0] if details else details


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as containers have
        return f"uid-{os.getuid()}"


def to_plain(message: Message) -> dict[str, Any]:
    """A message as JSON can carry it: bytes in hex, text as text, every field there; null for an optional
    value that is not."""
    plain: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        is_value = field.message_type is None and field.has_presence
        if is_value and not message.HasField(field.name):
            plain[field.name] = None
            continue
        value = getattr(message, field.name)
        plain[field.name] = _plain(field, value)
    return plain


def _plain(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_scalar(field, item) for item in value]
    return _scalar(field, value)


def _scalar(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return to_plain(value)
    if isinstance(value, bytes):
        return value.decode(errors="replace") if field.name in _TEXT_FIELDS else value.hex()
    return value
