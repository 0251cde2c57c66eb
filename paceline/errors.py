"""The one exception tree. Each error knows the HTTP status and the gRPC code it is shown as.

    PacelineError
    ├── InvalidRequest          400  INVALID_ARGUMENT      the client sent something wrong; names the field
    │   ├── UnknownModel        404  NOT_FOUND
    │   ├── UnknownSession      404  NOT_FOUND
    │   ├── SessionConflict     409  ABORTED               the session exists already, or has a turn under way
    │   ├── UnknownNode         404  NOT_FOUND
    │   └── NodeConflict        409  FAILED_PRECONDITION   the node cannot be drained, or not as things are
    ├── Unauthorized            401  UNAUTHENTICATED       no API key, or none that is known
    ├── Forbidden               403  PERMISSION_DENIED     the key has no right to this
    ├── Overloaded              429  RESOURCE_EXHAUSTED    refused before it queued; carries Retry-After
    ├── RequestTimeout          504  DEADLINE_EXCEEDED
    ├── Unavailable             503  UNAVAILABLE           no replica, a replica died, shutting down
    ├── EngineError             500  INTERNAL              a step of the engine failed
    ├── ConfigError             (start-up)                 a setting is wrong; names the key
    ├── ModelError              (start-up)                 a model is missing, broken or unsupported
    ├── DraftError              (never reaches a client)   a drafter failed; the target goes on without it
    └── ClusterError            (command line)             Kubernetes refused, or does not answer; paceline.k8s.errors

A client sees `message`, `code` and `param`, and never an internal exception's text.
"""

from __future__ import annotations

from typing import ClassVar

MAX_MESSAGE_CHARS = 1000


class PacelineError(Exception):
    """Base of every error Paceline raises on purpose.

    `code` is the machine-readable word of OpenAI's error envelope, `http_status` and `grpc_code` (the
    name of a `grpc.StatusCode`) are how the two front ends report it.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        if len(message) > MAX_MESSAGE_CHARS:  # it quotes what a client sent, and gRPC has it in a header
            message = message[:MAX_MESSAGE_CHARS] + "…"
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.param, self.retry_after)


def _rebuild(kind: type[PacelineError], message: str, param: str | None, retry_after: float | None) -> PacelineError:
    return kind(message, param=param, retry_after=retry_after)


class InvalidRequest(PacelineError):
    """The request itself is wrong. `param` names the field."""

    code = "invalid_request_error"
    http_status = 400
    grpc_code = "INVALID_ARGUMENT"


class UnknownModel(InvalidRequest):
    code = "model_not_found"
    http_status = 404
    grpc_code = "NOT_FOUND"


class UnknownSession(InvalidRequest):
    code = "session_not_found"
    http_status = 404
    grpc_code = "NOT_FOUND"


class SessionConflict(InvalidRequest):
    code = "session_conflict"
    http_status = 409
    grpc_code = "ABORTED"


class UnknownNode(InvalidRequest):
    code = "node_not_found"
    http_status = 404
    grpc_code = "NOT_FOUND"


class NodeConflict(InvalidRequest):
    """A node that cannot be drained, or not as things are. The message has the reason and the remedy."""

    code = "node_conflict"
    http_status = 409
    grpc_code = "FAILED_PRECONDITION"


class Unauthorized(PacelineError):
    """Who asks is not known. The message says how to send a key, and nothing of the one that came."""

    code = "invalid_api_key"
    http_status = 401
    grpc_code = "UNAUTHENTICATED"


class Forbidden(PacelineError):
    code = "permission_denied"
    http_status = 403
    grpc_code = "PERMISSION_DENIED"


class Overloaded(PacelineError):
    """Refused before it queued. `retry_after` is in seconds."""

    code = "rate_limit_exceeded"
    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"


class RequestTimeout(PacelineError):
    code = "timeout"
    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"


class Unavailable(PacelineError):
    code = "service_unavailable"
    http_status = 503
    grpc_code = "UNAVAILABLE"


class EngineError(PacelineError):
    """A step failed. The message given to a client says so and no more; the log has the rest."""


class ConfigError(PacelineError):
    """A setting is wrong. `param` is its dotted key."""

    code = "config_error"


class ModelError(PacelineError):
    """A model cannot be found, read or run. The message names the remedy."""

    code = "model_error"


class DraftError(PacelineError):
    """A drafter failed. Speculation handles it; it never reaches a client."""

    code = "draft_error"


class ClusterError(PacelineError):
    """Kubernetes refused something, does not answer, or has not become what was asked for."""

    code = "cluster_error"


def by_code(code: str) -> type[PacelineError]:
    """The class of an error that crossed a process boundary as its code word."""
    return _BY_CODE.get(code, PacelineError)


def _tree(kind: type[PacelineError]) -> list[type[PacelineError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _tree(child))]


# EngineError has the base's code; it is the one of the two that is raised.
_BY_CODE = {kind.code: kind for kind in _tree(PacelineError)}
