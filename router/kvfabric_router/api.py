"""The OpenAI HTTP API as data: what a request asks, what an error looks like. Pure.

Reads bodies and answers, decides nothing about routing. What a client may not set is dropped here: the
fields by which router, engine and node talk about the cache, whoever sent them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from kvfabric.errors import KVFabricError
from kvfabric.types import MissReason
from kvfabric_router.rates import Work

COMPLETIONS, CHAT_COMPLETIONS = "/v1/completions", "/v1/chat/completions"
MAX_BODY_BYTES = 32 << 20
DEFAULT_MAX_TOKENS = 16
"""OpenAI's own default for completions; only used to tell a request that cannot fit."""

_MAX_TOKENS = ("max_completion_tokens", "max_tokens")
_RESERVED = frozenset(
    {
        "cache_salt",
        "data_parallel_rank",
        "extra_key",
        "kv_transfer_params",
        "request_id",
        "rid",
        "vllm_xargs",
    }
)
_RESERVED_PREFIXES = ("bootstrap_", "ec_transfer", "kv_", "kvfabric")
# Where one of these says anything unusual, the prompt's tokens are not those of its text alone.
_OPAQUE = {
    COMPLETIONS: frozenset(
        {"add_special_tokens", "prompt_embeds", "suffix", "truncate_prompt_tokens"}
    ),
    CHAT_COMPLETIONS: frozenset(
        {
            "add_generation_prompt",
            "add_special_tokens",
            "chat_template",
            "chat_template_kwargs",
            "continue_final_message",
            "documents",
            "functions",
            "mm_processor_kwargs",
            "reasoning_effort",
            "tools",
            "truncate_prompt_tokens",
        }
    ),
}
_USUALLY_TRUE = {(COMPLETIONS, "add_special_tokens"), (CHAT_COMPLETIONS, "add_generation_prompt")}
_Fields = Mapping[str, msgspec.Raw]
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_RETRY_AFTER = (429, 503)


