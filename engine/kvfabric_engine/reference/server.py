"""The OpenAI-compatible HTTP server of the reference engine: reads requests, streams answers.

    GET  /v1/models  /healthz  /metrics        POST  /v1/completions  /v1/chat/completions

A client that goes away aborts its request. Errors have the OpenAI shape. Parsing is `openai.py`'s, everything
else the engine's.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from aiohttp import web

from kvfabric.errors import CapacityError, ClosedError
from kvfabric.handle import SESSION_HEADER
from kvfabric.hashing import layout_fingerprint
from kvfabric.types import MissReason
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.reference.openai import AnswerText, BadRequest, Call, error_body, parse, usage
from kvfabric_engine.reference.sequence import Finish, GenerationRequest, Output, Reused

MAX_BODY_BYTES = 16 << 20
INLINE_BYTES = 256 << 10
"""A larger body is parsed in a thread."""
REQUEST_ID_HEADER = "X-Request-Id"
MAX_REQUEST_ID_CHARS = 128

_ENGINE = web.AppKey("engine", Engine)


def create_app(engine: Engine) -> web.Application:
    """The routes over a started engine."""
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors])
    app[_ENGINE] = engine
    app.add_routes(
        [
            web.get("/v1/models", _models),
            web.post("/v1/completions", _completions),
            web.post("/v1/chat/completions", _chat_completions),
            web.get("/healthz", _healthz),
            web.get("/metrics", _metrics),
        ]
    )
    return app


@web.middleware
async def _errors(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except BadRequest as exc:
        return _error(str(exc), exc.status, exc.param)
    except CapacityError as exc:
        return _error(str(exc), 400, "prompt")
    except ClosedError as exc:
        return _error(str(exc), 503)
    except web.HTTPException as exc:
        if exc.status < 400:
            raise
        return _error(exc.reason, exc.status)
    return response


def _error(message: str, status: int, param: str | None = None) -> web.Response:
    return web.json_response(error_body(message, status=status, param=param), status=status)


async def _models(request: web.Request) -> web.Response:
    engine = request.app[_ENGINE]
    if not engine.is_healthy:  # routers ask here whether to send requests
        raise ClosedError("the engine is not running")
    return web.json_response({"object": "list", "data": [_model(engine)]})


def _session(engine: Engine) -> str:
    return engine.connector.session.hex() if engine.connector is not None else ""


def _model(engine: Engine) -> dict[str, Any]:
    return {
        "id": engine.config.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "kvfabric",
        "kvfabric": {
            "session": _session(engine),
            "model_revision": engine.model.revision,
            "layout_fingerprint": layout_fingerprint(engine.layout).hex(),
            "block_tokens": engine.shape.block_tokens,
            "tokenizer": engine.tokenizer.name,
            "max_model_tokens": engine.config.max_model_tokens,
            "role": engine.config.role,
            "deterministic": engine.is_deterministic,
        },
    }


async def _healthz(request: web.Request) -> web.Response:
    healthy = request.app[_ENGINE].is_healthy
    return web.Response(text="ok\n" if healthy else "stopped\n", status=200 if healthy else 503)


async def _metrics(request: web.Request) -> web.Response:
    return web.Response(text=_exposition(request.app[_ENGINE]))


async def _completions(request: web.Request) -> web.StreamResponse:
    return await _answer(request, is_chat=False)


async def _chat_completions(request: web.Request) -> web.StreamResponse:
    return await _answer(request, is_chat=True)


@dataclass(slots=True)
class _Choice:
    """One prompt's answer as it grows."""

    index: int
    num_prompt: int
    text: AnswerText
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish: str | None = None
    reused: Reused = field(default_factory=Reused)

    def take(self, output: Output) -> tuple[str, list[int]]:
        """Text and token ids that this output adds."""
        new_ids = [output.token_id] if output.token_id is not None else []
        piece = self.text.push(output.token_id, is_last=output.finish is not None)
        self.token_ids += new_ids
        self.pieces.append(piece)
        self.reused = output.reused
        if self.text.is_stopped:
            self.finish = Finish.STOP.value
        elif output.finish is not None:
            self.finish = output.finish.value
        return piece, new_ids


