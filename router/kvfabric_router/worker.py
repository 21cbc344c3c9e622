"""A worker process: HTTP from and to clients and engines, nothing else. No secret and no index is here.

`python -m kvfabric_router.worker` is started by `workers.Workers`, with the socket that all workers accept on
and its end of a channel to the process that decides. It ends when that process does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import secrets
import signal
import socket

import aiohttp
import uvloop
from aiohttp import web

from kvfabric import garbage
from kvfabric.keyring import hide_memory
from kvfabric_router import api, front
from kvfabric_router.api import ApiError
from kvfabric_router.engine_http import client
from kvfabric_router.proxy import REQUEST_ID, Proxy
from kvfabric_router.worker_desk import WorkerCall, WorkerDesk

KNOCK_BYTES = 64 << 10
"""A body larger than that is read only when its sender is known and may ask."""
_PASSED_ON = ("Content-Type", "Allow", "Retry-After", "WWW-Authenticate")


class Worker:
    """Its HTTP front. `decider`: a session to the application of the process that decides."""

    def __init__(
        self, desk: WorkerDesk, proxy: Proxy[WorkerCall], decider: aiohttp.ClientSession
    ) -> None:
        self._desk = desk
        self._proxy = proxy
        self._decider = decider

    def application(self) -> web.Application:
        return front.application(
            [
                web.post(api.COMPLETIONS, self.complete),
                web.post(api.CHAT_COMPLETIONS, self.complete),
                web.route("*", "/{path:.*}", self.pass_on),
            ]
        )

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """A completion, of a text or of a chat."""
        request_id = f"req-{secrets.token_hex(16)}"
        number = self._desk.open(request_id, request.headers.get("Authorization"))
        result = "disconnected"
        try:
            try:
                call = await self._call(request, request_id, number)
                response = await self._proxy.serve(request, call)
                result = call.result
            except ApiError as exc:
                response, result = front.error_response(exc), ""
            except web.HTTPRequestEntityTooLarge as exc:
                response, result = front.error_response(front.too_large(exc)), ""
            result = result or str(response.status)
        finally:
            self._desk.end(number, result)
        if not response.prepared:
            response.headers.setdefault(REQUEST_ID, request_id)
        return response

    async def _call(self, request: web.Request, request_id: str, number: int) -> WorkerCall:
        """Raises ApiError: who may not ask hears that first, whatever else is wrong."""
        length = request.content_length
        if length is None or length > KNOCK_BYTES:
            await self._desk.welcome(number)
        raw = await request.read()
        try:
            asked = front.directives(request)
            return WorkerCall(
                number,
                request_id,
                request.path,
                api.parse(request.path, raw),
                no_store=asked.no_store,
                no_read=asked.no_read,
                ttft_ms=asked.ttft_ms,
            )
        except ApiError:
            await self._desk.welcome(number)
            raise

    async def pass_on(self, request: web.Request) -> web.Response:
        """Everything else is asked of the process that decides."""
        headers = {n: request.headers[n] for n in ("Authorization",) if n in request.headers}
        try:
            async with self._decider.request(
                request.method,
                f"http://decider{request.path_qs}",
                headers=headers,
                data=await request.read() or None,
            ) as answer:
                passed = {n: answer.headers[n] for n in _PASSED_ON if n in answer.headers}
                body = await answer.read()
                return web.Response(status=answer.status, body=body, headers=passed)
        except aiohttp.ClientError as exc:
            raise ApiError(503, "The router is going down.", code="not_ready") from exc


async def run(
    listener: socket.socket, channel: socket.socket, decider: str, timeout_s: float
) -> None:
    """Serve until SIGTERM or SIGINT, or until the process that decides is gone."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    desk = WorkerDesk(gone=stop.set)
    await loop.create_unix_connection(lambda: desk, sock=channel)
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(client())
        connector = aiohttp.UnixConnector(decider)
        told = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        worker = Worker(desk, Proxy(desk, http=http, timeout_s=timeout_s), told)
        runner = await stack.enter_async_context(front.serving(worker.application()))
        await web.SockSite(runner, listener, backlog=front.BACKLOG).start()
        group = await stack.enter_async_context(asyncio.TaskGroup())
        collecting = group.create_task(garbage.collect(lambda: asyncio.sleep(0)))
        stack.enter_context(garbage.own_schedule())
        desk.ready()
        await stop.wait()
        collecting.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listener", type=int, required=True, help="descriptor to accept on")
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the channel")
    parser.add_argument("--decider", required=True, help="Unix socket of its application")
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--log-level", default="INFO")
    args = parser.parse_args()
    hide_memory()
    logging.basicConfig(
        level=args.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    listener, channel = socket.socket(fileno=args.listener), socket.socket(fileno=args.channel)
    uvloop.run(run(listener, channel, args.decider, args.timeout_s))


if __name__ == "__main__":
    main()
