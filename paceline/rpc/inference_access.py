"""Who calls, by the metadata of a gRPC call: the same keys and bounds as over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from typing import Any, TypeVar

from paceline.api.gateway import Gateway
from paceline.api.keys import Caller, KeyRing, presented_key
from paceline.api.owned import seen_by
from paceline.errors import PacelineError
from paceline.rpc.inference_service import Events, Handler, InferenceHandlers, Refused, RpcContext

A = TypeVar("A")
StreamHandler = Callable[[InferenceHandlers, Any, RpcContext], Events]


class InferenceAccess:
    """The only way to the handlers. Every caller has handlers of its own, over what it may see of the gateway."""

    def __init__(
        self,
        gateway: Gateway,
        keys: KeyRing | None,
        handlers: Callable[[Gateway], InferenceHandlers] = InferenceHandlers,
    ) -> None:
        self._gateway = gateway
        self._keys = keys
        self._make = handlers
        self._open = handlers(gateway)
        self._by_name: dict[str, tuple[Caller, InferenceHandlers]] = {}

    async def answer(self, method: Handler[A], request: Any, grpc_context: RpcContext) -> A:
        """What a method of the handlers answers, or why the caller may not ask."""
        with self._admitted(request, grpc_context) as (handlers, admitted):
            return await method(handlers, admitted, grpc_context)

    async def stream(self, method: StreamHandler, request: Any, grpc_context: RpcContext) -> Events:
        """The same for one that streams."""
        with self._admitted(request, grpc_context) as (handlers, admitted):
            async with aclosing(method(handlers, admitted, grpc_context)) as events:
                async for event in events:
                    yield event

    @contextmanager
    def _admitted(self, request: Any, grpc_context: RpcContext) -> Iterator[tuple[InferenceHandlers, Any]]:
        """For the time of a call: handlers, and the request or, in its place, what refuses it."""
        if self._keys is None:
            yield self._open, request
            return
        with ExitStack() as held:
            handlers, admitted = self._open, request
            try:
                caller = self._keys.caller(presented_key(_texts(grpc_context)))
                held.enter_context(caller.quota.request())
                handlers = self._of(caller)
            except PacelineError as error:
                admitted = Refused(error)
            yield handlers, admitted

    def _of(self, caller: Caller) -> InferenceHandlers:
        known, handlers = self._by_name.get(caller.name, (None, self._open))
        if known is not caller:  # new, or its line has changed
            handlers = self._make(seen_by(self._gateway, caller))
            self._by_name[caller.name] = caller, handlers
        return handlers


def _texts(grpc_context: RpcContext) -> dict[str, str]:
    """Metadata without its binary entries."""
    return {name: value for name, value in grpc_context.invocation_metadata() or () if isinstance(value, str)}
