"""Paceline's errors as statuses of gRPC calls, and back.

    status code and details      the error's `grpc_code`, its message
    grpc-status-details-bin      google.rpc.Status: ErrorInfo (reason: `code`, domain "paceline"),
                                 BadRequest.FieldViolation (field: `param`), RetryInfo (`retry_after`)

Any client of gRPC reads the first line; libraries that know google.rpc, in any language, read the second as well.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from paceline.errors import (
    InvalidRequest,
    Overloaded,
    PacelineError,
    RequestTimeout,
    SessionConflict,
    Unavailable,
    by_code,
)

DETAILS_KEY = "grpc-status-details-bin"
DOMAIN = "paceline"
MAX_TEXT_BYTES = 1024
"""Of a message: it is sent twice, escaped, and peers refuse more than 8 KiB of metadata."""

_KINDS: dict[grpc.StatusCode, type[PacelineError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: InvalidRequest,
    grpc.StatusCode.ABORTED: SessionConflict,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: RequestTimeout,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.UNAUTHENTICATED: by_code("invalid_api_key"),
    grpc.StatusCode.PERMISSION_DENIED: by_code("permission_denied"),
}
"""What a status without our details is: one of a proxy's, of gRPC's own, or of a server that speaks only codes."""


def status_of(error: PacelineError) -> tuple[grpc.StatusCode, str, bytes]:
    """The code, the details and the value of `grpc-status-details-bin`."""
    code, text = grpc.StatusCode[error.grpc_code], cut(error.message)
    status = status_pb2.Status(code=code.value[0], message=text)
    status.details.append(_packed(error_details_pb2.ErrorInfo(reason=error.code, domain=DOMAIN)))
    if error.param is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=cut(error.param), description=text)
        status.details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after is not None:
        delay = Duration()
        delay.FromMicroseconds(round(error.retry_after * 1e6))
        status.details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return code, text, status.SerializeToString()


def error_of(code: grpc.StatusCode, details: str, trailing: Any = ()) -> PacelineError:
    """The error of a call's status. `trailing` is its trailing metadata, (key, value) pairs or None."""
    kind, param, retry_after = _KINDS.get(code, PacelineError), None, None
    for message in _details(trailing):
        if isinstance(message, error_details_pb2.ErrorInfo) and message.domain == DOMAIN:
            kind = by_code(message.reason)
        elif isinstance(message, error_details_pb2.BadRequest) and message.field_violations:
            param = message.field_violations[0].field
        elif isinstance(message, error_details_pb2.RetryInfo):
            retry_after = message.retry_delay.ToMicroseconds() / 1e6
    return kind(details or code.name, param=param, retry_after=retry_after)


def cut(text: str, limit: int = MAX_TEXT_BYTES) -> str:
    """At most so many bytes of a text, in valid UTF-8 whatever it holds."""
    raw = text.encode(errors="replace")
    return raw.decode() if len(raw) <= limit else raw[: limit - 3].decode(errors="ignore") + "…"


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def _details(trailing: Any) -> list[Message]:
    """The details of the status that are known here. What cannot be read says nothing."""
    known = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    found: list[Message] = []
    try:
        for key, value in trailing or ():
            if key == DETAILS_KEY and isinstance(value, bytes):
                for each in status_pb2.Status.FromString(value).details:
                    for kind in known:
                        message = kind()
                        if each.Unpack(message):
                            found.append(message)
    except DecodeError:
        return []
    return found
