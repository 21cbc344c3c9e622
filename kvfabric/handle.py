"""Handle: what the router tells the node, through the engine, about a request. Pure.

A handle rides in `kv_transfer_params["kvfabric"]` of one request to one engine. It is MessagePack
(format version 1) followed by HMAC-SHA-256, base64url, at most 2 KiB. The router mints it, the engine
passes it on unread, the node opens it: so an engine never holds a tenant's secret.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Mapping

import msgspec

from kvfabric.errors import BadHandle, LocalProtocolError
from kvfabric.types import Incarnation, Segment

FORMAT_VERSION = 1
MAX_HANDLE_CHARS = 2048
MAC_BYTES = 32
PARAMS_FIELD = "kvfabric"
"""Name of the field in `kv_transfer_params`."""
SESSION_HEADER = "x-kvfabric-session"
"""Which engine session (hex) a request's handle was made for. An engine of another session has started
anew: it answers 421 with what `/v1/models` says, and the router makes a handle for that session."""

_MAC_DOMAIN = b"kvfabric/handle/1\0"


class HandleSegment(msgspec.Struct, array_like=True, frozen=True):
    """A `types.Segment` on the wire."""

    template: str
    version: str
    incarnation: bytes
    first_token: int
    num_tokens: int = 0


class Handoff(msgspec.Struct, array_like=True, frozen=True):
    """One engine computes a prompt, another answers it: both their handles name the hand-off.

    `node`: where the prompt is computed. `wait_ms`: how long, from when the handle is opened, its blocks are
    worth waiting for; 0 in the handle of the engine that computes them.
    """

    name: str
    node: str
    wait_ms: int = 0


class Handle(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """Everything a node needs to serve one request. Times are Unix seconds.

    `public_tokens`: length of the public prefix. `cacheable_tokens`: only blocks that end at or before
    this token may be read or stored (a withdrawn template's text starts there); -1 for no limit.
    `epochs`: (scope, epoch) as the router saw them; any difference fences the request.
    `sources`: up to two node ids that probably hold the prefix.
    """

    version: int
    key_id: int
    tenant: str
    model_revision: str
    adapter: str
    adapter_revision: str
    layout_fingerprint: bytes
    segments: tuple[HandleSegment, ...]
    public_tokens: int
    cacheable_tokens: int
    epochs: tuple[tuple[str, int], ...]
    audience: bytes
    request_id: str
    expires_at: int
    sources: tuple[str, ...] = ()
    no_store: bool = False
    no_read: bool = False
    handoff: Handoff | None = None

    def to_segments(self) -> tuple[Segment, ...]:
        return tuple(
            Segment(s.template, s.version, Incarnation(s.incarnation), s.first_token, s.num_tokens)
            for s in self.segments
        )


def from_segments(segments: tuple[Segment, ...]) -> tuple[HandleSegment, ...]:
    return tuple(
        HandleSegment(s.template, s.version, s.incarnation, s.first_token, s.num_tokens)
        for s in segments
    )


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Handle)


def mint(handle: Handle, key: bytes) -> str:
    """The handle as ASCII. `key` is the 32-byte handle key whose id is `handle.key_id`."""
    body = _ENCODER.encode(handle)
    mac = hmac.digest(key, _MAC_DOMAIN + body, "sha256")
    text = base64.urlsafe_b64encode(body + mac).rstrip(b"=").decode()
    if len(text) > MAX_HANDLE_CHARS:
        raise LocalProtocolError(f"a handle has at most {MAX_HANDLE_CHARS} characters: {len(text)}")
    return text


def open_handle(text: str, keys: Mapping[int, bytes], *, audience: bytes, now: float) -> Handle:
    """Verify and decode. `keys`: handle keys by id (two valid generations); `now`: Unix seconds.

    Raises BadHandle with what is wrong; what it says of a forged handle reveals nothing but that.
    """
    handle = open_relayed(text, keys, now=now)
    if not hmac.compare_digest(handle.audience, audience):
        raise BadHandle("handle was made for another engine session")
    return handle


def open_relayed(text: str, keys: Mapping[int, bytes], *, now: float) -> Handle:
    """As `open_handle`, of a handle that another node of the fleet passes on for one of its engines."""
    body, signer = _verify(text, keys)
    try:
        handle = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BadHandle(f"handle does not decode: {exc}") from exc
    if handle.version != FORMAT_VERSION:
        raise BadHandle(f"handle of format {handle.version}; this node reads {FORMAT_VERSION}")
    if handle.key_id != signer:
        raise BadHandle("handle names another key than the one that signed it")
    if handle.expires_at <= now:
        raise BadHandle(f"handle expired {now - handle.expires_at:.0f} s ago")
    return handle


def _verify(text: str, keys: Mapping[int, bytes]) -> tuple[bytes, int]:
    if len(text) > MAX_HANDLE_CHARS:
        raise BadHandle(f"handle of {len(text)} characters; at most {MAX_HANDLE_CHARS}")
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError as exc:
        raise BadHandle("handle is not base64url") from exc
    body, mac = raw[:-MAC_BYTES], raw[-MAC_BYTES:]
    # Which key signed is inside the body, which is not trusted yet: try the few valid ones.
    for key_id, key in keys.items():
        if hmac.compare_digest(hmac.digest(key, _MAC_DOMAIN + body, "sha256"), mac):
            return body, key_id
    raise BadHandle("handle was not signed by a key in force")
