"""Identity: two things that must never share a key do not; the same thing always has the same key."""

from __future__ import annotations

import json
import struct
from dataclasses import fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfabric import hashing
from kvfabric.errors import LocalProtocolError
from kvfabric.types import (
    BlockLayout,
    ExtraInput,
    Incarnation,
    Namespace,
    PartSpec,
    Segment,
    TenantId,
)

GOLDEN = Path(__file__).parent / "golden" / "identity.json"
SECRET = bytes(range(32))
LAYOUT = BlockLayout(
    num_layers=4,
    num_kv_heads=2,
    head_dim=8,
    dtype="float32",
    block_tokens=4,
    engine_block_tokens=2,
    parts=(PartSpec(0, 0, 2048),),
)


def make_namespace(tenant: str = "org_1", **changes: Any) -> Namespace:
    fields: dict[str, Any] = {
        "model_revision": "sha256:aa",
        "adapter": "",
        "adapter_revision": "",
    } | changes
    return Namespace(
        tenant=TenantId(tenant), layout_fingerprint=hashing.layout_fingerprint(LAYOUT), **fields
    )


def make_segment(
    first_token: int, template: str = "t", version: str = "1", fill: int = 7
) -> Segment:
    return Segment(template, version, Incarnation(bytes([fill]) * 16), first_token)


def make_image(first_token: int, num_tokens: int = 3, fill: int = 1) -> ExtraInput:
    return ExtraInput("image", bytes([fill]) * 32, "uint8", (3, 2, 2), first_token, num_tokens)


KEY = hashing.namespace_key(make_namespace(), SECRET)
TOKENS = list(range(100, 117))


def golden_cases() -> dict[str, str]:
    """Every primitive of the identity over fixed input, as hex."""
    cases = {
        "layout": hashing.layout_fingerprint(LAYOUT).hex(),
        "namespace org_1": KEY.hex(),
        "namespace_tag": hashing.namespace_tag(KEY).hex(),
        "segment": hashing.segment_digest(make_segment(0)).hex(),
        "salt none": hashing.salt(KEY, ()),
        "salt one": hashing.salt(KEY, (make_segment(0),)),
    }
    # The adversarial pairs: fields that run together the same way must not be the same key.
    for tenant, revision in (("org_1", "2345"), ("org_12345", ""), ("org_1", "234"), ("", "")):
        namespace = make_namespace(tenant, model_revision=revision)
        cases[f"namespace {tenant!r} {revision!r}"] = hashing.namespace_key(namespace, SECRET).hex()
    for adapter, revision in (("lora", "1"), ("lora1", ""), ("", "lora1")):
        namespace = make_namespace(adapter=adapter, adapter_revision=revision)
        cases[f"adapter {adapter!r} {revision!r}"] = hashing.namespace_key(namespace, SECRET).hex()
    for template, version in (("ab", "c"), ("a", "bc"), ("abc", "")):
        segment = make_segment(0, template, version)
        cases[f"segment {template!r} {version!r}"] = hashing.segment_digest(segment).hex()
    chains = {
        "plain": {},
        "segment at 5": {"segments": (make_segment(5),)},
        "segments at 4 and 5": {"segments": (make_segment(4, fill=1), make_segment(5, fill=2))},
        "image at 6": {"extra_inputs": (make_image(6),)},
    }
    for name, options in chains.items():
        for index, key in enumerate(hashing.block_keys(TOKENS, 4, KEY, **options)):  # type: ignore[arg-type]
            cases[f"{name}, block {index}"] = key.hex()
    return cases


def test_identity_matches_the_golden_vectors() -> None:
    """A change of any of these makes every stored record unreachable: it needs a new algorithm id."""
    assert golden_cases() == json.loads(GOLDEN.read_text())


def test_golden_vectors_are_all_different() -> None:
    """No two of the adversarial inputs alias; the repeats are chains that truly share a prefix."""
    cases = golden_cases()
    shared = {name for name in cases if name.endswith("block 0")}
    distinct = [value for name, value in cases.items() if name not in shared]
    assert len(set(distinct)) == len(distinct)
    assert len({cases[name] for name in shared}) == 1


def test_aliasing_pair_collides_without_length_prefixes() -> None:
    """The guard taken out: with bare concatenation the adversarial pair is one key."""

    def bare(tenant: str, revision: str) -> bytes:
        return blake2b(tenant.encode() + revision.encode(), key=SECRET, digest_size=32).digest()

    assert bare("org_1", "2345") == bare("org_12345", "")
    first = hashing.namespace_key(make_namespace("org_1", model_revision="2345"), SECRET)
    second = hashing.namespace_key(make_namespace("org_12345", model_revision=""), SECRET)
    assert first != second


