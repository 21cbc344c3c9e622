"""What every HTTP front of the router has: how a request is read, how an error looks, how it listens."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass

import msgspec
from aiohttp import web

from kvfabric.errors import KVFabricError
from kvfabric_router.api import MAX_BODY_BYTES, ApiError
from kvfabric_router.openapi import TTFT_OBJECTIVE

STOP_S = 30.0
"""How long answers in progress may take to end when the router stops."""

BACKLOG = 1024
"""Connections that wait to be accepted: as many clients may come at once."""

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = logging.getLogger(__name__)


@web.middleware
async def openai_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Every error in the shape that OpenAI clients read."""
    try:
        return await handler(request)
    except ApiError as exc:
        return error_response(exc)
    except web.HTTPException as exc:
        response = error_response(
            ApiError(exc.status, f"{exc.reason}: {request.method} {request.path}")
        )
        if "Allow" in exc.headers:
            response.headers["Allow"] = exc.headers["Allow"]
        return response
    except KVFabricError:
        _log.exception("%s %s", request.method, request.path)
        return error_response(ApiError(500, "The router failed on this request."))


def application(routes: Iterable[web.AbstractRouteDef]) -> web.Application:
    app = web.Application(middlewares=[openai_errors], client_max_size=MAX_BODY_BYTES)
    app.add_routes(routes)
    return app


def error_response(error: ApiError) -> web.Response:
    return web.Response(
        status=error.status,
        body=error.body(),
        headers=error.headers,
        content_type="application/json",
    )


def too_large(error: web.HTTPRequestEntityTooLarge) -> ApiError:
    return ApiError(error.status, f"A request has at most {MAX_BODY_BYTES} bytes.")


def json_response(value: object, *, status: int = 200) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(value), content_type="application/json"
    )


@dataclass(frozen=True, slots=True)
class Directives:
    """What headers ask for. `no_store` leaves nothing behind in the cache, `no_read` finds nothing there."""

    no_store: bool
    no_read: bool
    ttft_ms: float | None


def directives(request: web.Request) -> Directives:
    """Raises ApiError 400."""
    values = ",".join(request.headers.getall("Cache-Control", ())).lower().split(",")
    asked = {value.strip() for value in values}
    return Directives(
        no_store="no-store" in asked,
        no_read="no-read" in asked,
        ttft_ms=_objective(request.headers.get(TTFT_OBJECTIVE)),
    )


def _objective(header: str | None) -> float | None:
    if header is None:
        return None
    try:
        value = float(header)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ApiError(400, f"`{TTFT_OBJECTIVE}` must be a number of milliseconds above 0.")
    return value


@contextlib.asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[web.AppRunner]:
    """A runner to add sites to. At the end answers in progress get `STOP_S`."""
    # handler_cancellation: a client that goes away ends its handler, and with it the engine's work.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=STOP_S, access_log=None)
    await runner.setup()
    try:
        yield runner
    finally:
        await runner.cleanup()
