"""What a running cluster says of its speculation: in the answer, in /status and in /metrics, the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.conftest import Server

pytestmark = pytest.mark.serve
BODY = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 24}


def counted(server: Server) -> dict[str, float]:
    """Sums over all replicas, by name of the metric."""
    text = httpx.get(server.endpoints.http + "/metrics", timeout=30).raise_for_status().text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def drafted(status: Mapping[str, Any]) -> int:
    sources = [each for target in status["targets"] for each in target["speculation"]["sources"].values()]
    return sum(sum(each["drafted"]) for each in sources)


def test_an_answer_says_which_of_its_tokens_were_drafted(server: Server) -> None:
    answer = server.post("/v1/chat/completions", BODY).json()
    info, usage = answer["paceline"], answer["usage"]["completion_tokens_details"]
    by_place = [sum(each[kind]) for each in info["sources"].values() for kind in ("drafted", "accepted")]
    assert (sum(by_place[0::2]), sum(by_place[1::2])) == (info["drafted_tokens"], info["accepted_tokens"])
    assert usage["accepted_prediction_tokens"] == info["accepted_tokens"] > 0


def test_status_and_metrics_count_what_the_answers_said(server: Server) -> None:
    before, earlier = drafted(server.status()), counted(server)
    answer = server.post("/v1/chat/completions", BODY).json()["paceline"]
    after, later = drafted(server.status()), counted(server)
    grown = {name: later[name] - earlier.get(name, 0) for name in later}
    assert after - before == answer["drafted_tokens"]
    assert grown["vllm:spec_decode_num_draft_tokens_total"] == answer["drafted_tokens"]
    assert grown["vllm:spec_decode_num_accepted_tokens_per_pos_total"] == answer["accepted_tokens"]


def test_metrics_tell_of_every_replica_and_link(server: Server) -> None:
    found = counted(server)
    assert (found["paceline_replicas"], found["paceline_drafters_connected"]) == (4, 4)
    assert found["paceline_draft_link_bytes_total"] > 0


def test_a_cluster_at_work_warns_of_nothing(server: Server) -> None:
    server.post("/v1/chat/completions", BODY)
    assert [target["warnings"] for target in server.status()["targets"]] == [[], []]
