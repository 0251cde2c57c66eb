"""Metrics of candidates: what targets verified, and what drafters drew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, Literal

from paceline.api.metrics.family import (
    Family,
    Reader,
    Sample,
    by_name,
    mapping_at,
    number,
    number_at,
    ranges_by_key,
)

Counted = Literal["drafted", "accepted"]


def _by_place(status: Any, counted: Counted) -> dict[str, Sequence[float]]:
    """Counts by place of each source; nothing of what is not there or not numbers."""
    found: dict[str, Sequence[float]] = {}
    for source, told in mapping_at(status, "speculation", "sources").items():
        counts = mapping_at({"": told}, "").get(counted)
        if isinstance(counts, list | tuple) and all(type(count) in (int, float) for count in counts):
            found[str(source)] = counts
    return found


def _total(counted: Counted) -> Reader:
    def read(target: Any) -> Iterator[Sample]:
        yield (), sum(map(sum, _by_place(target, counted).values()))

    return read


def _accepted_by_position(target: Any) -> Iterator[Sample]:
    for place, counts in enumerate(zip_longest(*_by_place(target, "accepted").values(), fillvalue=0)):
        yield (str(place),), sum(counts)


def _by_source_and_position(counted: Counted) -> Reader:
    def read(target: Any) -> Iterator[Sample]:
        for source, counts in _by_place(target, counted).items():
            for place, count in enumerate(counts):
                yield (source, str(place)), count

    return read


def _rolled_back(target: Any) -> Iterator[Sample]:
    drafted, accepted = _by_place(target, "drafted"), _by_place(target, "accepted")
    for source in drafted.keys() & accepted.keys():
        yield (source,), sum(drafted[source]) - sum(accepted[source])


def _wasted(target: Any) -> Iterator[Sample]:
    sources = mapping_at(target, "speculation", "sources")
    for source in sources:
        if (count := number_at(sources, source, "wasted")) is not None:
            yield (str(source),), count


FAMILIES = (
    Family(
        "vllm:spec_decode_num_drafts_total",
        "counter",
        "Runs of candidates verified.",
        number("telemetry", "drafts"),
    ),
    Family(
        "vllm:spec_decode_num_draft_tokens_total",
        "counter",
        "Candidates verified, of all sources.",
        _total("drafted"),
    ),
    Family(
        "vllm:spec_decode_num_accepted_tokens_total",
        "counter",
        "Candidates that became output.",
        _total("accepted"),
    ),
    Family(
        "vllm:spec_decode_num_accepted_tokens_per_pos_total",
        "counter",
        "Candidates that became output, by their place in the run, from 0.",
        _accepted_by_position,
        ("position",),
    ),
    Family(
        "paceline_drafted_tokens_total",
        "counter",
        "Candidates verified.",
        _by_source_and_position("drafted"),
        ("source", "position"),
    ),
    Family(
        "paceline_accepted_tokens_total",
        "counter",
        "Candidates that became output.",
        _by_source_and_position("accepted"),
        ("source", "position"),
    ),
    Family("paceline_rolled_back_tokens_total", "counter", "Candidates verified in vain.", _rolled_back, ("source",)),
    Family(
        "paceline_wasted_tokens_total",
        "counter",
        "Candidates that arrived and were never verified.",
        _wasted,
        ("source",),
    ),
    Family(
        "paceline_speculation_depth",
        "histogram",
        "Candidates in a window that was verified.",
        ranges_by_key("telemetry", "depth"),
        ("source",),
    ),
    Family(
        "paceline_late_drafts_total",
        "counter",
        "Steps of a sequence that wanted a draft and had none.",
        number("speculation", "late"),
    ),
    Family(
        "paceline_draft_tokens_wanted_total",
        "counter",
        "Candidates asked of drafters.",
        number("draft_tokens_wanted"),
    ),
    Family(
        "paceline_draft_saved_seconds",
        "gauge",
        "Time of the target that drafts saved since its start; falls while they cost more than they save.",
        number("draft_saved_s"),
    ),
    Family(
        "paceline_synthetic_acceptance",
        "gauge",
        "Set: text is nonsense.",
        number("speculation", "synthetic_acceptance"),
    ),
    Family("paceline_drafters_connected", "gauge", "Draft streams up.", number("drafters_connected")),
    Family(
        "paceline_draft_link_bytes_total",
        "counter",
        "Bytes between target and drafters.",
        by_name({direction: f"draft_bytes_{direction}" for direction in ("sent", "received")}),
        ("direction",),
    ),
)

DRAFTERS = (
    Family(
        "paceline_drafter_tokens_total",
        "counter",
        "Tokens a draft replica drew.",
        number("drafted_tokens"),
        scope="draft",
    ),
    Family(
        "paceline_drafter_rolled_back_tokens_total",
        "counter",
        "Tokens a draft replica drew in vain: the target went another way.",
        number("rolled_back_tokens"),
        scope="draft",
    ),
    Family(
        "paceline_drafter_busy_seconds_total",
        "counter",
        "Time a draft replica spent in steps.",
        number("busy_s"),
        scope="draft",
    ),
    Family(
        "paceline_drafter_streams",
        "gauge",
        "Targets connected to a draft replica.",
        number("streams"),
        scope="draft",
    ),
    Family(
        "paceline_drafter_sequences",
        "gauge",
        "Sequences a draft replica follows.",
        number("sequences"),
        scope="draft",
    ),
)
