"""Configuration: flag over environment over file over default, and every mistake names its key."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from kvfabric import config
from kvfabric.config import EngineConfig, NodeConfig, RouterConfig
from kvfabric.errors import ConfigError


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    file = tmp_path / "kvfabric.toml"
    file.write_text(
        '[fabric]\nstate_dir = "/srv/kv"\n[node]\nhost_bytes = "2GiB"\nlease_s = 5\n'
        '[router]\nnodes = ["/a.sock", "/b.sock"]\n[engine]\ndevice = "cuda"\n'
    )
    return file


def test_defaults_are_valid() -> None:
    for cls in (NodeConfig, RouterConfig, EngineConfig):
        cls()


def test_file_serves_every_process(toml: Path) -> None:
    node = config.load(NodeConfig, file=toml, flags={})
    router = config.load(RouterConfig, file=toml, flags={})
    engine = config.load(EngineConfig, file=toml, flags={})
    assert (node.host_bytes, node.lease_s, node.state_dir) == (2 << 30, 5.0, Path("/srv/kv"))
    assert node.admin_socket_path == Path("/srv/kv/admin.sock")
    assert router.node_targets == ("unix:/a.sock", "unix:/b.sock")
    assert router.state_dir == Path("/srv/kv")
    assert engine.device == "cuda"


def test_flag_beats_environment_beats_file(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFABRIC_NODE_HOST_BYTES", "3GiB")
    monkeypatch.setenv("KVFABRIC_NODE_REQUIRE_HANDLE", "yes")
    from_environment = config.load(NodeConfig, file=toml, flags={})
    assert (from_environment.host_bytes, from_environment.require_handle) == (3 << 30, True)
    assert config.load(NodeConfig, file=toml, flags={"host_bytes": "4096"}).host_bytes == 4096


def test_every_key_is_a_flag() -> None:
    parser = argparse.ArgumentParser()
    config.add_arguments(parser, RouterConfig)
    args = parser.parse_args(["--nodes", "/a, /b", "--fabric", "false", "--handle-ttl-s", "1.5"])
    router = config.from_args(RouterConfig, args)
    assert (router.nodes, router.fabric, router.handle_ttl_s) == (("/a", "/b"), False, 1.5)


def _load_section(text: str, file: Path) -> NodeConfig | RouterConfig:
    if "router" in text:
        return config.load(RouterConfig, file=file, flags={})
    return config.load(NodeConfig, file=file, flags={})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[node]\nhost_byte = 1\n", "node.host_byte"),
        ("[nodes]\nx = 1\n", r"\[nodes\]"),
        ("[fabric]\nhost_bytes = 1\n", "fabric.host_bytes"),
        ("node = 1\n", "node must be a section"),
        ("[node]\nlease_s = true\n", "node.lease_s"),
        ("[node]\nhost_bytes = 1.5\n", "node.host_bytes"),
        ("[node]\nhost_bytes = '1 potato'\n", "node.host_bytes"),
        ("[node]\nhost_bytes = 0\n", "node.host_bytes"),
        ("[node]\nnode_id = 1\n", "node.node_id"),
        ("[node]\nlog_level = 'loud'\n", "node.log_level"),
        ("[router]\nnodes = 3\n", "router.nodes"),
        ("[node]\nrequire_handle = 'perhaps'\n", "node.require_handle"),
        ("[node\n", "not TOML"),
    ],
)
def test_mistake_in_the_file_names_itself(tmp_path: Path, text: str, names: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=names):
        _load_section(text, file)


def test_unknown_environment_variable_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFABRIC_NODE_HOST_BYTE", "1")
    with pytest.raises(ConfigError, match="KVFABRIC_NODE_HOST_BYTE"):
        config.load(NodeConfig, file=None, flags={})


def test_missing_file_names_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml"):
        config.load(NodeConfig, file=tmp_path / "gone.toml", flags={})


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"vocab_size": 100}, "vocab_size"),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads"),
        ({"block_tokens": 40}, "block_tokens"),
        ({"block_tokens": -16}, "block_tokens"),
        ({"dtype": "int8"}, "dtype"),
        ({"nothing": 1}, "engine.nothing"),
    ],
)
def test_engine_shape_that_cannot_be_is_refused(flags: dict[str, object], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        config.load(EngineConfig, file=None, flags=flags)


@pytest.mark.parametrize(
    "flags",
    [{"lease_s": "nan"}, {"lease_s": "inf"}, {"ssd_bytes": "-5"}, {"host_bytes": "8388608TiB"}],
)
def test_number_that_cannot_be_names_its_key(flags: dict[str, object]) -> None:
    (name,) = flags
    with pytest.raises(ConfigError, match=name.replace("_", "[-_]")):
        config.load(NodeConfig, file=None, flags=flags)


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("64", 64), ("4KiB", 4096), ("2 MiB", 2 << 20), ("1tib", 1 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert config.parse_size(text, "key") == size


@pytest.mark.parametrize("text", ["", ":80", "host", "host:", "host:99999", "host:http", "host:8²"])
def test_wrong_address_names_its_key(text: str) -> None:
    with pytest.raises(ConfigError, match=r"router\.listen"):
        config.split_address(text, "router.listen")


def test_a_number_of_too_many_digits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"node\.host_bytes"):
        config.parse_size("9" * 5000, "node.host_bytes")


def test_addresses() -> None:
    assert config.split_address("127.0.0.1:80", "k") == ("127.0.0.1", 80)
    assert config.split_address("[::1]:80", "k") == ("::1", 80)


def test_a_folder_says_what_its_model_is() -> None:
    """Keys of the random model beside a folder are refused, not overruled; the folder gives the name."""
    engine = EngineConfig(model_path="/models/some-llama", max_model_tokens=100)
    assert engine.model_name == "some-llama"
    assert EngineConfig(model_path="/models/some-llama", model="mine").model_name == "mine"
    assert EngineConfig().model_name == "reference"
    for key in ("num_layers", "vocab_size", "seed"):
        with pytest.raises(ConfigError, match=f"engine.{key} is for random weights"):
            EngineConfig(model_path="/models/some-llama", **{key: 300})  # type: ignore[arg-type]


def test_a_password_that_ps_would_show_is_refused_and_not_repeated() -> None:
    parser = argparse.ArgumentParser()
    config.add_arguments(parser, NodeConfig)
    for user in ("", "kv"):
        args = parser.parse_args(["--directory", f"rediss+sentinel://{user}:hush@h:1,i/p"])
        with pytest.raises(ConfigError, match="password_file") as caught:
            config.from_args(NodeConfig, args)
        assert "hush" not in str(caught.value)
    for fine in ("rediss://kv@h:1/?password_file=f", "unix:///a:b@c/redis.sock"):
        found = config.from_args(NodeConfig, parser.parse_args(["--directory", fine]))
        assert found.directory == fine
