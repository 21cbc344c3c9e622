"""What identity costs: the keyed BLAKE2b chain over 64-token blocks of a 128k-token prompt.

Beside it, in the same run: the raw limit (keyed BLAKE2b-256 of the same bytes in one go, no chain), and
as a peer the chain that vLLM computes by default, SHA-256 over the pickled (parent, tokens, extra keys)
of each block.
"""

from __future__ import annotations

import pickle
import random
from hashlib import blake2b, sha256

import harness
import numpy as np

from kvfabric.hashing import block_keys
from kvfabric.types import Incarnation, Segment

BLOCK_TOKENS = 64


def main() -> None:
    args = harness.parse_arguments(__doc__ or "")
    num_tokens = 8192 if args.quick else 131072
    source = random.Random(args.seed)
    tokens = [source.randrange(150_000) for _ in range(num_tokens)]
    array = np.asarray(tokens, dtype="<u4")
    raw = array.tobytes()
    key = source.randbytes(32)
    segments = tuple(
        Segment("template", str(n), Incarnation(source.randbytes(16)), n * 1000) for n in range(3)
    )

    def peer() -> None:
        parent = b""
        for start in range(0, num_tokens, BLOCK_TOKENS):
            block = (parent, tuple(tokens[start : start + BLOCK_TOKENS]), None)
            parent = sha256(pickle.dumps(block, protocol=pickle.HIGHEST_PROTOCOL)).digest()

    taken = harness.alternate(
        {
            "token ids in a list": lambda: block_keys(tokens, BLOCK_TOKENS, key),
            "token ids in an array": lambda: block_keys(array, BLOCK_TOKENS, key),
            "with three segments": lambda: block_keys(tokens, BLOCK_TOKENS, key, segments=segments),
            "raw limit": lambda: blake2b(raw, key=key, digest_size=32).digest(),
            "peer: SHA-256 of pickle": peer,
        },
        rounds=5 if args.quick else 51,
    )
    blocks = num_tokens / BLOCK_TOKENS
    rows = {
        name: {
            "us_per_block": harness.median(times) / blocks * 1e6,
            "ms": harness.median(times) * 1e3,
        }
        for name, times in taken.items()
    }
    for name, row in rows.items():
        print(f"{name:24} {row['us_per_block']:6.2f} us a block {row['ms']:8.2f} ms in all")
    ours = rows["token ids in a list"]
    figures = {
        "us_per_block": ours["us_per_block"],
        "ms_per_128k_prompt": ours["us_per_block"] * 131072 / BLOCK_TOKENS / 1e3,
        "over_raw_limit": ours["ms"] / rows["raw limit"]["ms"],
        "over_peer": ours["ms"] / rows["peer: SHA-256 of pickle"]["ms"],
    }
    harness.report("hashing", args, figures, rows)


if __name__ == "__main__":
    main()
