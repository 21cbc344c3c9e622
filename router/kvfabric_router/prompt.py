"""From a prompt to its tokens, and which registered template versions stand in them. Pure.

A prompt uses a template version if its tokens contain the version's tokens, anywhere. Within one
template the longest text that stands at a place is what is used there: a version that extends another
is not a use of the shorter one. Different templates are independent, also where they overlap.

Only the first place of each version matters: a marker there enters the keys of that block and all that
follow. The first place of a version out of service ends what may be cached at all.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from kvfabric import tokenizer
from kvfabric.registry.state import SERVING, RegistryState, TemplateVersion
from kvfabric.types import Segment
from kvfabric_router.api import ApiError

Encode = Callable[[str | bytes], Sequence[int]]
TOKENIZERS: Mapping[str, Encode] = MappingProxyType({"byte": tokenizer.encode_array})
"""Tokenizers the router has, by the name that an engine gives its own."""

NO_LIMIT = -1
_CODEC = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"


def tokenise(text: str | None, token_ids: Sequence[int] | None, encode: Encode) -> Sequence[int]:
    """Token ids of a prompt given as either, packed: each is looked at several times. Raises ApiError 400
    for what no tokenizer makes.
    """
    if token_ids is not None:
        return _packed(token_ids)
    assert text is not None, "a prompt is text or token ids"
    try:
        return encode(text)
    except UnicodeEncodeError as exc:
        raise ApiError(400, f"the prompt is not valid text: {exc.reason}", param="prompt") from exc


def _packed(token_ids: Sequence[int]) -> array[int]:
    try:
        return array("I", token_ids)  # of an array a plain copy
    except (TypeError, OverflowError) as exc:
        raise ApiError(400, "the prompt holds what is no token id", param="prompt") from exc


def _searchable(token_ids: Sequence[int]) -> str:
    # One character a token: `str.find` is then a search for token sequences, at C speed and linear.
    try:
        return _packed(token_ids).tobytes().decode(_CODEC, "surrogatepass")
    except UnicodeDecodeError as exc:
        raise ApiError(400, "the prompt holds what is no token id", param="prompt") from exc


@dataclass(frozen=True, slots=True)
class Recognised:
    """What a prompt uses of the registry.

    `cacheable_tokens`: first token of the first withdrawn version's text, NO_LIMIT without one; segments
    from there on are left out. `public_tokens`: length of the public versions that the prompt starts with,
    each where it was approved, else 0.
    """

    segments: tuple[Segment, ...] = ()
    cacheable_tokens: int = NO_LIMIT
    public_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Needle:
    version: TemplateVersion
    text: str
    containers: tuple[tuple[str, int], ...]
    """Longer texts of the same template, and where in them this text stands."""


class TemplateIndex:
    """Every version of one registry state, ready to be looked for in prompts of one tokenizer."""

    def __init__(self, state: RegistryState, encode: Encode) -> None:
        versions: dict[tuple[str, str], TemplateVersion] = {}
        for version in state.templates.values():
            text = _searchable(encode(version.text))
            known = versions.get((version.name, text))
            # Of two versions with the same text the one in service is the one in use.
            if text and (known is None or known.state != SERVING):
                versions[version.name, text] = version
        self._needles = tuple(
            _Needle(version, text, _containers(text, name, versions))
            for (name, text), version in versions.items()
        )
        self._known = {(n.version.name, n.version.version) for n in self._needles}

    def knows(self, segment: Segment) -> bool:
        """Whether it is one of this state's versions."""
        return (segment.template, segment.version) in self._known

    def recognise(self, token_ids: Sequence[int]) -> Recognised:
        """Raises ApiError 400 if `token_ids` are none."""
        prompt = _searchable(token_ids)
        found = [(_first(prompt, needle), needle) for needle in self._needles]
        found = [(place, needle) for place, needle in found if place >= 0]
        withdrawn = [place for place, needle in found if needle.version.state != SERVING]
        end = min(withdrawn, default=len(prompt))
        used = [(place, needle) for place, needle in found if place < end]
        return Recognised(
            segments=tuple(
                _segment(needle, place) for place, needle in sorted(used, key=_prompt_order)
            ),
            cacheable_tokens=end if withdrawn else NO_LIMIT,
            public_tokens=min(_public(used), end),
        )


def _public(used: Sequence[tuple[int, _Needle]]) -> int:
    """Where the longest chain of public texts ends: one that may begin, then each right behind one that it
    was approved to follow. A text counts at its first place alone, where its marker is."""
    by_place: dict[int, list[_Needle]] = {}
    for place, needle in used:
        if needle.version.is_public:
            by_place.setdefault(place, []).append(needle)
    ends = {
        (len(needle.text), needle.version.name)
        for needle in by_place.get(0, ())
        if not needle.version.after
    }
    seen = set(ends)
    while ends:
        ends = {
            (end + len(needle.text), needle.version.name)
            for end, name in ends
            for needle in by_place.get(end, ())
            if name in needle.version.after
        } - seen
        seen |= ends
    return max((end for end, _ in seen), default=0)


def _segment(needle: _Needle, place: int) -> Segment:
    version = needle.version
    return Segment(version.name, version.version, version.incarnation, place, len(needle.text))


def _prompt_order(found: tuple[int, _Needle]) -> tuple[int, str, str]:
    # Total, so that equal prompts get equal keys whatever the order of registration.
    place, needle = found
    return place, needle.version.name, needle.version.version


def _containers(
    text: str, name: str, versions: Mapping[tuple[str, str], TemplateVersion]
) -> tuple[tuple[str, int], ...]:
    found = []
    for other_name, other in versions:
        if other_name == name and len(other) > len(text):
            place = other.find(text)
            while place >= 0:
                found.append((other, place))
                place = other.find(text, place + 1)
    return tuple(found)


def _first(prompt: str, needle: _Needle) -> int:
    """First place where `needle` stands and no longer text of its template covers it, or -1."""
    place = prompt.find(needle.text)
    while place >= 0 and any(
        place >= offset and prompt.startswith(text, place - offset)
        for text, offset in needle.containers
    ):
        place = prompt.find(needle.text, place + 1)
    return place
