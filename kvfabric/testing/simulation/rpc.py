"""gRPC over the simulated network: the generated stubs and servicers, with real messages, on another wire."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc

from kvfabric.testing.simulation.loop import Process
from kvfabric.testing.simulation.network import Network, Unreachable

_EMPTY = grpc.aio.Metadata()


class _Aborted(Exception):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code


class _Context:
    """As much of a servicer's context as the product asks for."""

    def set_trailing_metadata(self, metadata: object) -> None:
        pass

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    async def abort(self, code: grpc.StatusCode, details: str = "") -> NoReturn:
        raise _Aborted(code, details)


class Server:
    """What `add_..._to_server` takes; `serve` puts it on the network."""

    def __init__(self) -> None:
        self._methods: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        pass

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self._methods |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    def serve(self, network: Network, address: str, process: Process) -> None:
        network.serve(address, process, self._unary, self._stream)

    async def _unary(self, method: str, payload: bytes) -> bytes:
        handler = self._methods[method]
        reply = await handler.unary_unary(handler.request_deserializer(payload), _Context())
        packed: bytes = handler.response_serializer(reply)
        return packed

    async def _stream(self, method: str, payload: bytes) -> AsyncIterator[bytes]:
        handler = self._methods[method]
        async for reply in handler.unary_stream(handler.request_deserializer(payload), _Context()):
            yield handler.response_serializer(reply)


class Channel:
    """What stubs take."""

    def __init__(self, network: Network, address: str) -> None:
        self._network = network
        self._address = address

    def get_state(self, *, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return grpc.ChannelConnectivity.READY

    async def close(self) -> None:
        pass

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        **_: Any,
    ) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, timeout: float | None = None) -> Any:
            try:
                packed = request_serializer(request)
                reply = await self._network.call(self._address, method, packed, timeout=timeout)
            except (Unreachable, TimeoutError, _Aborted) as exc:
                raise _translated(exc) from exc
            return response_deserializer(reply)

        return call

    def unary_stream(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        **_: Any,
    ) -> Callable[..., AsyncIterator[Any]]:
        async def read(request: Any) -> AsyncIterator[Any]:
            packed = request_serializer(request)
            try:
                async for item in self._network.stream(self._address, method, packed):
                    yield response_deserializer(item)
            except (Unreachable, _Aborted) as exc:
                raise _translated(exc) from exc

        return read


def _translated(error: Exception) -> grpc.aio.AioRpcError:
    code = grpc.StatusCode.UNAVAILABLE
    if isinstance(error, TimeoutError):
        code = grpc.StatusCode.DEADLINE_EXCEEDED
    elif isinstance(error, _Aborted):
        code = error.code
    return grpc.aio.AioRpcError(code, _EMPTY, _EMPTY, details=str(error))