def test_block_key_is_what_the_docstring_says() -> None:
    """An independent encoder, written from the documented byte layout, makes the same keys."""
    segments = (make_segment(4, fill=1), make_segment(5, fill=2))
    image = make_image(6)
    parent = bytes(32)
    expected = []
    for block in range(4):
        tokens = TOKENS[block * 4 : block * 4 + 4]
        markers = [s for s in segments if s.first_token // 4 == block]
        extras = [image] if block in (1, 2) else []
        message = struct.pack("<HHIII", 1, 0, len(markers), 4, len(extras)) + parent
        for marker in markers:
            message += struct.pack("<I", marker.first_token % 4) + hashing.segment_digest(marker)
        message += struct.pack("<4I", *tokens)
        for extra in extras:
            fields = b""
            for tag, value in (
                (1, b"image"),
                (2, extra.digest),
                (3, b"uint8"),
                (4, struct.pack("<3Q", 3, 2, 2)),
                (5, struct.pack("<q", 6 - block * 4)),
                (6, struct.pack("<Q", 3)),
            ):
                fields += struct.pack("<HI", tag, len(value)) + value
            name = b"kvfabric/extra"
            message += blake2b(
                struct.pack("<H", len(name)) + name + fields,
                digest_size=32,
                person=b"kvf-extra-1",
            ).digest()
        parent = blake2b(message, digest_size=32, key=KEY, person=b"kvf-block-1").digest()
        expected.append(parent)
    assert expected == hashing.block_keys(TOKENS, 4, KEY, segments=segments, extra_inputs=(image,))


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.lists(st.integers(0, 12), max_size=6))
def test_chain_does_not_depend_on_how_tokens_arrive(tokens: list[int], cuts: list[int]) -> None:
    """Extending piece by piece, from a list or an array, gives the keys of the whole."""
    hasher = hashing.BlockHasher(KEY, 4)
    keys = []
    rest = tokens
    for cut in cuts:
        keys += hasher.extend(rest[:cut])
        rest = rest[cut:]
    keys += hasher.extend(np.asarray(rest, dtype=np.int64))
    assert keys == hashing.block_keys(tokens, 4, KEY)
    assert len(keys) == len(tokens) // 4 == hasher.num_blocks


