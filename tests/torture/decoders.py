"""What proof 7 feeds: every decoder of bytes that somebody else wrote, with what it may answer.

A `Decoder` takes bytes. Its errors are its answer; anything else that comes out is a crash. Where a
checksum, a MAC or a cipher stands before the decoder, one variant is fed as it comes and one with that put
right, so that what lies behind is reached too.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from google.protobuf.message import DecodeError

from kvfabric import handle as handles
from kvfabric.config import EngineConfig, NodeConfig, RouterConfig, load, parse_size, split_address
from kvfabric.daemon.adoption import ArenaRecord
from kvfabric.errors import (
    BadHandle,
    ConfigError,
    Conflict,
    CorruptBlock,
    NotFound,
    RemoteProtocolError,
)
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import messages as m
from kvfabric.protocol.codec import (
    HEADER,
    MAX_HELLO_BYTES,
    FrameReader,
    decode_reply,
    decode_request,
    encode,
)
from kvfabric.registry import changes
from kvfabric.registry.state import TemplateVersion, Tenant
from kvfabric.registry.wire import quota_from_pb, state_from_pb, state_to_pb
from kvfabric.testing.engine import tiny_hello
from kvfabric.testing.tiers import make_part
from kvfabric.tiers.records import (
    PAGE_BYTES,
    FileHeader,
    RecordHeader,
    decode_file_header,
    decode_header,
    decode_identity,
    encode_file_header,
    encode_header,
    encode_identity,
)

_KEY = bytes(range(32))
_SESSION = b"s" * 16
_MACHINE = changes.initial_state()
_KNOWN = changes.register_template(
    _MACHINE, TemplateVersion("t", "1", changes.mint_incarnation(), b"text", is_public=True)
).state


@dataclass(frozen=True, slots=True)
class Decoder:
    """`seeds`: inputs that decode. `share`: of the inputs of a full run, by how fast it is."""

    name: str
    feed: Callable[[bytes], None]
    errors: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]
    share: float

    def run(self, data: bytes) -> bool:
        """Whether it decoded. Raises whatever is not an answer."""
        try:
            self.feed(data)
        except self.errors:
            return False
        return True


# ---------------------------------------------------------------------- frames and messages


def feed_frames(data: bytes, *, reader: Callable[[], FrameReader] | None = None) -> None:
    """A stream in pieces, as a socket gives them; the first byte says how long they are."""
    frames = (reader or (lambda: FrameReader(MAX_HELLO_BYTES)))()
    step = 1 + 64 * (data[0] if data else 0)
    for start in range(1, len(data), step):
        for _, body in frames.feed(data[start : start + step]):
            decode_request(body)
        assert frames.num_pending_bytes <= MAX_HELLO_BYTES + HEADER.size, "more than the cap"


def _feed_body(decode: Callable[[bytes], object], data: bytes) -> None:
    decode(data)


_REQUESTS: tuple[m.Request, ...] = (
    tiny_hello().to_wire(session=b"", resumed=False),
    m.OpenHandle("r1", "handle"),
    m.Match("r1", b"k" * 64),
    m.Load("r1", b"k" * 64, 0, 0),
    m.Reserve("r1", bytes(32), b"k" * 64, 0, 0),
    m.Commit(7, b"\0" * 8, b"\0" * 16),
    m.Release(("r1", "r2")),
    m.EngineEvents((m.BlockRun(b"t" * 8, b"p" * 8, b"k" * 16),), (), True),
    m.Ping(),
)
_REPLIES: tuple[m.Reply, ...] = (
    m.Welcome(1, b"s" * 16, b"b" * 16, "node", 1 << 20, 1 << 20, 30.0, 30.0, False),
    m.HandleOpened(b"k" * 32, b"", 0, -1, (m.WireSegment("t", "1", b"i" * 16, 3),), False, False),
    m.Matched(2, b"\0\1", 30.0, "absent"),
    m.Located(1, 4096, b"\0" * 8, b"\0" * 4, b"\0" * 16, "absent"),
    m.Failed("bad_handle", "why"),
)


def _bodies(messages: tuple[m.Request, ...] | tuple[m.Reply, ...]) -> tuple[bytes, ...]:
    return tuple(encode(1, message)[HEADER.size :] for message in messages)


# ---------------------------------------------------------------------- records


def _page(body: bytes, magic: bytes) -> bytes:
    """A header page around `body` whose CRC is right."""
    page = bytearray(
        (magic + struct.pack("<HHI", 1, 0, 0) + body)[:PAGE_BYTES].ljust(PAGE_BYTES, b"\0")
    )
    struct.pack_into("<I", page, 12, zlib.crc32(page))
    return bytes(page)


def _feed_page(data: bytes) -> None:
    decode = decode_header if data[:1] == b"K" and data[3:4] == b"R" else decode_file_header
    decode(data.ljust(PAGE_BYTES, b"\0"))


def _feed_sealed_page(data: bytes) -> None:
    """What a decoded record says must be encodable again: it is written back when it is hot."""
    header = decode_header(_page(data, b"KVFREC01"))
    assert decode_identity(encode_identity(header.identity)) == header.identity
    decode_file_header(_page(data, b"KVFSEG01"))


_IDENTITY = make_part(3, 5000)[0]
_RECORD = encode_header(RecordHeader(b"f" * 16, PAGE_BYTES, 7, _IDENTITY))
_FILE = encode_file_header(FileHeader(b"f" * 16, 3, 1 << 20))


# ---------------------------------------------------------------------- handles


def _feed_handle(data: bytes) -> None:
    handles.open_handle(data.decode("latin-1"), {1: _KEY}, audience=_SESSION, now=0.0)


def _feed_signed_handle(data: bytes) -> None:
    text = base64.urlsafe_b64encode(
        data + hmac.digest(_KEY, b"kvfabric/handle/1\0" + data, "sha256")
    )
    opened = handles.open_handle(text.rstrip(b"=").decode(), {1: _KEY}, audience=_SESSION, now=0.0)
    opened.to_segments()


_HANDLE = handles.Handle(
    version=1,
    key_id=1,
    tenant="default",
    model_revision="rev",
    adapter="",
    adapter_revision="",
    layout_fingerprint=bytes(32),
    segments=(handles.HandleSegment("t", "1", b"i" * 16, 0),),
    public_tokens=0,
    cacheable_tokens=-1,
    epochs=(("fabric", 0),),
    audience=_SESSION,
    request_id="r1",
    expires_at=1 << 40,
)


# ---------------------------------------------------------------------- configuration


_files: dict[str, int] = {}


def _file_of(data: bytes, name: str) -> Path:
    """A file of 0600 with this content, in memory."""
    if name not in _files:
        _files[name] = os.memfd_create(name)
        os.fchmod(_files[name], 0o600)
    os.ftruncate(_files[name], 0)
    os.pwrite(_files[name], data, 0)
    return Path(f"/proc/self/fd/{_files[name]}")


def close_files() -> None:
    while _files:
        os.close(_files.popitem()[1])


def _feed_toml(data: bytes) -> None:
    file = _file_of(data, "kvfabric.toml")
    for section in (NodeConfig, RouterConfig, EngineConfig):
        load(section, file=file, flags={})  # type: ignore[type-var]


def _feed_flags(data: bytes) -> None:
    text = data.decode("latin-1")
    name, _, value = text.partition("=")
    for parse in (parse_size, split_address):
        with contextlib.suppress(ConfigError):
            parse(value, name)
    load(NodeConfig, file=None, flags={name: value})


_TOML = b"""[fabric]
state_dir = "/x"
log_level = "info"
[node]
host_bytes = "64MiB"
lease_s = 3.5
require_handle = true
[router]
nodes = ["a", "b"]
[engine]
num_layers = 2
"""


# ---------------------------------------------------------------------- administration and state files


def _feed_state(data: bytes) -> None:
    state = state_from_pb(pb.RegistryState.FromString(data))
    assert state_from_pb(state_to_pb(state)) == state


def _feed_changes(data: bytes) -> None:
    """The first byte chooses a request; what it asks for is decided as the registry decides it."""
    kind, body = data[:1], data[1:]
    if kind == b"t":
        template = pb.RegisterTemplateRequest.FromString(body)
        incarnation = changes.mint_incarnation()
        version = TemplateVersion(
            template.name, template.version, incarnation, template.text, template.is_public
        )
        changes.register_template(_MACHINE, version)
    elif kind == b"n":
        tenant = pb.CreateTenantRequest.FromString(body)
        host, ssd = quota_from_pb(tenant.host), quota_from_pb(tenant.ssd)
        changes.create_tenant(
            _MACHINE, Tenant(changes.mint_tenant_id(), tenant.name, host=host, ssd=ssd), "key"
        )
    else:
        wanted = pb.InvalidateRequest.FromString(body)
        scope = changes.scope_of(_KNOWN, wanted.scope, wanted.name)
        if wanted.scope == "template":
            changes.withdraw_template(_KNOWN, wanted.name, wanted.version, purge=wanted.purge)
        else:
            changes.invalidate_scope(_KNOWN, scope, "retire")


def _feed_keyring(data: bytes) -> None:
    keyring = Keyring(_file_of(data, "keyring"), _file_of(_KEY, "root.key"))
    keyring.reload()
    keyring.current_handle_key()


def _feed_sealed_keyring(data: bytes) -> None:
    nonce = bytes(12)
    _feed_keyring(b"KVFKEYS1" + nonce + AESGCM(_KEY).encrypt(nonce, data, b"KVFKEYS1"))


def _feed_arena(data: bytes) -> None:
    ArenaRecord.load(_file_of(data, "arena.json"))


_STATE = state_to_pb(_KNOWN).SerializeToString()
_KEYRING = msgspec.msgpack.encode(
    {
        "generation": 1,
        "tenant_secrets": {"default": _KEY},
        "handle_keys": {1: _KEY},
        "current_handle_key": 1,
    }
)
_ARENA = json.dumps({"boot_id": "ab", "arena": [1, 2, 3], "processes": [[1, 2]]}).encode()
_REGISTER = pb.RegisterTemplateRequest(name="t", version="1", text=b"x").SerializeToString()
_TENANT = pb.CreateTenantRequest(name="n", host=pb.TierQuota(max_bytes=5)).SerializeToString()
_INVALIDATE = pb.InvalidateRequest(scope="tenant", name="default").SerializeToString()
_REMOTE = (RemoteProtocolError,)
_ADMIN = (ConfigError, Conflict, NotFound, DecodeError)

DECODERS = (
    Decoder("frames", feed_frames, _REMOTE, tuple(b"\1" + encode(1, r) for r in _REQUESTS), 0.2),
    Decoder("requests", partial(_feed_body, decode_request), _REMOTE, _bodies(_REQUESTS), 0.2),
    Decoder("replies", partial(_feed_body, decode_reply), _REMOTE, _bodies(_REPLIES), 0.1),
    Decoder("record pages", _feed_page, (CorruptBlock,), (_RECORD[:400], _FILE[:64]), 0.1),
    Decoder("record pages, CRC right", _feed_sealed_page, (CorruptBlock,), (_RECORD[16:400],), 0.1),
    Decoder("handles", _feed_handle, (BadHandle,), (handles.mint(_HANDLE, _KEY).encode(),), 0.05),
    Decoder(
        "handles, signed",
        _feed_signed_handle,
        (BadHandle,),
        (msgspec.msgpack.encode(_HANDLE),),
        0.1,
    ),
    Decoder("configuration files", _feed_toml, (ConfigError,), (_TOML,), 0.01),
    Decoder(
        "configuration flags",
        _feed_flags,
        (ConfigError,),
        (b"host_bytes=64MiB", b"http=127.0.0.1:9470", b"lease_s=1e3", b"require_handle=yes"),
        0.05,
    ),
    Decoder("registry states", _feed_state, (RemoteProtocolError, DecodeError), (_STATE,), 0.04),
    Decoder(
        "administration",
        _feed_changes,
        _ADMIN,
        (b"t" + _REGISTER, b"n" + _TENANT, b"i" + _INVALIDATE),
        0.02,
    ),
    Decoder("keyring files", _feed_keyring, (ConfigError,), (b"KVFKEYS1" + bytes(60),), 0.01),
    Decoder("keyring files, sealed", _feed_sealed_keyring, (ConfigError,), (_KEYRING,), 0.01),
    Decoder("arena files", _feed_arena, (), (_ARENA,), 0.01),
)
assert abs(sum(decoder.share for decoder in DECODERS) - 1.0) < 1e-9
