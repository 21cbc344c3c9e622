"""What must hold for the demo to pass. Pure: each check looks at results and says why it failed.

A check that has nothing to look at fails: no answers, no loads, no sealed blocks prove nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvfabric.demo.replay import Answer

MIN_SHARE_OF_IDEAL = 0.8


@dataclass(frozen=True, slots=True)
class Check:
    """One asserted condition and what was seen."""

    name: str
    passed: bool
    seen: str


@dataclass(frozen=True, slots=True)
class AuditLine:
    """A part that an engine stored (`op` "store") or loaded ("load"); `checksum` is XXH3-128, hex."""

    op: str
    key: str
    group: int
    shard: int
    checksum: str

    @property
    def part(self) -> tuple[str, int, int]:
        return (self.key, self.group, self.shard)


def parse_audit(text: str) -> list[AuditLine]:
    """Lines of an engine's audit file. A last line without its end is still being written: left out."""
    complete = text[: text.rfind("\n") + 1]
    rows = (json.loads(line) for line in complete.splitlines())
    return [
        AuditLine(row["op"], row["key"], row["group"], row["shard"], row["checksum"])
        for row in rows
    ]


def all_succeeded(name: str, answers: Sequence[Answer]) -> Check:
    """Every request got its whole answer with status 200."""
    failed = [answer for answer in answers if not answer.succeeded]
    seen = f"{len(answers) - len(failed)} of {len(answers)} requests answered"
    if failed:
        first = failed[0]
        seen += f"; request {first.job.index}: status {first.status} {first.error[:200]}"
    return Check(name, bool(answers) and not failed, seen)


def same_answers(name: str, expected: Mapping[int, Answer], answers: Sequence[Answer]) -> Check:
    """Each answer has the tokens of the answer to the same prompt in `expected`."""
    differing = [
        answer.job.index
        for answer in answers
        if not answer.token_ids or answer.token_ids != expected[answer.job.index].token_ids
    ]
    seen = f"{len(answers) - len(differing)} of {len(answers)} answers equal token for token"
    if differing:
        seen += f"; different: requests {differing[:10]}"
    return Check(name, bool(answers) and not differing, seen)


def loads_equal_stores(name: str, lines: Iterable[AuditLine]) -> Check:
    """Every part that any engine loaded has the checksum of one that was stored under its key."""
    stored: dict[tuple[str, int, int], set[str]] = {}
    loads: list[AuditLine] = []
    for line in lines:
        if line.op == "store":
            stored.setdefault(line.part, set()).add(line.checksum)
        else:
            loads.append(line)
    wrong = [line for line in loads if line.checksum not in stored.get(line.part, ())]
    seen = f"{len(loads) - len(wrong)} of {len(loads)} loaded parts bitwise what was stored"
    if wrong:
        seen += f"; first other: key {wrong[0].key[:16]}"
    return Check(name, bool(loads) and not wrong, seen)


def reused_exactly(name: str, answers: Sequence[Answer], expected_tokens: Sequence[int]) -> Check:
    """Each request reused exactly so many prompt tokens, from whichever tier."""
    pairs = list(zip(answers, expected_tokens, strict=True))
    wrong = [
        f"request {answer.job.index} reused {answer.cached_tokens}, not {tokens}"
        for answer, tokens in pairs
        if answer.cached_tokens != tokens or not answer.succeeded
    ]
    seen = f"{sum(a.cached_tokens for a in answers)} tokens reused, {sum(expected_tokens)} expected"
    if wrong:
        seen += "; " + ", ".join(wrong[:4])
    return Check(name, bool(pairs) and not wrong, seen)


def reused_share_of_ideal(name: str, answers: Sequence[Answer], ideal_tokens: int) -> Check:
    """The gate on the whole slice: reused tokens over what an infinite cache would reuse."""
    reused = sum(answer.cached_tokens for answer in answers)
    share = reused / ideal_tokens if ideal_tokens else 0.0
    seen = f"{reused} of {ideal_tokens} tokens, {share:.3f} of the ideal"
    return Check(name, share >= MIN_SHARE_OF_IDEAL, seen)


def no_more_than_ideal(name: str, answers: Sequence[Answer], ideal_tokens: Sequence[int]) -> Check:
    """No request reused more than its own tenant had sent before: nothing came from another's."""
    wrong = [
        f"request {answer.job.index} reused {answer.cached_tokens} of at most {tokens}"
        for answer, tokens in zip(answers, ideal_tokens, strict=True)
        if answer.cached_tokens > tokens
    ]
    seen = (
        f"{len(answers) - len(wrong)} of {len(answers)} requests within their tenant's own prefixes"
    )
    if wrong:
        seen += "; " + ", ".join(wrong[:4])
    return Check(name, bool(answers) and not wrong, seen)