@given(st.lists(st.integers(0, 300), min_size=12, max_size=24), st.data())
def test_one_changed_token_changes_its_block_and_all_after(
    tokens: list[int], data: st.DataObject
) -> None:
    """A chain: what comes before a difference is shared, what follows never is."""
    where = data.draw(st.integers(0, len(tokens) - len(tokens) % 4 - 1))
    other = list(tokens)
    other[where] += 1
    ours, theirs = hashing.block_keys(tokens, 4, KEY), hashing.block_keys(other, 4, KEY)
    same = [a == b for a, b in zip(ours, theirs, strict=True)]
    assert same == [index < where // 4 for index in range(len(same))]


def test_withdrawing_a_segment_kills_what_follows_and_nothing_before() -> None:
    """A new incarnation of a segment that starts in block 1 leaves block 0 alone."""
    old = hashing.block_keys(TOKENS, 4, KEY, segments=(make_segment(5, fill=1),))
    new = hashing.block_keys(TOKENS, 4, KEY, segments=(make_segment(5, fill=2),))
    assert [a == b for a, b in zip(old, new, strict=True)] == [True, False, False, False]


def test_where_in_its_block_a_segment_starts_counts() -> None:
    """The same incarnation at another offset is another prompt."""
    at_4 = hashing.block_keys(TOKENS, 4, KEY, segments=(make_segment(4),))
    at_5 = hashing.block_keys(TOKENS, 4, KEY, segments=(make_segment(5),))
    assert at_4[1] != at_5[1]


def test_segment_that_starts_past_the_full_blocks_changes_nothing() -> None:
    plain = hashing.block_keys(TOKENS, 4, KEY)
    assert hashing.block_keys(TOKENS, 4, KEY, segments=(make_segment(16),)) == plain


def test_tenants_share_no_block() -> None:
    """The same tokens of two tenants, or of one name under two secrets, have no key in common."""
    other = hashing.namespace_key(make_namespace("org_2"), SECRET)
    stolen = hashing.namespace_key(make_namespace("org_1"), bytes(32))
    chains = [set(hashing.block_keys(TOKENS, 4, key)) for key in (KEY, other, stolen)]
    assert len(set.union(*chains)) == sum(map(len, chains))


def test_public_prefix_is_shared_and_what_follows_is_not() -> None:
    """Blocks wholly inside the public prefix are equal for all tenants, the straddling one is not."""
    public = hashing.namespace_key(make_namespace("public"), bytes(range(1, 33)))
    other = hashing.namespace_key(make_namespace("org_2"), SECRET)
    chains = [
        hashing.BlockHasher(key, 4, public_key=public, public_tokens=6).extend(TOKENS)
        for key in (KEY, other)
    ]
    assert [a == b for a, b in zip(*chains, strict=True)] == [True, False, False, False]
    assert chains[0][0] == hashing.block_keys(TOKENS[:4], 4, public)[0]


def test_what_kind_of_extra_input_and_where_counts() -> None:
    """Other content, dtype, shape or place of an image is another prompt."""
    base = make_image(6)
    variants = [
        base,
        make_image(6, fill=2),
        make_image(5),
        make_image(6, num_tokens=4),
        ExtraInput("audio", base.digest, base.dtype, base.shape, 6, 3),
        ExtraInput("image", base.digest, "float32", base.shape, 6, 3),
        ExtraInput("image", base.digest, base.dtype, (2, 3, 2), 6, 3),
    ]
    keys = [hashing.block_keys(TOKENS, 4, KEY, extra_inputs=(image,))[1] for image in variants]
    assert len(set(keys)) == len(keys)


def test_salt_is_43_characters_that_an_engine_accepts() -> None:
    salt = hashing.salt(KEY, (make_segment(0),))
    assert len(salt) == 43
    assert not set(salt) & set("@/\\\0=+")


def test_salt_differs_by_tenant_and_by_incarnation() -> None:
    other = hashing.namespace_key(make_namespace("org_2"), SECRET)
    salts = [
        hashing.salt(KEY, ()),
        hashing.salt(other, ()),
        hashing.salt(KEY, (make_segment(0, fill=1),)),
        hashing.salt(KEY, (make_segment(0, fill=2),)),
    ]
    assert len(set(salts)) == 4


@pytest.mark.parametrize("bad", [[-1], [2**32], [1.5], ["a"]])
def test_token_ids_that_do_not_fit_are_refused(bad: list[int]) -> None:
    with pytest.raises(LocalProtocolError):
        hashing.block_keys(bad, 4, KEY)


@pytest.mark.parametrize("bad", [np.array([-1]), np.array([2**33]), np.array([0.5]), np.eye(2)])
def test_token_arrays_that_do_not_fit_are_refused(bad: npt.NDArray[Any]) -> None:
    with pytest.raises(LocalProtocolError):
        hashing.block_keys(bad, 4, KEY)


def test_every_field_of_a_layout_counts() -> None:
    """Layouts that differ anywhere hold bytes that are not interchangeable."""
    seen = {hashing.layout_fingerprint(LAYOUT)}
    for field in fields(LAYOUT):
        value = getattr(LAYOUT, field.name)
        if isinstance(value, int):
            changed: Any = value + 1
        elif isinstance(value, str):
            changed = value + "x"
        else:
            changed = (PartSpec(0, 1, 2048),)
        seen.add(hashing.layout_fingerprint(replace(LAYOUT, **{field.name: changed})))
    assert len(seen) == 1 + len(fields(LAYOUT))


@pytest.mark.parametrize("kind", [bytes, bytearray, tuple])
def test_bytes_are_token_ids_one_each(kind: type) -> None:
    """Whatever sequence the ids come in: a byte is a token, four bytes are not one."""
    ids = list(range(64))
    assert hashing.block_keys(kind(ids), 16, bytes(32)) == hashing.block_keys(ids, 16, bytes(32))


def test_page_key_is_what_the_docstring_says() -> None:
    """BLAKE2b-256 keyed with the namespace key over the TLV of engine and hash; 32-byte hashes only."""
    key, page = bytes(range(32)), bytes(32)
    message = hashing.tlv("kvfabric/engine-page", [(1, b"sglang"), (2, page)])
    expected = blake2b(message, digest_size=32, key=key, person=b"kvf-page-1").digest()
    assert hashing.engine_page_keys("sglang", [page], key) == [expected]
    for bad in (b"", page[:16], page + b"\0", page.hex().encode()):
        with pytest.raises(LocalProtocolError):
            hashing.engine_page_keys("sglang", [bad], key)


def test_page_keys_differ_by_engine_hash_and_namespace() -> None:
    """Another engine, hash or namespace is another key, and none is the key of a block of tokens."""
    key, other = bytes(32), bytes([1] * 32)
    pages = [bytes([number] * 32) for number in range(4)]
    keys = [
        *hashing.engine_page_keys("sglang", pages, key),
        *hashing.engine_page_keys("sglan", pages, key),
        *hashing.engine_page_keys("sglang", pages, other),
        *hashing.block_keys(range(64), 8, key),
    ]
    assert len(set(keys)) == len(keys) == 20
