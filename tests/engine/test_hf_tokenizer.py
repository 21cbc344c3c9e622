"""Text, tokens and chats of a Hugging Face folder, as its tokenizer and its template say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kvfabric_engine.reference.hf_tokenizer import MAX_HELD, HfTokenizer
from kvfabric_engine.reference.openai import AnswerText

from kvfabric.errors import ConfigError
from kvfabric.tokenizer import ChatRefused
from tests.engine import hf_folder

CHAT = [{"role": "user", "content": " the quick fox "}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_folder.write_tokenizer(tmp_path)
    hf_folder.write_json(tmp_path / "config.json", hf_folder.config("llama"))
    return tmp_path


def load(folder: Path) -> HfTokenizer:
    return HfTokenizer(folder, hf_folder.VOCAB)


def spell(tokenizer: HfTokenizer, ids: list[int], prompt: str = "", stop: str = "") -> list[str]:
    """The pieces in which an answer comes out."""
    text = AnswerText((stop,) if stop else (), tokenizer.decoder(tokenizer.encode(prompt)))
    return [text.push(token_id, is_last=n == len(ids)) for n, token_id in enumerate(ids, 1)]


def test_a_prompt_gets_what_tokenizer_json_adds(folder: Path) -> None:
    """A text begins with the token of the post-processor, a chat only with what the template writes."""
    tokenizer, fast = load(folder), hf_folder.tokenizer()
    assert tokenizer.encode("the fox") == [0, *fast.encode("the fox", add_special_tokens=False).ids]
    expected = "<|im_start|>user\nthe quick fox<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode_chat(CHAT) == fast.encode(expected, add_special_tokens=False).ids
    assert tokenizer.encode_chat(CHAT)[0] == 1


def test_nothing_is_cut_or_filled_up(folder: Path) -> None:
    """Truncation and padding in tokenizer.json are settings of a training, not of an engine."""
    fast = hf_folder.tokenizer()
    fast.enable_truncation(4)
    fast.enable_padding(length=64)
    fast.save(str(folder / "tokenizer.json"))
    text = "the quick brown fox jumps over the lazy dog"
    assert load(folder).encode(text) == hf_folder.tokenizer().encode(text).ids


@pytest.mark.parametrize("text", ["the quick brown fox", "naïve — 🦊 日本", "a\n\n b", "é"])
def test_pieces_are_whole_characters_and_add_up(folder: Path, text: str) -> None:
    """A character of several tokens comes when its last token does, never broken."""
    tokenizer = load(folder)
    ids = hf_folder.tokenizer().encode(text, add_special_tokens=False).ids
    pieces = spell(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(ids) == 1 or sum(bool(piece) for piece in pieces) > 1 or len(text) == 1


def test_broken_end_and_special_tokens(folder: Path) -> None:
    """An answer that stops inside a character says so; special tokens have no text."""
    tokenizer = load(folder)
    ids = hf_folder.tokenizer().encode("fox🦊", add_special_tokens=False).ids
    assert "".join(spell(tokenizer, ids[:-1])) == "fox\N{REPLACEMENT CHARACTER}"
    assert spell(tokenizer, [1, *ids, 2])[-1] == ""
    assert "".join(spell(tokenizer, [1, *ids, 2])) == "fox🦊"


def test_long_answers_cost_what_short_ones_do(folder: Path) -> None:
    """The window that is decoded for a token does not grow with the answer."""
    ids = hf_folder.tokenizer().encode("the lazy dog " * 50, add_special_tokens=False).ids
    decoder = load(folder).decoder([])
    pieces = [decoder.push(token_id, is_last=False) for token_id in ids]
    assert "".join(pieces) == "the lazy dog " * 50
    assert len(vars(decoder)["_ids"]) <= 2


@pytest.mark.parametrize("token", ["ÿ", "<|im_start|>"])
def test_what_never_becomes_a_character_is_not_kept(folder: Path, token: str) -> None:
    """Bytes that begin none and tokens without text: the window is bounded, what follows is whole."""
    fast = hf_folder.tokenizer()
    token_id = fast.token_to_id(token)
    assert token_id is not None
    decoder = load(folder).decoder([])
    for _ in range(100):
        decoder.push(token_id, is_last=False)
        assert len(vars(decoder)["_ids"]) <= 2 * MAX_HELD
    ids = fast.encode(" fox", add_special_tokens=False).ids
    rest = "".join(decoder.push(token_id, is_last=token_id == ids[-1]) for token_id in ids)
    assert rest.lstrip("\N{REPLACEMENT CHARACTER}") == " fox"


def test_stop_strings_cut_across_tokens(folder: Path) -> None:
    ids = hf_folder.tokenizer().encode("the quick brown fox", add_special_tokens=False).ids
    assert "".join(spell(load(folder), ids, stop="k br")) == "the quic"


def test_what_ends_an_answer(folder: Path) -> None:
    """generation_config.json counts before config.json; the tokenizer's own end always does."""
    assert load(folder).end_ids == {2}
    hf_folder.write_json(folder / "generation_config.json", {"eos_token_id": [7, 9]})
    assert load(folder).end_ids == {2, 7, 9}
    for wrong in ("x", [[7]], True):
        hf_folder.write_json(folder / "generation_config.json", {"eos_token_id": wrong})
        with pytest.raises(ConfigError, match="eos_token_id"):
            load(folder)


