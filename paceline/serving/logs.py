"""Where the lines of a replica go: into the file that Ray Serve keeps of it, and to stderr, in the wanted form."""

from __future__ import annotations

import logging

from ray.serve.schema import LoggingConfig

from paceline.config import TelemetrySettings
from paceline.telemetry.logs import JsonFormatter

SERVE = "ray.serve"
OURS = "paceline"


def logging_config(settings: TelemetrySettings) -> LoggingConfig | None:
    """Of a deployment: in what form Serve writes the file; None leaves it to the application's."""
    return LoggingConfig(encoding="JSON") if settings.log_format == "json" else None


def join_serve_logs(settings: TelemetrySettings) -> None:
    """Have this process's `paceline` loggers write where Serve's write, from the same level on.

    Serve's filters add the replica and the request's id to each line. Outside a replica there is nothing to join.
    """
    serve, ours = logging.getLogger(SERVE), logging.getLogger(OURS)
    if not serve.handlers:
        return
    if settings.log_format == "json":
        for handler in serve.handlers:
            if type(handler) is logging.StreamHandler:  # Serve has the form for its file alone
                handler.setFormatter(JsonFormatter())
    ours.handlers = [_To(serve)]
    ours.setLevel(serve.level)


class _To(logging.Handler):
    """What another logger does with a record, whatever handlers it has by then."""

    def __init__(self, other: logging.Logger) -> None:
        super().__init__()
        self._other = other

    def handle(self, record: logging.LogRecord) -> bool:
        self._other.callHandlers(record)
        return True
