"""Configuration: one frozen dataclass a process, and the only reader of TOML and KVFABRIC_* variables.

One file serves all processes of a machine: sections [node], [router], [engine], and [fabric] for keys that
several of them share. Precedence: flag, then environment variable KVFABRIC_<SECTION>_<KEY>, then the
process's own section, then [fabric], then the default. Tenants and templates are data, not configuration.

Sizes accept `512MiB`, `4GiB` or plain bytes. Validation rejects; it never changes another key.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import socket
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from kvfabric.errors import ConfigError
from kvfabric.types import ENGINE_ROLES

_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"(\d{1,20})\s*([KMGT]iB)?", re.IGNORECASE)
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


TLS_HELP = "directory with ca.crt, tls.crt and tls.key of this process (`kvfabric pki` makes one)"
DIRECTORY_HELP = (
    "registry of a fleet: rediss://USER@HOST/?password_file=FILE&ca=FILE, unix:///SOCKET or "
    "rediss+sentinel://HOST,HOST/PRIMARY; empty: each node has its own"
)


def default_state_dir() -> Path:
    """Where a node keeps keyring, registry, SSD tier and sockets unless told otherwise."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "kvfabric"


def _key(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """The node daemon, section [node]."""

    section = "node"

    node_id: str = _key("", "name of this node in the fleet (default: host name)")
    state_dir: Path = dataclasses.field(
        default_factory=default_state_dir,
        metadata={"help": "keyring, registry, SSD tier and sockets live here"},
    )
    socket: str = _key("", "Unix socket for engines (default: STATE_DIR/node.sock)")
    admin_socket: str = _key("", "Unix socket for gRPC (default: STATE_DIR/admin.sock)")
    listen: str = _key("", "HOST:PORT for gRPC beside that, over mTLS; empty: none")
    advertise: str = _key("", "HOST:PORT under which others reach `listen` (default: the same)")
    http: str = _key("127.0.0.1:9470", "address of /metrics, /healthz, /readyz; empty for none")
    host_bytes: int = _key(1 << 30, "size of the host tier")
    ssd_dir: str = _key("", "directory of the SSD tier (default: STATE_DIR/ssd)")
    ssd_bytes: int = _key(4 << 30, "size of the SSD tier, dead bytes included; 0 for none")
    ssd_deadline_s: float = _key(
        5.0, "how long a read or write of the SSD tier may take before it counts as failed"
    )
    ssd_write_bytes_per_day: int = _key(0, "most bytes written to SSD in a day; 0 for no limit")
    partition: str = _key(
        "shared",
        "shared, or strict: each tenant has a fixed part of each tier and never moves another's blocks",
    )
    ssd_encryption: bool = _key(
        False, "encrypt blocks on SSD under each tenant's data key; switching empties the tier"
    )
    max_blocks: int = _key(1 << 20, "most blocks that the index holds, all tiers together")
    window_bytes: int = _key(256 << 20, "largest window that an engine worker gets")
    lease_s: float = _key(30.0, "how long a match may be used without being renewed")
    reservation_s: float = _key(30.0, "how long a reservation may wait for its commit")
    require_handle: bool = _key(False, "refuse requests that carry no handle of a router")
    epoch_lease_s: float = _key(2.0, "how long routers may trust the epochs they saw")
    directory: str = _key("", DIRECTORY_HELP)
    keyring_dir: str = _key("", "where the keyring is, if nodes share it (default: STATE_DIR)")
    tls_dir: str = _key("", TLS_HELP)
    insecure: bool = _key(False, "allow plain TCP, which anybody on the way can read and change")
    ucx_net_devices: str = _key(
        "",
        "devices over which blocks move between nodes, as UCX names them (mlx5_0:1, eth0, lo); with "
        "wire = plain a zone of trust; empty: none move",
    )
    wire: str = _key(
        "plain",
        "plain, or aes-gcm: blocks that move between nodes are sealed, also for peers that do not ask for it",
    )
    rack: str = _key("", "rack that this node is in, if any: blocks move faster within one")
    zone: str = _key("", "zone that this node is in, if the fleet has several")
    sessions_return_s: float = _key(
        10.0, "how long a new daemon waits for the engines of a crashed one to return the arena"
    )
    log_level: str = _key("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        _positive(self, "host_bytes", "max_blocks", "window_bytes", "lease_s", "reservation_s")
        _positive(self, "epoch_lease_s", "sessions_return_s", "ssd_deadline_s")
        _not_negative(self, "ssd_bytes", "ssd_write_bytes_per_day")
        _one_of(self, "log_level", "debug", "info", "warning", "error")
        _one_of(self, "partition", "shared", "strict")
        _one_of(self, "wire", "plain", "aes-gcm")

    @property
    def name(self) -> str:
        return self.node_id or socket.gethostname()

    @property
    def socket_path(self) -> Path:
        return Path(self.socket) if self.socket else self.state_dir / "node.sock"

    @property
    def tls_path(self) -> Path:
        return Path(self.tls_dir).expanduser()

    @property
    def keyring_path(self) -> Path:
        return Path(self.keyring_dir) if self.keyring_dir else self.state_dir

    @property
    def admin_socket_path(self) -> Path:
        return Path(self.admin_socket) if self.admin_socket else self.state_dir / "admin.sock"

    @property
    def takeover_socket_path(self) -> Path:
        return self.state_dir / "takeover.sock"

    @property
    def ssd_path(self) -> Path:
        return Path(self.ssd_dir) if self.ssd_dir else self.state_dir / "ssd"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """The HTTP front door, section [router]."""

    section = "router"

    listen: str = _key("127.0.0.1:8000", "address of the OpenAI API")
    state_dir: Path = dataclasses.field(
        default_factory=default_state_dir, metadata={"help": "where the node keeps the keyring"}
    )
    nodes: tuple[str, ...] = _key(
        (),
        "admin sockets of the nodes (default: those in the directory, else STATE_DIR/admin.sock)",
    )
    directory: str = _key("", DIRECTORY_HELP)
    keyring_dir: str = _key("", "where the keyring is, if nodes share it (default: STATE_DIR)")
    tls_dir: str = _key("", TLS_HELP)
    insecure: bool = _key(False, "allow plain TCP, which anybody on the way can read and change")
    engines: tuple[str, ...] = _key((), "base URLs of engines that no node announces")
    tokenizers: tuple[str, ...] = _key(
        (),
        "MODEL=FOLDER: Hugging Face folders with the tokenizer and chat template of each model; without one "
        "its prompts are routed approximately",
    )
    policy: str = _key("cost", "cost, least_loaded or round_robin")
    fabric: bool = _key(True, "use the nodes; false: a plain load balancer with API keys")
    request_timeout_s: float = _key(600.0, "how long an engine may take for one answer")
    handle_ttl_s: float = _key(600.0, "how long a handle is valid")
    journal_dir: str = _key(
        "", "where choices are recorded for `kvfabric replay` (default: nowhere)"
    )
    journal_bytes: int = _key(64 << 20, "size of the journal; the oldest choices go first")
    workers: int = _key(1, "processes that do the HTTP; more than 1: beside the one that decides")
    log_level: str = _key("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        _positive(self, "request_timeout_s", "handle_ttl_s", "journal_bytes", "workers")
        _one_of(self, "policy", "cost", "least_loaded", "round_robin")
        _one_of(self, "log_level", "debug", "info", "warning", "error")

    @property
    def tls_path(self) -> Path:
        return Path(self.tls_dir).expanduser()

    @property
    def keyring_path(self) -> Path:
        return Path(self.keyring_dir) if self.keyring_dir else self.state_dir

    @property
    def node_targets(self) -> tuple[str, ...]:
        """`unix:PATH` or `HOST:PORT` of the nodes that the configuration names."""
        own = () if self.directory else (str(self.state_dir / "admin.sock"),)
        return tuple(f"unix:{one}" if "/" in one else one for one in self.nodes or own)


_OF_RANDOM_MODEL = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "seed",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The reference engine, section [engine].

    Without `model_path` the model is small and its weights are random; with it the folder says what it is.
    """

    section = "engine"

    listen: str = _key("127.0.0.1:8100", "address of the OpenAI API")
    engine_id: str = _key("", "name of this engine (default: its address)")
    node_socket: str = _key("", "the node's Unix socket; empty: HBM cache only")
    role: str = _key("both", "prefill, decode or both")
    model: str = _key(
        "", "name under which the model is served (default: its folder, or reference)"
    )
    model_path: str = _key(
        "",
        "Hugging Face folder of a Llama, Qwen2 or Qwen3 (config.json, safetensors, tokenizer.json); "
        "empty: a small model with random weights, shaped by the keys up to seed",
    )
    num_layers: int = _key(4, "decoder layers")
    hidden_size: int = _key(256, "width of the residual stream")
    num_heads: int = _key(8, "query heads")
    num_kv_heads: int = _key(4, "KV heads")
    head_dim: int = _key(32, "width of a head")
    intermediate_size: int = _key(512, "width of the MLP")
    vocab_size: int = _key(512, "token ids; the byte tokenizer needs 259")
    seed: int = _key(0, "seed of the weights")
    dtype: str = _key("float32", "float32, bfloat16 or float16")
    device: str = _key("cpu", "cpu or cuda")
    num_threads: int = _key(1, "compute threads on CPU")
    engine_block_tokens: int = _key(16, "tokens of a page of the KV pool")
    block_tokens: int = _key(0, "tokens of a fabric block; 0: smallest multiple of a page, 64 up")
    hbm_blocks: int = _key(2048, "pages of the KV pool")
    max_batch: int = _key(8, "sequences decoded together")
    max_model_tokens: int = _key(4096, "longest prompt and answer together")
    deterministic: str = _key("auto", "auto (on for CPU), on or off: equal shapes for equal tokens")
    window_bytes: int = _key(64 << 20, "size of the window towards the node")
    audit_parts: str = _key("", "write a JSON line with the checksum of each part stored or loaded")
    log_level: str = _key("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        _positive(self, "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim")
        _positive(self, "intermediate_size", "num_threads", "engine_block_tokens", "hbm_blocks")
        _positive(self, "max_batch", "max_model_tokens", "window_bytes")
        _not_negative(self, "block_tokens")
        _one_of(self, "role", *ENGINE_ROLES)
        _one_of(self, "dtype", "float32", "bfloat16", "float16")
        _one_of(self, "deterministic", "auto", "on", "off")
        _one_of(self, "log_level", "debug", "info", "warning", "error")
        if self.vocab_size < 259:
            raise ConfigError(f"engine.vocab_size is {self.vocab_size}; bytes need at least 259")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError("engine.num_heads must be a multiple of engine.num_kv_heads")
        if self.block_tokens % self.engine_block_tokens:
            raise ConfigError("engine.block_tokens must be a multiple of engine_block_tokens")
        if self.model_path:
            self._leave_to_folder()

    def _leave_to_folder(self) -> None:
        for field in dataclasses.fields(self):
            if field.name in _OF_RANDOM_MODEL and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"engine.{field.name} is for random weights; with engine.model_path leave it out"
                )

    @property
    def model_name(self) -> str:
        if self.model or not self.model_path:
            return self.model or "reference"
        return Path(self.model_path).expanduser().resolve().name


Config = TypeVar("Config", NodeConfig, RouterConfig, EngineConfig)
_SECTIONS = {cls.section: cls for cls in (NodeConfig, RouterConfig, EngineConfig)}


def load(cls: type[Config], *, file: Path | None, flags: Mapping[str, object]) -> Config:
    """Merge flags, environment, file and defaults. Raises ConfigError that names the wrong key."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    if file is not None:
        values |= _from_file(cls.section, names, hints, _read_toml(file))
    values |= _from_environment(cls.section, names, hints)
    for name, value in flags.items():
        if name not in names:
            raise ConfigError(f"unknown key {cls.section}.{name}")
        values[name] = _convert(value, hints[name], f"--{name.replace('_', '-')}")
    return cls(**values)


def add_arguments(parser: argparse.ArgumentParser, cls: type[Config]) -> None:
    """One flag for each key, and --config FILE."""
    parser.add_argument("--config", metavar="FILE", help="TOML file")
    for field in dataclasses.fields(cls):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=field.metadata["help"],
        )


_PASSWORD = re.compile(r"[a-z+]+://[^/@?]*:[^/@?]+@")


def from_args(cls: type[Config], args: argparse.Namespace) -> Config:
    """The configuration of a command whose parser went through `add_arguments`."""
    names = {field.name for field in dataclasses.fields(cls)}
    flags = {name: value for name, value in vars(args).items() if name in names}
    refuse_password(str(flags.get("directory", "")))
    return load(cls, file=Path(args.config) if args.config else None, flags=flags)


def refuse_password(directory: str) -> None:
    """Raises ConfigError for one in an address that was given as a flag."""
    if _PASSWORD.match(directory):
        raise ConfigError(
            "--directory: a password on the command line shows in `ps`: name a file with "
            "?password_file=FILE, or say it in the environment"
        )


def split_address(address: str, key: str) -> tuple[str, int]:
    """`host:port` -> parts. Raises ConfigError that names `key`."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ConfigError(f"{key} is {address!r}; it must be HOST:PORT")
    return host.strip("[]"), int(port)


def parse_size(text: str, key: str) -> int:
    """`64MiB` -> bytes."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ConfigError(f"{key} is {text!r}; it must be a size such as 4096, 512MiB or 4GiB")
    size = int(found[1]) * _UNITS[(found[2] or "").upper()]
    if size >= 1 << 63:
        raise ConfigError(f"{key} is {text!r}; no size is above 8 EiB")
    return size


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            document = tomllib.load(stream)
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:  # TOML's own errors, and bytes that are no text
        raise ConfigError(f"{file} is not TOML: {exc}") from exc
    for section, content in document.items():
        if section not in _SECTIONS and section != "fabric":
            raise ConfigError(f"{file}: unknown section [{section}]")
        if not isinstance(content, dict):
            raise ConfigError(f"{file}: {section} must be a section, not a value")
        for key in content:
            if not _is_known(section, key):
                raise ConfigError(f"{file}: unknown key {section}.{key}")
    return document


def _is_known(section: str, key: str) -> bool:
    classes = list(_SECTIONS.values()) if section == "fabric" else [_SECTIONS[section]]
    holders = sum(key in {field.name for field in dataclasses.fields(cls)} for cls in classes)
    return holders >= (2 if section == "fabric" else 1)


def _from_file(
    section: str, names: list[str], hints: Mapping[str, Any], document: Mapping[str, Any]
) -> dict[str, Any]:
    merged = {**document.get("fabric", {}), **document.get(section, {})}
    return {k: _convert(v, hints[k], f"{section}.{k}") for k, v in merged.items() if k in names}


def _from_environment(section: str, names: list[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"KVFABRIC_{section.upper()}_"
    found = {}
    for variable, text in os.environ.items():
        if not variable.startswith(prefix):
            continue
        name = variable.removeprefix(prefix).lower()
        if name not in names:
            raise ConfigError(f"unknown key {section}.{name} (from {variable})")
        found[name] = _convert(text, hints[name], variable)
    return found


def _convert(value: object, hint: Any, key: str) -> Any:
    if typing.get_origin(hint) is tuple:
        return _to_tuple(value, key)
    if isinstance(hint, types.GenericAlias):  # pragma: no cover - no other generic is declared
        raise ConfigError(f"{key}: unsupported type {hint}")
    if hint is bool:
        return _to_bool(value, key)
    if hint is Path and isinstance(value, str | Path):
        return Path(value).expanduser()
    if isinstance(value, str) and hint is not str:
        return _parse_number(value, hint, key)
    if isinstance(value, bool) or not isinstance(value, (int, float) if hint is float else hint):
        raise ConfigError(f"{key} is {value!r}; it must be {hint.__name__}")
    return float(value) if hint is float else value


def _to_tuple(value: object, key: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(item.strip() for item in value.split(",") if item.strip())
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise ConfigError(f"{key} is {value!r}; it must be a list of strings")


def _to_bool(value: object, key: str) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text in _TRUE | _FALSE:
        return text in _TRUE
    raise ConfigError(f"{key} is {value!r}; it must be true or false")


def _parse_number(text: str, hint: Any, key: str) -> int | float:
    if hint is int:
        return int(text) if re.fullmatch(r"-\d{1,20}", text) else parse_size(text, key)
    try:
        return float(text)
    except ValueError as exc:
        raise ConfigError(f"{key} is {text!r}; it must be a number") from exc


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < float("inf"):
            raise ConfigError(
                f"{config.section}.{name} is {getattr(config, name)}; it must be more than 0"
            )


def _not_negative(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 0:
            raise ConfigError(
                f"{config.section}.{name} is {getattr(config, name)}; it must be 0 or more"
            )


def _one_of(config: Any, name: str, *allowed: str) -> None:
    if getattr(config, name) not in allowed:
        raise ConfigError(
            f"{config.section}.{name} is {getattr(config, name)!r}; it must be one of "
            + ", ".join(allowed)
        )