async def _answer(request: web.Request, *, is_chat: bool) -> web.StreamResponse:
    engine = request.app[_ENGINE]
    call = await _parse(await request.read(), engine, is_chat=is_chat)
    if not engine.is_healthy:
        raise ClosedError("the engine is not running")
    meant, own = request.headers.get(SESSION_HEADER, ""), _session(engine)
    if meant and own and meant != own:  # the node would refuse its handle
        error = error_body("the handle was made for another session of this engine", status=421)
        return web.json_response({**error, "data": [_model(engine)]}, status=421)
    for prompt in call.prompts:  # before the status line is sent
        engine.check_size(len(prompt), call.params.max_tokens)
    answer = _Answer(engine, call, _request_id(request))
    return await answer.stream(request) if call.stream else await answer.whole()


async def _parse(body: bytes, engine: Engine, *, is_chat: bool) -> Call:
    read = partial(
        parse,
        body,
        model=engine.config.model_name,
        vocab_size=engine.model.shape.vocab_size,
        tokenizer=engine.tokenizer,
        is_chat=is_chat,
    )
    # Megabytes of text take a tokenizer seconds, in which the loop must answer others.
    return await asyncio.to_thread(read) if len(body) > INLINE_BYTES else read()


def _request_id(request: web.Request) -> str:
    given = request.headers.get(REQUEST_ID_HEADER, "")[:MAX_REQUEST_ID_CHARS]
    # What is no text could be sent to no node, and would stand in the way of what is sent with it.
    return given if given.isascii() and given.isprintable() and given else secrets.token_hex(16)


class _Answer:
    """The answer to one HTTP request. On cancellation (the client left) every prompt is aborted."""

    def __init__(self, engine: Engine, call: Call, request_id: str) -> None:
        self._engine = engine
        self._call = call
        self._request_id = request_id
        self._created = int(time.time())
        self._choices = [
            _Choice(index, len(prompt), AnswerText(call.stop, engine.tokenizer.decoder(prompt)))
            for index, prompt in enumerate(call.prompts)
        ]

    async def whole(self) -> web.Response:
        async with asyncio.TaskGroup() as group:
            for choice in self._choices:
                group.create_task(self._run(choice))
        if any(choice.finish in _FAILURES for choice in self._choices):
            return _error("the engine stopped before the answer was complete", 503)
        body = self._envelope("chat.completion" if self._call.is_chat else "text_completion")
        body["choices"] = [self._choice(choice) for choice in self._choices]
        body["usage"] = self._usage()
        return web.json_response(body)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        is_gone = False
        try:
            async with asyncio.TaskGroup() as group:
                for choice in self._choices:
                    group.create_task(self._run(choice, response))
        except* ConnectionError:
            is_gone = True  # the client left: nobody reads the rest
        if is_gone:
            return response
        if self._call.include_usage:
            await self._send(response, choices=[], usage=self._usage())
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _run(self, choice: _Choice, response: web.StreamResponse | None = None) -> None:
        async with aclosing(_outputs(self._engine, self._to_request(choice))) as outputs:
            async for output in outputs:
                piece, token_ids = choice.take(output)
                if response is not None:
                    part = self._delta(choice, piece, token_ids)
                    await self._send(response, choices=[part])
                if choice.finish is not None:
                    return

    def _to_request(self, choice: _Choice) -> GenerationRequest:
        call, is_first = self._call, choice.index == 0
        # A handle is made for one request and one prompt; others beside it go without reuse.
        handle = call.handle if is_first or not call.handle else None
        request_id = self._request_id if is_first else f"{self._request_id}-{choice.index}"
        prompt = call.prompts[choice.index]
        return GenerationRequest(request_id, prompt, call.params, handle, call.salt)

    def _envelope(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self._call.is_chat else "cmpl"
        return {
            "id": f"{prefix}-{self._request_id}",
            "object": kind,
            "created": self._created,
            "model": self._engine.config.model_name,
        }

    def _choice(self, choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.pieces)
        body: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish}
        if self._call.is_chat:
            body["message"] = {"role": "assistant", "content": text}
        else:
            body |= {"text": text, "logprobs": None}
        if self._call.return_token_ids:
            body["token_ids"] = choice.token_ids
        return body

    def _delta(self, choice: _Choice, piece: str, token_ids: list[int]) -> dict[str, Any]:
        body: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish}
        if self._call.is_chat:
            role = {"role": "assistant"} if len(choice.pieces) == 1 else {}
            body["delta"] = role | {"content": piece}
        else:
            body |= {"text": piece, "logprobs": None}
        if self._call.return_token_ids:
            body["token_ids"] = token_ids
        return body

    async def _send(self, response: web.StreamResponse, **fields: Any) -> None:
        kind = "chat.completion.chunk" if self._call.is_chat else "text_completion"
        event = json.dumps(self._envelope(kind) | fields)
        await response.write(f"data: {event}\n\n".encode())

    def _usage(self) -> dict[str, Any]:
        reused = [choice.reused for choice in self._choices]
        return usage(
            sum(choice.num_prompt for choice in self._choices),
            sum(len(choice.token_ids) for choice in self._choices),
            Reused(
                hbm=sum(r.hbm for r in reused),
                host=sum(r.host for r in reused),
                ssd=sum(r.ssd for r in reused),
                peer=sum(r.peer for r in reused),
                miss=next(
                    (r.miss for r in reused if r.miss is not MissReason.NONE), MissReason.NONE
                ),
            ),
        )


