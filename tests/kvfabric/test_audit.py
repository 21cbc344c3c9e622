from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from kvfabric import cli
from kvfabric.registry import audit
from kvfabric.registry.audit import FIRST_HEAD, AuditRecord, first_broken, link, problem_with
from kvfabric.registry.embedded import EmbeddedRegistry

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


def made_anew(entries: Entries) -> Entries:
    """What somebody who can write everything makes of these records: numbers, heads and all."""
    found: Entries = []
    head = FIRST_HEAD
    for number, (record, _) in enumerate(entries, start=1):
        old = audit.decode(record)
        fields = [getattr(old, name) for name in old.__struct_fields__]
        renumbered = audit.encode(AuditRecord(number, *fields[1:]))
        head = link(head, renumbered)
        found.append((renumbered, head))
    return found


@pytest.mark.parametrize(
    "forge",
    [
        lambda entries: entries[:3] + chain(9)[6:7] + entries[4:],
        lambda entries: entries[:1] + entries[2:],
        lambda entries: [entries[1], entries[0], *entries[2:]],
        lambda entries: entries[:3],
    ],
    ids=["changed", "dropped", "reordered", "truncated"],
)
def test_a_receipt_shows_what_was_forged_with_the_whole_chain(
    forge: Callable[[Entries], Entries],
) -> None:
    entries = chain(5)
    receipt = entries[-1][1]
    forged = made_anew(forge(entries))
    assert problem_with(entries, receipt, [entries[2][1], receipt]) == ""
    assert problem_with(forged, forged[-1][1]) == "", "without a receipt nothing shows"
    assert "no record has the head" in problem_with(forged, forged[-1][1], [receipt])


async def test_the_command_reads_beside_the_node_and_finds_a_changed_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with EmbeddedRegistry(tmp_path / "registry") as registry:
        changes = [
            await registry.invalidate("model", "m", "", purge=False, requested_by="alice")
            for _ in range(3)
        ]
    where = ["--state-dir", str(tmp_path)]
    heads = [change.audit_head.hex() for change in changes]
    assert cli.main(["audit", "verify", *where, "--head", heads[0], "--head", heads[2]]) == 0
    assert "3 records hold" in capsys.readouterr().out
    assert cli.main(["audit", "list", *where]) == 0
    listed = capsys.readouterr().out
    assert [line.rsplit(" ", 1)[1] for line in listed.splitlines()] == heads
    assert "alice  retire_model model:m 0 -> 1" in listed
    assert cli.main(["audit", "verify", *where, "--head", "00" * 32]) == 1
    assert "no record has the head" in capsys.readouterr().err
    assert cli.main(["audit", "verify", *where, "--head", "xy"]) == 2
    with lmdb.open(str(tmp_path / "registry"), max_dbs=8) as env:
        table = env.open_db(b"audit")
        with env.begin(write=True) as txn:
            key = (2).to_bytes(8, "big")
            row = txn.get(key, b"", db=table)
            txn.put(key, row.replace(b"alice", b"mallo"), db=table)
    capsys.readouterr()
    assert cli.main(["audit", "verify", *where]) == 1
    assert "record 2 does not hold" in capsys.readouterr().err
    assert cli.main(["audit", "list", "--state-dir", str(tmp_path / "no")]) == 2
