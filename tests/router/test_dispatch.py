"""What an engine gets with a request: its own tenant's salt and handle, or nothing that can be reused."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from kvfabric_router.fleet import SessionReport
from kvfabric_router.identity import ModelIdentity, RequestIdentity
from kvfabric_router.prompt import TemplateIndex
from kvfabric_router.tokenizers import ByteTokenizer
from kvfabric_router.topology import Place

from kvfabric import tokenizer
from kvfabric.errors import BadHandle
from kvfabric.handle import Handle, open_handle
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.registry.lease import EpochLease
from kvfabric.registry.state import RETIRED, RegistryState
from kvfabric.types import NodeId
from tests.router.standin import (
    BLOCK_TOKENS,
    FINGERPRINT,
    Client,
    StandInEngine,
    client_of,
    config_for,
    engines,
    give_lease,
    keyring_with,
    registry_state,
    template,
    tenant,
)

KEYS = {"t-1": "kvf-one", "t-2": "kvf-two"}
TENANTS = [tenant(name, key) for name, key in KEYS.items()]
PROMPT = "Once upon a time there was a cache that never lied to anybody. " * 2
NO_STORE = {"Cache-Control": "no-store"}  # so that no request is what the next one finds
ASK: dict[str, Any] = {"model": "reference", "prompt": PROMPT}
MODEL = ModelIdentity("revision-1", FINGERPRINT, BLOCK_TOKENS)
NODE = NodeId("n")


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return keyring_with(tmp_path, KEYS)


@pytest.fixture
async def pair() -> AsyncIterator[list[StandInEngine]]:
    async with engines(2) as found:
        yield found


def served(tmp_path: Path, found: list[StandInEngine], **keys: Any) -> Any:
    config = config_for(tmp_path, [e.url for e in found], **keys)
    return client_of(config, registry_state(TENANTS))


def opened(keyring: Keyring, engine: StandInEngine, number: int = -1) -> Handle:
    text = engine.requests[number]["kv_transfer_params"]["kvfabric"]
    return open_handle(text, keyring.handle_keys(), audience=engine.session, now=time.time())


def lease_ends(router: Any) -> None:
    """The clock jumps past the lease."""
    late = time.clock_gettime(time.CLOCK_BOOTTIME) + 3600
    router.registry.lease._clock = lambda: late


async def test_an_engine_gets_the_tenants_handle_and_salt(
    tmp_path: Path, pair: list[StandInEngine], keyring: Keyring
) -> None:
    async with served(tmp_path, pair[:1]) as client:
        _, _, headers = await client.post(ASK, key=KEYS["t-1"])
        handle = opened(keyring, pair[0])
        assert handle.tenant == "t-1"
        assert handle.request_id == headers["X-Request-Id"]
        assert not handle.no_store
        assert len(pair[0].requests[0]["cache_salt"]) == 43
        await client.post(ASK, key=KEYS["t-1"], headers={"Cache-Control": "no-store"})
        assert opened(keyring, pair[0]).no_store
        # An engine without its node caches by salt alone: nobody may have this one again.
        await client.post(ASK, key=KEYS["t-1"])
        salts = [request["cache_salt"] for request in pair[0].requests]
        assert salts[0] == salts[2]
        assert salts[1] != salts[0]


@pytest.mark.parametrize("checks", [True, False], ids=["guarded", "engine does not check"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_started_anew_gets_a_handle_of_its_own(
    tmp_path: Path, pair: list[StandInEngine], keyring: Keyring, stream: bool, checks: bool
) -> None:
    """Nobody told the router yet that the session is another: the engine does, before it computes. One that
    does not say so gets a handle that its node will refuse."""
    async with served(tmp_path, pair[:1]) as client:
        await client.post(ASK, key=KEYS["t-1"])
        pair[0].session, pair[0].checks_session = b"n" * 16, checks
        status, _, _ = await client.post({**ASK, "stream": stream}, key=KEYS["t-1"])
        assert (status, len(pair[0].requests), pair[0].misdirected) == (200, 2, checks)
        if not checks:
            with pytest.raises(BadHandle):
                opened(keyring, pair[0])
            return
        assert opened(keyring, pair[0]).tenant == "t-1"
        assert client.router.fleet.num_flights == 0
        await client.post(ASK, key=KEYS["t-1"])
        assert pair[0].misdirected == 1  # it is known now


async def test_what_a_client_sends_of_its_own_is_dropped(
    tmp_path: Path, pair: list[StandInEngine], keyring: Keyring
) -> None:
    async with served(tmp_path, pair[:1]) as client:
        await client.post(ASK, key=KEYS["t-2"])
        stolen = pair[0].requests[0]
        forged = {
            **ASK,
            "cache_salt": stolen["cache_salt"],
            "kv_transfer_params": {**stolen["kv_transfer_params"], "do_remote_prefill": True},
            "vllm_xargs": {"kvfabric": "x"},
            "kv_params": 1,
        }
        await client.post(forged, key=KEYS["t-1"])
        got = pair[0].requests[1]
        assert opened(keyring, pair[0]).tenant == "t-1"
        assert set(got["kv_transfer_params"]) == {"kvfabric"}
        assert got["cache_salt"] != stolen["cache_salt"]
        assert not {"vllm_xargs", "kv_params"} & set(got)


@pytest.mark.parametrize("fabric", [True, False])
async def test_it_is_dropped_also_where_nothing_is_put_in_its_place(
    tmp_path: Path, pair: list[StandInEngine], fabric: bool
) -> None:
    forged = {**ASK, "cache_salt": "mine", "kv_transfer_params": {"kvfabric": "x"}}
    async with served(tmp_path, pair[:1], fabric=fabric) as client:
        lease_ends(client.router)
        await client.post(forged, key=KEYS["t-1"])
        got = pair[0].requests[0]
        assert got.get("cache_salt") != "mine"
        assert "kv_transfer_params" not in got


async def test_without_the_fabric_engines_get_the_request_alone_and_take_turns(
    tmp_path: Path, pair: list[StandInEngine]
) -> None:
    """The baseline of comparisons; keys are asked for all the same."""
    async with served(tmp_path, pair, fabric=False) as client:
        assert (await client.post(ASK))[0] == 401
        for _ in range(4):
            await client.post(ASK, key=KEYS["t-1"])
        assert [len(engine.requests) for engine in pair] == [2, 2]
        assert all(request == ASK for engine in pair for request in engine.requests)


async def test_tenants_share_no_salt_for_the_same_prompt(
    tmp_path: Path, pair: list[StandInEngine], keyring: Keyring
) -> None:
    async with served(tmp_path, pair[:1]) as client:
        for key in (*KEYS.values(), *KEYS.values()):
            await client.post(ASK, key=key)
        salts = [request["cache_salt"] for request in pair[0].requests]
        assert salts[:2] == salts[2:]
        assert salts[0] != salts[1]


async def test_a_tenant_newer_than_the_keyring_that_was_read_is_known(
    tmp_path: Path, pair: list[StandInEngine], keyring: Keyring
) -> None:
    async with served(tmp_path, pair[:1]) as client:
        await client.post(ASK, key=KEYS["t-1"])
        keyring.add_tenant(tenant("t-3").tenant_id)
        state = registry_state([*TENANTS, tenant("t-3", "kvf-three")], version=2)
        give_lease(client.router, state)
        await client.post(ASK, key="kvf-three")
        assert opened(keyring, pair[0]).tenant == "t-3"


async def _requests_around_the_end_of_the_lease(
    tmp_path: Path, engine: StandInEngine
) -> list[dict[str, Any]]:
    """One request with a lease, two after it ended."""
    async with served(tmp_path, [engine]) as client:
        await client.post(ASK, key=KEYS["t-1"])
        lease_ends(client.router)
        for _ in range(2):
            assert (await client.post(ASK, key=KEYS["t-1"]))[0] == 200
        _, raw, _ = await client.get("/metrics")
        assert b"kvfabric_router_epoch_lease_valid" in raw
    return engine.requests


def reuses_nothing(requests: list[dict[str, Any]]) -> bool:
    salts = [request["cache_salt"] for request in requests]
    no_handle = all("kv_transfer_params" not in request for request in requests)
    return no_handle and len(set(salts)) == len(salts)


async def test_without_a_lease_salts_are_one_time_and_there_is_no_handle(
    tmp_path: Path, pair: list[StandInEngine], keyring: Keyring
) -> None:
    before, *after = await _requests_around_the_end_of_the_lease(tmp_path, pair[0])
    assert "kv_transfer_params" in before
    assert reuses_nothing(after)
    assert before["cache_salt"] not in [request["cache_salt"] for request in after]


async def test_a_router_that_ignores_its_lease_would_mint_stale_handles(
    tmp_path: Path,
    pair: list[StandInEngine],
    keyring: Keyring,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The guard removed: the proof above then fails."""
    monkeypatch.setattr(EpochLease, "allows", lambda self, state: state is not None)
    _, *after = await _requests_around_the_end_of_the_lease(tmp_path, pair[0])
    assert not reuses_nothing(after)


