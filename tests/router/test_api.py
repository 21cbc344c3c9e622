"""Bodies are read strictly, answers leniently, and what is not a client's to set is dropped."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from kvfabric_router.api import (
    CHAT_COMPLETIONS,
    COMPLETIONS,
    ApiError,
    EventSplitter,
    ModelRequest,
    Usage,
    events_of,
    parse,
    parse_usage,
)


def completion(**fields: Any) -> ModelRequest:
    return parse(COMPLETIONS, msgspec.json.encode({"model": "m", "prompt": "hi", **fields}))


def chat(**fields: Any) -> ModelRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return parse(CHAT_COMPLETIONS, msgspec.json.encode(body))


def test_a_text_prompt_is_read() -> None:
    request = completion(max_tokens=7, stream=True)
    assert (request.model, request.text, request.token_ids) == ("m", "hi", None)
    assert (request.max_tokens, request.stream, request.usage_wanted) == (7, True, False)


def test_token_ids_are_read() -> None:
    assert completion(prompt=[1, 2, 3]).token_ids == [1, 2, 3]


@pytest.mark.parametrize("prompt", [["hi"], [[1, 2]]])
def test_a_list_of_one_prompt_is_that_prompt(prompt: Any) -> None:
    request = completion(prompt=prompt)
    assert request.text == "hi" or request.token_ids == [1, 2]


def test_a_chat_of_texts_is_read() -> None:
    assert chat().messages == ({"role": "user", "content": "hi"},)
    assert chat(messages=[{"role": "user", "content": "hi", "name": None}]).messages is not None


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]]])
def test_several_prompts_are_opaque(prompt: Any) -> None:
    request = completion(prompt=prompt)
    assert request.text is None
    assert request.token_ids is None


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{}]},
        {"chat_template": "x"},
        {"add_generation_prompt": False},
        {"add_special_tokens": True},
        {"reasoning_effort": "low"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
        {"messages": [{"role": "user", "content": "hi", "name": "me"}]},
    ],
)
def test_a_chat_whose_tokens_only_its_engine_knows_is_opaque(fields: dict[str, Any]) -> None:
    assert chat(**fields).messages is None


@pytest.mark.parametrize(
    "name",
    [
        "cache_salt",
        "kv_transfer_params",
        "vllm_xargs",
        "kv_anything",
        "kvfabric",
        "extra_key",
        "request_id",
        "rid",
        "bootstrap_host",
        "ec_transfer_params",
    ],
)
def test_fields_between_router_engine_and_node_are_not_a_clients(name: str) -> None:
    request = completion(**{name: "forged"})
    assert msgspec.json.decode(request.with_fields({})) == {"model": "m", "prompt": "hi"}


RAW = b"""{ "model":"m" ,"prompt": "h\\u0069", "temperature":0.10, "seed":12345678901234567890123,
 "x": {"b" : [1.0,2e400] ,"b":null}}"""


def test_a_body_that_needs_no_change_goes_on_byte_for_byte() -> None:
    assert parse(COMPLETIONS, RAW).with_fields({}) is RAW


def test_what_is_added_changes_no_value_of_the_clients() -> None:
    sent = parse(COMPLETIONS, RAW).with_fields({"cache_salt": "s"})
    values = (b'"h\\u0069"', b"0.10", b"12345678901234567890123", b'{"b" : [1.0,2e400] ,"b":null}')
    for value in (*values, b'"cache_salt":"s"'):
        assert value in sent, value


def test_of_a_repeated_field_the_last_goes_on_alone() -> None:
    raw = b'{"model":"m","prompt":"one","prompt":"two","cache_salt":"x"}'
    request = parse(COMPLETIONS, raw)
    assert request.text == "two"
    assert request.with_fields({}) == b'{"model":"m","prompt":"two"}'


@pytest.mark.parametrize(
    ("fields", "is_opaque"),
    [
        ({"add_special_tokens": True}, False),
        ({"add_special_tokens": False}, True),
        ({"suffix": ""}, False),
        ({"suffix": "end"}, True),
        ({"truncate_prompt_tokens": None}, False),
        ({"truncate_prompt_tokens": 5}, True),
        ({"tools": [{}]}, False),  # a completion has none
    ],
)
def test_a_completion_whose_tokens_only_its_engine_knows_is_opaque(
    fields: dict[str, Any], is_opaque: bool
) -> None:
    assert (completion(**fields).text is None) == is_opaque


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"model":"m","prompt":"\\ud800"}',
        b'{"model":"m","prompt":"\xff"}',
        b'{"model":"m","prompt":NaN}',
        b"[" * 100_000,
        b"{}",
        b'{"model":""}',
        b'{"model":7,"prompt":"x"}',
        b'{"model":"m"}',
        b'{"model":"m","prompt":""}',
        b'{"model":"m","prompt":[]}',
        b'{"model":"m","prompt":[""]}',
        b'{"model":"m","prompt":{}}',
        b'{"model":"m","prompt":[true]}',
        b'{"model":"m","prompt":[1.5]}',
        b'{"model":"m","prompt":[1,"x"]}',
        b'{"model":"m","prompt":"x","stream":"yes"}',
        b'{"model":"m","prompt":"x","stream_options":7}',
        b'{"model":"m","prompt":"x","y":"\xff"}',
        b'{"model":"m","prompt":"x","y":' + b"[" * 100_000,
        b'{"model":"m","prompt":"x","max_tokens":-1}',
        b'{"model":"m","prompt":"x","max_tokens":"9"}',
    ],
)
def test_what_is_no_request_is_a_400(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(COMPLETIONS, raw)
    assert caught.value.status == 400
    assert set(msgspec.json.decode(caught.value.body())["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }


@pytest.mark.parametrize("messages", [None, [], "x", [7], [{"content": "x"}]])
def test_what_is_no_chat_is_a_400(messages: Any) -> None:
    with pytest.raises(ApiError, match="messages"):
        chat(messages=messages)


@pytest.mark.parametrize(
    ("answer", "usage"),
    [
        (None, None),
        ([], None),
        ({"usage": None}, None),
        ({"usage": {}}, Usage(0, 0, 0, 0, 0, 0)),
        ({"usage": {"prompt_tokens": "9", "prompt_tokens_details": 3}}, Usage(0, 0, 0, 0, 0, 0)),
        (
            {
                "usage": {
                    "prompt_tokens": 9,
                    "completion_tokens": 2,
                    "prompt_tokens_details": {"cached_tokens": 8, "kvfabric": {"host_tokens": 8}},
                }
            },
            Usage(9, 2, 8, 0, 8, 0),
        ),
    ],
)
def test_usage_is_read_where_there_is_any(answer: object, usage: Usage | None) -> None:
    assert parse_usage(answer) == usage


@pytest.mark.parametrize("separator", [b"\n\n", b"\r\n\r\n"])
def test_a_stream_is_cut_between_events_whatever_its_chunks(separator: bytes) -> None:
    stream = separator.join([b"data: 1", b": comment", b"data: [DONE]", b""])
    for cut in range(len(stream) + 1):
        splitter = EventSplitter()
        parts = [splitter.feed(stream[:cut]), splitter.feed(stream[cut:])]
        assert b"".join(parts) == stream
        assert all(part == b"" or part.endswith(separator) for part in parts)
        assert splitter.rest == b""
    assert events_of(stream) == [b"1", b"[DONE]"]


def test_an_endless_event_is_not_kept() -> None:
    splitter = EventSplitter()
    passed = sum(len(splitter.feed(b"x" * 65536)) for _ in range(64))
    assert passed + len(splitter.rest) == 64 * 65536
    assert len(splitter.rest) <= EventSplitter.MAX_EVENT_BYTES
