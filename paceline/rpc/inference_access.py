"""Who calls, by the metadata of a gRPC call: the same keys and bounds as over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from paceline.api.gateway import Gateway
from paceline.api.keys import Caller, KeyRing, presented_key
from paceline.api.owned import seen_by
from paceline.errors import PacelineError
from paceline.rpc.inference_service import InferenceHandlers, RpcContext, text_metadata


class InferenceAccess:
    """The only way to the handlers: `with access.admitted(context) as handlers`, around a whole call.

    Every caller has handlers of its own, over what it may see of the gateway.
    """

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

    @contextmanager
    def admitted(self, grpc_context: RpcContext) -> Iterator[InferenceHandlers]:
        """The handlers as the caller may use them; if it may not at all, handlers that refuse whatever is asked."""
        if self._keys is None:
            yield self._open
            return
        with ExitStack() as held:
            try:
                caller = self._keys.caller(presented_key(text_metadata(grpc_context)))
                held.enter_context(caller.quota.request())
            except PacelineError as error:
                yield InferenceHandlers(self._gateway, refusal=error)
                return
            yield self._of(caller)

    def _of(self, caller: Caller) -> InferenceHandlers:
        known, handlers = self._by_name.get(caller.name, (None, self._open))
        if known is not caller:  # new, or its line has changed
            handlers = self._make(seen_by(self._gateway, caller))
            self._by_name[caller.name] = caller, handlers
        return handlers
