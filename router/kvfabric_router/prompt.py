"""Which registered template versions stand in a prompt. Pure.

A prompt uses a template version if what its tokens spell contains the version's text, anywhere. Within one
template the longest text that stands at a place is what is used there: a version that extends another
is not a use of the shorter one. Different templates are independent, also where they overlap.

Only the first place of each version matters: a marker there enters the keys of that block and all that
follow. The first place of a version out of service ends what may be cached at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvfabric.registry.state import SERVING, RegistryState, TemplateVersion
from kvfabric.types import Segment
from kvfabric_router.tokenizers import Tokenizer, Tokens

NO_LIMIT = -1


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

    def __init__(self, state: RegistryState, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        versions: dict[tuple[str, str], TemplateVersion] = {}
        for version in state.templates.values():
            text = tokenizer.spell_text(version.text)
            known = versions.get((version.name, text))
            # Of two versions with the same text the one in service is the one in use.
            if text and (known is None or known.state != SERVING):
                versions[version.name, text] = version
        self._needles = tuple(
            _Needle(version, text, _containers(text, name, versions))
            for (name, text), version in versions.items()
        )
        self._names = {(n.version.name, n.version.version) for n in self._needles}

    def __len__(self) -> int:
        return len(self._needles)

    def knows(self, segment: Segment) -> bool:
        """Whether it is one of this state's versions."""
        return (segment.template, segment.version) in self._names

    def recognise(self, tokens: Tokens) -> Recognised:
        """Raises ApiError 400 if `tokens` are none."""
        if not self._needles:
            return Recognised()
        prompt = self._tokenizer.spell(tokens)
        found = [(_first(prompt, needle), needle) for needle in self._needles]
        found = [(place, needle) for place, needle in found if place >= 0]
        if not found:
            return Recognised()
        token_at = self._tokenizer.token_at(tokens)
        withdrawn = [place for place, needle in found if needle.version.state != SERVING]
        end = token_at(min(withdrawn, default=len(prompt)))
        used = [(place, needle) for place, needle in found if token_at(place) < end]
        public_end = _public(used)
        segments = []
        for place, needle in sorted(used, key=_prompt_order):
            version, first = needle.version, token_at(place)
            size = token_at(place + len(needle.text) - 1) + 1 - first
            segments.append(
                Segment(version.name, version.version, version.incarnation, first, size)
            )
        return Recognised(
            segments=tuple(segments),
            cacheable_tokens=end if withdrawn else NO_LIMIT,
            public_tokens=min(token_at(public_end), end) if public_end else 0,
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
