"""How an engine process talks to its node: blocking and asyncio drivers of the one codec.

Owns the connection, the read-only mapping of the arena and this connection's window; decides nothing
about what to load or store (the engine's Connector does) and imports only what is cheap in an engine.

    window.py    regions of the window and who may touch them
    parts.py     arena -> engine buffers, verified
    link.py      what both drivers share: handshake, correlation ids, holds
    blocking.py  NodeClient
    aio.py       AsyncNodeClient
"""

from kvfabric.client.aio import AsyncNodeClient
from kvfabric.client.blocking import NodeClient
from kvfabric.client.link import EngineHello
from kvfabric.client.window import Window

__all__ = ["AsyncNodeClient", "EngineHello", "NodeClient", "Window"]
