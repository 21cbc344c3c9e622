"""An LMDB file, simulated: what a transaction wrote is there once it ended, and survives every crash."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

Table = dict[bytes, bytes]


class SimulatedFiles:
    """The LMDB files of one machine, by directory. `open_env`: as `registry.database.open_environment`."""

    def __init__(self) -> None:
        self._files: dict[Path, dict[bytes, Table]] = {}
        self.num_commits = 0

    def open_env(self, directory: Path) -> _Env:
        return _Env(self, self._files.setdefault(directory, {}))


class _Env:
    def __init__(self, files: SimulatedFiles, tables: dict[bytes, Table]) -> None:
        self._files = files
        self._tables = tables

    def open_db(self, name: bytes, *_: Any, **__: Any) -> bytes:
        self._tables.setdefault(name, {})
        return name

    def close(self) -> None:
        pass

    @contextmanager
    def begin(self, *, write: bool = False) -> Iterator[_Transaction]:
        work = _Transaction(
            {name: dict(table) for name, table in self._tables.items()} if write else self._tables
        )
        yield work
        if write:
            self._tables.clear()
            self._tables.update(work.tables)
            self._files.num_commits += 1


class _Transaction:
    def __init__(self, tables: dict[bytes, Table]) -> None:
        self.tables = tables

    def get(self, key: bytes, *, db: bytes) -> bytes | None:
        return self.tables[db].get(key)

    def put(self, key: bytes, value: bytes, *, db: bytes) -> bool:
        self.tables[db][bytes(key)] = bytes(value)
        return True

    def drop(self, db: bytes, *, delete: bool) -> None:
        self.tables[db] = {}

    def cursor(self, *, db: bytes) -> _Cursor:
        return _Cursor(self.tables[db])


class _Cursor:
    def __init__(self, table: Table) -> None:
        self._rows = sorted(table.items())
        self._at = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(self._rows)

    def set_range(self, key: bytes) -> bool:
        self._at = bisect_left(self._rows, (key, b""))
        return self._at < len(self._rows)

    def key(self) -> bytes:
        return self._rows[self._at][0]

    def value(self) -> bytes:
        return self._rows[self._at][1]

    def next(self) -> bool:
        self._at += 1
        return self._at < len(self._rows)