def test_template_file_comes_before_the_setting(folder: Path) -> None:
    """And of several named ones in the settings, `default` counts."""
    hf_folder.write_tokenizer(folder, template=None)
    with pytest.raises(ChatRefused, match="no chat template"):
        load(folder).encode_chat(CHAT)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "the"}]
    hf_folder.write_json(folder / "tokenizer_config.json", settings | {"chat_template": named})
    fast = hf_folder.tokenizer()
    assert load(folder).encode_chat(CHAT) == fast.encode("the", add_special_tokens=False).ids
    (folder / "chat_template.jinja").write_text("fox{{ bos_token }}")
    assert load(folder).encode_chat(CHAT) == [
        *fast.encode("fox", add_special_tokens=False).ids,
        0,
    ]


def test_marks_for_trainers_are_text(folder: Path) -> None:
    hf_folder.write_tokenizer(folder, template="the{% generation %} fox{% endgeneration %}")
    fast = hf_folder.tokenizer()
    assert load(folder).encode_chat(CHAT) == fast.encode("the fox", add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ nothing.at_all }}", "undefined"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_what_a_template_refuses(folder: Path, template: str, why: str) -> None:
    """Whatever a template does with messages it did not expect, the client hears of it; it is a sandbox."""
    hf_folder.write_tokenizer(folder, template=template)
    with pytest.raises(ChatRefused, match=why):
        load(folder).encode_chat(CHAT)


def test_name_is_of_contents(folder: Path) -> None:
    """Engines have the same name for it only if every prompt has the same tokens."""
    first = load(folder).name
    assert first.startswith("hf:")
    assert load(folder).name == first
    hf_folder.write_tokenizer(folder, template="other")
    second = load(folder).name
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text())
    document["model"]["merges"].pop()
    hf_folder.write_json(file, document)
    assert len({first, second, load(folder).name}) == 3


def test_folders_that_do_not_fit(folder: Path) -> None:
    """No tokenizer, a broken one, ids that the model does not have, a template that is none."""
    with pytest.raises(ConfigError, match=r"ids up to \d+; the model knows 300"):
        HfTokenizer(folder, 300)
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match="chat template cannot be read"):
        load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no tokenizer"):
        load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json"):
        load(folder)


def test_lone_surrogates_are_an_error(folder: Path) -> None:
    tokenizer = load(folder)
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("\ud800")
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode_chat([{"role": "user", "content": "\ud800"}])