async def test_a_state_behind_the_registrys_is_not_minted_by(
    tmp_path: Path, pair: list[StandInEngine], keyring: Keyring
) -> None:
    async with served(tmp_path, pair[:1]) as client:
        lease = client.router.registry.lease
        lease.renewed(
            sent_at=lease.now(),
            registry_id=client.router.registry.state.registry_id,
            ttl_s=60.0,
            version=2,
        )
        for _ in range(2):
            await client.post(ASK, key=KEYS["t-1"])
        assert reuses_nothing(pair[0].requests)


async def test_a_withdrawn_version_is_not_used_from_the_next_request_on(
    tmp_path: Path, pair: list[StandInEngine], keyring: Keyring
) -> None:
    serving = registry_state(TENANTS, [template("t", "1", "never lied")], version=2)
    retired = registry_state(TENANTS, [template("t", "1", "never lied", state=RETIRED)], version=3)
    back = registry_state(TENANTS, [template("t", "1", "never lied")], version=4)
    async with served(tmp_path, pair[:1]) as client:
        for state in (serving, retired, back):
            give_lease(client.router, state)
            await client.post(ASK, key=KEYS["t-1"])
        used, after, again = (opened(keyring, pair[0], number) for number in range(3))
        assert [segment.template for segment in used.segments] == ["t"]
        assert (after.segments, after.cacheable_tokens) == ((), PROMPT.index("never lied"))
        assert again.segments == used.segments
        salts = [request["cache_salt"] for request in pair[0].requests]
        assert salts[0] == salts[2] != salts[1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": ["a", "b"]}, "opaque_prompt"),
        ({"suffix": "x"}, "opaque_prompt"),
    ],
)
async def test_a_prompt_whose_tokens_are_unknown_reuses_nothing(
    tmp_path: Path,
    pair: list[StandInEngine],
    keyring: Keyring,
    change: dict[str, Any],
    reason: str,
) -> None:
    async with served(tmp_path, pair[:1]) as client:
        for _ in range(2):
            assert (await client.post({**ASK, **change}, key=KEYS["t-1"]))[0] == 200
        assert reuses_nothing(pair[0].requests)
        _, raw, _ = await client.get("/metrics")
        assert f'one_time_salts_total{{reason="{reason}"}} 2.0'.encode() in raw


