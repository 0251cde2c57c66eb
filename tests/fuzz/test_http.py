"""A minute of schemathesis; `python -m tests.fuzz.http` takes as long as it is given."""

from __future__ import annotations

import pytest

pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install -e '.[fuzz]'")

from tests.fuzz.http import fuzz, own_server


@pytest.mark.slow
async def test_no_request_is_an_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.setLevel("ERROR")
    async with own_server() as url:
        assert await fuzz(url, 60, 1) == 0
    assert caplog.records == []
