"""The front door: who may come in, what errors look like, what operators see."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from kvfabric_router.api import MAX_BODY_BYTES, ApiError
from kvfabric_router.app import _background, running
from kvfabric_router.auth import TenantDirectory
from kvfabric_router.request_rate import RequestRates

from kvfabric.errors import ConfigError
from kvfabric.registry.state import TenantLimits
from tests.router.standin import (
    client_of,
    config_for,
    engines,
    keyring_with,
    registry_state,
    template,
    tenant,
)

ASK = {"model": "reference", "prompt": "hello"}
KEY = "kvf-" + "k" * 43


def is_openai_error(body: Any) -> bool:
    return set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("tenants", "header", "status"),
    [
        ([tenant("default")], {}, 200),
        ([tenant("default")], {"Authorization": "Bearer anything"}, 200),
        ([], {}, 200),
        ([tenant("default"), tenant("t-1")], {}, 401),
        ([tenant("default"), tenant("t-1", KEY)], {}, 401),
        ([tenant("t-1", KEY)], {"Authorization": f"Bearer {KEY}"}, 200),
        ([tenant("t-1", KEY)], {"Authorization": f"bearer   {KEY} "}, 200),
        ([tenant("t-1", KEY)], {"Authorization": "Bearer kvf-wrong"}, 401),
        ([tenant("t-1", KEY)], {"Authorization": "Bearer "}, 401),
        ([tenant("t-1", KEY)], {"Authorization": KEY}, 401),
        ([tenant("t-1", KEY)], {"Authorization": f"Basic {KEY}"}, 401),
        ([tenant("t-1", KEY)], {"X-Api-Key": KEY}, 401),
    ],
)
async def test_who_may_come_in(
    tmp_path: Path, tenants: list[Any], header: dict[str, str], status: int
) -> None:
    async with (
        engines() as (engine,),
        client_of(config_for(tmp_path, [engine.url]), registry_state(tenants)) as client,
    ):
        found, body, _ = await client.post(ASK, headers=header)
        assert found == status
        assert status == 200 or is_openai_error(body)


async def test_nobody_comes_in_before_the_registry_was_heard_of(tmp_path: Path) -> None:
    """Whether anybody has a key is not known: `default` is not assumed."""
    async with engines() as (engine,), client_of(config_for(tmp_path, [engine.url])) as client:
        status, body, headers = await client.post(ASK)
        assert status == 503
        assert is_openai_error(body)
        assert headers["Retry-After"] == "1"
        assert (await client.get("/readyz"))[0] == 503
        assert (await client.get("/healthz"))[0] == 200


async def test_a_revoked_key_ends_at_once(tmp_path: Path) -> None:
    async with (
        engines() as (engine,),
        client_of(
            config_for(tmp_path, [engine.url]), registry_state([tenant("t-1", KEY)])
        ) as client,
    ):
        assert (await client.post(ASK, key=KEY))[0] == 200
        others = registry_state([tenant("t-1", "kvf-new")], version=2)
        client.router.registry.apply(others)
        assert (await client.post(ASK, key=KEY))[0] == 401


async def test_revoking_the_last_key_opens_no_door(tmp_path: Path) -> None:
    """A router whose tenants have no key left does not take the revoked one, nor none, for `default`."""
    everybody = [tenant("default"), tenant("t-1", KEY)]
    async with (
        engines() as (engine,),
        client_of(config_for(tmp_path, [engine.url]), registry_state(everybody)) as client,
    ):
        keyless = [tenant("default"), tenant("t-1")]
        client.router.registry.apply(registry_state(keyless, version=2))
        assert (await client.post(ASK, key=KEY))[0] == 401
        assert (await client.post(ASK))[0] == 401
        assert engine.requests == []


async def test_a_key_revoked_while_a_body_comes_is_not_taken(tmp_path: Path) -> None:
    """Whoever revoked a key was told that no router takes it: slow clients are no exception."""
    async with (
        engines() as (engine,),
        client_of(
            config_for(tmp_path, [engine.url]), registry_state([tenant("t-1", KEY)])
        ) as client,
        aiohttp.ClientSession() as http,
    ):
        others = registry_state([tenant("t-1", "kvf-new")], version=2)

        async def slowly() -> AsyncIterator[bytes]:
            yield b" "
            await asyncio.sleep(0.02)  # the router has read the head, and waits for the rest
            client.router.registry.apply(others)
            yield msgspec.json.encode(ASK)

        headers = {"Authorization": f"Bearer {KEY}"}
        url = client.router.url + "/v1/completions"
        async with http.post(url, data=slowly(), headers=headers) as answer:
            assert answer.status == 401
        assert engine.requests == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        ({"prompt": "x"}, 400, None),
        ({**ASK, "model": "unknown"}, 404, "model_not_found"),
        ({**ASK, "prompt": "x" * 4081}, 400, "context_length_exceeded"),
        ({**ASK, "max_tokens": 4096}, 400, "context_length_exceeded"),
        ({**ASK, "prompt": [1 << 32]}, 400, None),
        (b" " * (MAX_BODY_BYTES + 1), 413, None),
    ],
)
async def test_bad_requests_have_the_openai_shape(
    tmp_path: Path, body: Any, status: int, code: str | None
) -> None:
    async with (
        engines() as (engine,),
        client_of(config_for(tmp_path, [engine.url]), registry_state()) as client,
    ):
        keyring_with(tmp_path)
        found, answer, headers = await client.post(body)
        assert found == status
        assert is_openai_error(answer)
        assert answer["error"]["code"] == code
        assert headers["X-Request-Id"].startswith("req-")
        assert engine.requests == []


async def test_unknown_paths_and_methods_have_the_openai_shape(tmp_path: Path) -> None:
    async with client_of(config_for(tmp_path, []), registry_state()) as client:
        assert (await client.get("/v1/nothing"))[0] == 404
        status, body, _ = await client.get("/v1/completions")
        assert status == 405
        assert is_openai_error(body)


async def test_a_known_model_without_an_engine_is_a_503(tmp_path: Path) -> None:
    async with (
        engines() as (engine,),
        client_of(config_for(tmp_path, [engine.url]), registry_state()) as client,
    ):
        client.router.fleet.failed(engine.url)
        status, body, headers = await client.post(ASK)
        assert status == 503
        assert is_openai_error(body)
        assert "Retry-After" in headers


async def test_too_many_requests_are_a_429(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfabric_router.app.MAX_IN_FLIGHT", 0)
    async with (
        engines() as (engine,),
        client_of(config_for(tmp_path, [engine.url]), registry_state()) as client,
    ):
        status, body, headers = await client.post(ASK)
        assert status == 429
        assert is_openai_error(body)
        assert headers["Retry-After"] == "1"


async def test_models_are_those_that_engines_serve(tmp_path: Path) -> None:
    async with engines(2) as (one, two):
        two.model = "other"
        config = config_for(tmp_path, [one.url, two.url])
        async with client_of(config, registry_state([tenant("t-1", KEY)])) as client:
            assert (await client.get("/v1/models"))[0] == 401
            _, body, _ = await client.get("/v1/models", KEY)
            assert [model["id"] for model in body["data"]] == ["other", "reference"]


async def test_readiness_and_metrics(tmp_path: Path) -> None:
    keyring_with(tmp_path)
    state = registry_state([tenant("t-1", KEY)], [template("greeting", "1", "hello")])
    async with (
        engines() as (engine,),
        client_of(config_for(tmp_path, [engine.url]), state) as client,
    ):
        assert (await client.post(ASK, key=KEY))[0] == 200
        status, ready, _ = await client.get("/readyz")
        assert status == 200
        assert ready["ready"] is ready["epoch_lease"] is True
        _, raw, _ = await client.get("/metrics")
        lines = set(raw.decode().splitlines())
    assert 'kvfabric_router_requests_total{result="200",tenant="t-1"} 1.0' in lines
    assert 'kvfabric_router_reused_tokens_total{tenant="t-1",tier="host"} 16.0' in lines
    assert 'kvfabric_router_reused_tokens_total{tenant="t-1",tier="any"} 0.0' in lines
    assert 'kvfabric_router_prompt_tokens_total{tenant="t-1"} 40.0' in lines
    assert 'kvfabric_router_engines{result="taking"} 1.0' in lines
    assert "kvfabric_router_epoch_lease_valid 1.0" in lines
    assert 'kvfabric_router_template_requests_total{result="used",template="greeting"} 1.0' in lines


async def test_a_decision_is_explained_to_its_own_tenant_only(tmp_path: Path) -> None:
    keyring_with(tmp_path, ["t-1", "t-2"])
    state = registry_state([tenant("t-1", KEY), tenant("t-2", "kvf-2")])
    async with (
        engines(2) as found,
        client_of(config_for(tmp_path, [e.url for e in found]), state) as client,
    ):
        _, _, headers = await client.post(ASK, key=KEY)
        path = f"/v1/explain/{headers['X-Request-Id']}"
        status, told, _ = await client.get(path, KEY)
        assert status == 200
        assert told["candidates"][0]["engine"] == headers["x-kvfabric-engine"]
        assert len(told["candidates"]) == 2
        assert set(told["candidates"][0]["cost_ms"]) >= {"wait", "fetch", "prefill", "total"}
        assert (await client.get(path, "kvf-2"))[0] == 404


async def test_an_address_in_use_is_a_configuration_error(tmp_path: Path) -> None:
    async with engines() as (engine,):
        config = config_for(tmp_path, [])
        taken = type(config)(
            listen=engine.url.removeprefix("http://"), state_dir=tmp_path, log_level="warning"
        )
        with pytest.raises(ConfigError, match=r"router\.listen"):
            async with running(taken):
                pass


async def test_a_tenant_above_its_request_rate_is_told_when_to_come_again(tmp_path: Path) -> None:
    """And nobody else is; the limit is changed and taken away while the router runs."""
    slow = replace(tenant("t-1", KEY), limits=TenantLimits(requests_per_s=0.2))
    other = "kvf-" + "o" * 43
    state = registry_state([slow, tenant("t-2", other)])
    async with (
        engines() as (engine,),
        client_of(config_for(tmp_path, [engine.url]), state) as client,
    ):
        assert (await client.post(ASK, key=KEY))[0] == 200
        status, body, headers = await client.post(ASK, key=KEY)
        assert status == 429
        assert is_openai_error(body)
        assert body["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(headers["Retry-After"]) <= 5
        assert [(await client.post(ASK, key=other))[0] for _ in range(3)] == [200] * 3
        free = registry_state([tenant("t-1", KEY), tenant("t-2", other)])
        client.router.registry.apply(replace(free, version=state.version + 1))
        assert [(await client.post(ASK, key=KEY))[0] for _ in range(3)] == [200] * 3


def test_a_request_rate_allows_bursts_of_a_second() -> None:
    now = 0.0
    rates = RequestRates(lambda: now)
    known = replace(tenant("t-1"), limits=TenantLimits(requests_per_s=4.0))
    for _ in range(4):
        rates.take(known)
    with pytest.raises(ApiError) as refused:
        rates.take(known)
    assert refused.value.headers == {"Retry-After": "1"}
    now = 0.25
    rates.take(known)
    now = 100.0
    for _ in range(4):
        rates.take(known)
    with pytest.raises(ApiError):
        rates.take(known)


def test_a_key_that_a_rotation_left_ends_on_time() -> None:
    now = 100.0
    left, fresh = "kvf-old", "kvf-new"
    rotated = replace(
        tenant("t-1", fresh), expiring_keys=((hashlib.sha256(left.encode()).digest(), 160.0),)
    )
    directory = TenantDirectory(registry_state([rotated]), lambda: now)
    assert directory.authenticate(f"Bearer {left}") == rotated
    now = 160.0
    with pytest.raises(ApiError, match="revoked"):
        directory.authenticate(f"Bearer {left}")
    assert directory.authenticate(f"Bearer {fresh}") == rotated


async def test_work_that_takes_a_cancellation_for_a_failure_ends_too() -> None:
    """As it does when a client of Redis fails while it leaves a call that was cancelled."""
    tries = 0

    async def try_again() -> None:
        nonlocal tries
        while tries < 2:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                tries += 1
        await asyncio.sleep(60)

    async with asyncio.timeout(10):
        async with _background(try_again()):
            await asyncio.sleep(0)
    assert tries == 2
