"""Lines of a log as JSON, and what of a replica goes where Ray Serve's own lines go."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest

from paceline.config import AppSettings, TelemetrySettings
from paceline.serving.logs import join_serve_logs, logging_config
from paceline.telemetry.logs import JsonFormatter
from paceline.telemetry.requests import named
from paceline.types import Request, SamplingParams
from tests.telemetry.recorded import CLIENT, CLIENT_TRACE

TEXT, JSON = TelemetrySettings(), TelemetrySettings(log_format="json")
REQUEST = Request("chatcmpl-1", (1,), SamplingParams(), session_id="s/1", trace=CLIENT)


def line(message: str, *args: object, **extra: Any) -> dict[str, Any]:
    record = logging.getLogger("paceline.x").makeRecord(
        "paceline.x", logging.WARNING, "x.py", 7, message, args, None, extra=extra
    )
    found: dict[str, Any] = json.loads(JsonFormatter().format(record))
    return found


def test_a_line_has_level_logger_and_message() -> None:
    found = line("%d drafters", 2)
    assert [found[name] for name in ("levelname", "logger", "message")] == ["WARNING", "paceline.x", "2 drafters"]


def test_what_a_line_was_given_is_in_it() -> None:
    found = line("gone", **named(REQUEST))
    ids = (found["completion_id"], found["session_id"], found["trace_id"])
    assert ids == ("chatcmpl-1", "s/1", f"{CLIENT_TRACE:032x}")


def test_a_line_about_a_request_without_a_session_names_none() -> None:
    assert named(Request("r", (1,), SamplingParams())) == {"completion_id": "r"}


def test_a_line_is_one_line_whatever_is_in_it() -> None:
    record = logging.makeLogRecord({"msg": "a\nb", "session_id": 'x"\n'})
    assert "\n" not in JsonFormatter().format(record)


def test_a_traceback_is_a_field() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.makeLogRecord({"msg": "failed", "exc_info": sys.exc_info()})
    assert json.loads(JsonFormatter().format(record))["exc_text"].endswith("ValueError: why")


def test_a_deployment_s_logs_are_the_application_s_unless_json_is_wanted() -> None:
    assert logging_config(TEXT) is None
    made = logging_config(JSON)
    assert made is not None and made.encoding == "JSON"


def test_an_unknown_form_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"telemetry\.log_format"):
        AppSettings.model_validate({"telemetry": {"log_format": "xml"}})


@pytest.fixture
def serve_log() -> Iterator[StringIO]:
    """What Serve's logger writes to stderr, as it is in a replica; all loggers are put back."""
    written = StringIO()
    loggers = [logging.getLogger(name) for name in ("ray.serve", "paceline")]
    before = [(each, each.handlers, each.level) for each in loggers]
    loggers[0].handlers, loggers[0].level = [logging.StreamHandler(written)], logging.INFO
    try:
        yield written
    finally:
        for each, handlers, level in before:
            each.handlers = handlers
            each.setLevel(level)


def test_our_lines_go_where_serve_s_go(serve_log: StringIO) -> None:
    join_serve_logs(TEXT)
    logging.getLogger("paceline.x").info("here")
    assert serve_log.getvalue() == "here\n"


def test_what_serve_does_not_log_we_do_not(serve_log: StringIO) -> None:
    join_serve_logs(TEXT)
    logging.getLogger("paceline.x").debug("here")
    assert serve_log.getvalue() == ""


def test_with_json_both_write_it_to_stderr(serve_log: StringIO) -> None:
    join_serve_logs(JSON)
    logging.getLogger("paceline.x").info("ours", extra=named(REQUEST))
    logging.getLogger("ray.serve").info("serve's")
    ours, serves = map(json.loads, serve_log.getvalue().splitlines())
    assert (ours["message"], ours["session_id"], serves["message"]) == ("ours", "s/1", "serve's")


def test_handlers_that_serve_gets_later_are_used(serve_log: StringIO) -> None:
    join_serve_logs(TEXT)
    later = StringIO()
    logging.getLogger("ray.serve").handlers = [logging.StreamHandler(later)]
    logging.getLogger("paceline.x").info("here")
    assert (serve_log.getvalue(), later.getvalue()) == ("", "here\n")


def test_outside_a_replica_nothing_changes(serve_log: StringIO) -> None:
    logging.getLogger("ray.serve").handlers = []
    before = list(logging.getLogger("paceline").handlers)
    join_serve_logs(JSON)
    assert logging.getLogger("paceline").handlers == before
