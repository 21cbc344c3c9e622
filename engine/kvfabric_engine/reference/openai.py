"""The OpenAI API as data: bodies in, requests and errors out. Pure; `server.py` does the I/O.

Understood: model, prompt (string, token ids, or a list of either), messages, max_tokens (also
max_completion_tokens), temperature, top_p, seed, stream, stream_options.include_usage, stop, n = 1. Beyond
OpenAI, as in vLLM: ignore_eos, return_token_ids, cache_salt, kv_transfer_params. Others are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvfabric.errors import KVFabricError
from kvfabric.handle import PARAMS_FIELD
from kvfabric.tokenizer import ChatRefused
from kvfabric_engine.reference.sampler import SamplingParams
from kvfabric_engine.reference.sequence import Reused
from kvfabric_engine.reference.tokens import Decoder, Message, Tokenizer

MAX_PROMPTS = 64
MAX_STOPS = 16
"""Each is looked for at every token."""
DEFAULT_MAX_TOKENS = 16


class BadRequest(KVFabricError):
    """What a client did wrong, with the HTTP status and the field (`param`) it is about."""

    code = "invalid_request"

    def __init__(self, message: str, *, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request: some prompts, one way to continue them all."""

    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    return_token_ids: bool
    handle: str
    salt: str
    is_chat: bool


def error_body(message: str, *, status: int, param: str | None = None) -> dict[str, Any]:
    """The OpenAI error shape."""
    kind = "invalid_request_error" if status < 500 else "internal_error"
    code = {404: "model_not_found", 503: "unavailable"}.get(status)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def parse(body: bytes, *, model: str, vocab_size: int, tokenizer: Tokenizer, is_chat: bool) -> Call:
    """Raises BadRequest."""
    fields = _Fields(body)
    asked = fields.get("model", str, model)
    if asked != model:
        raise BadRequest(f"the model {asked!r} does not exist", status=404, param="model")
    if fields.get("n", int, 1) != 1:
        raise BadRequest("n must be 1", param="n")
    if is_chat:
        prompts: tuple[tuple[int, ...], ...] = (_chat_prompt(fields, tokenizer),)
    else:
        prompts = _prompts(fields, vocab_size, tokenizer)
    options = fields.get("stream_options", dict, {})
    transfer = fields.get("kv_transfer_params", dict, {})
    handle = transfer.get(PARAMS_FIELD, "")
    if not isinstance(handle, str) or not handle.isascii():
        raise BadRequest(f"kv_transfer_params.{PARAMS_FIELD} must be a string of ASCII")
    salt = fields.get("cache_salt", str, "")
    if not salt.isascii():
        raise BadRequest("cache_salt must be ASCII", param="cache_salt")
    return Call(
        prompts=prompts,
        params=_sampling(fields),
        stop=_stop(fields),
        stream=fields.get("stream", bool, False),
        include_usage=bool(options.get("include_usage")),
        return_token_ids=fields.get("return_token_ids", bool, False),
        handle=handle,
        salt=salt,
        is_chat=is_chat,
    )


class _Fields:
    """A JSON object whose fields are checked as they are taken. Null counts as absent."""

    def __init__(self, body: bytes) -> None:
        try:
            document = json.loads(body)
        except (ValueError, RecursionError) as exc:
            raise BadRequest(f"the body is not JSON: {exc}") from exc
        if not isinstance(document, dict):
            raise BadRequest("the body must be a JSON object")
        self._fields: dict[str, Any] = document

    def get(self, name: str, kind: type, default: Any) -> Any:
        value = self._fields.get(name)
        if value is None:
            return default
        if kind is float and type(value) is int:
            value = _to_float(value, name)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise BadRequest(f"{name} must be {kind.__name__}", param=name)
        return value

    def raw(self, name: str) -> Any:
        return self._fields.get(name)


def _to_float(value: int, name: str) -> float:
    try:
        return float(value)
    except OverflowError as exc:
        raise BadRequest(f"{name} is too large a number", param=name) from exc


