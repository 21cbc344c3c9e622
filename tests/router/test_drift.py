"""Where a prompt stopped being what hit before."""

from __future__ import annotations

from kvfabric_router.drift import Drift, DriftWatch, Seen

from kvfabric.types import Incarnation, Segment, TenantId

BLOCK = 16
ONE, TWO = TenantId("t-1"), TenantId("t-2")
DATE = list(range(1000, 1032))
TEXT = list(range(2000, 2064))
QUESTION = list(range(3000, 3020))


def segment(first_token: int, version: str = "1") -> Segment:
    return Segment("helper", version, Incarnation(version.encode() * 16), first_token)


def seen(tokens: list[int], reused: int, *, at: int | None = None) -> Seen:
    """A prompt with the template's text from token `at` on."""
    known = () if at is None else (segment(at),)
    ends = () if at is None else (at + len(TEXT),)
    return Seen(tokens, known, ends, BLOCK, reused)


def watch_with_a_hit() -> DriftWatch:
    watch = DriftWatch()
    assert watch.judge(ONE, seen(DATE + TEXT + QUESTION, 96, at=32)) is None
    return watch


def test_a_change_before_the_template_is_found() -> None:
    other = [*DATE[:20], 7, *DATE[21:]]
    found = watch_with_a_hit().judge(ONE, seen(other + TEXT + QUESTION, 16, at=32))
    assert found == Drift("helper", "1", "", 20)


def test_a_change_in_its_text_is_found_though_it_is_no_template_any_more() -> None:
    other = [*TEXT[:40], 7, *TEXT[41:]]
    found = watch_with_a_hit().judge(ONE, seen(DATE + other + QUESTION, 64))
    assert found == Drift("helper", "1", "helper", 72)


def test_the_block_where_the_template_began_may_miss_already() -> None:
    other = [*TEXT[:40], 7, *TEXT[41:]]
    found = watch_with_a_hit().judge(ONE, seen(DATE + other + QUESTION, 32))
    assert found == Drift("helper", "1", "helper", 72)


def test_another_question_is_no_drift() -> None:
    watch = watch_with_a_hit()
    assert watch.judge(ONE, seen(DATE + TEXT + [1] * 40, 96, at=32)) is None


def test_what_was_evicted_has_not_drifted() -> None:
    """Equal to the end, or blocks missing before the place that differs."""
    watch = watch_with_a_hit()
    assert watch.judge(ONE, seen(DATE + TEXT + QUESTION, 0, at=32)) is None
    other = [*TEXT[:40], 7, *TEXT[41:]]
    assert watch.judge(ONE, seen(DATE + other + QUESTION, 0)) is None


def test_another_prompt_altogether_is_no_drift() -> None:
    assert watch_with_a_hit().judge(ONE, seen([5] * 100, 0)) is None


def test_one_tenants_hits_say_nothing_of_anothers_prompts() -> None:
    other = [*DATE[:20], 7, *DATE[21:]]
    assert watch_with_a_hit().judge(TWO, seen(other + TEXT + QUESTION, 16, at=32)) is None


def test_what_never_hit_is_not_remembered() -> None:
    watch = DriftWatch()
    watch.judge(ONE, seen(DATE + TEXT + QUESTION, 32, at=32))
    assert len(watch) == 0


def test_memory_is_bounded_oldest_tenant_first() -> None:
    watch = DriftWatch(max_kept=2)
    for number in range(5):
        watch.judge(TenantId(f"t-{number}"), seen(DATE + TEXT + QUESTION, 96, at=32))
    assert len(watch) == 2
    other = [*DATE[:20], 7, *DATE[21:]]
    assert watch.judge(TenantId("t-0"), seen(other + TEXT, 16, at=32)) is None
    assert watch.judge(TenantId("t-4"), seen(other + TEXT, 16, at=32)) is not None
