"""Template versions are recognised in a prompt's tokens, wherever and however they stand there."""

from __future__ import annotations

import pytest
from kvfabric_router.api import ApiError
from kvfabric_router.prompt import NO_LIMIT, Recognised, TemplateIndex
from kvfabric_router.tokenizers import ByteTokenizer

from kvfabric import tokenizer
from kvfabric.registry.state import PURGED, RETIRED, TemplateVersion
from tests.router.standin import registry_state, template


def recognise(prompt: str, *templates: TemplateVersion) -> Recognised:
    index = TemplateIndex(registry_state(templates=templates), ByteTokenizer())
    return index.recognise(tokenizer.encode(prompt))


def places(found: Recognised) -> list[tuple[str, str, int]]:
    return [(s.template, s.version, s.first_token) for s in found.segments]


def test_a_prompt_without_templates_has_no_segments_and_no_limit() -> None:
    assert recognise("hello", template("a", "1", "absent")) == Recognised()


def test_a_template_is_found_at_the_start_and_in_the_middle() -> None:
    a, b = template("a", "1", "You are A."), template("b", "1", "Be brief.")
    assert places(recognise("You are A. x Be brief. y", a, b)) == [("a", "1", 0), ("b", "1", 13)]


def test_adjacent_templates_are_both_found() -> None:
    a, b = template("a", "1", "alpha"), template("b", "1", "beta")
    assert places(recognise("alphabeta", a, b)) == [("a", "1", 0), ("b", "1", 5)]


def test_the_place_is_in_tokens_not_in_characters() -> None:
    """A template that starts in the middle of a block, after text of several bytes a character."""
    a = template("a", "1", "ünïcode")
    found = recognise("é" * 20 + "ünïcode", a)
    assert places(found) == [("a", "1", 40)]
    assert [one.num_tokens for one in found.segments] == [9]


def test_overlapping_texts_of_two_templates_are_both_found() -> None:
    a, b = template("a", "1", "one two"), template("b", "1", "two three")
    assert places(recognise("one two three", a, b)) == [("a", "1", 0), ("b", "1", 4)]


def test_only_the_first_place_of_a_version_counts() -> None:
    assert places(recognise("x" + "abc" * 100, template("a", "1", "abc"))) == [("a", "1", 1)]


@pytest.mark.parametrize("state", [RETIRED, PURGED])
def test_a_version_out_of_service_ends_what_may_be_cached(state: str) -> None:
    before = template("before", "1", "BEFORE")
    gone = template("gone", "1", "GONE", state=state)
    after = template("after", "1", "AFTER")
    found = recognise("BEFORE text GONE AFTER", before, gone, after)
    assert places(found) == [("before", "1", 0)]
    assert found.cacheable_tokens == 12


def test_a_version_that_extends_a_withdrawn_one_is_no_use_of_it() -> None:
    old = template("t", "1", "You are kind.", state=RETIRED)
    new = template("t", "2", "You are kind. And brief.")
    found = recognise("You are kind. And brief. Hi", old, new)
    assert places(found) == [("t", "2", 0)]
    assert found.cacheable_tokens == NO_LIMIT


def test_a_withdrawn_version_beside_one_that_extends_it_is_found() -> None:
    old = template("t", "1", "You are kind.", state=RETIRED)
    new = template("t", "2", "You are kind. And brief.")
    found = recognise("You are kind. And brief. You are kind.", old, new)
    assert found.cacheable_tokens == len("You are kind. And brief. ")


def test_a_withdrawn_version_that_extends_the_serving_one_is_found() -> None:
    old = template("t", "1", "You are kind.")
    new = template("t", "2", "You are kind. And brief.", state=RETIRED)
    assert recognise("You are kind. And brief.", old, new) == Recognised((), 0, 0)
    assert places(recognise("You are kind. Or not.", old, new)) == [("t", "1", 0)]


def test_a_withdrawn_template_inside_another_template_is_found() -> None:
    outer = template("outer", "1", "Say: be safe. Thanks.")
    inner = template("inner", "1", "be safe.", state=RETIRED)
    found = recognise("Say: be safe. Thanks.", outer, inner)
    assert places(found) == [("outer", "1", 0)]
    assert found.cacheable_tokens == 5


