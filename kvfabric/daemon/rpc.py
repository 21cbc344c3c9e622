"""What every gRPC method of a node has around it: errors as a status with its code, and who asked."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc

from kvfabric.daemon.admin_client import ERROR_CODE, REQUESTED_BY
from kvfabric.daemon.peers import identity_in
from kvfabric.errors import (
    AccessError,
    CapacityError,
    ClosedError,
    ConfigError,
    Conflict,
    DeadlineExceeded,
    KVFabricError,
    NotFound,
    ProtocolError,
)

Reply = TypeVar("Reply")
Request = TypeVar("Request")
Server = TypeVar("Server")

_STATUS = (
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (ProtocolError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (Conflict, grpc.StatusCode.FAILED_PRECONDITION),
    (CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (AccessError, grpc.StatusCode.PERMISSION_DENIED),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (ClosedError, grpc.StatusCode.UNAVAILABLE),
)


def _status_of(error: KVFabricError) -> grpc.StatusCode:
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status
    return grpc.StatusCode.INTERNAL


async def _abort(context: Any, error: KVFabricError) -> None:
    context.set_trailing_metadata(((ERROR_CODE, error.code),))
    await context.abort(_status_of(error), str(error))


def unary(
    method: Callable[[Server, Request, Any], Awaitable[Reply]],
) -> Callable[[Server, Request, Any], Awaitable[Reply | None]]:
    """KVFabricError -> status and message. Anything else is a bug, and gRPC logs it and says UNKNOWN."""

    @functools.wraps(method)
    async def answer(self: Server, request: Request, context: Any) -> Reply | None:
        try:
            return await method(self, request, context)
        except KVFabricError as exc:
            await _abort(context, exc)
            return None

    return answer


def stream(
    method: Callable[[Server, Request, Any], AsyncIterator[Reply]],
) -> Callable[[Server, Request, Any], AsyncIterator[Reply]]:
    @functools.wraps(method)
    async def answers(self: Server, request: Request, context: Any) -> AsyncIterator[Reply]:
        try:
            async for reply in method(self, request, context):
                yield reply
        except KVFabricError as exc:
            await _abort(context, exc)

    return answers


def requested_by(context: Any) -> str:
    """What the caller says; over TLS, who its certificate says it is before that."""
    identity = identity_in(context)
    if identity is not None:
        return f"{identity} ({_claimed(context)})"
    return _claimed(context)


def _claimed(context: Any) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == REQUESTED_BY:
            return str(value)[:200]
    return ""
