"""Prompts whose tokens the router cannot know: routed by their text, visibly, and never past a template."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from kvfabric_router.identities import Identities

from kvfabric.hf_tokenizer import FolderTokenizer
from kvfabric.registry.state import RegistryState
from tests.engine import hf_folder
from tests.router.standin import (
    USAGE,
    Client,
    StandInEngine,
    client_of,
    config_for,
    engines,
    keyring_with,
    registry_state,
    template,
    tenant,
)

KEYS = {"t-1": "kvf-one", "t-2": "kvf-two"}
TENANTS = [tenant(name, key) for name, key in KEYS.items()]
TEXT = "You are a careful assistant. "
PROMPT = "Once upon a time there was a cache that never lied to anybody. " * 8
ASK: dict[str, Any] = {"model": "reference", "prompt": PROMPT}
CHAT: dict[str, Any] = {
    "model": "reference",
    "messages": [{"role": "user", "content": PROMPT}],
    "tools": [{"type": "function", "function": {"name": "weather"}}],
}
WITHDRAWN = [template("t", "1", TEXT, state="retired")]
RENDERED = template("t", "1", f"<|system|>\n{TEXT}", state="retired")
"""Only an engine's chat template makes this of a message."""
SYSTEM = {"model": "reference", "messages": [{"role": "system", "content": TEXT + PROMPT}]}


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[list[StandInEngine]]:
    keyring_with(tmp_path, KEYS)
    async with engines(2) as found:
        yield found


def served(
    tmp_path: Path, found: list[StandInEngine], state: RegistryState | None = None, **keys: Any
) -> Any:
    config = config_for(tmp_path, [e.url for e in found], **keys)
    return client_of(config, state or registry_state(TENANTS))


async def ask(client: Client, body: Any, who: str = "t-1") -> dict[str, Any]:
    """One request, as it is explained."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    status, _, headers = await client.post(body, key=KEYS[who], path=path)
    assert status == 200
    _, told, _ = await client.get(f"/v1/explain/{headers['X-Request-Id']}", key=KEYS[who])
    found: dict[str, Any] = told
    return found


def reuse(told: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = told["candidates"][0]["reuse_tokens"]
    return found


def salts(pair: list[StandInEngine]) -> list[str]:
    return [request["cache_salt"] for engine in pair for request in engine.requests]


@pytest.mark.parametrize(("name", "body"), [("other", ASK), ("other", CHAT), ("byte", CHAT)])
async def test_they_go_where_their_text_went_before(
    tmp_path: Path, pair: list[StandInEngine], name: str, body: dict[str, Any]
) -> None:
    """An engine with another tokenizer, or a chat with tools: same salt, a handle, the same engine again."""
    for engine in pair:
        engine.tokenizer = name
    async with served(tmp_path, pair) as client:
        first = await ask(client, body)
        assert reuse(first) == {"hbm": 0, "host": 0, "ssd": 0, "peer": 0, "is_approximate": True}
        for _ in range(5):
            told = await ask(client, body)
            assert told["engine"] == first["engine"]
            assert told["reason"] == ""
            assert reuse(told)["is_approximate"]
            assert 0 < reuse(told)["hbm"] <= told["candidates"][0]["prompt_tokens"]
        assert len(set(salts(pair))) == 1
        assert all("kv_transfer_params" in one for e in pair for one in e.requests)
        await ask(client, body, "t-2")
        assert len(set(salts(pair))) == 2
        _, raw, _ = await client.get("/metrics")
        assert b'approximate_requests_total{tenant="t-1"} 6.0' in raw


async def test_doctor_says_so(tmp_path: Path, pair: list[StandInEngine]) -> None:
    pair[0].tokenizer = "other"
    async with served(tmp_path, pair[:1]) as client:
        _, told, _ = await client.get("/doctor")
        assert any("routed approximately" in one["text"] for one in told["findings"])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({**ASK, "prompt": TEXT + PROMPT}, "no_tokenizer"),
        ({**ASK, "prompt": [5, 6, 7]}, "no_tokenizer"),
        ({**CHAT, "tools": None}, "no_tokenizer"),
        (SYSTEM, "no_tokenizer"),
        (ASK, ""),
    ],
)
async def test_what_a_template_may_stand_in_reuses_nothing(
    tmp_path: Path, pair: list[StandInEngine], body: dict[str, Any], reason: str
) -> None:
    """Of a text it is seen that none does, of what an engine makes of a chat, or of token ids, it is not."""
    pair[0].tokenizer = "other"
    state = registry_state(TENANTS, [RENDERED] if body is SYSTEM else WITHDRAWN)
    async with served(tmp_path, pair[:1], state) as client:
        assert [(await ask(client, body))["reason"] for _ in range(2)] == [reason] * 2
        assert len(set(salts(pair))) == (2 if reason else 1)
        assert all(("kv_transfer_params" in one) == (not reason) for one in pair[0].requests)


async def test_otherwise_a_withdrawn_text_would_be_reused(
    tmp_path: Path, pair: list[StandInEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Identities, "_may_hold_templates", lambda self: False)
    pair[0].tokenizer = "other"
    async with served(tmp_path, pair[:1], registry_state(TENANTS, [RENDERED])) as client:
        for _ in range(2):
            await ask(client, SYSTEM)
        assert len(set(salts(pair))) == 1
        assert all("kv_transfer_params" in one for one in pair[0].requests)


# ---------------------------------------------------------------------- a tokenizer that is configured


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_folder.write_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def text_of(folder: Path, num_tokens: int) -> str:
    fast = FolderTokenizer(folder)
    text = "the"
    while len(fast.encode(text)) < num_tokens:
        text += " lazy dog" if len(fast.encode(text + " lazy dog")) <= num_tokens else "."
    return text


async def test_a_text_goes_on_as_its_tokens(
    tmp_path: Path, pair: list[StandInEngine], folder: Path
) -> None:
    pair[0].tokenizer = ""
    async with served(tmp_path, pair[:1], tokenizers=(f"reference={folder}",)) as client:
        told = await ask(client, {**ASK, "prompt": "the quick fox"})
        ids = FolderTokenizer(folder).encode("the quick fox")
        assert pair[0].requests[-1]["prompt"] == ids
        assert told["candidates"][0]["prompt_tokens"] == len(ids)
        # What an engine is to say again it gets as it was said.
        await ask(client, {**ASK, "prompt": "the quick fox", "echo": True})
        assert pair[0].requests[-1]["prompt"] == "the quick fox"


@pytest.mark.parametrize("is_right", [True, False])
async def test_a_tokenizer_that_counts_otherwise_is_not_believed(
    tmp_path: Path, pair: list[StandInEngine], folder: Path, is_right: bool
) -> None:
    pair[0].tokenizer = ""
    said = USAGE["prompt_tokens"]
    assert isinstance(said, int)
    prompt = text_of(folder, said if is_right else said - 1)
    async with served(tmp_path, pair[:1], tokenizers=(f"reference={folder}",)) as client:
        sent = []
        for _ in range(5):
            await ask(client, {**ASK, "prompt": prompt})
            sent.append(type(pair[0].requests[-1]["prompt"]))
        assert sent == [list] * 5 if is_right else [list] * 3 + [str] * 2
        _, told, _ = await client.get("/doctor")
        found = any("chat template differs" in one["text"] for one in told["findings"])
        assert found == (not is_right)
