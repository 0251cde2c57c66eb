"""What `paceline autoscale simulate` runs, and the tables it prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from paceline.autoscaling.load_policy import LoadPolicy
from paceline.autoscaling.policy import Policy
from paceline.autoscaling.presets import resolved
from paceline.autoscaling.simulate import generators, traces
from paceline.autoscaling.simulate.cluster import Conditions, Simulation
from paceline.autoscaling.simulate.policies import Fixed
from paceline.autoscaling.simulate.profile import Pace, Profile
from paceline.autoscaling.simulate.record import Record
from paceline.autoscaling.simulate.report import Comparison, Outcome, against, outcome
from paceline.config_autoscaling import AutoscalingSettings, DraftScaling, Preset, TargetScaling
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

ONGOING = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 26, 28, 30, 32)
"""What `ray` is run with for `target_ongoing_requests`: its frontier."""
BEGINNING_S = 300.0
HALF_FULL = 0.5
"""A simulation begins with as many replicas as the first minutes fill so far."""


@dataclass(frozen=True)
class Plan:
    """What is simulated."""

    profile: Profile
    rate: float
    hours: float
    seed: int
    follows: float
    cached: float
    tick: float
    look: float
    least: int
    most: int
    ttft_s: float
    itl_s: float
    price: float

    @property
    def cpu(self) -> bool:
        return self.profile.device == "cpu"


def itl_objective(profile: Profile) -> float:
    """The one of the preset throughput."""
    return float(resolved(AutoscalingSettings(preset="throughput"), cpu=profile.device == "cpu").itl_s)


def expanded(names: Sequence[str]) -> list[str]:
    """`ray` is all of its points; each name once."""
    every = [each for name in names for each in ([f"ray:{n}" for n in ONGOING] if name == "ray" else [name])]
    return list(dict.fromkeys(every))


def named_policy(name: str, plan: Plan) -> Policy:
    """Raises ConfigError for a name that is none."""
    kind, _, number = name.partition(":")
    if name in get_args(Preset):
        return LoadPolicy(_settings(name, plan), cpu=plan.cpu)
    if kind == "fixed" and number.isdecimal() and 0 < int(number) <= plan.most:
        return Fixed(int(number))
    if kind == "ray" and _positive(number):
        from paceline.serving.ray_policy import RayQueueLength

        return RayQueueLength(float(number), plan.least, plan.most)
    raise ConfigError(
        f"--policy: {name}: give latency, throughput, cost, ray, ray:N with N over 0, or fixed:N with N from 1 to "
        f"--max-replicas {plan.most}",
        param="policy",
    )


def _settings(preset: Any, plan: Plan) -> AutoscalingSettings:
    return AutoscalingSettings(
        preset=preset,
        target=TargetScaling(min_replicas=plan.least, max_replicas=plan.most),
        draft=DraftScaling(max_replicas=plan.most, price=plan.price),
        interval_s=max(plan.look, plan.tick),
    )


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def compare(trace: str, names: Sequence[str], plan: Plan, plot: Path | None, *, several: bool) -> list[Outcome]:
    """Every policy over one trace; with `several` traces each has a picture of its own."""
    arrivals = _arrivals(trace, plan)
    outcomes: list[Outcome] = []
    records: list[tuple[str, Record]] = []
    with _progress() as following:
        for name in names:
            began = perf_counter()
            conditions = _conditions(plan, arrivals, name)
            record = Simulation(conditions, arrivals, named_policy(name, plan)).run(following(arrivals.name, name))
            outcomes.append(outcome(arrivals.name, name, record, plan.price, perf_counter() - began))
            records.append((name, record))
    if plot is not None:
        from paceline.autoscaling.simulate.plots import draw

        path = plot.with_stem(f"{plot.stem}-{arrivals.name}") if several else plot
        shown = _worth_showing(outcomes, plan.ttft_s)
        draw(path, arrivals.name, [each for each in records if each[0] in shown], plan.ttft_s, plan.price)
    return outcomes


def _arrivals(trace: str, plan: Plan) -> traces.Arrivals:
    if trace not in generators.KINDS and Path(trace).exists():
        return traces.read(Path(trace)).ticks(plan.tick, Path(trace).stem)
    sessions = generators.Sessions(plan.follows, plan.cached)
    return generators.generate(trace, plan.rate, plan.hours, plan.seed, plan.tick, sessions)


def _conditions(plan: Plan, arrivals: traces.Arrivals, policy: str) -> Conditions:
    return Conditions(
        profile=plan.profile,
        ttft_s=plan.ttft_s,
        itl_s=plan.itl_s,
        initial=int(policy.partition(":")[2]) if policy.startswith("fixed:") else _beginning(plan, arrivals),
        look_s=plan.look,
        max_replicas=plan.most,
        seed=plan.seed,
    )


def _beginning(plan: Plan, arrivals: traces.Arrivals) -> int:
    """Replicas that the first minutes fill by half."""
    first = slice(0, max(1, round(BEGINNING_S / plan.tick)))
    seconds = plan.tick * len(arrivals.requests[first])
    pace = Pace(plan.profile)
    seats = float(pace.seats(plan.itl_s))
    token_s = float(pace.step(np.array([seats]))[0]) / seats
    fresh = (arrivals.prompt - arrivals.follow_cached)[first].sum() / plan.profile.prefill_tokens_per_s
    busy = (fresh + arrivals.output[first].sum() * token_s) / seconds
    return int(min(max(np.ceil(busy / HALF_FULL), plan.least), plan.most))


@contextmanager
def _progress() -> Iterator[Callable[[str, str], Callable[[float], None]]]:
    """A bar for each policy on a terminal; nothing elsewhere, for it is over in seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:

        def following(trace: str, name: str) -> Callable[[float], None]:
            task = bars.add_task(f"{trace}: {name}", total=1.0)
            return lambda share: bars.update(task, completed=share)

        yield following


