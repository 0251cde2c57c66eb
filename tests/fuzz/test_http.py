"""A minute of schemathesis; `python -m tests.fuzz.http` takes as long as it is given."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install -e '.[fuzz]'")

from tests.fuzz.http import fuzz, own_server


@pytest.mark.slow
async def test_no_request_is_an_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    async with own_server() as url:
        assert await fuzz(url, 60, 1) == 0
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
