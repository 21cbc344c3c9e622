"""The page of results: a row replaces its own, and leaves the others."""

from __future__ import annotations

from tests.torture.publish import PAGE, merged
from tests.torture.scale import at_most


def test_rows_replace_their_own() -> None:
    """A later run of one proof does not lose what others measured elsewhere."""
    one: dict[str, object] = {"proof": "1 kills", "n": 10, "result": at_most(0, 10)}
    two: dict[str, object] = {"proof": "2 flips", "n": 20, "result": at_most(3, 20)}
    page = merged(PAGE.read_text(), [two, one], command="make torture", on="here", at="abc")
    page = merged(page, [one | {"n": 30}], command="make torture", on="there", at="def")
    assert [line for line in page.splitlines() if "here" in line and line.startswith("| ")][
        -2:
    ] == [
        "| 1 kills | `make torture` | 30 | 0 (at most 3/10, 95 %) | there | def |",
        "| 2 flips | `make torture` | 20 | 3 | here | abc |",
    ]
