from __future__ import annotations

import pytest

from kvfabric.registry import audit
from kvfabric.registry.audit import FIRST_HEAD, AuditRecord, first_broken, link

Entries = list[tuple[bytes, bytes]]


def chain(count: int) -> Entries:
    entries: Entries = []
    head = FIRST_HEAD
    for number in range(1, count + 1):
        record = audit.encode(
            AuditRecord(number, 1e9, "alice", "retire_model", "model:m", "", number - 1, number, 1)
        )
        head = link(head, record)
        entries.append((record, head))
    return entries


def test_an_untouched_chain_holds() -> None:
    entries = chain(5)
    assert first_broken(entries, entries[-1][1]) is None
    assert first_broken([], FIRST_HEAD) is None
    assert [record.sequence for record in audit.records(entries)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("at", [0, 2, 4])
def test_changed_dropped_swapped_and_inserted_records_are_found(at: int) -> None:
    entries = chain(5)
    head = entries[-1][1]
    record, claimed = entries[at]
    changed = bytes([*record[:-1], record[-1] ^ 1])
    assert first_broken([*entries[:at], (changed, claimed), *entries[at + 1 :]], head) == at + 1
    assert first_broken([*entries[:at], *entries[at + 1 :]], head) == at + 1
    assert first_broken([*entries[: at + 1], *entries[at:]], head) == at + 2
    assert first_broken([*entries[:at], (b"\xc1", claimed), *entries[at + 1 :]], head) == at + 1


def test_a_chain_that_was_cut_does_not_reach_its_head() -> None:
    entries = chain(5)
    assert first_broken(entries[:3], entries[-1][1]) == 4
    assert first_broken([], entries[-1][1]) == 1


def test_a_chain_made_anew_does_not_end_at_the_head_of_a_receipt() -> None:
    """Whoever can write the whole file can make a chain that holds: a receipt kept elsewhere shows it."""
    forged = [
        (audit.encode(AuditRecord(n, 0.0, "mallory", "a", "s", "", 0, 1, 1)), b"") for n in (1, 2)
    ]
    head = FIRST_HEAD
    entries: Entries = []
    for record, _ in forged:
        head = link(head, record)
        entries.append((record, head))
    assert first_broken(entries, head) is None
    assert first_broken(entries, chain(2)[-1][1]) == 3
