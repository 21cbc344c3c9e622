"""Keys, salts and handles keep tenants, templates and engines apart."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from kvfabric_router.identity import (
    Addressee,
    ModelIdentity,
    PromptKeys,
    RequestIdentity,
    one_time_salt,
)
from kvfabric_router.prompt import NO_LIMIT, TemplateIndex
from kvfabric_router.tokenizers import ByteTokenizer

from kvfabric import hashing, tokenizer
from kvfabric.errors import BadHandle, UnknownTenant
from kvfabric.handle import Handle, open_handle
from kvfabric.keyring import Keyring
from kvfabric.registry.state import RETIRED, RegistryState, Tenant, namespace_of
from kvfabric.types import TenantId
from tests.router.standin import (
    BLOCK_TOKENS,
    FINGERPRINT,
    keyring_with,
    registry_state,
    template,
    tenant,
)

MODEL = ModelIdentity("revision-1", FINGERPRINT, BLOCK_TOKENS)
PROMPT = (
    "The quick brown fox jumps over the lazy dog. " * 4
)  # 180 tokens, 11 blocks that can be reused
SESSION = b"e" * 16


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return keyring_with(tmp_path, ["t-1", "t-2"])


def identity_of(
    keyring: Keyring,
    who: Tenant,
    state: RegistryState | None = None,
    prompt: str = PROMPT,
) -> RequestIdentity:
    state = state or registry_state()
    token_ids = tokenizer.encode(prompt)
    return RequestIdentity(
        tenant=who,
        state=state,
        keyring=keyring,
        token_ids=token_ids,
        recognised=TemplateIndex(state, ByteTokenizer()).recognise(token_ids),
    )


def keys_of(
    keyring: Keyring, name: str, state: RegistryState | None = None, prompt: str = PROMPT
) -> PromptKeys:
    return identity_of(keyring, tenant(name), state, prompt).keys(MODEL)


def opened(keyring: Keyring, identity: RequestIdentity, **fields: bool) -> Handle:
    text = identity.mint(
        MODEL, to=Addressee(SESSION), request_id="req-1", expires_at=int(time.time()) + 60, **fields
    )
    return open_handle(text, keyring.handle_keys(), audience=SESSION, now=time.time())


def test_keys_are_those_that_the_one_maker_of_keys_makes(keyring: Keyring) -> None:
    namespace = namespace_of(registry_state(), TenantId("t-1"), "revision-1", FINGERPRINT)
    key = hashing.namespace_key(namespace, keyring.tenant_secret(TenantId("t-1")))
    whole = hashing.block_keys(tokenizer.encode(PROMPT), BLOCK_TOKENS, key)
    found = keys_of(keyring, "t-1")
    assert list(found.keys) == whole
    assert found.tenant_tag == hashing.namespace_tag(key)
    assert found.salt == hashing.salt(key, ())


def test_the_block_of_the_last_token_is_never_asked_for(keyring: Keyring) -> None:
    """An engine computes at least one token of each prompt."""
    assert len(keys_of(keyring, "t-1", prompt="x" * 32).keys) == 1
    assert len(keys_of(keyring, "t-1", prompt="x" * 33).keys) == 2


def test_two_tenants_share_no_key_tag_or_salt(keyring: Keyring) -> None:
    one, two = keys_of(keyring, "t-1"), keys_of(keyring, "t-2")
    assert not set(one.keys) & set(two.keys)
    assert one.tenant_tag != two.tenant_tag
    assert one.salt != two.salt


def test_the_same_tenant_gets_the_same_keys_and_salt_again(keyring: Keyring) -> None:
    assert keys_of(keyring, "t-1") == keys_of(keyring, "t-1")


def test_another_model_or_adapter_has_other_keys(keyring: Keyring) -> None:
    identity = identity_of(keyring, tenant("t-1"))
    others = [
        replace(MODEL, model_revision="revision-2"),
        replace(MODEL, layout_fingerprint=bytes(32)),
        replace(MODEL, adapter="lora", adapter_revision="1"),
        replace(MODEL, adapter="lora", adapter_revision="2"),
    ]
    tags = {identity.keys(model).tenant_tag for model in (MODEL, *others)}
    assert len(tags) == 5


def test_keys_are_made_once_for_engines_of_one_model(keyring: Keyring) -> None:
    identity = identity_of(keyring, tenant("t-1"))
    assert identity.keys(MODEL) is identity.keys(replace(MODEL))


def test_a_template_changes_keys_from_its_block_on_and_the_salt(keyring: Keyring) -> None:
    state = registry_state(templates=[template("t", "1", "lazy dog")])  # first at token 35, block 2
    plain, marked = keys_of(keyring, "t-1"), keys_of(keyring, "t-1", state)
    same = [a == b for a, b in zip(plain.keys, marked.keys, strict=True)]
    assert same == [True] * 2 + [False] * 9
    assert plain.salt != marked.salt


def test_nothing_from_a_withdrawn_text_on_is_asked_for(keyring: Keyring) -> None:
    state = registry_state(templates=[template("t", "1", "lazy dog", state=RETIRED)])
    found = identity_of(keyring, tenant("t-1"), state)
    assert found.keys(MODEL).keys == keys_of(keyring, "t-1").keys[:2]
    assert opened(keyring, found).cacheable_tokens == 35


def test_a_withdrawn_text_makes_the_salt_one_time(keyring: Keyring) -> None:
    """An engine that caches by salt alone cannot stop in the middle of a prompt."""
    state = registry_state(templates=[template("t", "1", "lazy dog", state=RETIRED)])
    assert keys_of(keyring, "t-1", state).salt != keys_of(keyring, "t-1", state).salt


def test_the_salt_of_a_version_comes_back_with_it(keyring: Keyring) -> None:
    """A rollback puts the same incarnation back: what an engine holds is warm again."""
    serving = registry_state(templates=[template("t", "1", "lazy dog")])
    assert keys_of(keyring, "t-1", serving).salt == keys_of(keyring, "t-1", serving).salt


def test_a_public_prefix_is_shared_and_the_rest_is_not(keyring: Keyring) -> None:
    public = template("p", "1", PROMPT[:50], is_public=True)  # 3 whole blocks
    state = registry_state(templates=[public])
    one, two = keys_of(keyring, "t-1", state), keys_of(keyring, "t-2", state)
    assert one.public_blocks == 3
    assert one.public_tag == two.public_tag
    assert one.keys[:3] == two.keys[:3]
    assert not set(one.keys[3:]) & set(two.keys[3:])


def test_an_adapter_has_no_public_prefix(keyring: Keyring) -> None:
    public = template("p", "1", PROMPT[:50], is_public=True)
    identity = identity_of(keyring, tenant("t-1"), registry_state(templates=[public]))
    found = identity.keys(replace(MODEL, adapter="lora"))
    assert found.public_blocks == 0
    assert found.public_tag == b""


def test_the_handle_says_everything_that_the_node_needs(keyring: Keyring) -> None:
    templates = [template("t", "1", "lazy dog"), template("p", "1", PROMPT[:50], is_public=True)]
    handle = opened(keyring, identity_of(keyring, tenant("t-1"), registry_state((), templates)))
    assert handle.tenant == "t-1"
    assert handle.audience == SESSION
    assert handle.request_id == "req-1"
    assert [(s.template, s.first_token, s.num_tokens) for s in handle.segments] == [
        ("p", 0, 50),
        ("t", 35, 8),
    ]
    assert handle.public_tokens == 50
    assert handle.cacheable_tokens == NO_LIMIT
    assert {scope for scope, _ in handle.epochs} == {
        "fabric",
        "tenant:t-1",
        "tenant:public",
        "model:revision-1",
        "template:t",
        "template:p",
    }


def test_the_handle_is_for_one_engine_session_only(keyring: Keyring) -> None:
    text = identity_of(keyring, tenant("t-1")).mint(
        MODEL, to=Addressee(SESSION), request_id="r", expires_at=int(time.time()) + 60
    )
    with pytest.raises(BadHandle, match="another engine session"):
        open_handle(text, keyring.handle_keys(), audience=b"f" * 16, now=time.time())


def test_no_store_and_opting_out_are_in_the_handle(keyring: Keyring) -> None:
    asked = opened(keyring, identity_of(keyring, tenant("t-1")), no_store=True)
    assert (asked.no_store, asked.no_read) == (True, False)
    out = identity_of(keyring, tenant("t-1", opted_out=True))
    handle = opened(keyring, out)
    assert (handle.no_store, handle.no_read) == (True, True)
    assert out.keys(MODEL).salt != identity_of(keyring, tenant("t-1")).keys(MODEL).salt


def test_more_templates_than_fit_a_handle_end_what_is_cached(keyring: Keyring) -> None:
    texts = [f"<{number:03}>" for number in range(100)]
    state = registry_state(templates=[template(f"name-{t}", "1", t) for t in texts])
    identity = identity_of(keyring, tenant("t-1"), state, "".join(texts))
    handle = opened(keyring, identity)
    assert 5 < len(handle.segments) < 100
    assert handle.cacheable_tokens == 5 * len(handle.segments)


def test_a_tenant_without_a_secret_is_an_error(keyring: Keyring) -> None:
    with pytest.raises(UnknownTenant):
        keys_of(keyring, "t-3")


def test_one_time_salts_never_repeat() -> None:
    salts = {one_time_salt() for _ in range(100)}
    assert len(salts) == 100
    assert {len(salt) for salt in salts} == {43}
