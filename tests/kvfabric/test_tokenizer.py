"""The byte tokenizer: a prompt's tokens are exactly its bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvfabric import tokenizer


@given(st.text(), st.text())
def test_tokens_of_a_whole_are_those_of_its_parts(first: str, second: str) -> None:
    """So a template's text ends and begins at token boundaries, wherever it stands."""
    parts = tokenizer.encode(first) + tokenizer.encode(second)
    assert tokenizer.encode(first + second) == parts
    assert tokenizer.decode(parts) == first + second


def test_ids_that_stand_for_no_byte_are_left_out() -> None:
    ids = [tokenizer.START_ID, *tokenizer.encode("a"), tokenizer.END_ID, 400]
    assert tokenizer.decode(ids) == "a"


def test_chat_template() -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages) == (
        "<|system|>\nbe brief\n<|user|>\nhi\n<|assistant|>\n"
    )
