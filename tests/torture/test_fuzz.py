"""Proof 7: whatever bytes arrive, a decoder answers: no crash, no hang, no memory past its cap.

Hypothesis changes inputs that decode, a few hundred of each; a full run has atheris follow the code's own
branches for 10 million inputs, each decoder in a process of its own with a limit on its memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvfabric import handle as handles
from kvfabric.errors import BadHandle, RemoteProtocolError
from kvfabric.protocol.codec import MAX_HELLO_BYTES, FrameReader
from tests.torture.decoders import DECODERS, Decoder, close_files, feed_frames
from tests.torture.scale import FULL, count, record

pytestmark = pytest.mark.slow

EXAMPLES = count(150, 2000)
INPUTS = count(0, 10_000_000, "KVFABRIC_TORTURE_INPUTS")
"""Of atheris, all decoders together."""
ALLOCATED_PER_BYTE, ALLOCATED = 64, 256 << 10
"""What decoding may allocate: so much for each byte of the input, and so much besides."""
HANG_S, HANG_WALL_S = 1.0, 10
"""Of processor time, and of the clock where others may have the processor."""
DRIVER = Path(__file__).with_name("fuzz_atheris.py")


@pytest.fixture(autouse=True)
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()
    close_files()


def mutated(decoder: Decoder) -> st.SearchStrategy[bytes]:
    """Inputs near ones that decode: cut, spliced, with bytes replaced, and plain noise."""
    seeds = st.sampled_from(decoder.seeds)
    edits = st.lists(st.tuples(st.integers(0, 4095), st.binary(max_size=9)), max_size=6)

    def edit(seed: bytes, changes: list[tuple[int, bytes]], keep: int) -> bytes:
        data = bytearray(seed)
        for at, patch in changes:
            at %= len(data) + 1
            data[at : at + len(patch)] = patch
        return bytes(data[: keep or None])

    near = st.builds(edit, seeds, edits, st.sampled_from([0, 0, 0, 1, 7, 16, 31, 100]))
    return st.one_of(near, near, st.builds(lambda a, b: a + b, near, near), st.binary(max_size=300))


def allocated(feed: Callable[[], object]) -> int:
    """Most bytes that `feed` held at once, of what Python allocates."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    feed()
    return tracemalloc.get_traced_memory()[1] - before


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.name)
def test_a_decoder_answers_whatever_arrives(decoder: Decoder) -> None:
    """What decodes does, and everything else gets an error of the kind its caller expects, in time and
    within its memory."""
    for seed in decoder.seeds:
        decoder.run(seed)

    @settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(data=mutated(decoder))
    def feed(data: bytes) -> None:
        began = time.thread_time()
        peak = allocated(lambda: decoder.run(data))
        assert peak <= ALLOCATED + ALLOCATED_PER_BYTE * len(data), f"{peak} bytes for {data!r}"
        assert time.thread_time() - began < HANG_S, f"hangs on {data!r}"

    feed()


_LONG = st.integers(1, 60).map(lambda kib: b"\xff" + b"KVF1" + (kib << 10).to_bytes(4, "little"))


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "no cap"])
def test_a_long_frame_is_refused_before_it_is_held(guarded: bool) -> None:
    """A length is checked when it is read; without the cap the reader holds whatever is announced."""

    def reader() -> FrameReader:
        return FrameReader(MAX_HELLO_BYTES) if guarded else FrameReader()

    held = 0

    @settings(max_examples=60, deadline=None, database=None)
    @given(head=_LONG)
    def feed(head: bytes) -> None:
        nonlocal held
        try:
            feed_frames(head + bytes(8) + bytes(60 << 10), reader=reader)
        except AssertionError:
            held += 1
        except RemoteProtocolError:
            pass  # too long, or zeros are no message

    feed()
    assert (held == 0) == guarded


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "no cap"])
def test_a_long_handle_is_refused_before_it_is_decoded(
    guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handle of 8 MiB costs nothing; without the cap it is copied several times."""
    if not guarded:
        monkeypatch.setattr(handles, "MAX_HANDLE_CHARS", 1 << 30)
    text = "A" * (8 << 20)

    def feed() -> None:
        with pytest.raises(BadHandle):
            handles.open_handle(text, {1: bytes(32)}, audience=b"", now=0.0)

    peak = allocated(feed)
    assert (peak < ALLOCATED) == guarded


@pytest.mark.skipif(not FULL, reason="atheris runs in `make torture` only")
@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.name)
def test_coverage_guided_inputs(decoder: Decoder, tmp_path: Path) -> None:
    """No crash, no hang, no more than 1 GiB of address space beyond the start."""
    inputs = int(INPUTS * decoder.share)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(decoder.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    command = [
        sys.executable,
        str(DRIVER),
        decoder.name,
        f"-runs={inputs}",
        f"-timeout={HANG_WALL_S}",
    ]
    done = subprocess.run(
        [
            *command,
            "-max_len=4200",
            "-rss_limit_mb=768",
            f"-artifact_prefix={tmp_path}/",
            str(corpus),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Done (\d+) runs in (\d+) second", done.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    assert found is not None, done.stderr[-3000:]
    result = f"0 crashes, hangs or allocations past the cap (at most 3/{found[1]}, 95 %)"
    record(f"7 fuzzing, {decoder.name}", int(found[1]), result)
