"""What an engine process imports clashes with nothing that an engine pins."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("grpc", "google.protobuf", "lmdb", "redis", "ucxx", "aiohttp", "cryptography")
LIGHT = ("kvfabric.client", "kvfabric.hashing", "kvfabric.handle", "kvfabric.protocol.codec")


def _loaded_after(modules: tuple[str, ...]) -> set[str]:
    code = f"import sys\nfor m in {modules!r}: __import__(m)\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    return set(done.stdout.split())


@pytest.mark.slow
def test_client_imports_little() -> None:
    assert not _loaded_after(LIGHT) & {*HEAVY, "torch"}


@pytest.mark.slow
def test_connector_imports_little_beside_torch() -> None:
    assert not _loaded_after(("kvfabric_engine.connector",)) & set(HEAVY)


@pytest.mark.slow
def test_a_heavy_import_would_be_seen() -> None:
    """The check itself works: the keyring does load cryptography."""
    assert _loaded_after(("kvfabric.keyring",)) & set(HEAVY)
