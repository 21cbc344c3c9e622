"""Fixtures of tests that run whole fleets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory for commands that make directories of their own in it: the path of a Unix socket has at
    most 107 bytes, and those of pytest's workers are long."""
    with tempfile.TemporaryDirectory(prefix="kvf-") as directory:
        yield Path(directory)
