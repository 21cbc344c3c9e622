"""The router's own API as an OpenAPI 3.1 document, served at `/openapi.json`. Pure data.

It says what the router itself checks and answers. Of a request's other fields the engine decides: they pass
as they are, so nothing is said of them here, and an engine's own errors come under their own status.
"""

from __future__ import annotations

from typing import Any

from kvfabric import __version__
from kvfabric_router.api import CHAT_COMPLETIONS, COMPLETIONS, MAX_BODY_BYTES

TTFT_OBJECTIVE = "x-kvfabric-ttft-objective-ms"
_Schema = dict[str, Any]

_TOKENS: _Schema = {"type": ["integer", "null"], "minimum": 0}
_TEXT: _Schema = {"type": "string", "minLength": 1}
_TOKEN_IDS: _Schema = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1},
}
_COMMON: _Schema = {
    "model": {**_TEXT, "description": "A model of `/v1/models`."},
    "max_tokens": _TOKENS,
    "max_completion_tokens": _TOKENS,
    "stream": {"type": ["boolean", "null"]},
    "stream_options": {
        "type": ["object", "null"],
        "properties": {"include_usage": {"type": ["boolean", "null"]}},
    },
}
_COMPLETION: _Schema = {
    "type": "object",
    "required": ["model", "prompt"],
    "properties": {
        **_COMMON,
        "prompt": {
            "description": "Text, token ids, or a list of either. Several prompts reuse nothing.",
            "anyOf": [
                _TEXT,
                _TOKEN_IDS,
                {"type": "array", "minItems": 1, "items": _TEXT},
                {"type": "array", "minItems": 1, "items": _TOKEN_IDS},
            ],
        },
    },
}
_CHAT: _Schema = {
    "type": "object",
    "required": ["model", "messages"],
    "properties": {
        **_COMMON,
        "messages": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role"],
                "properties": {"role": {"type": "string"}},
            },
        },
    },
}
_ERROR: _Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": ["string", "null"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_MODELS: _Schema = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {
        "object": {"const": "list"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "object", "created", "owned_by"],
                "properties": {"id": {"type": "string"}, "object": {"const": "model"}},
            },
        },
    },
}
_FINDINGS: _Schema = {
    "type": "object",
    "required": ["findings"],
    "properties": {
        "findings": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["subject", "result", "text", "advice"],
                "properties": {"result": {"enum": ["ok", "warn", "fail"]}},
            },
        }
    },
}
_OBJECT: _Schema = {"type": "object"}

_ERRORS = {
    400: "What was sent is no such request.",
    401: "The API key is missing or wrong.",
    404: "There is no such model, or no such request.",
    405: "The path takes another method.",
    413: f"The body is larger than {MAX_BODY_BYTES} bytes.",
    429: "Too many requests; `Retry-After` says when to come again.",
    500: "The router, or the engine, failed on this request.",
    503: "Nobody can answer now; `Retry-After` says when to come again.",
    504: "No engine answered in time.",
}


def document() -> _Schema:
    """The whole document, to be encoded as JSON."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kvfabric router",
            "version": __version__,
            "description": "The OpenAI API in front of engines that share what they computed.",
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _ERROR},
        },
        "paths": {
            COMPLETIONS: {"post": _completion("createCompletion", _COMPLETION)},
            CHAT_COMPLETIONS: {"post": _completion("createChatCompletion", _CHAT)},
            "/v1/models": {"get": _operation("listModels", _MODELS, errors=(401, 503))},
            "/v1/explain/{request_id}": {"get": _explain()},
            "/doctor": {"get": _open("diagnose", _json(_FINDINGS))},
            "/healthz": {"get": _open("isAlive", _json(_OBJECT))},
            "/readyz": {"get": _open("isReady", _json(_OBJECT), not_ready=_json(_OBJECT))},
            "/metrics": {"get": _open("readMetrics", {"text/plain": {}})},
            "/openapi.json": {"get": _open("describe", _json(_OBJECT))},
        },
    }


def _json(schema: _Schema) -> _Schema:
    return {"application/json": {"schema": schema}}


def _errors(*statuses: int) -> _Schema:
    content = _json({"$ref": "#/components/schemas/Error"})
    return {str(s): {"description": _ERRORS[s], "content": content} for s in statuses}


def _operation(name: str, answer: _Schema, *, errors: tuple[int, ...]) -> _Schema:
    return {
        "operationId": name,
        "security": [{"key": []}],
        "responses": {
            "200": {"description": "The answer.", "content": _json(answer)},
            **_errors(*errors),
        },
    }


def _explain() -> _Schema:
    operation = _operation("explain", _OBJECT, errors=(400, 401, 404, 503))
    request_id = {
        "name": "request_id",
        "in": "path",
        "required": True,
        "description": "`X-Request-Id` of an answer.",
        "schema": {"type": "string"},
    }
    return {**operation, "parameters": [request_id]}


def _completion(name: str, schema: _Schema) -> _Schema:
    operation = _operation(name, _OBJECT, errors=tuple(one for one in _ERRORS if one != 405))
    operation["responses"]["200"]["content"]["text/event-stream"] = {}
    # What only an engine says: 422 and the like.
    operation["responses"]["default"] = {"description": "The engine's own answer."}
    objective = {
        "name": TTFT_OBJECTIVE,
        "in": "header",
        "description": "Milliseconds: refuse the request if its first token comes later.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    }
    cache = {
        "name": "Cache-Control",
        "in": "header",
        "description": "`no-store` leaves nothing in the cache, `no-read` finds nothing there.",
        "schema": {"enum": ["no-store", "no-read", "no-store, no-read"]},
    }
    body = {"required": True, "content": _json(schema)}
    return {**operation, "parameters": [objective, cache], "requestBody": body}


def _open(name: str, content: _Schema, *, not_ready: _Schema | None = None) -> _Schema:
    """For operators: no API key."""
    responses: _Schema = {"200": {"description": "The answer.", "content": content}}
    if not_ready is not None:
        responses["503"] = {"description": "Not yet.", "content": not_ready}
    return {"operationId": name, "security": [], "responses": responses}
