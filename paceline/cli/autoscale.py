"""`paceline autoscale`: policies over arrivals that are simulated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.options import Json, group
from paceline.errors import ConfigError

EPILOG = """\b
Examples:
  paceline autoscale simulate bursts --rate 60 --hours 6 --plot bursts.png
  paceline autoscale simulate poisson bursts diurnal --policy throughput --policy ray
  paceline autoscale simulate AzureLLMInferenceTrace_conv.csv --policy cost --policy ray:16 --policy fixed:4
  paceline autoscale simulate requests.jsonl --profile smollm2-135m-2cores --json
  paceline autoscale simulate diurnal --rate 50000 --max-replicas 5000 --tick 5 --policy throughput
"""
PRESETS = ("latency", "throughput", "cost")
HUGE = 512
HUGE_LOOK_S = 60.0

autoscale_app = group("How many replicas there should be.")

Traces = Annotated[
    list[str],
    typer.Argument(
        metavar="TRACE…",
        help="poisson, bursts or diurnal; or a file: JSONL of {t, prompt_tokens, output_tokens, session}, or CSV of "
        "Azure's LLM inference traces.",
        show_default=False,
    ),
]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        metavar="NAME",
        help="latency, throughput or cost: ours; ray: Ray Serve's default over several target_ongoing_requests; ray:N: "
        "with N; fixed:N: always N. May be repeated.  [default: the three presets and ray]",
        show_default=False,
    ),
]
ProfileName = Annotated[
    str, typer.Option("--profile", metavar="NAME", help="What a replica can do: a shipped profile, or a YAML file.")
]
Rate = Annotated[
    float, typer.Option("--rate", metavar="N", min=1e-6, max=1e9, help="Requests a second, of generated traces.")
]
Hours = Annotated[float, typer.Option("--hours", metavar="H", min=0.01, max=8784.0, help="Of generated traces.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of generated traces and of start-up times.")]
Follows = Annotated[
    float, typer.Option("--follows", metavar="SHARE", min=0.0, max=1.0, help="Generated requests continuing a session.")
]
Cached = Annotated[
    float, typer.Option("--cached", metavar="SHARE", min=0.0, max=1.0, help="Of their prompts, what the session holds.")
]
TickSeconds = Annotated[
    float, typer.Option("--tick", metavar="SECONDS", min=0.05, max=10.0, help="Step of the simulation.")
]
LookSeconds = Annotated[
    float | None,
    typer.Option(
        "--look",
        metavar="SECONDS",
        min=0.05,
        max=600.0,
        help="Between two looks of a policy.  [default: 1; 60 for more than 512 replicas]",
        show_default=False,
    ),
]
Least = Annotated[int, typer.Option("--min-replicas", metavar="N", min=1, help="Fewest targets.")]
Most = Annotated[int, typer.Option("--max-replicas", metavar="N", min=1, max=100_000, help="Most targets.")]
TtftSeconds = Annotated[
    float, typer.Option("--ttft", metavar="SECONDS", min=0.001, help="Objective that goodput is counted by.")
]
ItlSeconds = Annotated[
    float | None,
    typer.Option(
        "--itl",
        metavar="SECONDS",
        min=0.0001,
        help="Objective that goodput is counted by, and a replica's seats.  [default: of the preset throughput]",
        show_default=False,
    ),
]
WithDrafts = Annotated[bool, typer.Option("--drafts", help="With a pool of drafters, as the profile describes them.")]
Price = Annotated[float, typer.Option("--price", metavar="X", min=0.0, help="Cost of a drafter, in targets.")]
PlotFile = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        help="Draw replicas, latency, goodput and cost over time; of several traces a file each. Needs matplotlib.",
        show_default=False,
    ),
]


@autoscale_app.callback()
def _group() -> None:
    """How many replicas there should be."""


@autoscale_app.command("simulate", epilog=EPILOG)
def simulate(
    traces: Traces,
    policy: Policies = None,
    profile: ProfileName = "llama-8b-h100",
    rate: Rate = 60.0,
    hours: Hours = 6.0,
    seed: Seed = 0,
    follows: Follows = 0.5,
    cached: Cached = 0.6,
    tick: TickSeconds = 1.0,
    look: LookSeconds = None,
    min_replicas: Least = 1,
    max_replicas: Most = 100,
    ttft: TtftSeconds = 3.0,
    itl: ItlSeconds = None,
    drafts: WithDrafts = False,
    price: Price = 0.25,
    plot: PlotFile = None,
    as_json: Json = False,
) -> None:
    """Replay arrivals against autoscaling policies, and compare what they cost and how long first tokens take.

    The policies are those that serve; replicas are a model, made from measurements. docs/autoscaling-simulation.md says
    what it knows and what it leaves out.
    """
    from paceline.autoscaling.simulate.profile import load
    from paceline.cli.autoscale_runs import Plan, compare, expanded, itl_objective, named_policy, report, show
    from paceline.cli.console import stdout

    if min_replicas > max_replicas:
        raise ConfigError(
            f"--min-replicas: {min_replicas} is more than --max-replicas {max_replicas}", param="min_replicas"
        )
    loaded = load(profile)
    if drafts and loaded.drafts is None:
        raise ConfigError(f"--drafts: the profile {loaded.name} describes no drafters", param="drafts")
    loaded = loaded if drafts else loaded.model_copy(update={"drafts": None})
    plan = Plan(
        profile=loaded, rate=rate, hours=hours, seed=seed, follows=follows, cached=cached, tick=tick,
        look=look or (1.0 if max_replicas <= HUGE else HUGE_LOOK_S), least=min_replicas, most=max_replicas, ttft_s=ttft,
        itl_s=itl or itl_objective(loaded), price=price,
    )  # fmt: skip
    names = expanded(policy or [*PRESETS, "ray"])
    for name in names:
        named_policy(name, plan)  # a wrong name is said before anything is computed
    if plot is not None:
        from paceline.autoscaling.simulate.plots import require_matplotlib

        require_matplotlib()
    try:
        found = [compare(trace, names, plan, plot, several=len(traces) > 1) for trace in traces]
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(report(found, plan), indent=2))
        return
    console = stdout()
    for outcomes in found:
        show(console, outcomes)
