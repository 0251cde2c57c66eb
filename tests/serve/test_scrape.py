"""Every metric that a dashboard or an alert asks for is in the scrape of a cluster at work."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.monitoring.files import wanted
from tests.serve.conftest import Server, chat_all

pytestmark = pytest.mark.serve

PROMPTS = ["Count from one to twenty.", "Name the days of the week.", "Say the same word again and again."]
NEVER_HERE = {
    "paceline_autoscaling_signal": "only where there is an autoscaler",
    "paceline_draft_saved_seconds": "not with a depth that was set: nobody holds drafts against plain steps then",
    "paceline_synthetic_acceptance": "only where candidates are accepted by chance",
}


async def at_work(server: Server) -> str:
    """/metrics after a few chats at once, one of them continued, so that its prompt is found in the cache."""
    options = {"max_tokens": 32, "temperature": 0}
    await chat_all(server, PROMPTS, **options)
    for _ in range(2):
        await chat_all(server, PROMPTS[:1], session_id="scraped", **options)
    async with httpx.AsyncClient(base_url=server.endpoints.http, timeout=30) as client:
        return (await client.get("/metrics")).raise_for_status().text


async def test_dashboards_and_alerts_ask_for_nothing_that_is_not_there(server: Server) -> None:
    text = await at_work(server)
    found = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    assert sorted(wanted() - found - NEVER_HERE.keys()) == []