class ApiError(KVFabricError):
    """An answer of the router's own, in the shape that OpenAI clients read."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int = 1,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        if self.status in _RETRY_AFTER:
            return {"Retry-After": str(self.retry_after_s)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}

    def body(self) -> bytes:
        return error_body(self.status, str(self), code=self.reason, param=self.param)


def error_body(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> bytes:
    """`{"error": {...}}` as JSON."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return msgspec.json.encode(
        {"error": {"message": message, "type": kind, "param": param, "code": code}}
    )


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """One request for an answer of a model.

    `text`, `token_ids` or (of a chat) `messages` is its prompt; all are None if only the engine can know its
    tokens: several prompts, images, tools, a template in the request.
    `raw` is the client's body, `fields` what it holds but for what is not a client's to set, each value as
    the client wrote it.
    """

    model: str
    is_chat: bool
    text: str | None
    token_ids: list[int] | None
    messages: tuple[Mapping[str, str], ...] | None
    max_tokens: int
    stream: bool
    stream_options: Mapping[str, Any]
    raw: bytes
    fields: _Fields
    is_whole: bool

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options.get("include_usage") is True

    @property
    def path(self) -> str:
        return CHAT_COMPLETIONS if self.is_chat else COMPLETIONS

    @property
    def wants_one_answer(self) -> bool:
        return all(_value(self.fields, name) in (None, 1) for name in ("n", "best_of"))

    def one_token(self) -> dict[str, Any]:
        """In place of the client's fields: the prompt computed, and a stream of one token to tell of it."""
        asked: dict[str, Any] = {name: 1 for name in _MAX_TOKENS if name in self.fields}
        if "min_tokens" in self.fields:
            asked["min_tokens"] = 0
        return {
            "max_tokens": 1,
            **asked,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def with_fields(self, fields: Mapping[str, Any]) -> bytes:
        """The body to send on: `fields` in place of the client's or beside them.

        Where nothing is to be changed these are the client's own bytes. Else names are written anew, once
        each (of one that was repeated the last value counts), and values stay as they are.
        """
        if self.is_whole and not fields:
            return self.raw
        return msgspec.json.encode({**self.fields, **fields})


def parse(path: str, raw: bytes) -> ModelRequest:
    """The request in `raw` to COMPLETIONS or CHAT_COMPLETIONS. Raises ApiError 400."""
    given = _decode(raw)
    model = _value(given, "model")
    if not isinstance(model, str) or not model:
        raise ApiError(400, "`model` must be the name of a model", param="model")
    stream = _value(given, "stream") or False
    if not isinstance(stream, bool):
        raise ApiError(400, "`stream` must be true or false", param="stream")
    options = _value(given, "stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(400, "`stream_options` must be an object", param="stream_options")
    is_chat = path == CHAT_COMPLETIONS
    text = token_ids = messages = None
    if is_chat:
        messages = _chat(given)
    else:
        text, token_ids = _prompt(given)
    if _is_opaque(given, path):
        text = token_ids = messages = None
    fields = {name: value for name, value in given.items() if not is_reserved(name)}
    return ModelRequest(
        model=model,
        is_chat=is_chat,
        text=text,
        token_ids=token_ids,
        messages=messages,
        max_tokens=_max_tokens(given, path),
        stream=stream,
        stream_options=options,
        raw=raw,
        fields=fields,
        is_whole=len(fields) == len(given),
    )


def _is_opaque(given: _Fields, path: str) -> bool:
    for name in _OPAQUE[path] & given.keys():
        value = _value(given, name)
        is_usual = value is True if (path, name) in _USUALLY_TRUE else not value
        if value is not None and not is_usual:
            return True
    return False


def is_reserved(name: str) -> bool:
    """Whether a body field is not a client's to set."""
    return name in _RESERVED or name.startswith(_RESERVED_PREFIXES)


def _decode(raw: bytes) -> _Fields:
    try:
        str(raw, "utf-8")  # values that are not looked at must be text too
        return _FIELDS.decode(raw)
    except msgspec.ValidationError as exc:
        raise ApiError(400, "the body must be a JSON object", code="invalid_json") from exc
    except (ValueError, RecursionError) as exc:
        raise ApiError(400, f"the body is not JSON: {exc}", code="invalid_json") from exc


def _value(given: _Fields, name: str) -> Any:
    """Decoded; None if absent."""
    try:
        return msgspec.json.decode(given[name]) if name in given else None
    except (ValueError, RecursionError) as exc:
        raise ApiError(400, f"`{name}` cannot be read: {exc}", param=name) from exc


def _integer(value: object) -> object:
    """JSON has one kind of number: 5.0 is an integer too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _prompt(given: _Fields) -> tuple[str | None, list[int] | None]:
    prompt = _value(given, "prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list | str):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return prompt, None
    if not isinstance(prompt, list) or not prompt:
        raise ApiError(400, "`prompt` must be text or token ids, not empty", param="prompt")
    if all(isinstance(one, list | str) and one for one in prompt):
        return None, None
    if not all(type(one) is int for one in prompt):
        prompt = [_integer(one) for one in prompt]
    try:
        return None, msgspec.convert(prompt, list[int])
    except msgspec.ValidationError as exc:
        raise ApiError(
            400, f"`prompt` must be text, token ids or a list of either: {exc}", param="prompt"
        ) from exc


def _chat(given: _Fields) -> tuple[Mapping[str, str], ...] | None:
    messages = _value(given, "messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "`messages` must be a list of messages, not empty", param="messages")
    if any(not isinstance(m, dict) or not isinstance(m.get("role"), str) for m in messages):
        raise ApiError(400, "each of `messages` needs a `role`", param="messages")
    if all(map(_is_plain, messages)):
        return tuple({"role": m["role"], "content": m["content"]} for m in messages)
    return None


def _is_plain(message: Mapping[str, Any]) -> bool:
    """Text and nothing else: no parts, tool calls or names, of which each template makes what it likes."""
    others = (v for name, v in message.items() if name not in ("role", "content"))
    return isinstance(message.get("content"), str) and not any(others)


def _max_tokens(given: _Fields, path: str) -> int:
    for name in _MAX_TOKENS:
        value = _integer(_value(given, name))
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ApiError(400, f"`{name}` must be a number of tokens", param=name)
        return value
    return DEFAULT_MAX_TOKENS if path == COMPLETIONS else 1


@dataclass(frozen=True, slots=True)
class Usage:
    """What an engine says it did, in tokens. Tiers are 0 where the engine does not tell them apart."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    hbm_tokens: int
    host_tokens: int
    ssd_tokens: int
    miss: MissReason = MissReason.NONE
    peer_tokens: int = 0

    @property
    def work(self) -> Work:
        """What the prompt asked of the engine; reuse of no known tier counts as HBM's."""
        fetched = self.host_tokens + self.ssd_tokens + self.peer_tokens
        return Work(
            computed=max(self.prompt_tokens - self.cached_tokens, 0),
            hbm=max(self.cached_tokens - fetched, 0),
            host=self.host_tokens,
            ssd=self.ssd_tokens,
            peer=self.peer_tokens,
        )


def parse_usage(answer: object) -> Usage | None:
    """`usage` of a decoded answer or stream event; None if it has none that can be read."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, dict) else {}
    tiers = details.get("kvfabric")
    tiers = tiers if isinstance(tiers, dict) else {}
    return Usage(
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        cached_tokens=_count(details, "cached_tokens"),
        hbm_tokens=_count(tiers, "hbm_tokens"),
        host_tokens=_count(tiers, "host_tokens"),
        ssd_tokens=_count(tiers, "ssd_tokens"),
        miss=_reason(tiers.get("miss_reason")),
        peer_tokens=_count(tiers, "peer_tokens"),
    )


def _reason(value: object) -> MissReason:
    try:
        return MissReason(str(value))
    except ValueError:  # an engine of another version, or none of ours
        return MissReason.NONE


def _count(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    return value if isinstance(value, int) and value >= 0 else 0


def decode_answer(raw: bytes) -> object:
    """An engine's JSON, or None if it is not JSON."""
    try:
        return msgspec.json.decode(raw)
    except (ValueError, RecursionError):
        return None


class EventSplitter:
    """Cuts a server-sent event stream into whole events, so that an error event can follow any of them.

    `feed` returns the bytes of the events that are complete now; `rest` what is not. An event larger
    than `MAX_EVENT_BYTES` is handed on in pieces: memory is bounded, not the engine's answer.
    """

    MAX_EVENT_BYTES = 1 << 20

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, chunk: bytes) -> bytes:
        if not self.rest and chunk.endswith(b"\n\n"):
            return chunk
        data = self.rest + chunk
        marks = (b"\n\n", b"\r\n\r\n")
        end = max((at + len(m) for m in marks if (at := data.rfind(m)) >= 0), default=0)
        if len(data) - end > self.MAX_EVENT_BYTES:
            end = len(data)
        self.rest = data[end:]
        return data[:end]


def events_of(data: bytes) -> list[bytes]:
    """The `data:` payloads in a run of whole events."""
    return [
        line[5:].strip()
        for line in data.replace(b"\r\n", b"\n").split(b"\n")
        if line[:5] == b"data:"
    ]
