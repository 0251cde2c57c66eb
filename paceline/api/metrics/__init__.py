"""GET /metrics: what the replicas report about themselves, as Prometheus text.

    status of each replica ──► families (tables: name, kind, meaning, labels, what reads it) ──► text

Collected when it is asked for, from the same numbers as /status. A replica that does not answer is missing, and its
series with it; counters begin anew with a replica, which has a new name then. What routers count is told by the one
that answers, under its name. Names are vLLM's where the meaning is the same, so that its dashboards work; ours begin
with `paceline_`. docs/metrics.md is written from the tables.
"""

from paceline.api.metrics.exposition import CONTENT_TYPE, prometheus_text
from paceline.api.metrics.families import FAMILIES
from paceline.api.metrics.family import Family

__all__ = ["CONTENT_TYPE", "FAMILIES", "Family", "prometheus_text"]
