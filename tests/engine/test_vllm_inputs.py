"""What a vLLM request depends on besides its tokens: other content, other keys; doubt, no keys.

Here with stand-ins for vLLM's objects; `tests/vllm` runs the real ones.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kvfabric_engine.integrations.vllm_adapters import AdapterFiles, Adapters, Unknown, stamp_of
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
    lora_path: str
    lora_int_id: int = 1
    lora_name: str = "name"
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


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
def adapters(said: list[str]) -> Iterator[Adapters]:
    """As if the engine started in a minute: what is there lay there before."""
    adapters = Adapters(settings="", may_be_exchanged=False, tell=said.append)
    adapters._start = time.time() + 60, time.monotonic() + 60
    yield adapters
    adapters.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "adapter", b"weights")


def write(folder: Path, weights: bytes, name: str = "adapter_model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(b"{}")
    (folder / name).write_bytes(weights)
    return folder


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


def digest(adapters: Adapters, lora: Lora) -> bytes:
    deadline = time.monotonic() + 10
    while True:
        try:
            return adapters.find(lora).digest
        except Unknown as exc:
            if str(exc) or time.monotonic() > deadline:
                raise
            time.sleep(0.001)


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


def test_files_of_an_adapter_decide(adapters: Adapters, tmp_path: Path) -> None:
    """Weights, configuration, names of files; not where it lies, nor what vLLM calls it."""
    one = Lora(str(write(tmp_path / "1", b"weights")))
    same = Lora(str(write(tmp_path / "2", b"weights")), 2, "another")
    others = [
        Lora(str(write(tmp_path / "3", b"Weights"))),
        Lora(str(write(tmp_path / "4", b"weights", "adapter_model.bin"))),
        Lora(str(write(tmp_path / "5", b"weights"))),
        Lora(str(tmp_path / "1"), is_3d_lora_weight=True),
    ]
    (tmp_path / "5" / "adapter_config.json").write_bytes(b"{ }")
    digests = [digest(adapters, lora) for lora in (one, *others)]
    assert len(set(digests)) == 5
    assert digest(adapters, same) == digests[0]
    (tmp_path / "1" / "README.md").write_text("not of the weights")


def test_no_digest_is_another_kinds(make: Maker, adapters: Adapters, folder: Path) -> None:
    """The digest of an adapter, as an image's or an embedding's, is another key; each enters every block."""
    lora = Lora(str(folder))
    digest(adapters, lora)
    plain, with_adapter = keys(make()), keys(make(lora_request=lora))
    assert not set(plain) & set(with_adapter)
    (extra,) = make(lora_request=lora)()
    kinds = ["adapter", "mm:image", "prompt-embeds", "mm:adapter"]
    chains = [
        block_keys(TOKENS, BLOCK, KEY, extra_inputs=[type(extra)(kind, *_rest(extra))])
        for kind in kinds
    ]
    assert len({chain[0] for chain in chains}) == len(kinds)
    both = keys(make(image(mm_position=place(0, 1)), lora_request=lora))
    assert not set(both) & {*with_adapter, *keys(make(image(mm_position=place(0, 1))))}


def _rest(extra: Any) -> tuple[Any, ...]:
    return extra.digest, extra.dtype, extra.shape, extra.first_token, extra.num_tokens


def test_first_request_is_computed_while_files_are_read(
    make: Maker, adapters: Adapters, folder: Path, said: list[str]
) -> None:
    inputs = make(lora_request=Lora(str(folder)))
    adapters._reader.submit(time.sleep, 0.2)
    assert (inputs(), inputs.is_known) == ((), False)
    assert said == ['adapter "name" is being read: until then it is computed without the fabric']
    digest(adapters, Lora(str(folder)))
    assert len(inputs()) == 1
    assert inputs.is_known
    assert len(said) == 1


def overwritten(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"Weights")


def dated_back(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    known = file.stat()
    file.write_bytes(b"Weights")
    os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns))


def replaced(folder: Path) -> None:
    (folder / "new").write_bytes(b"Weights")
    (folder / "new").rename(folder / "adapter_model.safetensors")


def moved(folder: Path) -> None:
    other = write(folder.with_name("other"), b"Weights")
    folder.rename(folder.with_name("old"))
    other.rename(folder)


def added(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"more")


def removed(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize("change", [overwritten, dated_back, replaced, moved, added, removed])
def test_change_on_disk_is_seen(
    adapters: Adapters, folder: Path, change: Callable[[Path], None]
) -> None:
    """Even one that seems to be of before the start; the adapter is never believed again, nor by workers."""
    lora = Lora(str(folder))
    digest(adapters, lora)
    files = pickle.loads(pickle.dumps(adapters.find(lora).files))
    assert files.are_unchanged()
    change(folder)
    assert not files.are_unchanged()
    for _ in range(2):
        with pytest.raises(Unknown, match="changed on disk"):
            adapters.find(lora)
        write(folder, b"weights")


def test_link_that_moves_is_seen(tmp_path: Path) -> None:
    """A link on the way to the folder, or to a file in it, or behind another link."""
    one, two = (write(tmp_path / name, b"weights") for name in ("one", "two"))
    (tmp_path / "inner").symlink_to("one")
    (tmp_path / "outer").symlink_to(tmp_path / "inner")
    files = AdapterFiles(str(tmp_path / "outer"), stamp_of(str(tmp_path / "outer")))
    assert files.are_unchanged()
    before = [entry[0] for entry in files.stamp]
    assert {f"link {tmp_path / 'inner'}", f"link {tmp_path / 'outer'}"} <= set(before)
    (tmp_path / "inner").unlink()
    (tmp_path / "inner").symlink_to("two")
    assert not files.are_unchanged()
    (two / "adapter_model.safetensors").unlink()
    (two / "adapter_model.safetensors").symlink_to(one / "adapter_model.safetensors")
    assert any(name.startswith(f"link {two}") for name, *_ in stamp_of(str(two)))


def test_adapter_younger_than_the_engine(folder: Path, said: list[str]) -> None:
    """vLLM may have read what lay there before it."""
    adapters = Adapters(settings="", may_be_exchanged=False, tell=said.append)
    with pytest.raises(Unknown, match="changed on disk since this engine started"):
        adapters.find(Lora(str(folder)))


def test_clock_set_back(adapters: Adapters, folder: Path) -> None:
    """Then the age of files proves nothing."""
    adapters._start = time.time() + 3600, time.monotonic()
    with pytest.raises(Unknown, match="clock was set back"):
        adapters.find(Lora(str(folder)))


@pytest.mark.parametrize(
    "later",
    [
        {"load_inplace": True},
        {"lora_path": "elsewhere"},
        {"is_3d_lora_weight": True},
    ],
)
def test_id_that_changes_its_weights(
    adapters: Adapters, folder: Path, later: dict[str, Any]
) -> None:
    """From when such a request is seen, what ran under the id is not believed either."""
    lora = Lora(str(folder))
    adapters.see(lora)
    digest(adapters, lora)
    found = adapters.find(lora)
    adapters.see(lora)
    assert adapters.is_trusted(found)
    adapters.see(Lora(**({"lora_path": str(folder)} | later)))
    assert not adapters.is_trusted(found)
    with pytest.raises(Unknown, match="its id was given to another"):
        adapters.find(lora)
    other = Lora(str(folder), 2)
    adapters.see(other)
    assert adapters.find(other).digest == found.digest


def test_what_is_no_adapter_here(adapters: Adapters, tmp_path: Path, said: list[str]) -> None:
    """A name at a hub, an empty folder, an engine whose adapters may be exchanged."""
    with pytest.raises(Unknown, match="is not a folder here"):
        adapters.find(Lora("someone/adapter"))
    with pytest.raises(Unknown, match="no configuration or no weights"):
        digest(adapters, Lora(str(tmp_path)))
    mutable = Adapters(settings="", may_be_exchanged=True, tell=said.append)
    with pytest.raises(Unknown, match="may be exchanged at run time"):
        mutable.find(Lora(str(write(tmp_path / "adapter", b"weights"))))


def test_salt_takes_in_the_adapter(adapters: Adapters, folder: Path) -> None:
    """vLLM's own cache knows adapters by name."""
    lora = Lora(str(folder))
    digest(adapters, lora)
    found = adapters.find(lora)
    assert salt_with("salt", None) == "salt"
    assert salt_with("salt", found) == f"salt.{found.digest.hex()}.1"
    assert len(salt_with("s" * 43, found)) <= 128
