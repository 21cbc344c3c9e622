"""Tokens in the router are the engine's: piece by piece as in one go, and found again by what they spell."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kvfabric_router import hf_tokenizer
from kvfabric_router.api import CHAT_COMPLETIONS, COMPLETIONS, ApiError, ModelRequest, parse
from kvfabric_router.hf_tokenizer import LINE_PIECE_CHARS, HfTokenizer
from kvfabric_router.prompt import NO_LIMIT, TemplateIndex
from kvfabric_router.tokenizers import UNKNOWN, ByteTokenizer, Tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from kvfabric.errors import ConfigError
from kvfabric.hf_tokenizer import FolderTokenizer
from tests.engine import hf_folder
from tests.router.standin import registry_state, template

CORPUS = [
    "You are a careful assistant. You answer in one word, and you never guess.\n",
    "It's 1234 o'clock; what's next?\n\n    def f(x):\n        return x + 1\n",
    "naïve — 日本語 🦊 and more of the same, the same, the same.\n",
] * 3
SPECIAL = ["<|im_start|>", "<|im_end|>"]
LLAMA3 = max(hf_tokenizer._CUT_LINES, key=len)
QWEN = min(hf_tokenizer._CUT_LINES, key=len)


def byte_level(*before: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """As GPT-2, or after another step as Llama 3 and Qwen."""
    found = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not before)
    found.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    found.decoder = decoders.ByteLevel()
    found.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(CORPUS, trainer)
    return found


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def sentence_piece() -> Tokenizer:
    """As Llama 2 and Gemma: spaces are a character of their own, other characters fall back to bytes."""
    found = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=["<unk>", *SPECIAL], show_progress=False
    )
    found.train_from_iterator(CORPUS, trainer)
    written = json.loads(found.to_str())
    vocabulary = written["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    return Tokenizer.from_str(json.dumps(written))


def words() -> Tokenizer:
    """Its tokens do not add up to the text."""
    found = Tokenizer(models.WordLevel(unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", *SPECIAL], show_progress=False)
    found.train_from_iterator(CORPUS, trainer)
    return found


def greedy_special() -> Tokenizer:
    """Special tokens that take spaces with them, and one that begins as another ends."""
    found = byte_level(split(QWEN))
    found.add_special_tokens(
        [AddedToken("<sep>", lstrip=True, rstrip=True), "|><|", AddedToken("\n\n", special=False)]
    )
    return found


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": byte_level,
    "llama3": lambda: byte_level(split(LLAMA3)),
    "qwen": lambda: byte_level(split(QWEN)),
    "other-pattern": lambda: byte_level(split(r"\s+|\S+\s")),
    "sentence-piece": sentence_piece,
    "words": words,
    "begins-with-a-token": hf_folder.tokenizer,
    "greedy-special": greedy_special,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, make in KINDS.items():
        found[name] = tmp_path_factory.mktemp(name)
        hf_folder.write_tokenizer(found[name])
        make().save(str(found[name] / "tokenizer.json"))
    return found


def completion(text: str) -> ModelRequest:
    return parse(COMPLETIONS, msgspec.json.encode({"model": "m", "prompt": text}))


def chat(*contents: str) -> ModelRequest:
    messages = [{"role": "user", "content": content} for content in contents]
    return parse(CHAT_COMPLETIONS, msgspec.json.encode({"model": "m", "messages": messages}))


PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *SPECIAL,
                "<sep>",
                "|><|",
                "\n",
                "\n\n",
                " ",
                "\r\n",
                "\t",
                "x\ny",
                ".\n",
                "é",
                "e\u0301",
            ]
        ),
        st.text(max_size=8),
        st.sampled_from(CORPUS),
    ),
    min_size=1,
    max_size=12,
).map("".join)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=PIECES.filter(bool))
@example(text="a\u0301<|im_end|>\u0301 x\n\u0301y  <sep>  z\n")
def test_a_text_in_pieces_has_the_tokens_of_the_text(
    folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(hf_tokenizer, "LINE_PIECE_CHARS", 3)
    monkeypatch.setattr(hf_tokenizer, "_LEAST_CACHED", 1)
    ours, its = loaded(folders[kind])
    for _ in range(2):  # made, and found again
        assert list(ours.tokens(completion(text), "t") or ()) == its.encode(text)
        assert list(ours.tokens(chat(text), "t") or ()) == its.encode_chat(
            [{"role": "user", "content": text}]
        )


_LOADED: dict[Path, tuple[HfTokenizer, FolderTokenizer]] = {}


def loaded(folder: Path) -> tuple[HfTokenizer, FolderTokenizer]:
    if folder not in _LOADED:
        _LOADED[folder] = HfTokenizer(folder), FolderTokenizer(folder)
    return _LOADED[folder]


def test_cut_anywhere_else_they_would_differ(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_tokenizer, "LINE_PIECE_CHARS", 3)
    monkeypatch.setattr(hf_tokenizer, "_LINE_END", re.compile("(?=.)"))
    ours, its = loaded(folders["qwen"])
    assert list(ours.tokens(completion(CORPUS[0]), "t") or ()) != its.encode(CORPUS[0])


def test_which_are_cut_at_lines(folders: dict[str, Path]) -> None:
    cut = {kind for kind, folder in folders.items() if loaded(folder)[0]._cuts_lines}
    assert cut == {"gpt2", "llama3", "qwen", "begins-with-a-token"}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is tokenized."""
    texts: list[str] = []
    encode = HfTokenizer._encode

    def seen(self: HfTokenizer, given: Sequence[str]) -> Any:
        texts.extend(given)
        return encode(self, given)

    monkeypatch.setattr(HfTokenizer, "_encode", seen)
    return texts


