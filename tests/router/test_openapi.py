"""What the router says of its own API holds, whatever schemathesis sends with a tenant's key."""

from __future__ import annotations

import asyncio
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from kvfabric_router.openapi import document
from schemathesis.core.failures import FailureGroup

from tests.router.standin import (
    client_of,
    config_for,
    engines,
    keyring_with,
    registry_state,
    tenant,
)

pytestmark = [
    pytest.mark.slow,
    # The router draws from `random` in its thread, which hypothesis takes for a strategy's doing.
    pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies"),
]

KEY = "kvf-" + "k" * 43
SCHEMA = schemathesis.openapi.from_dict(document())


async def _serve(directory: Path, url: Future[str], stop: asyncio.Event) -> None:
    keyring_with(directory, ["t-1"])
    state = registry_state([tenant("t-1", KEY)])
    async with (
        engines() as (engine,),
        client_of(config_for(directory, [engine.url]), state) as client,
    ):
        url.set_result(client.router.url)
        await stop.wait()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A router in a thread: schemathesis asks without asyncio."""
    found: Future[str] = Future()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            try:
                runner.run(_serve(tmp_path_factory.mktemp("router"), found, stop))
            except BaseException as exc:
                if not found.done():
                    found.set_exception(exc)
                raise

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield found.result(10)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


@SCHEMA.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_it_answers_as_it_says(case: schemathesis.Case[Any], url: str) -> None:
    case.call_and_validate(base_url=url, headers={"Authorization": f"Bearer {KEY}"})


def test_an_answer_that_it_does_not_tell_of_would_be_seen(url: str) -> None:
    told = document()
    del told["paths"]["/v1/completions"]["post"]["responses"]["400"]
    del told["paths"]["/v1/completions"]["post"]["responses"]["default"]
    operation = schemathesis.openapi.from_dict(told)["/v1/completions"]["POST"]
    case = operation.Case(body={"model": 7})
    with pytest.raises(FailureGroup, match="Undocumented status code"):
        case.call_and_validate(base_url=url, headers={"Authorization": f"Bearer {KEY}"})


def test_the_document_is_served(url: str) -> None:
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=5) as answer:
        assert msgspec.json.decode(answer.read()) == document()
