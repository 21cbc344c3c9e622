"""The generated code of the control plane is what `make proto` makes of the committed .proto."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTO = "kvfabric/protocol/kvfabric.proto"
GENERATED = ("kvfabric_pb2.py", "kvfabric_pb2.pyi", "kvfabric_pb2_grpc.py")


@pytest.mark.slow
def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    outs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT), *outs, str(ROOT / PROTO)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=60)
    for name in GENERATED:
        fresh = tmp_path / "kvfabric" / "protocol" / name
        assert filecmp.cmp(fresh, ROOT / "kvfabric" / "protocol" / name, shallow=False), name
