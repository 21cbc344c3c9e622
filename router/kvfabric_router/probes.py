"""Asks each engine in its turn whether it lives and what it is: `GET /v1/models`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import aiohttp

from kvfabric_router.api import decode_answer
from kvfabric_router.fleet import Fleet, ProbeReport
from kvfabric_router.identity import ModelIdentity

PROBE_TIMEOUT_S = 5.0


class Prober:
    """Keeps a `Fleet` told. Each engine's probe is a task of its own: a dead one delays no other."""

    def __init__(
        self, fleet: Fleet, http: aiohttp.ClientSession, *, timeout_s: float = PROBE_TIMEOUT_S
    ) -> None:
        self._fleet = fleet
        self._http = http
        self._timeout_s = timeout_s
        self._running: set[str] = set()

    async def run(self) -> None:
        """Probe until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._fleet.probe_due.clear()
                for endpoint in self._fleet.due():
                    if endpoint not in self._running:
                        self._running.add(endpoint)
                        group.create_task(self._probe(endpoint))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._fleet.next_probe_in()):
                        await self._fleet.probe_due.wait()

    async def _probe(self, endpoint: str) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                report = await self._ask(endpoint)
        except (aiohttp.ClientError, OSError, TimeoutError):
            report = None
        finally:
            self._running.discard(endpoint)
        if report is None:
            self._fleet.probe_failed(endpoint)
        else:
            self._fleet.probe_answered(endpoint, report)

    async def _ask(self, endpoint: str) -> ProbeReport | None:
        async with self._http.get(f"{endpoint}/v1/models") as answer:
            return read_report(decode_answer(await answer.read())) if answer.status == 200 else None


def read_report(answer: object) -> ProbeReport | None:
    """What `/v1/models` says of the engine; None if it is not such an answer. Pure."""
    data = answer.get("data") if isinstance(answer, dict) else None
    first = data[0] if isinstance(data, list) and data else None
    if not isinstance(first, dict) or not isinstance(first.get("id"), str):
        return None
    extension = first.get("kvfabric")
    if not isinstance(extension, dict):
        return ProbeReport(model_name=first["id"], max_model_tokens=_number(first, "max_model_len"))
    return ProbeReport(
        model_name=first["id"],
        session=_hex(extension, "session"),
        model=_model(extension),
        tokenizer=_text(extension, "tokenizer"),
        max_model_tokens=_number(extension, "max_model_tokens"),
    )


def _model(extension: Mapping[str, Any]) -> ModelIdentity | None:
    fingerprint = _hex(extension, "layout_fingerprint")
    block_tokens = _number(extension, "block_tokens")
    revision = _text(extension, "model_revision")
    if not fingerprint or not block_tokens or not revision:
        return None
    return ModelIdentity(
        model_revision=revision,
        layout_fingerprint=fingerprint,
        block_tokens=block_tokens,
        adapter=_text(extension, "adapter"),
        adapter_revision=_text(extension, "adapter_revision"),
    )


def _hex(values: Mapping[str, Any], name: str) -> bytes:
    try:
        return bytes.fromhex(_text(values, name))
    except ValueError:
        return b""


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    return value if isinstance(value, str) else ""


def _number(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    return value if isinstance(value, int) and value > 0 else 0
