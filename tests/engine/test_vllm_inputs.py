"""What a vLLM request depends on besides its tokens: other content, other keys; doubt, no keys.

Here with stand-ins for vLLM's objects; `tests/vllm` runs the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kvfabric_engine.integrations.vllm_adapters import Adapters, Weights
from kvfabric_engine.integrations.vllm_inputs import RequestInputs, item_digest, salt_with

from kvfabric.hashing import block_keys
from kvfabric.types import BlockKey

BLOCK = 64
TOKENS = [7] * 256
KEY = bytes(32)


@dataclass
class Feature:
    data: Any
    modality: str = "image"
    identifier: str = "the caller's"
    mm_position: Any = field(default_factory=lambda: place(70, 100))


@dataclass
class Lora:
    lora_int_id: int = 1
    lora_name: str = "name"
    load_inplace: bool = False


def place(offset: int, length: int, mask: torch.Tensor | None = None) -> SimpleNamespace:
    return SimpleNamespace(offset=offset, length=length, is_embed=mask)


def item(**fields: object) -> dict[str, SimpleNamespace]:
    return {name: SimpleNamespace(data=data, field=object()) for name, data in fields.items()}


def image(seed: int = 0, **changes: Any) -> Feature:
    pixels = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return Feature(item(pixels=pixels), **changes)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def adapters(said: list[str]) -> Adapters:
    """As told by one worker, which holds one adapter under id 1."""
    adapters = Adapters(num_ranks=1, settings="", tell=said.append)
    adapters.learn({0: {1: Weights(1, bytes(32))}})
    return adapters


Maker = Callable[..., RequestInputs]


@pytest.fixture
def make(adapters: Adapters, said: list[str]) -> Maker:
    def make(*features: Feature, **fields: Any) -> RequestInputs:
        values = {"lora_request": None, "prompt_embeds": None, "prompt_is_token_ids": None}
        return RequestInputs(
            SimpleNamespace(mm_features=list(features), **(values | fields)),
            adapters=adapters,
            block_tokens=BLOCK,
            has_encoder_connector=False,
            tell=said.append,
        )

    return make


def keys(inputs: RequestInputs) -> tuple[BlockKey, ...]:
    found = tuple(block_keys(TOKENS, BLOCK, KEY, extra_inputs=inputs()))
    assert inputs.is_known
    return found


# --- items ---------------------------------------------------------------------------------------


def test_content_of_an_item_decides(make: Maker) -> None:
    """Other bytes, type, shape, field, modality, span or place in it: other keys from its block on."""
    pixels = torch.zeros(3, 4, 4)
    mask = torch.tensor([True] * 99 + [False])
    variants = [
        Feature(item(pixels=pixels)),
        Feature(item(pixels=pixels.index_fill(0, torch.tensor([2]), 1e-30))),
        Feature(item(pixels=pixels.view(torch.bfloat16))),
        Feature(item(pixels=pixels.view(torch.float16))),
        Feature(item(pixels=pixels.view(torch.uint8))),
        Feature(item(pixels=pixels.reshape(4, 3, 4))),
        Feature(item(pixels=[pixels])),
        Feature(item(pixels=[pixels[0], pixels[1], pixels[2]])),
        Feature(item(others=pixels)),
        Feature(item(pixels=pixels, size=4)),
        Feature(item(pixels=pixels, size=True)),
        Feature(item(pixels=pixels, size="4")),
        Feature(item(pixels=pixels), modality="video"),
        Feature(item(pixels=pixels), mm_position=place(71, 100)),
        Feature(item(pixels=pixels), mm_position=place(70, 101)),
        Feature(item(pixels=pixels), mm_position=place(70, 100, mask)),
        Feature(item(pixels=pixels), mm_position=place(70, 100, mask.roll(1))),
    ]
    found = [keys(make(feature)) for feature in variants]
    assert len({chain[0] for chain in found}) == 1
    assert found[0][0] == keys(make())[0]
    assert len({chain[1] for chain in found}) == len(variants)
    assert len({chain[3] for chain in found}) == len(variants)


def test_names_do_not_decide(make: Maker) -> None:
    """Not the identifier, nor the order of the fields, nor how the tensor lies in memory."""
    one, two = torch.arange(12.0).reshape(3, 4), torch.ones(2, dtype=torch.int64)
    first = Feature(item(a=one, b=two), identifier="x")
    second = Feature(item(b=two, a=one.t().contiguous().t()), identifier="y")
    assert keys(make(first)) == keys(make(second))


def test_fields_do_not_run_into_each_other() -> None:
    """The bytes of two fields, put together otherwise, are another item."""
    halves = torch.arange(4.0).reshape(4, 1)
    pairs = [
        item(a=halves[:1], b=halves[1:]),
        item(a=halves[:2], b=halves[2:]),
        item(a=halves, b=halves[:0]),
        item(a=[halves[:1], halves[1:]], b=[]),
        item(a=[[halves[:1]], halves[1:]], b=[]),
    ]
    assert len({item_digest(Feature(pair)) for pair in pairs}) == len(pairs)


def test_swapped_items(make: Maker) -> None:
    places = place(10, 20), place(130, 20)
    found = [
        keys(make(*(image(s, mm_position=p) for s, p in zip(seeds, places, strict=True))))
        for seeds in ((1, 2), (2, 1), (1, 1), (2, 2))
    ]
    assert len({chain[0] for chain in found}) == 2
    assert len({chain[2] for chain in found}) == 4


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        item(address=torch.tensor(5), monotonic_id=torch.tensor(6)),
        item(pixels=None),
        item(image_grid_thw=torch.tensor([1, 4, 4]), sizes=torch.ones(2, 2, dtype=torch.int64)),
        item(timestamps=torch.arange(64.0), count=4),
        item(pixels=object()),
        item(pixels=torch.zeros(2, 2).to_sparse()),
        item(pixels=torch.zeros(2, device="meta")),
    ],
)
def test_items_without_content_are_not_known(make: Maker, data: object, said: list[str]) -> None:
    """A hash alone, an address in shared memory, something that cannot be read: computed, with a line."""
    inputs = make(image(), Feature(data))
    assert inputs() == ()
    assert not inputs.is_known
    assert not inputs.identify()
    assert len(said) == 1
    assert said[0].endswith("is not cached: such requests are computed without the fabric")


def test_items_are_named_by_content(make: Maker) -> None:
    """For vLLM's own caches, which know them by the caller's name."""
    named = []
    for feature in (image(1), image(2), image(1, identifier="other"), image(1, modality="video")):
        inputs = make(feature)
        inputs()
        states = [inputs.are_identified, inputs.identify(), inputs.are_identified]
        assert states == [False, True, True]
        assert not inputs.identify()
        named.append(inputs._request.mm_features[0].identifier)
        assert feature.identifier != named[-1]
    assert named[0] == named[2]
    assert len(set(named)) == 3


# --- prompt embeddings ---------------------------------------------------------------------------


def test_rows_of_embeddings_decide(make: Maker) -> None:
    """Prompts that begin with the same rows share as far as these go."""
    rows = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    other = rows.clone()
    other[150, 3] += 1e-6
    first, second = (keys(make(prompt_embeds=r)) for r in (rows, other))
    assert first[:2] == second[:2]
    assert not set(first[2:]) & set(second[2:])
    assert keys(make(prompt_embeds=rows.view(torch.int32)))[0] != first[0]
    assert keys(make())[0] != first[0]


def test_embeddings_among_tokens_are_not_known(make: Maker, said: list[str]) -> None:
    inputs = make(prompt_embeds=torch.zeros(4, 2), prompt_is_token_ids=[True, False] * 2)
    assert inputs() == ()
    assert not inputs.is_known
    assert len(said) == 1


# --- adapters ------------------------------------------------------------------------------------


def test_no_digest_is_another_kinds(make: Maker) -> None:
    """The digest of an adapter, as an image's or an embedding's, is another key; each enters every block."""
    plain, with_adapter = keys(make()), keys(make(lora_request=Lora()))
    assert not set(plain) & set(with_adapter)
    (extra,) = make(lora_request=Lora())()
    kinds = ["adapter", "mm:image", "prompt-embeds", "mm:adapter"]
    chains = [
        block_keys(TOKENS, BLOCK, KEY, extra_inputs=[type(extra)(kind, *_rest(extra))])
        for kind in kinds
    ]
    assert len({chain[0] for chain in chains}) == len(kinds)
    both = keys(make(image(mm_position=place(0, 1)), lora_request=Lora()))
    assert not set(both) & {*with_adapter, *keys(make(image(mm_position=place(0, 1))))}


def _rest(extra: Any) -> tuple[Any, ...]:
    return extra.digest, extra.dtype, extra.shape, extra.first_token, extra.num_tokens


def test_adapter_that_no_worker_holds_is_not_known(make: Maker, said: list[str]) -> None:
    inputs = make(lora_request=Lora(2))
    for _ in range(2):
        assert (inputs(), inputs.is_known) == ((), False)
    assert set(said) == {
        'adapter "name" is not loaded yet or still being read: until it is, it is computed without the fabric'
    }


def test_salt_takes_in_the_adapter(adapters: Adapters) -> None:
    """vLLM's own cache knows adapters by name."""
    found = adapters.find(Lora())
    assert salt_with("salt", None) == "salt"
    assert salt_with("salt", found) == f"salt.{found.digest.hex()}.1.1"
    assert len(salt_with("s" * 43, found)) <= 128