def test_a_conversation_costs_its_last_turn(folders: dict[str, Path], encoded: list[str]) -> None:
    ours = HfTokenizer(folders["qwen"])
    turns = [f"This is turn {number} of many. " * 20 for number in range(3)]
    ours.tokens(chat(*turns), "t")
    encoded.clear()
    ours.tokens(chat(*turns, "And now this. " * 20), "t")
    long = [text for text in encoded if len(text) > 64]
    assert len(long) == 1
    assert "And now this." in long[0]


def test_a_text_that_grows_costs_its_end(folders: dict[str, Path], encoded: list[str]) -> None:
    ours = HfTokenizer(folders["qwen"])
    text = "".join(f"This is line {number} of many.\n" for number in range(2_000))
    ours.tokens(completion(text), "t")
    encoded.clear()
    ours.tokens(completion(text + "And one more.\n" * 10), "t")
    assert 0 < sum(map(len, encoded)) < 3 * LINE_PIECE_CHARS


def test_what_one_tenant_had_tokenized_is_no_others(
    folders: dict[str, Path], encoded: list[str]
) -> None:
    ours = HfTokenizer(folders["qwen"])
    costs = []
    for tenant in ("one", "one", "two"):
        encoded.clear()
        ours.tokens(completion("The same text for both. " * 20), tenant)
        costs.append(len(encoded))
    assert costs == [1, 0, 1]


def test_memory_is_bounded(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_tokenizer, "CACHED_TOKENS", 10_000)
    ours = HfTokenizer(folders["qwen"])
    for number in range(200):
        ours.tokens(completion(f"{number} " + "word " * 200), "t")
    kept = list(ours._cache._pieces.values())
    assert sum(map(len, kept)) == ours._cache._num_tokens <= 10_000
    assert len(kept) > 20


async def test_a_long_prompt_is_tokenized_in_a_thread(folders: dict[str, Path]) -> None:
    ours, its = loaded(folders["qwen"])
    text = "".join(f"{number} is a number.\n" for number in range(3_000))
    assert list(await ours.tokens_in_thread(completion(text), "t") or ()) == its.encode(text)


# ---------------------------------------------------------------------- templates in tokens

