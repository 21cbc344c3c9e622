"""The official `openai` client through the router: what it asks reaches the engine, the answer comes back.

Once with a real engine behind a real node, for what that engine does; and with a stand-in that answers as
vLLM does, for what passes through.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
from kvfabric_router.api import MAX_BODY_BYTES, ModelRequest
from openai import AsyncOpenAI

from tests.router.standin import (
    StandInEngine,
    client_of,
    config_for,
    engines,
    keyring_with,
    registry_state,
    tenant,
)
from tests.router.test_router_fleet import deployment

KEY = "kvf-" + "k" * 43
MODEL = "reference"
SAY: list[Any] = [{"role": "user", "content": "Say something."}]


def official(url: str, key: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


@contextlib.asynccontextmanager
async def served(
    directory: Path, *, fabric: bool = True
) -> AsyncIterator[tuple[AsyncOpenAI, StandInEngine]]:
    keyring_with(directory, ["t-1"])
    state = registry_state([tenant("t-1", KEY)])
    async with engines() as (engine,):
        engine.is_fabric = fabric
        config = config_for(directory, [engine.url], fabric=fabric)
        async with client_of(config, state) as client, official(client.router.url, KEY) as asking:
            yield asking, engine


# ---------------------------------------------------------------------- a real engine


@pytest.mark.slow
@pytest.mark.fleet
async def test_with_a_real_engine(tmp_path: Path) -> None:
    """One story, because starting processes takes long."""
    async with deployment(tmp_path) as fleet, official(fleet.url, fleet.keys["one"]) as asking:
        assert [model.id async for model in asking.models.list()] == [MODEL]

        # Text and its token ids are the same prompt; a list of prompts has an answer for each.
        same: dict[str, Any] = {"model": MODEL, "max_tokens": 6, "temperature": 0}
        text = await asking.completions.create(prompt="What is it?", **same)
        ids = [3 + byte for byte in b"What is it?"]
        assert text.usage is not None
        assert text.usage.prompt_tokens == len(ids)
        by_ids = await asking.completions.create(prompt=ids, **same)
        assert by_ids.choices[0].text == text.choices[0].text
        for prompts in (["What is it?", "Who is it?"], [ids, ids]):
            several = await asking.completions.create(prompt=prompts, **same)
            assert [choice.index for choice in several.choices] == [0, 1]
            assert several.choices[0].text == text.choices[0].text

        # A chat, whole and as a stream, with usage only for who asks for it.
        whole = await asking.chat.completions.create(messages=SAY, **same)
        for wanted in (True, False):
            options: Any = {"stream_options": {"include_usage": True}} if wanted else {}
            stream = await asking.chat.completions.create(
                messages=SAY, stream=True, **same, **options
            )
            chunks = [chunk async for chunk in stream]
            said = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
            assert said == whole.choices[0].message.content
            usages = [one.usage for one in chunks if one.usage is not None]
            assert [usage.completion_tokens for usage in usages] == ([6] if wanted else [])

        # The engine's own error, not the router's.
        with pytest.raises(openai.BadRequestError) as caught:
            await asking.completions.create(prompt="x", **{**same, "temperature": 1000})
        assert caught.value.param == "temperature"


# ---------------------------------------------------------------------- what passes through


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
]
TOOL_CALL = {
    "id": "call-1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"where": "here"}'},
}
LOGPROBS = {"content": [{"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": []}]}
CHAT: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": MODEL,
}
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


async def test_tools_logprobs_and_several_answers(tmp_path: Path) -> None:
    answers = [
        {
            "index": index,
            "finish_reason": "tool_calls",
            "logprobs": LOGPROBS,
            "message": {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
        }
        for index in range(3)
    ]
    async with served(tmp_path) as (asking, engine):
        engine.answer = json.dumps({**CHAT, "choices": answers, "usage": USAGE}).encode()
        got = await asking.chat.completions.create(
            model=MODEL,
            messages=SAY,
            tools=TOOLS,
            tool_choice="auto",
            logprobs=True,
            top_logprobs=2,
            n=3,
        )
        asked = engine.requests[0]
        assert (asked["tools"], asked["tool_choice"]) == (TOOLS, "auto")
        assert (asked["logprobs"], asked["top_logprobs"], asked["n"]) == (True, 2, 3)
        assert [choice.index for choice in got.choices] == [0, 1, 2]
        for choice in got.choices:
            assert choice.message.tool_calls is not None
            assert choice.message.tool_calls[0].model_dump() == TOOL_CALL
            assert choice.logprobs is not None
            assert choice.logprobs.content is not None
            assert choice.logprobs.content[0].logprob == -0.1


@pytest.mark.parametrize("wanted", [True, False])
async def test_a_stream_of_tool_calls_of_several_answers(tmp_path: Path, wanted: bool) -> None:
    pieces = [
        {"role": "assistant", "tool_calls": [{**TOOL_CALL, "index": 0}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "!"}}]},
    ]
    events = [
        {**CHAT, "choices": [{"index": index, "delta": piece, "finish_reason": None}]}
        for piece in pieces
        for index in range(2)
    ]
    events.append({**CHAT, "choices": [], "usage": USAGE})
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
    options: Any = {"stream_options": {"include_usage": True}} if wanted else {}
    async with served(tmp_path) as (asking, engine):
        engine.answer = "".join(lines).encode()
        stream = await asking.chat.completions.create(
            model=MODEL, messages=SAY, tools=TOOLS, n=2, stream=True, **options
        )
        got = [chunk async for chunk in stream]
        assert engine.requests[0]["stream_options"] == {"include_usage": True}
        assert [chunk.choices[0].index for chunk in got[:4]] == [0, 1, 0, 1]
        calls = got[0].choices[0].delta.tool_calls
        assert calls is not None
        assert calls[0].function is not None
        assert calls[0].function.arguments == TOOL_CALL["function"]["arguments"]  # type: ignore[index]
        assert [chunk.usage.total_tokens for chunk in got[4:] if chunk.usage] == [7] * wanted


async def test_logprobs_and_echo_of_a_completion(tmp_path: Path) -> None:
    logprobs = {"tokens": ["a"], "token_logprobs": [-1.5], "top_logprobs": [{"a": -1.5}]}
    choice = {"index": 0, "text": "a", "finish_reason": "stop", "logprobs": logprobs}
    envelope = {**CHAT, "object": "text_completion", "choices": [choice], "usage": USAGE}
    async with served(tmp_path) as (asking, engine):
        engine.answer = json.dumps(envelope).encode()
        got = await asking.completions.create(model=MODEL, prompt="x", logprobs=1, echo=True)
        assert (engine.requests[0]["logprobs"], engine.requests[0]["echo"]) == (1, True)
        assert got.choices[0].logprobs is not None
        assert got.choices[0].logprobs.token_logprobs == [-1.5]


ERRORS = {
    400: openai.BadRequestError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    503: openai.InternalServerError,
}


@pytest.mark.parametrize("status", ERRORS)
async def test_every_error_of_an_engine_is_the_clients(tmp_path: Path, status: int) -> None:
    async with served(tmp_path) as (asking, engine):
        engine.status = status
        with pytest.raises(ERRORS[status]) as caught:
            await asking.completions.create(model=MODEL, prompt="x")
        assert (caught.value.status_code, caught.value.code) == (status, "y")
        assert "engine says no" in str(caught.value)
        is_late = status in (429, 503)
        assert ("Retry-After" in caught.value.response.headers) == is_late


@pytest.mark.parametrize(
    "said", [{"object": "error", "message": "too long", "code": 400}, {"detail": "too long"}]
)
async def test_an_error_of_another_shape_keeps_its_words(tmp_path: Path, said: Any) -> None:
    async with served(tmp_path) as (asking, engine):
        engine.status, engine.answer = 400, json.dumps(said).encode()
        with pytest.raises(openai.BadRequestError, match="too long"):
            await asking.completions.create(model=MODEL, prompt="x")


async def test_the_routers_own_errors_are_told_apart(tmp_path: Path) -> None:
    async with served(tmp_path) as (asking, engine):
        with pytest.raises(openai.NotFoundError) as missing:
            await asking.completions.create(model="another", prompt="x")
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.AuthenticationError):
            await asking.with_options(api_key="kvf-wrong").models.list()
        with pytest.raises(openai.BadRequestError) as long:
            await asking.completions.create(model=MODEL, prompt="x" * 5_000)
        assert long.value.code == "context_length_exceeded"
        assert engine.requests == []


async def test_unknown_fields_pass_and_reserved_ones_do_not(tmp_path: Path) -> None:
    extra = {"guided_regex": "a+", "min_p": 0.1, "chat": {"deep": [1, None]}, "cache_salt": "mine"}
    async with served(tmp_path) as (asking, engine):
        await asking.completions.create(model=MODEL, prompt="x", extra_body=extra)
        asked = engine.requests[0]
        assert asked.pop("cache_salt") != extra.pop("cache_salt")
        assert {name: asked[name] for name in extra} == extra


# ---------------------------------------------------------------------- bodies

BODY = b'{ "prompt":"h\\u0069", "model" : "reference","temperature":0.10,\n"seed":1e0 }'


async def test_a_body_that_needs_no_change_is_forwarded_byte_for_byte(tmp_path: Path) -> None:
    async with served(tmp_path, fabric=False) as (asking, engine):
        await _post(asking, BODY)
        assert engine.raw == [BODY]


async def test_a_body_that_was_read_and_written_again_would_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rewritten(self: ModelRequest, fields: dict[str, Any]) -> bytes:
        return msgspec.json.encode({**msgspec.json.decode(self.raw), **fields})

    monkeypatch.setattr(ModelRequest, "with_fields", rewritten)
    async with served(tmp_path, fabric=False) as (asking, engine):
        await _post(asking, BODY)
        assert engine.raw != [BODY]


async def test_what_is_put_beside_it_changes_no_value(tmp_path: Path) -> None:
    async with served(tmp_path) as (asking, engine):
        await _post(asking, BODY)
        (raw,) = engine.raw
        assert all(value in raw for value in (b'"h\\u0069"', b"0.10", b"1e0", b'"cache_salt"'))


@pytest.mark.slow
async def test_bodies_of_up_to_32_mib_are_taken(tmp_path: Path) -> None:
    async with served(tmp_path, fabric=False) as (asking, engine):
        await asking.completions.create(model=MODEL, prompt="x")
        room = MAX_BODY_BYTES - len(engine.raw[0])
        got = await asking.completions.create(model=MODEL, prompt="x" * (1 + room))
        assert got.choices[0].text == "ab"
        assert len(engine.raw[1]) == MAX_BODY_BYTES == 32 << 20
        with pytest.raises(openai.APIStatusError) as caught:
            await asking.completions.create(model=MODEL, prompt="x" * (2 + room))
        assert caught.value.status_code == 413
        assert len(engine.raw) == 2


async def _post(asking: AsyncOpenAI, body: bytes) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"{asking.base_url}completions"
    async with aiohttp.ClientSession() as http, http.post(url, data=body, headers=headers) as got:
        assert got.status == 200
