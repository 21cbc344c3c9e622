"""The OpenAI API of the reference engine over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aiohttp import ClientSession, web
from kvfabric_engine.reference.engine import Engine
from kvfabric_engine.reference.server import create_app
from kvfabric_engine.testing import ask, small_config

from kvfabric.tokenizer import encode

GREEDY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(small_config()) as engine:
        yield engine


@pytest.fixture
async def http(engine: Engine) -> AsyncIterator[ClientSession]:
    runner = web.AppRunner(create_app(engine), handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with ClientSession(base_url=f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
        yield session
    await runner.cleanup()


async def post(http: ClientSession, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with http.post(path, data=data) as response:
        document: dict[str, Any] = await response.json()
        return response.status, document


async def events(http: ClientSession, path: str, body: dict[str, Any]) -> list[Any]:
    """All server-sent events of a streamed answer; checks that the stream ends as it should."""
    async with http.post(path, json=body | {"stream": True}) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        lines = [line.decode().strip() async for line in response.content]
    found = [line.removeprefix("data: ") for line in lines if line]
    assert found.pop() == "[DONE]"
    return [json.loads(event) for event in found]


async def test_models_says_what_a_router_needs(http: ClientSession, engine: Engine) -> None:
    """Identity, layout and limits stand beside the OpenAI fields."""
    async with http.get("/v1/models") as response:
        (model,) = (await response.json())["data"]
    assert model["id"] == "reference"
    assert model["kvfabric"]["model_revision"] == engine.model.revision
    assert model["kvfabric"]["block_tokens"] == 16
    assert model["kvfabric"]["session"] == ""


async def test_completion_of_text_and_of_its_tokens(http: ClientSession, engine: Engine) -> None:
    """A string and its token ids are one prompt; usage counts and names what was cached."""
    text = "a prompt of more than two blocks, sent twice"
    expected = await asyncio.to_thread(ask, engine, encode(text), max_tokens=6, salt="elsewhere")
    body = {"model": "reference", "max_tokens": 6} | GREEDY
    status, first = await post(http, "/v1/completions", body | {"prompt": text})
    assert status == 200
    assert tuple(first["choices"][0]["token_ids"]) == expected.token_ids
    assert first["choices"][0]["finish_reason"] == "length"
    _, second = await post(http, "/v1/completions", body | {"prompt": encode(text)})
    assert second["choices"][0]["text"] == first["choices"][0]["text"]
    assert second["usage"] == {
        "prompt_tokens": 44,
        "completion_tokens": 6,
        "total_tokens": 50,
        "prompt_tokens_details": {
            "cached_tokens": 32,
            "kvfabric": {
                "hbm_tokens": 32,
                "host_tokens": 0,
                "ssd_tokens": 0,
                "peer_tokens": 0,
                "miss_reason": "none",
            },
        },
    }


async def test_several_prompts_in_one_call(http: ClientSession) -> None:
    """Lists of strings and of token lists give a choice each, in order."""
    body = {"max_tokens": 3} | GREEDY
    _, several = await post(http, "/v1/completions", body | {"prompt": ["one", "two"]})
    assert [choice["index"] for choice in several["choices"]] == [0, 1]
    ids = [encode("one"), encode("two")]
    _, again = await post(http, "/v1/completions", body | {"prompt": ids})
    assert again["choices"] == several["choices"]
    assert again["usage"]["completion_tokens"] == 6


async def test_stream_is_the_whole_answer_in_pieces(http: ClientSession) -> None:
    """Streamed pieces add up to the unstreamed answer; usage comes when asked for."""
    body = {"prompt": "tell me", "max_tokens": 8} | GREEDY
    _, whole = await post(http, "/v1/completions", body)
    got = await events(http, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    last = got.pop()
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    choices = [event["choices"][0] for event in got]
    assert [t for c in choices for t in c["token_ids"]] == whole["choices"][0]["token_ids"]
    assert "".join(c["text"] for c in choices) == whole["choices"][0]["text"]
    assert [c["finish_reason"] for c in choices] == [None] * 7 + ["length"]


async def test_chat(http: ClientSession) -> None:
    """Messages go through the chat template; a stream starts with the role."""
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4} | GREEDY
    status, whole = await post(http, "/v1/chat/completions", body)
    assert status == 200
    assert whole["usage"]["prompt_tokens"] == len("<|user|>\nhello\n<|assistant|>\n")
    message = whole["choices"][0]["message"]
    assert message["role"] == "assistant"
    deltas = [e["choices"][0]["delta"] for e in await events(http, "/v1/chat/completions", body)]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta["content"] for delta in deltas) == message["content"]


async def test_stop_string_cuts_the_answer(http: ClientSession) -> None:
    """The answer ends before the first stop string, streamed or not."""
    body = {"prompt": "stop here", "max_tokens": 30} | GREEDY
    _, whole = await post(http, "/v1/completions", body)
    text = whole["choices"][0]["text"]
    stop = text[4:6]
    _, cut = await post(http, "/v1/completions", body | {"stop": stop})
    assert cut["choices"][0]["text"] == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    streamed = await events(http, "/v1/completions", body | {"stop": [stop]})
    assert "".join(e["choices"][0]["text"] for e in streamed) == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"[]", 400, None),
        (b"[" * 100_000, 400, None),
        ({"prompt": "x", "model": "other"}, 404, "model"),
        ({}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [1, "a"]}, 400, "prompt"),
        ({"prompt": [300]}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": "\ud800"}, 400, "prompt"),
        ({"prompt": "x" * 500, "max_tokens": 13}, 400, "prompt"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "x", "max_tokens": True}, 400, "max_tokens"),
        ({"prompt": "x", "temperature": "hot"}, 400, "temperature"),
        ({"prompt": "x", "temperature": -1}, 400, "temperature"),
        ({"prompt": "x", "temperature": 10**400}, 400, "temperature"),
        ({"prompt": "x", "top_p": 0}, 400, "top_p"),
        ({"prompt": "x", "cache_salt": "\ud800"}, 400, "cache_salt"),
        ({"prompt": "x", "seed": 2**70}, 400, "seed"),
        ({"prompt": "x", "n": 2}, 400, "n"),
        ({"prompt": "x", "stop": [1]}, 400, "stop"),
        ({"prompt": "x", "stop": ["a"] * 17}, 400, "stop"),
        ({"prompt": "x", "kv_transfer_params": {"kvfabric": 1}}, 400, None),
    ],
)
async def test_bad_requests_have_the_openai_shape(
    http: ClientSession, body: Any, status: int, param: str | None
) -> None:
    """Whatever is wrong with a request, the answer says so in the shape that clients parse."""
    got, document = await post(http, "/v1/completions", body)
    assert got == status
    assert document["error"]["type"] == "invalid_request_error"
    assert document["error"]["param"] == param
    assert document["error"]["message"]


@pytest.mark.parametrize("messages", [None, [], "hi", [{"role": "user"}], [{"content": "x"}]])
async def test_bad_messages(http: ClientSession, messages: Any) -> None:
    """Chat checks its messages."""
    status, document = await post(http, "/v1/chat/completions", {"messages": messages})
    assert status == 400
    assert document["error"]["param"] == "messages"


async def test_unknown_path_has_the_openai_shape(http: ClientSession) -> None:
    """Even what no route takes."""
    status, document = await post(http, "/v1/nothing", {})
    assert status == 404
    assert document["error"]["message"] == "Not Found"


async def test_client_that_leaves_aborts(http: ClientSession, engine: Engine) -> None:
    """A client that goes away in the middle of a stream, or before any answer, ends its request."""
    body = {"prompt": "x", "max_tokens": 500, "stream": True} | GREEDY
    async with http.post("/v1/completions", json=body) as response:
        await response.content.readline()
        response.close()
    with pytest.raises(TimeoutError):
        async with (
            asyncio.timeout(0.05),
            http.post("/v1/completions", json=body | {"stream": False}),
        ):
            pass
    async with asyncio.timeout(5):
        # Nobody announces it: the page count is all there is to see.
        while engine.statistics().pool.used:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_health_and_metrics(http: ClientSession) -> None:
    """Both are plain text; counters have unit and tier in their names and labels."""
    async with http.get("/healthz") as response:
        assert response.status == 200
    async with http.get("/metrics") as response:
        text = await response.text()
    assert 'kvfabric_engine_reused_tokens_total{tier="hbm"}' in text


async def test_seeded_sampling_repeats(http: ClientSession) -> None:
    """`seed` makes a sampled answer repeat; without one, or with another, it is another."""
    body = {"prompt": "once", "max_tokens": 12, "temperature": 1.0, "ignore_eos": True}

    async def sample(**fields: Any) -> str:
        _, document = await post(http, "/v1/completions", body | fields)
        return str(document["choices"][0]["text"])

    assert await sample(seed=7) == await sample(seed=7)
    assert len({await sample(seed=7), await sample(seed=8), await sample()}) == 3


async def test_a_request_id_that_is_no_text_is_replaced(http: ClientSession) -> None:
    """It goes to the node and into the answer: what is no plain text gets one of ours."""
    for given, kept in (("req-1", True), ("req-\xe4", False)):
        body = {"prompt": "x", "max_tokens": 1}
        headers = {"X-Request-Id": given}
        async with http.post("/v1/completions", json=body, headers=headers) as response:
            answer = (await response.json())["id"]
        assert (answer == f"cmpl-{given}") is kept
        assert answer.isascii()


async def test_a_stopped_engine_says_so_to_who_probes_it() -> None:
    """Routers ask for the models: an engine that computes nothing any more must not attract requests."""
    with Engine(small_config()) as stopped:
        runner = web.AppRunner(create_app(stopped))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with ClientSession(base_url=f"http://127.0.0.1:{runner.addresses[0][1]}") as http:
            assert (await http.get("/v1/models")).status == 200
            await asyncio.to_thread(stopped.stop)
            for path in ("/v1/models", "/healthz"):
                assert (await http.get(path)).status == 503
        await runner.cleanup()
