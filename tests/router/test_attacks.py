"""What a hostile client sends to the front door: refused with the right error, or dropped without a trace."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.router.standin import (
    Client,
    StandInEngine,
    client_of,
    config_for,
    engines,
    keyring_with,
    registry_state,
    tenant,
)

KEY, OTHER = "kvf-" + "k" * 43, "kvf-" + "o" * 43
BODY = json.dumps({"model": "reference", "prompt": "hello there, general. " * 4}).encode()
INNER = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"


def served(tmp_path: Path, engine: StandInEngine) -> Any:
    keyring_with(tmp_path, ["t-1", "t-2"])
    state = registry_state([tenant("t-1", KEY), tenant("t-2", OTHER)])
    return client_of(config_for(tmp_path, [engine.url]), state)


async def raw(client: Client, sent: bytes) -> bytes:
    """Everything that comes back for these bytes, until the router hangs up or says nothing more."""
    address = urlsplit(client.router.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(sent)
        await writer.drain()
        got = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            async with asyncio.timeout(0.3):
                while data := await reader.read(1 << 16):
                    got += data
        return got
    finally:
        writer.close()


def post(*headers: str, body: bytes = BODY, path: str = "/v1/completions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def statuses(answer: bytes) -> list[int]:
    """Of every HTTP response in these bytes."""
    found = [part.split(b" ", 1)[0] for part in answer.split(b"HTTP/1.1 ")[1:]]
    return [int(one) for one in found]


AUTH = f"Authorization: Bearer {KEY}"
LENGTH = f"Content-Length: {len(BODY)}"
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


async def test_the_raw_request_that_the_attacks_are_made_of_is_served(tmp_path: Path) -> None:
    async with engines() as (engine,), served(tmp_path, engine) as client:
        assert statuses(await raw(client, post(AUTH, LENGTH))) == [200]
        chunked = post(AUTH, "Transfer-Encoding: chunked", body=CHUNKED)
        assert statuses(await raw(client, chunked)) == [200]
        assert len(engine.requests) == 2


@pytest.mark.parametrize(
    "sent",
    [
        post(AUTH, LENGTH, "Transfer-Encoding: chunked", body=CHUNKED + INNER),
        post(AUTH, LENGTH, "Content-Length: 3", body=BODY),
        post(AUTH, "Content-Length: -1"),
        post(AUTH, "Content-Length: +5", body=BODY[:5]),
        post(AUTH, "Content-Length : 5", body=BODY[:5]),
        post(AUTH, "Transfer-Encoding: xchunked", body=CHUNKED),
        post(AUTH, "Transfer-Encoding: chunked", body=b"zz\r\n" + BODY + b"\r\n0\r\n\r\n"),
        post(AUTH, LENGTH, "X-A: b\nX-Kvfabric-Session: 00"),
        post(AUTH, LENGTH, "X-A: \x00"),
        post(AUTH, LENGTH, "X-A: " + "a" * (1 << 20)),
        post(f"Authorization: Bearer {'k' * (1 << 20)}", LENGTH),
        post(AUTH, LENGTH, path="/v1/" + "a" * (1 << 16)),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=[
        "both-lengths", "two-lengths", "negative", "plus", "space", "unknown-coding", "bad-chunk",
        "bare-newline", "nul", "long-header", "long-key", "long-path", "tls",
    ],
)  # fmt: skip
async def test_a_request_that_could_be_read_in_two_ways_is_refused(
    tmp_path: Path, sent: bytes
) -> None:
    """400 and the end of the connection: no engine gets anything, and what follows is no request."""
    async with engines() as (engine,), served(tmp_path, engine) as client:
        found = statuses(await raw(client, sent))
        assert len(found) <= 1
        assert all(400 <= status < 500 for status in found)
        assert engine.requests == []
        assert statuses(await raw(client, post(AUTH, LENGTH))) == [200], "it serves on"


async def test_fields_of_the_cache_reach_no_engine_however_they_are_spelt(tmp_path: Path) -> None:
    """Escaped, repeated or nested beside the prompt: what an engine reads is what the router wrote."""
    tricks = [
        rb'"cache_\u0073alt": "mine"',
        rb'"cache_salt": "mine", "cache_salt": "mine"',
        rb'"kv_transfer_params": null, "kv_transfer_par\u0061ms": {"kvfabric": "mine"}',
        rb'"user": "mine", "metadata": {"cache_salt": "mine"}',
    ]
    async with engines() as (engine,), served(tmp_path, engine) as client:
        await client.post(BODY, key=KEY)
        honest = engine.requests[0]
        for trick in tricks:
            assert (await client.post(BODY[:-1] + b", " + trick + b"}", key=KEY))[0] == 200
            got = engine.requests[-1]
            assert got["cache_salt"] == honest["cache_salt"], trick
            assert "mine" not in json.dumps(got.get("kv_transfer_params", "")), trick


async def test_headers_by_which_router_and_engine_talk_are_the_routers(tmp_path: Path) -> None:
    sent = {
        "X-Kvfabric-Session": "00" * 16,
        "X-Request-Id": "mine",
        "X-Data-Parallel-Rank": "7",
        "Cookie": "a=b",
        "X-Forwarded-For": "10.0.0.1",
    }
    async with engines() as (engine,), served(tmp_path, engine) as client:
        assert (await client.post(BODY, key=KEY, headers=sent))[0] == 200
        got = engine.headers[0]
        for name, value in sent.items():
            assert got.get(name) != value, name


async def test_two_keys_in_one_request_never_mix_tenants(tmp_path: Path) -> None:
    """Either is refused or the first counts, for identity, rate and answer alike."""
    async with engines() as (engine,), served(tmp_path, engine) as client:
        answer = await raw(client, post(AUTH, f"Authorization: Bearer {OTHER}", LENGTH))
        assert statuses(answer) in ([400], [200])
        await client.post(BODY, key=KEY)
        await client.post(BODY, key=OTHER)
        *first, one, other = [request["cache_salt"] for request in engine.requests]
        assert one != other
        assert all(salt == one for salt in first)


@pytest.mark.parametrize("name", ["../../etc/passwd", "%2e%2e%2fadmin", "req-1%00", "a" * 4096])
async def test_ids_in_paths_are_ids_and_no_paths(tmp_path: Path, name: str) -> None:
    async with engines() as (engine,), served(tmp_path, engine) as client:
        line = f"GET /v1/explain/{name} HTTP/1.1\r\nHost: x\r\n{AUTH}\r\n\r\n"
        assert statuses(await raw(client, line.encode()))[0] in (400, 404)