def _worth_showing(outcomes: Sequence[Outcome], ttft_s: float) -> list[str]:
    """In a picture: all but Ray's, and of Ray's the cheapest within the objective, else the fastest."""
    ray = _rays(outcomes)
    good = [each for each in ray if (each.ttft_p95_s or 0.0) <= ttft_s]
    best = min(good, key=lambda each: each.cost) if good else min(ray, key=_p95, default=None)
    return [each.policy for each in outcomes if each not in ray or each is best]


def _rays(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [each for each in outcomes if each.policy.startswith("ray:")]


def _p95(each: Outcome) -> float:
    return each.ttft_p95_s or 0.0


def _compared(outcomes: Sequence[Outcome]) -> dict[str, Comparison]:
    """All but Ray's against Ray's."""
    ray = _rays(outcomes)
    return {each.policy: against(ray, each) for each in outcomes if each not in ray} if ray else {}


def report(found: Sequence[Sequence[Outcome]], plan: Plan) -> dict[str, Any]:
    """All of it for programs."""
    return {
        "plan": asdict(plan) | {"profile": plan.profile.name},
        "traces": [
            {
                "trace": outcomes[0].trace,
                "policies": [asdict(each) for each in outcomes],
                "against_ray": {name: asdict(each) for name, each in _compared(outcomes).items()},
            }
            for outcomes in found
        ],
    }


def show(console: Console, outcomes: Sequence[Outcome]) -> None:
    """One trace."""
    from rich import box
    from rich.table import Table

    compared = _compared(outcomes)
    title = f"{outcomes[0].trace}: {outcomes[0].requests:,.0f} requests"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("policy")
    for name in ("TTFT p50", "p95", "p99 s", "ITL p95 ms", "goodput", "targets", "most", "cost h", "ray at same p95"):
        table.add_column(name, justify="right")
    drafted = any(each.draft_hours for each in outcomes)
    if drafted:
        table.add_column("draft h", justify="right")
    for each in outcomes:
        cells = [
            each.policy, _seconds(each.ttft_p50_s), _seconds(each.ttft_p95_s), _seconds(each.ttft_p99_s),
            "" if each.itl_p95_s is None else f"{1e3 * each.itl_p95_s:.1f}", f"{100 * each.goodput:.1f}%",
            f"{each.mean_replicas:.1f}", f"{each.most_replicas:.0f}", f"{each.cost:.1f}",
            _saving(compared.get(each.policy)),
        ]  # fmt: skip
        table.add_row(*cells, *([f"{each.draft_hours:.1f}"] if drafted else []))
    console.print(table)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _saving(compared: Comparison | None) -> str:
    if compared is None:
        return ""
    if compared.cost_at_same_p95 is None or compared.saved is None:
        return "none so fast"
    return f"{compared.cost_at_same_p95:.1f} ({-100 * compared.saved:+.0f}%)"
