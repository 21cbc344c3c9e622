"""`wire = "aes-gcm"` between real nodes: what goes over the network, and what happens to it there."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfabric.testing.engine import payload_of
from kvfabric.testing.processes import NodeProcess
from kvfabric.types import BlockKey
from tests.fleet.test_peers import LARGE, SMALL, found_after, nodes_on

pytestmark = [pytest.mark.slow, pytest.mark.fleet]

_RCVBUFFORCE = 33  # of Linux; the module does not name it


@contextlib.contextmanager
def overheard() -> Iterator[bytearray]:
    """All bytes that go over loopback meanwhile."""
    try:
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    except PermissionError:
        pytest.skip("needs CAP_NET_RAW")
    heard, ends = bytearray(), threading.Event()

    def listen() -> None:
        while not ends.is_set():
            with contextlib.suppress(TimeoutError):
                heard.extend(raw.recv(1 << 17))

    with raw:
        raw.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, 256 << 20)
        raw.bind(("lo", 0))
        raw.settimeout(0.2)
        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield heard
        finally:
            ends.set()
            thread.join()


def has_heard(heard: bytearray, keys: list[BlockKey], part_bytes: int) -> int:
    """How many blocks' bytes went by, by 64 of them."""
    return sum(payload_of(key, part_bytes)[256:320] in heard for key in keys)


@pytest.mark.parametrize("wire", ["plain", "aes-gcm"])
def test_who_listens_to_the_network_sees_no_block_that_is_sealed(tmp_path: Path, wire: str) -> None:
    """`plain` is the twin: there all are seen."""
    # A longer lease: to listen to all of loopback takes a processor.
    with nodes_on(tmp_path, wire=wire, epoch_lease_s=5.0) as pair:
        for num_blocks, part_bytes in ((60, SMALL), (4, LARGE)):
            with overheard() as heard:
                assert found_after(pair, wire, num_blocks, part_bytes) == (num_blocks, 0)
            engine = pair.engine(pair.b, part_bytes)
            keys = engine.open("see", wire, num_blocks, pair.handle(engine, "see"))
            seen = has_heard(heard, keys, part_bytes)
            assert seen == (num_blocks if wire == "plain" else 0), part_bytes
            assert len(heard) > num_blocks * part_bytes  # it did go by


def test_what_was_tampered_with_is_no_block(tmp_path: Path) -> None:
    """Though its receiver would believe any checksum."""
    receiver = ("believes_what_comes",)
    with nodes_on(
        tmp_path, sender=("sends_something_else",), receiver=receiver, wire="aes-gcm"
    ) as pair:
        assert found_after(pair, "untouched", 12, LARGE) == (12, 0)
        (pair.a.state_dir / "fault").write_text("tampered")
        assert found_after(pair, "small", 100, SMALL) == (0, 0)
        assert found_after(pair, "large", 12, LARGE) == (0, 0)
        metrics = pair.b.metrics()
        assert metrics['transfers_total{result="corrupt_blocks"}'] == 112
        assert metrics["draining_bytes"] == 0


def test_without_tags_it_is_served(tmp_path: Path) -> None:
    """The twin."""
    receiver = ("believes_what_comes", "takes_any_seal")
    with nodes_on(
        tmp_path, sender=("sends_something_else",), receiver=receiver, wire="aes-gcm"
    ) as pair:
        (pair.a.state_dir / "fault").write_text("tampered")
        assert found_after(pair, "small", 100, SMALL) == (100, 100)


def test_keys_never_go_over_plain_tcp(tmp_path: Path) -> None:
    node = NodeProcess(
        tmp_path / "n",
        wire="aes-gcm",
        ucx_net_devices="lo",
        directory="redis://127.0.0.1:1",
        listen="127.0.0.1:0",
        insecure=True,
    )
    with pytest.raises(RuntimeError, match=r"node\.wire = aes-gcm needs node\.tls_dir"):
        node.start()
