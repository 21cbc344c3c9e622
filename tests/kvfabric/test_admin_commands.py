from __future__ import annotations

import asyncio
import io
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvfabric import cli
from kvfabric.daemon.admin import AdminServer
from kvfabric.daemon.admin_sources import AdminSources
from kvfabric.daemon.fleet_models import FleetModels
from kvfabric.events.stream import EventStream
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.registry.changes import api_key_digest
from kvfabric.registry.embedded import EmbeddedRegistry
from kvfabric.registry.state import PURGED, RETIRED, SERVING, Tenant
from kvfabric.store.turns import Turns

ENGINE = pb.Engine(
    session=b"s" * 16,
    engine_id="e1",
    endpoint="http://127.0.0.1:8100",
    model="llama",
    model_revision="rev-1",
    block_tokens=64,
)


class Shell:
    """Runs commands against a served admin socket, as a user does."""

    def __init__(self, path: Path, registry: EmbeddedRegistry, output: Any) -> None:
        self.path = path
        self.registry = registry
        self._output = output

    async def run(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        """Standard output and error of a command that must exit with `code`."""
        command = list(arguments)
        end = command.index("--") if "--" in command else len(command)
        command[end:end] = ["--admin-socket", str(self.path)]
        found = await asyncio.to_thread(cli.main, command)
        out, err = self._output.readouterr()
        assert found == code, (out, err)
        return out, err

    async def json(self, *arguments: str) -> Any:
        return json.loads((await self.run(*arguments, "--json"))[0])

    def states(self) -> dict[str, str]:
        return {t.version: t.state for t in self.registry.state.templates.values()}


def node_status(sealed_keys: bool) -> pb.NodeStatus:
    del sealed_keys
    return pb.NodeStatus(
        tiers=[
            pb.TierStatus(
                tier="host",
                state="serving",
                capacity_bytes=1 << 30,
                used_bytes=3 << 20,
                num_blocks=9,
            )
        ],
        usage=[pb.TenantUsage(tenant_id="default", host_bytes=7 << 20)],
        counters={"hits": 5},
    )


@pytest.fixture
async def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Shell]:
    events = EventStream(boot_id=b"b" * 16)
    times = iter(range(1000, 10**9, 10))  # so that leases of a previous life are long over
    async with EmbeddedRegistry(tmp_path / "registry") as registry:
        keyring = Keyring.create_or_open(tmp_path)
        sources = AdminSources(
            registry,
            keyring,
            events,
            node_status,
            lambda _: iter(()),
            Turns().wait,
            FleetModels(lambda: [pb.Model(name=ENGINE.model, revision=ENGINE.model_revision)]),
        )
        path = tmp_path / "admin.sock"
        server = AdminServer(
            path, sources, node_id="n1", epoch_lease_s=2.0, clock=lambda: float(next(times))
        )
        async with server:
            events.engine_joined(ENGINE)
            yield Shell(path, registry, capsys)


async def test_status_for_people_and_for_programs(shell: Shell) -> None:
    out, _ = await shell.run("status")
    for word in ("node n1", "host", "serving", "3.0 MiB", "1.0 GiB", "e1", "llama", "rev-1"):
        assert word in out
    status = await shell.json("status")
    assert status["counters"] == {"hits": 5}
    assert status["tiers"][0]["used_bytes"] == 3 << 20
    assert status["engines"][0]["session"] == ENGINE.session.hex()