def first_from_host(name: str, lines: Sequence[AuditLine], answers: Sequence[Answer]) -> Check:
    """A restarted engine, whose own memory is empty, loaded parts; the answers name the host tier."""
    loads = sum(line.op == "load" for line in lines)
    host = sum(answer.host_tokens for answer in answers)
    seen = f"{loads} parts loaded by the restarted engine, {host} tokens from the host tier"
    return Check(name, loads > 0 and host > 0, seen)


def all_still_sealed(name: str, before: Collection[str], after: Collection[str]) -> Check:
    """Every key that SSD held durably before the crash is there after it."""
    missing = set(before) - set(after)
    seen = f"{len(before) - len(missing)} of {len(before)} sealed blocks there"
    return Check(name, bool(before) and not missing, seen)


def all_sealed_served(name: str, sealed: Collection[str], lines: Sequence[AuditLine]) -> Check:
    """Engines with empty memory loaded every sealed block, and none had to store one anew."""
    loaded = {line.key for line in lines if line.op == "load"}
    stored = {line.key for line in lines if line.op == "store"}
    missed, anew = set(sealed) - loaded, set(sealed) & stored
    seen = f"{len(sealed) - len(missed)} of {len(sealed)} sealed blocks loaded, {len(anew)} stored anew"
    if missed | anew:
        seen += f"; first: {min(missed | anew)[:16]}"
    return Check(name, bool(sealed) and not missed | anew, seen)


def some_tokens(name: str, tier: str, answers: Sequence[Answer]) -> Check:
    """The tier `tier` ("hbm", "host" or "ssd") gave something."""
    tokens = sum(int(getattr(answer, f"{tier}_tokens")) for answer in answers)
    return Check(name, tokens > 0, f"{tokens} tokens from {tier}")


def miss_is_explained(name: str, told: Mapping[str, Any], token: int) -> Check:
    """The router says that a request missed from `token` on, because of a withdrawal, and what each engine
    would have cost."""
    miss, candidates = told["miss"], told["candidates"]
    seen = (
        f"explain: {miss['reason']} from token {miss['first_missing_token']} on; of {len(candidates)} "
        f"engines {told['engine']} was the cheapest, {candidates[0]['cost_ms']['total']:.0f} ms"
    )
    right = miss["reason"] == "withdrawn" and miss["first_missing_token"] == token
    return Check(name, right and bool(candidates), seen)


def receipt_is_complete(
    name: str, receipt: Mapping[str, Any], kinds: Iterable[str], holders: Iterable[str] = ()
) -> Check:
    """The epoch rose, and a holder of each kind, and each of `holders` by its name, acknowledged rather than
    was waited out."""
    acked = [ack for ack in receipt["acknowledgements"] if not ack.get("waited_out")]
    who = sorted(f"{ack['holder_kind']} {ack['holder_id']}" for ack in acked)
    missing = set(kinds) - {ack["holder_kind"] for ack in acked}
    missing |= set(holders) - {ack["holder_id"].rpartition(".")[0] for ack in acked}
    old, new = int(receipt["old_epoch"]), int(receipt["new_epoch"])
    seen = f"epoch {old} -> {new}, acknowledged by {', '.join(who) or 'nobody'}"
    if missing:
        seen += f"; not by {', '.join(sorted(missing))}"
    return Check(name, new > old and not missing and bool(receipt["audit_head"]), seen)


def came_from_other_machines(
    name: str, told: Sequence[Mapping[str, Any]], lines: Iterable[AuditLine]
) -> Check:
    """Some of the answers that are explained in `told` had blocks of other nodes promised and fetched.

    `lines`: of engines that started with empty memory on machines that had nothing; parts that one of them
    loaded before any of them stored it came from another machine.
    """
    asked = [one["node"]["peer_blocks"] for one in told if one["node"] is not None]
    num_blocks, num_answers = sum(asked), sum(count > 0 for count in asked)
    stored: set[tuple[str, int, int]] = set()
    fetched: set[tuple[str, int, int]] = set()
    for line in lines:
        if line.op == "store":
            stored.add(line.part)
        elif line.part not in stored:
            fetched.add(line.part)
    seen = (
        f"{num_answers} of {len(told)} answers with {num_blocks} blocks of another machine; "
        f"{len(fetched)} parts loaded that nobody here had stored"
    )
    return Check(name, num_answers > 0 and bool(fetched), seen)


def answered_without_machine(
    name: str, answer: Answer, told: Mapping[str, Any], lost: str, expected: Answer
) -> Check:
    """The machine of engine `lost` is gone with the only copy of a prompt's blocks: another engine computed
    the same answer, and the router says why nothing was reused."""
    miss = told["miss"]
    seen = f"{told['engine']} answered, {answer.cached_tokens} tokens reused: {miss['reason']}"
    seen += f" from token {miss['first_missing_token']} on"
    for engine, why in told["left_out"].items():
        seen += f"; {engine}: {why}"
    right = answer.succeeded and answer.token_ids == expected.token_ids
    right = right and told["engine"] != lost and answer.cached_tokens < expected.prompt_tokens
    return Check(name, right and miss["reason"] != "none", seen)
