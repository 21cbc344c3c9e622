"""One decoder under atheris: `fuzz_atheris.py DECODER [libFuzzer options]`, its code instrumented."""

from __future__ import annotations

import logging
import resource
import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[2]
MEMORY_BYTES = 2 << 30
"""Of address space: several times what the process has once everything is imported."""


def main() -> None:
    name = sys.argv.pop(1)
    sys.path.insert(0, str(ROOT))
    with atheris.instrument_imports(include=["kvfabric", "tomllib"]):
        from tests.torture.decoders import DECODERS
    [decoder] = [decoder for decoder in DECODERS if decoder.name == name]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()  # of a file that does not read
    atheris.Setup(sys.argv, decoder.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