async def test_a_tenants_life(shell: Shell) -> None:
    created = await shell.json(
        "tenant", "create", "acme", "--host-max", "1GiB", "--host-floor", "1MiB"
    )
    assert created["api_key"].startswith("kvf-")
    assert created["tenant"]["host"] == {"max_bytes": 1 << 30, "floor_bytes": 1 << 20}
    out, _ = await shell.run(
        "tenant", "set", "acme", "--host-max", "2GiB", "--max-age", "60", "--opt-out"
    )
    assert "acme" in out
    (tenant,) = [t for t in (await shell.json("tenant", "list"))["tenants"] if t["name"] == "acme"]
    assert tenant["host"] == {"max_bytes": 2 << 30, "floor_bytes": 1 << 20}
    assert (tenant["max_age_s"], tenant["opted_out"]) == (60.0, True)
    assert (await shell.json("tenant", "set", "acme", "--opt-in"))["opted_out"] is False
    key = (await shell.json("tenant", "key", "create", "acme"))["api_key"]
    out, _ = await shell.run("tenant", "list")
    assert key not in out
    assert "2.0 GiB / 1.0 MiB" in out
    out, _ = await shell.run("tenant", "key", "revoke", "acme", tenant["api_key_digests"][0][:8])
    assert "1 API keys left" in out


async def test_secrets_are_shown_once_in_plain_output_too(shell: Shell) -> None:
    out, _ = await shell.run("tenant", "create", "acme")
    assert "API key (shown once): kvf-" in out
    out, _ = await shell.run("tenant", "key", "create", "acme")
    assert "API key (shown once): kvf-" in out


async def test_usage_names_tenants(shell: Shell) -> None:
    out, _ = await shell.run("tenant", "usage")
    assert "default" in out
    assert "7.0 MiB" in out
    assert (await shell.json("tenant", "usage"))["usage"] == [
        {
            "name": "default",
            "tenant_id": "default",
            "host_bytes": 7 << 20,
            "ssd_bytes": 0,
            "leased_bytes": 0,
            "ssd_written_bytes": 0,
            "pinned_bytes": 0,
            "pin_max_bytes": 0,
            "pins_refused": 0,
        }
    ]


async def test_a_templates_life(shell: Shell, tmp_path: Path) -> None:
    for version in ("1", "2"):
        (tmp_path / version).write_text(f"You are assistant {version}.")
    register = ("template", "register", "greeting")
    assert (await shell.run("template", "list"))[0] == "nothing\n"
    out, _ = await shell.run(*register, "--version", "1", "--file", str(tmp_path / "1"), "--public")
    assert "is serving" in out
    out, _ = await shell.run(*register, "--version", "2", "--file", str(tmp_path / "2"))
    assert "kvfabric template promote greeting 2" in out
    receipt = await shell.json("template", "promote", "greeting", "2")
    assert receipt["new_epoch"] == receipt["old_epoch"] + 1
    assert shell.states() == {"1": RETIRED, "2": SERVING}
    listed = (await shell.json("template", "list"))["templates"]
    assert [t["text"] for t in listed if t["is_public"]] == ["You are assistant 1."]
    out, _ = await shell.run("template", "list")
    assert "retired" in out
    out, _ = await shell.run("template", "promote", "greeting", "--version", "1")
    assert "promote_template template:greeting, epoch 3 -> 4" in out
    out, _ = await shell.run("invalidate", "template", "greeting", "--version", "1")
    assert "retire_template" in out
    assert "node" in out
    assert "audit head" in out
    await shell.run("invalidate", "template", "greeting", "--purge")
    assert shell.states() == {"1": PURGED, "2": PURGED}
    _, err = await shell.run("template", "promote", "greeting", "1", code=1)
    assert "never serves again" in err


