"""Tenants of a real node, and engines that ask it for them with handles of their own."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from kvfabric.client import NodeClient
from kvfabric.daemon.admin_client import AdminClient
from kvfabric.errors import PeerClosed
from kvfabric.handle import FORMAT_VERSION, Handle, mint
from kvfabric.hashing import block_keys, layout_fingerprint
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol.messages import Reply, Request
from kvfabric.testing.engine import BLOCK_TOKENS, DEADLINE_S, TinyEngine, tokens_of
from kvfabric.types import BlockKey


def create_tenants(admin: AdminClient, count: int) -> list[str]:
    """Ids of new tenants."""
    create = admin.registry.CreateTenant
    requests = [pb.CreateTenantRequest(name=f"tenant-{number}") for number in range(count)]
    return [str(admin.call(create, request).tenant.tenant_id) for request in requests]


def pipelined(client: NodeClient, messages: Sequence[Request]) -> list[Reply]:
    """Send all at once, and their answers. At most some 64 KiB; nothing else may use the client meanwhile."""
    sent = [client._exchange.start(message) for message in messages]
    sock = client._sock
    sock.settimeout(DEADLINE_S)
    try:
        sock.sendall(b"".join(frame for _, frame in sent))
        answers: dict[int, Reply] = {}
        while len(answers) < len(sent):
            data = sock.recv(1 << 18)
            if not data:
                raise PeerClosed("the node closed the connection")
            answers.update(client._exchange.feed(data))
    finally:
        sock.setblocking(False)
    return [answers[correlation] for correlation, _ in sent]


class Tenants:
    """Opens requests of any tenant at one engine, as a router's handle would."""

    def __init__(self, directory: Path, engine: TinyEngine, names: list[str]) -> None:
        self.engine = engine
        self.names = names
        self._keyring = Keyring.open(directory)
        self._numbers = itertools.count()
        self._namespaces: dict[str, bytes] = {}

    def handle(self, tenant: str, request: str) -> str:
        key_id, key = self._keyring.current_handle_key()
        hello = self.engine.hello
        handle = Handle(
            version=FORMAT_VERSION,
            key_id=key_id,
            tenant=tenant,
            model_revision=hello.model_revision,
            adapter=hello.adapter,
            adapter_revision=hello.adapter_revision,
            layout_fingerprint=layout_fingerprint(hello.layout),
            segments=(),
            public_tokens=0,
            cacheable_tokens=-1,
            epochs=(),
            audience=self.engine.client.session,
            request_id=request,
            expires_at=int(time.time()) + 3600,
        )
        return mint(handle, key)

    def open(self, tenant: str) -> str:
        """A new request of `tenant`; its id."""
        request = f"request-{next(self._numbers)}"
        opened = self.engine.client.open_handle(
            request, self.handle(tenant, request), deadline_s=DEADLINE_S
        )
        self._namespaces[tenant] = opened.namespace_key
        return request

    def keys(self, tenant: str, prompt: str, num_blocks: int) -> list[BlockKey]:
        """Of a prompt, as this tenant's request has them."""
        key = self.namespace_key(tenant)
        return block_keys(tokens_of(prompt, num_blocks), BLOCK_TOKENS, key)

    def namespace_key(self, tenant: str) -> bytes:
        """As the node gave it for this tenant."""
        if tenant not in self._namespaces:
            self.engine.release(self.open(tenant))
        return self._namespaces[tenant]

    def store(self, tenant: str, keys: list[BlockKey]) -> int:
        request = self.open(tenant)
        stored = self.engine.store(request, keys)
        self.engine.release(request)
        return stored