def test_of_two_versions_with_the_same_text_the_serving_one_is_used() -> None:
    old, new = template("t", "1", "same", state=PURGED), template("t", "2", "same")
    for templates in ((old, new), (new, old)):
        assert places(recognise("the same", *templates)) == [("t", "2", 4)]


def test_the_order_of_registration_changes_nothing() -> None:
    a, b = template("a", "1", "both"), template("b", "1", "both")
    assert recognise("both", a, b) == recognise("both", b, a)


def test_a_public_template_counts_only_at_the_start() -> None:
    public = template("p", "1", "PUBLIC PREFIX", is_public=True)
    assert recognise("PUBLIC PREFIX and more", public).public_tokens == 13
    assert recognise("x PUBLIC PREFIX", public).public_tokens == 0


def test_public_templates_are_shared_in_the_approved_order() -> None:
    system = template("system", "1", "SYSTEM.", is_public=True)
    tools = template("tools", "1", "TOOLS.", is_public=True, after=["system"])
    more = template("more", "1", "MORE.", is_public=True, after=["system", "tools"])
    loose = template("loose", "1", "LOOSE.", is_public=True)
    private = template("private", "1", "PRIVATE.")
    every = (system, tools, more, loose, private)

    def public(prompt: str) -> str:
        return prompt[: recognise(prompt, *every).public_tokens]

    assert public("SYSTEM.TOOLS.MORE. and mine") == "SYSTEM.TOOLS.MORE."
    assert public("SYSTEM.MORE.TOOLS.") == "SYSTEM.MORE.", "not in that order"
    assert public("TOOLS.MORE.") == "", "not at the start"
    assert public("SYSTEM. TOOLS.") == "SYSTEM.", "not right behind it"
    assert public("SYSTEM.PRIVATE.TOOLS.") == "SYSTEM."
    assert public("SYSTEM.LOOSE.") == "SYSTEM.", "approved for the start alone"
    assert public("LOOSE.TOOLS.") == "LOOSE."
    assert public("SYSTEM.SYSTEM.TOOLS.") == "SYSTEM."
    gone = template("tools", "1", "TOOLS.", is_public=True, after=["system"], state=RETIRED)
    found = recognise("SYSTEM.TOOLS.MORE.", system, gone, more)
    assert (found.public_tokens, found.cacheable_tokens) == (7, 7)


def test_of_public_texts_at_one_place_the_longest_chain_counts() -> None:
    short = template("short", "1", "ab", is_public=True)
    long = template("long", "1", "abc", is_public=True)
    rest = template("rest", "1", "cde", is_public=True, after=["short"])
    assert recognise("abcdef", short, long, rest).public_tokens == 5


def test_a_private_template_at_the_start_makes_nothing_public() -> None:
    private = template("s", "1", "secret")
    public = template("p", "1", "PUBLIC", is_public=True)
    assert recognise("secretPUBLIC", private, public).public_tokens == 0


def test_a_withdrawn_text_cuts_the_public_prefix() -> None:
    public = template("p", "1", "PUBLIC has BAD in it", is_public=True)
    bad = template("bad", "1", "BAD", state=RETIRED)
    assert recognise("PUBLIC has BAD in it.", public, bad).public_tokens == 11


def test_an_empty_template_is_nowhere() -> None:
    assert recognise("x", template("e", "1", "", state=RETIRED)) == Recognised()


@pytest.mark.parametrize("token_ids", [[-1], [1 << 32], [0x110000]])
def test_what_is_no_token_id_is_refused(token_ids: list[int]) -> None:
    state = registry_state(templates=[template("t", "1", "x")])
    with pytest.raises(ApiError, match="no token id"):
        TemplateIndex(state, ByteTokenizer()).recognise(token_ids)


def test_long_prompts_are_searched_in_linear_time() -> None:
    """A prompt made to fool a naive search: almost the template, everywhere."""
    found = recognise("a" * 100_000, template("t", "1", "a" * 5_000 + "b"))
    assert found == Recognised()