TEXT = "You are a careful assistant."


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_is_found_wherever_it_stands(folders: dict[str, Path], kind: str) -> None:
    """Also where its last letters are in one token with what follows: its first token is the first of it."""
    ours, its = loaded(folders[kind])
    index = TemplateIndex(registry_state(templates=[template("t", "1", TEXT)]), ours)
    for prompt in (chat(TEXT), chat(TEXT + " You answer"), chat("Before. " + TEXT + "\n\nAfter.")):
        tokens = ours.tokens(prompt, "t")
        assert tokens is not None
        (segment,) = index.recognise(tokens).segments
        text = its.fast.decode(
            list(tokens[segment.first_token :][: segment.num_tokens]), skip_special_tokens=False
        )
        assert TEXT.split()[-1].rstrip(".") in text
        assert "Before" not in text
        shorter = its.fast.decode(list(tokens[segment.first_token + 1 :][: segment.num_tokens]))
        assert TEXT not in shorter


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "qwen"])
def test_a_template_is_found_though_its_tokens_are_others_there(
    folders: dict[str, Path], kind: str
) -> None:
    """Its end is joined with what follows, so the tokens of its text alone stand nowhere."""
    ours, its = loaded(folders[kind])
    text = "You are a careful assis"
    alone = its.fast.encode(text, add_special_tokens=False).ids
    tokens = list(ours.tokens(completion(text + "tant. You answer"), "t") or ())
    assert not any(tokens[at : at + len(alone)] == alone for at in range(len(tokens)))
    state = registry_state(templates=[template("t", "1", text, is_public=True)])
    found = TemplateIndex(state, ours).recognise(tokens)
    assert len(found.segments) == 1
    # What is public ends before the token that holds anything else.
    spelt = its.fast.decode(tokens[: found.public_tokens], skip_special_tokens=True)
    assert text.startswith(spelt)
    assert spelt != ""


def test_token_ids_are_searched_as_text_is(folders: dict[str, Path]) -> None:
    """Spelt in other tokens than the tokenizer makes, it is the same text."""
    ours, its = loaded(folders["qwen"])
    spelt = [its.fast.encode(char, add_special_tokens=False).ids[0] for char in TEXT]
    assert spelt != its.fast.encode(TEXT, add_special_tokens=False).ids
    withdrawn = registry_state(templates=[template("t", "1", TEXT, state="retired")])
    found = TemplateIndex(withdrawn, ours).recognise([5, 5, *spelt, 5])
    assert found.cacheable_tokens == 2


def test_a_first_token_of_every_text_is_in_the_public_prefix(folders: dict[str, Path]) -> None:
    ours, _ = loaded(folders["begins-with-a-token"])
    public = registry_state(templates=[template("t", "1", TEXT, is_public=True)])
    tokens = ours.tokens(completion(TEXT + " And you?"), "t")
    assert tokens is not None
    found = TemplateIndex(public, ours).recognise(tokens)
    assert found.segments[0].first_token == 1
    assert found.cacheable_tokens == NO_LIMIT
    assert found.public_tokens > 1


# ---------------------------------------------------------------------- which is whose


def test_engines_get_the_tokenizer_that_they_name_or_that_is_configured(
    folders: dict[str, Path],
) -> None:
    found = Tokenizers([f"m={folders['qwen']}"])
    name = FolderTokenizer(folders["qwen"]).name
    assert found.name_for("m", "") == found.name_for("other", name) == found.of_model("m") == name
    assert found.name_for("m", "byte") == ByteTokenizer.name
    assert found.name_for("other", "") == found.name_for("m", "hf:another") == UNKNOWN
    assert found.are_slow
    assert not Tokenizers().are_slow


@pytest.mark.parametrize("item", ["m", "=x", "m=", "m=/nowhere"])
def test_what_is_no_tokenizer_is_a_configuration_error(item: str) -> None:
    with pytest.raises(ConfigError, match=r"router\.tokenizers|tokenizer\.json"):
        Tokenizers([item])


def test_text_that_is_no_text_is_refused() -> None:
    request = dataclasses.replace(completion("x"), text="\ud800")
    with pytest.raises(ApiError, match="not valid text"):
        ByteTokenizer().tokens(request, "t")