_FAILURES = (Finish.ABORT.value, Finish.ERROR.value)


async def _outputs(engine: Engine, request: GenerationRequest) -> AsyncGenerator[Output, None]:
    """Outputs of one request. Left early, it aborts the request."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Output] = asyncio.Queue()  # at most max_tokens + 1 entries

    def emit(output: Output) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(queue.put_nowait, output)

    name = engine.submit(request, emit)
    try:
        while True:
            output = await queue.get()
            yield output
            if output.finish is not None:
                return
    finally:
        engine.abort(name)


def _exposition(engine: Engine) -> str:
    """The Prometheus text format, written out: an engine has no room for the library's registry."""
    s = engine.statistics()
    lines = [
        "# TYPE kvfabric_engine_prompt_tokens_total counter",
        f"kvfabric_engine_prompt_tokens_total {s.prompt_tokens}",
        "# TYPE kvfabric_engine_computed_prompt_tokens_total counter",
        f"kvfabric_engine_computed_prompt_tokens_total {s.computed_prompt_tokens}",
        "# TYPE kvfabric_engine_answer_tokens_total counter",
        f"kvfabric_engine_answer_tokens_total {s.answer_tokens}",
        "# TYPE kvfabric_engine_reused_tokens_total counter",
        f'kvfabric_engine_reused_tokens_total{{tier="hbm"}} {s.reused.hbm}',
        f'kvfabric_engine_reused_tokens_total{{tier="host"}} {s.reused.host}',
        f'kvfabric_engine_reused_tokens_total{{tier="ssd"}} {s.reused.ssd}',
        f'kvfabric_engine_reused_tokens_total{{tier="peer"}} {s.reused.peer}',
        "# TYPE kvfabric_engine_requests gauge",
        f'kvfabric_engine_requests{{result="running"}} {s.scheduler.num_running}',
        f'kvfabric_engine_requests{{result="fetching"}} {s.scheduler.num_fetching}',
        f'kvfabric_engine_requests{{result="waiting"}} {s.scheduler.num_waiting}',
    ]
    if engine.connector is not None:
        c = engine.connector.statistics()
        lines += [
            "# TYPE kvfabric_engine_saved_bytes_total counter",
            f"kvfabric_engine_saved_bytes_total {c.saved_bytes}",
            "# TYPE kvfabric_engine_loaded_bytes_total counter",
            f"kvfabric_engine_loaded_bytes_total {c.loaded_bytes}",
            "# TYPE kvfabric_engine_borrowed_blocks_total counter",
            f'kvfabric_engine_borrowed_blocks_total{{result="loaded"}} {c.borrowed_blocks}',
            f'kvfabric_engine_borrowed_blocks_total{{result="stale"}} {c.stale_blocks}',
            "# TYPE kvfabric_engine_misses_total counter",
            *(
                f'kvfabric_engine_misses_total{{reason="{reason.value}"}} {count}'
                for reason, count in sorted(c.misses.items())
            ),
        ]
    return "\n".join(lines) + "\n"