async def test_an_engine_that_says_nothing_of_itself_reuses_nothing(
    tmp_path: Path, pair: list[StandInEngine], keyring: Keyring
) -> None:
    pair[0].is_fabric = False
    async with served(tmp_path, pair[:1]) as client:
        for prompt in (PROMPT, PROMPT, [5, 6, 7]):
            await client.post({**ASK, "prompt": prompt}, key=KEYS["t-1"])
        assert reuses_nothing(pair[0].requests)


async def test_without_a_keyring_requests_are_served_and_reuse_nothing(
    tmp_path: Path, pair: list[StandInEngine]
) -> None:
    async with served(tmp_path, pair[:1]) as client:
        for _ in range(2):
            assert (await client.post(ASK, key=KEYS["t-1"]))[0] == 200
        assert reuses_nothing(pair[0].requests)


# --- the index decides ---


def announce(client: Client, pair: list[StandInEngine]) -> None:
    """What a node would say of the two engines."""
    reports = []
    for number, engine in enumerate(pair):
        engine.session = bytes([number + 1]) * 16
        reports.append(
            SessionReport(engine.url, f"e{number}", engine.session, "reference", MODEL, 4096)
        )
    client.router.fleet.announce(NODE, reports)


def hold(
    client: Client, keyring: Keyring, who: str, engine: StandInEngine | NodeId, blocks: int
) -> None:
    """An event: `engine`, or another node, has the first blocks of the prompt of tenant `who`, in its HBM or
    in its host memory."""
    token_ids = tokenizer.encode(PROMPT)
    state = client.router.registry.state or RegistryState()
    keys = RequestIdentity(
        tenant=tenant(who),
        state=state,
        keyring=keyring,
        token_ids=token_ids,
        recognised=TemplateIndex(state, ByteTokenizer()).recognise(token_ids),
    ).keys(MODEL)
    is_node = isinstance(engine, str)
    run = pb.Run(
        kind=pb.STORED,
        tier=pb.HOST if is_node else pb.HBM,
        namespace_tag=keys.tenant_tag,
        keys=b"".join(key[:8] for key in keys.keys[:blocks]),
        engine=b"" if isinstance(engine, str) else engine.session,
    )
    node = engine if isinstance(engine, str) else NODE
    client.router.index.apply(node, pb.EventBatch(runs=[run]))


async def peers_of(
    tmp_path: Path, pair: list[StandInEngine], keyring: Keyring, bytes_per_s: float
) -> tuple[Any, tuple[str, ...]]:
    """(the chosen candidate as explained, whom the handle names) where another node has 6 blocks of the
    prompt and the link to it is as fast as that."""
    other = NodeId("other")
    async with served(tmp_path, pair) as client:
        announce(client, pair)
        topology = client.router.fleet.topology
        for node in (NODE, other):
            topology.placed(node, Place(node.encode(), "r", "z", exchanges=True))
        rate = pb.Rate(tier="peer", peer=other, bytes_per_s=bytes_per_s, num_sights=9)
        topology.measured(NODE, [rate])
        hold(client, keyring, "t-1", other, 6)
        _, _, headers = await client.post(ASK, key=KEYS["t-1"])
        _, told, _ = await client.get(f"/v1/explain/{headers['X-Request-Id']}", KEYS["t-1"])
        chosen = pair[int(headers["x-kvfabric-engine"][1:])]
        return told["candidates"][0], opened(keyring, chosen).sources


