"""Cut the demo's slice out of the Mooncake conversation trace, by the rule of `kvfabric.demo.slice`."""

from __future__ import annotations

from pathlib import Path

from kvfabric.demo import slice as demo_slice

ROOT = Path(__file__).resolve().parent.parent
TRACE = ROOT / "benchmarks" / "traces" / "mooncake_conversation.jsonl.gz"
TARGET = ROOT / "kvfabric" / "demo" / "slice.jsonl.gz"


def main() -> None:
    with TRACE.open("rb") as file:
        requests = demo_slice.cut(demo_slice.read_trace(file))
    TARGET.write_bytes(demo_slice.dump(requests))
    groups = {request.group for request in requests}
    print(f"{len(requests)} requests in {len(groups)} groups -> {TARGET.name}")


if __name__ == "__main__":
    main()
