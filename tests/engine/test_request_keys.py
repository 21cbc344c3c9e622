"""Keys of a request: the one maker's, cut where the handle says, local ones for salts."""

from __future__ import annotations

import random

import msgspec
from kvfabric_engine.request_keys import LocalNamespaces, RequestKeys

from kvfabric.hashing import ROOT_PARENT, BlockHasher, block_keys, namespace_tag
from kvfabric.protocol.messages import HandleOpened, WireSegment
from kvfabric.types import ExtraInput, Incarnation, Segment

TOKENS = random.Random(1).choices(range(3, 259), k=100)
KEY, PUBLIC_KEY = bytes(32), bytes([1]) * 32
OPENED = HandleOpened(KEY, b"", 0, -1, (), no_store=False, no_read=False)


def test_keys_are_the_makers_however_they_grow() -> None:
    """Token by token or at once; the last, unfinished block has none."""
    keys = RequestKeys(OPENED, 16)
    for end in (10, 33, 100):
        keys.extend(TOKENS[:end])
    assert keys.first(100) == block_keys(TOKENS, 16, KEY)
    assert keys.first(47) == block_keys(TOKENS[:47], 16, KEY)
    assert keys.num_blocks == 6


def test_what_was_hashed_is_not_hashed_again() -> None:
    """A preempted sequence replays from its start: its keys stay those of its tokens."""
    keys = RequestKeys(OPENED, 16)
    for end in (80, 33, 50, 100):
        keys.extend(TOKENS[:end])
    assert keys.first(100) == block_keys(TOKENS, 16, KEY)
    assert keys.num_blocks == 6


def test_cacheable_tokens_cut_the_chain() -> None:
    """Only blocks that end at or before the limit have keys, whenever they come."""
    keys = RequestKeys(msgspec.structs.replace(OPENED, cacheable_tokens=40), 16)
    keys.extend(TOKENS[:20])
    keys.extend(TOKENS)
    assert keys.num_blocks == 2


def test_segments_and_public_prefix_enter_the_keys() -> None:
    """A marker changes its block and what follows; public blocks have the public namespace's tag."""
    segment = WireSegment("t", "1", bytes(16), 20)
    marked = RequestKeys(msgspec.structs.replace(OPENED, segments=(segment,)), 16)
    marked.extend(TOKENS)
    plain = block_keys(TOKENS, 16, KEY)
    assert marked.first(100)[0] == plain[0]
    assert not set(marked.first(100)[1:]) & set(plain)
    expected = BlockHasher(KEY, 16, segments=(Segment("t", "1", Incarnation(bytes(16)), 20),))
    assert marked.first(100) == expected.extend(TOKENS)
    public = RequestKeys(
        msgspec.structs.replace(OPENED, public_key=PUBLIC_KEY, public_tokens=40), 16
    )
    public.extend(TOKENS)
    tags = [public.identity(block).namespace_tag for block in range(4)]
    assert tags == [namespace_tag(PUBLIC_KEY)] * 2 + [namespace_tag(KEY)] * 2
    assert public.identity(0).parent == ROOT_PARENT
    assert public.identity(2).parent == public.identity(1).key


def test_extra_inputs_enter_the_keys() -> None:
    """As the maker takes them; the salt is of the namespace alone."""
    image = ExtraInput("image", bytes(32), "", (), 20, 10)
    keys = RequestKeys(OPENED, 16, extra_inputs=[image])
    for end in (10, 33, 100):
        keys.extend(TOKENS[:end])
    assert keys.first(100) == block_keys(TOKENS, 16, KEY, extra_inputs=[image])
    assert keys.salt == RequestKeys(OPENED, 16).salt
    assert not keys.is_limited


def test_extra_inputs_are_never_public() -> None:
    """The node takes the first blocks of such a chain for public: then there are none."""
    opened = msgspec.structs.replace(OPENED, public_key=PUBLIC_KEY, public_tokens=40)
    for first_token, num_blocks in ((0, 0), (39, 0), (40, 6)):
        image = ExtraInput("image", bytes(32), "", (), first_token, 1)
        keys = RequestKeys(opened, 16, extra_inputs=[image])
        keys.extend(TOKENS)
        assert keys.num_blocks == num_blocks
        assert not keys.is_limited


def test_local_namespaces_are_the_processs_own() -> None:
    """Equal salts share; other salts, other processes, other models do not."""
    local = LocalNamespaces("model", bytes(32))
    assert local.open("a") == local.open("a")
    keys = [local.open("a"), local.open("b"), LocalNamespaces("model", bytes(32)).open("a")]
    assert len({opened.namespace_key for opened in keys}) == 3