async def test_blocks_of_a_peer_count_and_are_asked_for(
    tmp_path: Path, pair: list[StandInEngine], keyring: Keyring
) -> None:
    told, sources = await peers_of(tmp_path, pair, keyring, 4e9)
    assert sources == ("other",)
    assert told["reuse_tokens"]["peer"] == 6 * BLOCK_TOKENS
    assert told["peer"] == {
        "node": "other",
        "link": "rack",
        "bytes_per_s": 4_000_000_000,
        "basis": "link",
    }
    per_token = 4096 / BLOCK_TOKENS / 4e6
    assert told["fetch_ms"]["peer"] >= round(6 * BLOCK_TOKENS * per_token, 3)
    assert told["cost_ms"]["fetch"] == pytest.approx(sum(told["fetch_ms"].values()), abs=0.002)


async def test_a_peer_over_a_slow_link_is_not_asked(
    tmp_path: Path, pair: list[StandInEngine], keyring: Keyring
) -> None:
    """At a kilobyte a second everything is computed sooner."""
    told, sources = await peers_of(tmp_path, pair, keyring, 1e3)
    assert sources == ()
    assert told["reuse_tokens"]["peer"] == 0
    assert told["peer"] is None


async def test_a_request_goes_where_its_prompt_is(
    tmp_path: Path, pair: list[StandInEngine], keyring: Keyring
) -> None:
    async with served(tmp_path, pair) as client:
        announce(client, pair)
        hold(client, keyring, "t-1", pair[1], 6)
        asked = [(await client.post(ASK, key=KEYS["t-1"]))[2] for _ in range(6)]
        assert {headers["x-kvfabric-engine"] for headers in asked} == {"e1"}
        path = f"/v1/explain/{asked[0]['X-Request-Id']}"
        _, told, _ = await client.get(path, KEYS["t-1"])
        assert told["candidates"][0]["reuse_tokens"]["hbm"] == 6 * BLOCK_TOKENS
        assert told["selected_tokens"] == told["reachable_tokens"] == 6 * BLOCK_TOKENS
        assert told["regret_tokens"] == 0
        assert told["actual"]["reuse_tokens"] == {"hbm": 16, "host": 16, "ssd": 0, "peer": 0}
        assert opened(keyring, pair[1]).audience == pair[1].session


async def test_what_one_tenant_has_cached_does_not_draw_another(
    tmp_path: Path, pair: list[StandInEngine], keyring: Keyring
) -> None:
    async with served(tmp_path, pair) as client:
        announce(client, pair)
        hold(client, keyring, "t-1", pair[1], 6)
        for _ in range(24):
            _, _, headers = await client.post(ASK, key=KEYS["t-2"], headers=NO_STORE)
            path = f"/v1/explain/{headers['X-Request-Id']}"
            _, told, _ = await client.get(path, KEYS["t-2"])
            assert all(c["reuse_tokens"]["hbm"] == 0 for c in told["candidates"])
        assert all(len(engine.requests) > 2 for engine in pair)


async def test_a_retry_is_minted_for_the_other_engine(
    tmp_path: Path, pair: list[StandInEngine], keyring: Keyring
) -> None:
    async with served(tmp_path, pair) as client:
        announce(client, pair)
        hold(client, keyring, "t-1", pair[0], 6)
        pair[0].break_after = 0
        status, _, _ = await client.post(ASK, key=KEYS["t-1"])
        assert status == 200
        first, second = opened(keyring, pair[0]), opened(keyring, pair[1])
        assert first.audience != second.audience
        assert first.request_id == second.request_id


async def test_no_read_finds_nothing_and_may_leave_what_it_computed(
    tmp_path: Path, pair: list[StandInEngine], keyring: Keyring
) -> None:
    async with served(tmp_path, pair[:1]) as client:
        for _ in range(2):
            await client.post(ASK, key=KEYS["t-1"])
        headers = {"Cache-Control": "max-age=0, No-Read"}
        await client.post(ASK, key=KEYS["t-1"], headers=headers)
        plain, asked = (opened(keyring, pair[0], at) for at in (-2, -1))
        assert (plain.no_read, asked.no_read, asked.no_store) == (False, True, False)
        salts = [request["cache_salt"] for request in pair[0].requests[-3:]]
        assert salts[0] == salts[1] != salts[2], "an engine looks into its own cache first"