async def test_template_text_comes_from_standard_input(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello")))
    register = ("template", "register", "greeting", "--version", "1", "--file", "-")
    assert (await shell.json(*register))["text"] == "hello"


async def test_receipt_as_json_is_whole_and_invents_nothing(shell: Shell) -> None:
    receipt = await shell.json("invalidate", "model", "llama")
    assert receipt["scope"] == "model:rev-1"
    assert (receipt["old_epoch"], receipt["new_epoch"]) == (0, 1)
    assert len(bytes.fromhex(receipt["audit_head"])) == 32
    assert receipt["acknowledgements"][0]["holder_kind"] == "node"
    assert "@" in receipt["requested_by"]
    assert receipt["bytes_unreachable"] == 0


async def test_errors_are_one_line_with_what_to_do(shell: Shell, tmp_path: Path) -> None:
    for arguments, code, words in (
        (("tenant", "set", "nobody"), 1, "tenant list"),
        (("tenant", "create", "a b"), 2, "letters"),
        (("tenant", "create", "acme", "--host-max", "lots"), 2, "--host-max"),
        (("tenant", "key", "revoke", "default", "12"), 2, "8 hex"),
        (("template", "promote", "t"), 2, "name one version"),
        (("template", "promote", "t", "1", "--version", "2"), 2, "name one version"),
        (("template", "register", "t", "--version", "1", "--file", "/no/file"), 2, "/no/file"),
        (("invalidate", "tenant", "default", "--version", "1"), 2, "--version"),
        (("invalidate", "model", "lama"), 1, "there are llama"),
    ):
        out, err = await shell.run(*arguments, code=code)
        assert out == ""
        assert err.startswith("kvfabric: ")
        assert err.count("\n") == 1
        assert words in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["tenant"],
        ["tenant", "explode"],
        ["tenant", "set", "x", "--opt-in", "--opt-out"],
        ["invalidate", "galaxy", "x"],
        ["invalidate", "template", "x", "--retire", "--purge"],
        ["template", "register", "x"],
    ],
)
def test_wrong_use_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_no_node_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    socket = str(tmp_path / "admin.sock")
    for arguments in (["status"], ["tenant", "list"]):
        assert cli.main([*arguments, "--admin-socket", socket]) == 1
        err = capsys.readouterr().err
        assert f"no node answers at {socket}" in err
        assert err.count("\n") == 1


def test_admin_socket_comes_from_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFABRIC_NODE_STATE_DIR", str(tmp_path / "state"))
    assert cli.main(["status"]) == 1
    assert str(tmp_path / "state" / "admin.sock") in capsys.readouterr().err
    file = tmp_path / "fabric.toml"
    file.write_text('[node]\nadmin_socket = "/tmp/elsewhere.sock"\n')
    assert cli.main(["status", "--config", str(file)]) == 1
    assert "/tmp/elsewhere.sock" in capsys.readouterr().err


def test_sizes_beyond_any_tier_are_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tenant", "create", "x", "--host-max", "99999999TiB"]) == 2
    err = capsys.readouterr().err
    assert "--host-max" in err
    assert err.count("\n") == 1


def test_too_long_a_socket_path_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--admin-socket", "/tmp/" + "a" * 200]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_user_without_a_name_may_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's user id often has no entry in the password file, and no variable names it."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 123_456_789)
    assert cli.main(["status", "--admin-socket", str(tmp_path / "admin.sock")]) == 1
    assert "no node answers" in capsys.readouterr().err


async def test_limits_of_a_tenant_are_set_shown_and_kept(shell: Shell) -> None:
    await shell.run("tenant", "create", "acme", "--requests-per-s", "5", "--lease-max", "1GiB")
    await shell.run("tenant", "set", "acme", "--ssd-write-per-day", "3GiB")
    listed = await shell.json("tenant", "list")
    (acme,) = [one for one in listed["tenants"] if one["name"] == "acme"]
    assert acme["limits"] == {
        "lease_max_bytes": 1 << 30,
        "ssd_write_bytes_per_day": 3 << 30,
        "requests_per_s": 5.0,
        "pin_max_bytes": None,
    }
    out, _ = await shell.run("tenant", "list")
    assert "3.0 GiB/day" in out
    assert "5/s" in out
    await shell.run("tenant", "set", "acme", "--requests-per-s", "0")
    (again,) = [t for t in shell.registry.state.tenants.values() if t.name == "acme"]
    assert (again.limits.requests_per_s, again.limits.lease_max_bytes) == (0.0, 1 << 30)
    _, err = await shell.run("tenant", "set", "acme", "--requests-per-s", "-1", code=2)
    assert "requests_per_s" in err