def _sampling(fields: _Fields) -> SamplingParams:
    max_tokens = fields.get("max_completion_tokens", int, None)
    if max_tokens is None:
        max_tokens = fields.get("max_tokens", int, DEFAULT_MAX_TOKENS)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=fields.get("temperature", float, 1.0),
        top_p=fields.get("top_p", float, 1.0),
        seed=fields.get("seed", int, None),
        ignore_eos=fields.get("ignore_eos", bool, False),
    )
    if params.max_tokens < 1:
        raise BadRequest("max_tokens must be at least 1", param="max_tokens")
    if not 0 <= params.temperature <= 100:
        raise BadRequest("temperature must be between 0 and 100", param="temperature")
    if not 0 < params.top_p <= 1:
        raise BadRequest("top_p must be more than 0 and at most 1", param="top_p")
    if params.seed is not None and not -(2**63) <= params.seed < 2**63:
        raise BadRequest("seed must be a 64-bit integer", param="seed")
    return params


def _stop(fields: _Fields) -> tuple[str, ...]:
    stop = fields.raw("stop")
    if stop is None:
        return ()
    if isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop, list) or not all(isinstance(item, str) and item for item in stop):
        raise BadRequest("stop must be a string or a list of strings", param="stop")
    if len(stop) > MAX_STOPS:
        raise BadRequest(f"stop has at most {MAX_STOPS} strings", param="stop")
    return tuple(stop)


def _prompts(fields: _Fields, vocab_size: int, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    prompt = fields.raw("prompt")
    if isinstance(prompt, str) or _is_ids(prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not 1 <= len(prompt) <= MAX_PROMPTS:
        raise BadRequest("prompt must be a string, token ids, or a list of them", param="prompt")
    return tuple(_tokens(item, vocab_size, tokenizer) for item in prompt)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _tokens(item: object, vocab_size: int, tokenizer: Tokenizer) -> tuple[int, ...]:
    if isinstance(item, str):
        with _unicode():
            item = tokenizer.encode(item)
    if not _is_ids(item):
        raise BadRequest("a prompt must have at least one token", param="prompt")
    assert isinstance(item, list)
    if not 0 <= min(item) <= max(item) < vocab_size:
        raise BadRequest(f"token ids must be between 0 and {vocab_size - 1}", param="prompt")
    return tuple(item)


@contextmanager
def _unicode() -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError as exc:
        raise BadRequest(f"the prompt is not valid Unicode: {exc.reason}", param="prompt") from exc


def _chat_prompt(fields: _Fields, tokenizer: Tokenizer) -> tuple[int, ...]:
    messages = fields.raw("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of messages", param="messages")
    try:
        with _unicode():
            prompt = tokenizer.encode_chat([_message(item) for item in messages])
    except ChatRefused as exc:
        raise BadRequest(str(exc), param="messages") from exc
    if not prompt:
        raise BadRequest("the chat template makes an empty prompt of it", param="messages")
    return tuple(prompt)


def _message(item: object) -> Message:
    if not isinstance(item, Mapping) or not isinstance(item.get("role"), str):
        raise BadRequest("a message must have a role and content", param="messages")
    content = item.get("content")
    if isinstance(content, list):  # parts of text
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str):
        raise BadRequest("the content of a message must be text", param="messages")
    return {"role": item["role"], "content": content}


def usage(num_prompt: int, num_answered: int, reused: Reused) -> dict[str, Any]:
    """`cached_tokens`: prompt tokens whose KV was not computed; below it, by where they came from."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answered,
        "total_tokens": num_prompt + num_answered,
        "prompt_tokens_details": {
            "cached_tokens": reused.total,
            "kvfabric": {
                "hbm_tokens": reused.hbm,
                "host_tokens": reused.host,
                "ssd_tokens": reused.ssd,
                "peer_tokens": reused.peer,
                "miss_reason": reused.miss.value,
            },
        },
    }


class AnswerText:
    """Text of a growing answer: whole characters, cut off before the first stop string.

    What might become a stop string is held back until it does or does not.
    """

    def __init__(self, stop: tuple[str, ...], decoder: Decoder) -> None:
        self._stop = stop
        self._decoder = decoder
        self._held = ""
        self.is_stopped = False

    def push(self, token_id: int | None, *, is_last: bool) -> str:
        """Text that became final with this token."""
        self._held += self._decoder.push(token_id, is_last=is_last)
        cut = min((at for s in self._stop if (at := self._held.find(s)) >= 0), default=-1)
        if cut >= 0:
            self.is_stopped = True
            return self._take(cut)
        return self._take(len(self._held) if is_last else len(self._held) - self._undecided())

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        lengths = (
            size
            for stop in self._stop
            for size in range(min(len(stop) - 1, len(self._held)), 0, -1)
            if stop.startswith(self._held[-size:])
        )
        return max(lengths, default=0)
