"""docs/metrics.md: every metric, from the tables that /metrics is written from."""

from __future__ import annotations

from collections.abc import Iterator

from paceline.api.metrics import Family
from paceline.api.metrics.families import SECTIONS

HEAD = """{generated}
# Metrics

`GET /metrics` of a running server is Prometheus text; who may read it says
[`api_keys.metrics`](security.md). It is collected when it is asked for, from what the replicas say in `/status`: one
that does not answer is missing. Counters begin anew with a replica, which has a new name then. Labels and names are
bounded: no label is made of what clients send.

Names that begin with `vllm:` mean what they mean in vLLM, so that its dashboards and AIPerf's server metrics work; the
label `engine` of vLLM is `replica` here. Buckets of histograms are vLLM's, with finer ones below its first. What to
know when numbers are compared:

- The time between tokens is that between two deltas of a stream, as in vLLM: with speculation a delta brings several
  tokens. The mean per token is in `vllm:request_time_per_output_token_seconds`.
- A request with `n` outputs counts as n. One that was taken over from a lost replica counts at both.
- Histograms of requests are of those that came to their end; an aborted one is only in `vllm:request_success_total`.
- What routers count has their name for a label: of several routers the one that a scrape comes to answers. Let
  queries sum over the `rate` of each, and over a time in which each was asked twice.
"""


def metrics_reference(generated: str) -> str:
    """The page; `generated` is its first line."""
    return "\n".join(_page(generated)).rstrip() + "\n"


def _page(generated: str) -> Iterator[str]:
    yield HEAD.format(generated=generated)
    for title, families in SECTIONS.items():
        yield f"## {title}\n\n| Name | Type | Labels | Meaning |\n| --- | --- | --- | --- |"
        yield from map(_row, families)
        yield ""


def _row(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.all_labels)
    return f"| `{family.name}` | {family.kind} | {labels} | {family.text} |"
