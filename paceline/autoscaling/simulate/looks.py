"""What replicas that are simulated report: the same fields as real ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
from numpy.typing import NDArray

from paceline.autoscaling.simulate.profile import DraftProfile
from paceline.autoscaling.simulate.replicas import REPORTED, Replicas
from paceline.autoscaling.snapshot import DraftLoad, TargetLoad

FEW = 512
GROUPS = 128
"""More than FEW replicas report in so many groups of about the same load, each member its group's mean: sums stay."""
NOTHING = 0.01
"""Requests a second below which there is no time to the first token."""


@dataclass(frozen=True)
class Reporting:
    """What every target reports alike."""

    seats: int
    prefill_tokens_per_s: float
    kv_tokens: int
    start_s: float
    depth: int


def targets_seen(
    replicas: Replicas, serving: NDArray[np.bool_], alike: Reporting, served: float
) -> tuple[TargetLoad, ...]:
    """Of those that serve; `served` is the share of the steps wanting drafts that had them."""
    there = np.flatnonzero(serving)
    figures = np.concatenate([replicas.reported, replicas["sessions"][None]])[:, there]
    if len(there) <= FEW:
        names = replicas.number[there].tolist()
        rows = figures.T.tolist()
        return tuple(_load(f"t{name}", row, alike, served) for name, row in zip(names, rows, strict=True))
    order = np.argsort(figures[0] + figures[1])
    edges = np.linspace(0, len(there), GROUPS + 1).astype(int)
    sizes = np.diff(edges)
    means = (np.add.reduceat(figures[:, order], edges[:-1], axis=1) / sizes).T.tolist()
    loads = (_load(f"group-{n}", row, alike, served) for n, row in enumerate(means))
    return tuple(chain.from_iterable(repeat(load, int(size)) for load, size in zip(loads, sizes, strict=True)))


def _load(name: str, row: list[float], alike: Reporting, served: float) -> TargetLoad:
    seen = dict(zip((*REPORTED, "sessions"), row, strict=True))
    return TargetLoad(
        replica=name,
        running=seen["running"],
        waiting=seen["waiting"],
        seats=float(alike.seats),
        queued_prefill_tokens=seen["queued"],
        prefill_tokens_per_s=alike.prefill_tokens_per_s,
        prompt_tokens_per_s=seen["prompt"],
        output_tokens_per_s=seen["tokens"],
        requests_per_s=seen["arrived"],
        kv_in_use=min(1.0, seen["kv"] / alike.kv_tokens),
        ttft_p95_s=seen["ttft"] if seen["arrived"] > NOTHING else None,
        itl_p95_s=seen["itl"] if seen["running"] > NOTHING else None,
        sessions=seen["sessions"],
        start_s=alike.start_s,
        drafts_wanted=seen["wanted"],
        draft_tokens_wanted_per_s=seen["steps"] * seen["wanted"] * alike.depth,
        draft_late=1.0 - served if seen["wanted"] > 0 else None,
        draft_saved=seen["saved"] if alike.depth else None,
    )


def drafts_seen(count: int, busy: float, profile: DraftProfile) -> tuple[DraftLoad, ...]:
    """Drafters share their work evenly."""
    tokens = busy / profile.token_s
    return tuple(
        DraftLoad(replica=f"d{n}", busy=busy, tokens_per_s=tokens, start_s=profile.start_s) for n in range(count)
    )