async def test_pin_budgets_are_set_shown_and_kept(shell: Shell) -> None:
    await shell.run("tenant", "create", "acme", "--pin-budget", "2GiB")
    await shell.run("tenant", "set", "acme", "--lease-max", "1GiB")
    out, _ = await shell.run("tenant", "list")
    assert "2.0 GiB" in out

    def budget() -> int | None:
        (found,) = [t for t in shell.registry.state.tenants.values() if t.name == "acme"]
        return found.limits.pin_max_bytes

    assert budget() == 2 << 30
    for text, expected in (("0", 0), ("default", None), ("1MiB", 1 << 20)):
        await shell.run("tenant", "set", "acme", "--pin-budget", text)
        assert budget() == expected
    _, err = await shell.run("tenant", "set", "acme", "--pin-budget", "much", code=2)
    assert "--pin-budget" in err


async def test_a_template_is_pinned_and_unpinned(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("You are kind.")
    file = ("--file", str(tmp_path / "t"))
    await shell.run("template", "register", "greeting", "--version", "1", *file)
    before = shell.registry.state
    out, _ = await shell.run("template", "pin", "greeting", "--ttl", "60")
    assert "template greeting 1 is pinned until 20" in out
    listed, _ = await shell.run("template", "list")
    assert "until 20" in listed
    (plain,) = (await shell.json("template", "list"))["templates"]
    assert plain["pin_s"] == 60.0
    assert plain["pinned_until"] > 60.0
    assert shell.registry.state.epochs == before.epochs
    out, _ = await shell.run("template", "unpin", "greeting", "--version", "1")
    assert "not pinned any more" in out
    assert "until" not in (await shell.run("template", "list"))[0]
    for arguments, code, words in (
        (("unpin", "greeting"), 1, "is not pinned"),
        (("unpin", "parting"), 1, "template list"),
        (("pin", "greeting", "--version", "2", "--ttl", "1"), 1, "template list"),
        (("pin", "greeting", "--ttl", "0"), 2, "up to"),
        (("pin", "greeting", "--ttl", "nan"), 2, "up to"),
        (("pin", "greeting", "--ttl", "1e9"), 2, "up to"),
    ):
        _, err = await shell.run("template", *arguments, code=code)
        assert words in err
        assert err.count("\n") == 1


async def test_api_keys_are_rotated_with_and_without_grace(shell: Shell) -> None:
    await shell.run("tenant", "create", "acme")

    def acme() -> Tenant:
        (found,) = [t for t in shell.registry.state.tenants.values() if t.name == "acme"]
        return found

    first = acme().api_key_digests
    rotated = await shell.json("tenant", "key", "rotate", "acme", "--grace", "60")
    second = api_key_digest(rotated["api_key"])
    assert acme().api_key_digests == (second,)
    ((left, at),) = acme().expiring_keys
    assert left == first[0]
    assert 50 < at - time.time() < 61
    out, _ = await shell.run("tenant", "list")
    assert f"{left.hex()[:8]} (until " in out
    await shell.json("tenant", "key", "rotate", "acme", "--grace", "3600")
    assert dict(acme().expiring_keys)[left] == at, "its end was told already"
    await shell.run("tenant", "key", "revoke", "acme", left.hex()[:8])
    assert [digest for digest, _ in acme().expiring_keys] == [second]
    await shell.json("tenant", "key", "rotate", "acme")
    assert (len(acme().api_key_digests), acme().expiring_keys) == (1, ())
    _, err = await shell.run("tenant", "key", "rotate", "acme", "--grace", "-1", code=2)
    assert "grace" in err


def files_in(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc", ".", "-x", "a\nb", "a b", "ä", "", "a" * 129]
)
async def test_names_that_could_mean_something_else_are_refused(
    shell: Shell, tmp_path: Path, name: str
) -> None:
    before = files_in(tmp_path)
    text = tmp_path / "text"
    text.write_text("Be kind.")
    _, err = await shell.run("tenant", "create", "--", name, code=2)
    assert err.count("\n") == 1
    there = ("--version", "1", "--file", str(text))
    await shell.run("template", "register", *there, "--", name, code=2)
    text.unlink()
    assert files_in(tmp_path) == before
    assert len(shell.registry.state.tenants) == 2
    assert not shell.registry.state.templates
