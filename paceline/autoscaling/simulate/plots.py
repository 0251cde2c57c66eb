"""Policies beside each other over time; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paceline.autoscaling.simulate.histogram import quantile
from paceline.autoscaling.simulate.profile import Array
from paceline.autoscaling.simulate.record import Record
from paceline.errors import ConfigError

COLOURS = ("#1f6fd6", "#e07b16", "#2a9d5c", "#b23a8e", "#7a6a58", "#c22f2f")
SMOOTHED = 5
"""Windows whose distributions are one quantile in the picture."""


def require_matplotlib() -> None:
    """Raises ConfigError where it is not installed; draws to files from here on."""
    try:
        from matplotlib import use
    except ImportError:
        raise ConfigError("--plot: needs matplotlib (pip install 'paceline[bench]')", param="plot") from None
    use("Agg")


def draw(path: Path, title: str, runs: Sequence[tuple[str, Record]], ttft_s: float, price: float) -> None:
    """One picture of a trace: load, replicas, first tokens, goodput, cost."""
    require_matplotlib()
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(5, 1, figsize=(11, 13), sharex=True, layout="constrained")
    hours = _hours(runs[0][1])
    panels[0].fill_between(hours, _cut(runs[0][1], "requests"), color="#9aa7b5", alpha=0.6, linewidth=0)
    panels[0].set_ylabel("requests a second")
    for (name, record), colour in zip(runs, COLOURS * (len(runs) // len(COLOURS) + 1), strict=False):
        _policy(panels[1:], name, record, colour, price)
    panels[1].set_ylabel("targets\n(dotted: wanted)")
    panels[2].set_ylabel("time to first token, s\np95 (thin: p50)")
    panels[2].set_yscale("log")
    panels[2].axhline(ttft_s, color="#444444", linewidth=0.8, linestyle="--")
    panels[3].set_ylabel("goodput,\nshare of requests")
    panels[3].set_ylim(top=1.02)
    panels[4].set_ylabel("cost so far,\ntarget hours")
    panels[4].set_xlabel("hours")
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.margins(x=0.01)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in (panels[0], panels[1], panels[4]):
        panel.set_ylim(bottom=0)
    handles, labels = panels[4].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False, title=title)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _policy(panels: Any, name: str, record: Record, colour: str, price: float) -> None:
    hours = _hours(record)
    replicas, first, good, cost = panels
    replicas.plot(hours, _cut(record, "running"), color=colour, linewidth=1.3)
    replicas.plot(hours, _cut(record, "wanted"), color=colour, linewidth=0.8, linestyle=":")
    first.plot(hours, _quantiles(record, 0.95), color=colour, linewidth=1.3)
    first.plot(hours, _quantiles(record, 0.5), color=colour, linewidth=0.6)
    asked, served = _lump(record["requests"][: len(hours)]), _lump(record["good"][: len(hours)])
    good.plot(hours, np.minimum(served / np.maximum(asked, 1e-9), 1.0), color=colour, linewidth=1.1)
    spent = np.cumsum(record["replica_s"] + price * record["draft_s"])[: len(hours)] / 3600
    cost.plot(hours, spent, color=colour, linewidth=1.5, label=f"{name} ({spent[-1]:.0f} h)")


def _windows(record: Record) -> int:
    """Those with arrivals; what comes after is only the end of the last requests."""
    return max(1, int(np.flatnonzero(record["requests"] > 0).max(initial=0)) + 1)


def _hours(record: Record) -> Array:
    return (np.arange(_windows(record)) + 0.5) * record.window_s / 3600


def _cut(record: Record, name: str) -> Array:
    return record.over_time(name)[: _windows(record)]


def _lump(values: Array) -> Array:
    return np.convolve(values, np.ones(SMOOTHED), mode="same")


def _quantiles(record: Record, q: float) -> Array:
    count = _windows(record)
    around = [record.ttft[max(0, n - SMOOTHED // 2) : n + SMOOTHED // 2 + 1].sum(axis=0) for n in range(count)]
    return np.array([quantile(each, q) or np.nan for each in around])
