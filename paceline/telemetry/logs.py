"""Lines of a log as JSON objects: what Python's record has, and every field that was given as `extra`."""

from __future__ import annotations

import json
import logging
import time

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every record has; the rest was given."""
_UNTOLD = frozenset({"serve_access_log", "skip_context_filter", "log_to_stderr", "job_id", "task_id"})
"""Ray's, for its own handlers."""


class JsonFormatter(logging.Formatter):
    """One object a line. Names are those of Ray Serve's own JSON logs, so that both are read alike."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "asctime": f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "levelname": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
        }
        if record.exc_info:
            fields["exc_text"] = self.formatException(record.exc_info)
        given = {name: value for name, value in vars(record).items() if name not in _OWN and name not in _UNTOLD}
        return json.dumps(fields | given, default=str)
