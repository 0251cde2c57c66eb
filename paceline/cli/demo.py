"""`paceline demo`: a two-turn chat through drafts and targets, the same again without drafts, and the numbers.

Two short answers say little about speed, so it is measured on longer ones, with and without drafts by turns.
"""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.cli import options
from paceline.errors import PacelineError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from paceline.cli.client import Answer, Client, ServerStatus
    from paceline.cli.deployment import Deployment
    from paceline.config import AppSettings

EPILOG = """\b
Examples:
  paceline demo
  paceline demo --keep --port 8000
  paceline demo --config deployments/local-cpu.yaml
"""

QUESTIONS = ("What is the capital of France?", "What is it famous for? Answer in two sentences.")
MAX_TOKENS = 80
SPEED_QUESTIONS = (
    "Explain how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper.",
    "How do I make a good cup of tea? Give me the steps.",
    "Write a Python function that reverses a string, and explain it.",
)
SPEED_TOKENS, SPEED_ROUNDS = 96, 3
DRAFTS_TIMEOUT_S = 30.0
POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of one round, answered."""

    number: int
    speculation: bool
    answer: Answer


def demo(
    keep: options.Keep = False,
    port: options.FreePort = None,
    grpc_port: options.FreeGrpcPort = None,
    config: options.DemoConfig = None,
) -> None:
    """Chat in two turns through a whole cluster.

    Starts router, targets and drafts on free ports of this machine, asks a question and a follow-up in one session,
    asks the same again without drafts, compares the tokens, and stops everything. A table shows for each turn which
    target served it, what came from its KV cache and what the drafts contributed. Four longer answers, three times
    with drafts and three times without, show the speed. The first run downloads the model.
    Exit code 1 if anything fails, or if drafts are deployed and none of their candidates arrives.
    """
    from paceline.cli.client import Client
    from paceline.cli.cluster import fetch_models, running_cluster, wait_for_interrupt
    from paceline.cli.console import StatusLine, stdout
    from paceline.cli.serve import announce, replicas

    deployment = read_demo_deployment(config, port, grpc_port)
    settings = deployment.settings
    console = stdout()
    fetch_models(settings, console)
    console.print(f"starting {settings.public_name}: {replicas(settings)}", markup=False)
    with running_cluster(deployment.config, StatusLine(console)) as endpoints:
        with Client(endpoints.http) as client:
            wait_for_drafts(client, settings, console)
            turns = [*play(client, console, speculation=True), *play(client, console, speculation=False)]
            report(console, settings, turns)
            if drafts_wanted(settings):
                console.print(speed_line(measure_speed(client, console)), style="bold", markup=False, soft_wrap=True)
        if keep:
            announce(console, settings, endpoints)
            wait_for_interrupt()
    console.print("stopped; nothing is left running")


def read_demo_deployment(config: Path | None, port: int | None, grpc_port: int | None) -> Deployment:
    """The config of the demo on free ports, so that a running server does not disturb it."""
    from paceline.cli.deployment import Overrides, find_local_cpu, read_deployment
    from paceline.ports import free_ports

    http, grpc = free_ports(2)
    overrides = Overrides(port=port or http, grpc_port=grpc_port or grpc)
    deployment = read_deployment(config or find_local_cpu(Path.cwd()), overrides)
    deployment.require_free_ports()
    return deployment


def wait_for_drafts(client: Client, settings: AppSettings, console: Console) -> None:
    """Give the targets time to find the drafts that are deployed; say so if they do not, and go on."""
    if not drafts_wanted(settings):
        return
    deadline = time.monotonic() + DRAFTS_TIMEOUT_S
    while warning := draft_warning(client.status()):
        if time.monotonic() > deadline:
            console.print(f"WARNING: {warning}", style="bold red", markup=False, soft_wrap=True)
            return
        time.sleep(POLL_S)


def drafts_wanted(settings: AppSettings) -> bool:
    return settings.speculation.enabled and settings.draft.num_replicas > 0


def play(client: Client, console: Console, *, speculation: bool) -> list[Turn]:
    """Ask the questions in one new session, printing the answers as they arrive."""
    from paceline.cli.client import ChatOptions, Message
    from paceline.cli.console import printable

    chosen = ChatOptions(
        session_id=f"demo-{secrets.token_hex(4)}",
        speculation=speculation,
        temperature=0.0,
        max_tokens=MAX_TOKENS,
        return_token_ids=True,
    )
    console.print(f"\nsession {chosen.session_id}, {'with' if speculation else 'without'} drafts", style="bold")
    history: list[Message] = []
    turns = []
    for number, question in enumerate(QUESTIONS, start=1):
        history.append(Message("user", question))
        console.print(f"> {question}", style="cyan", markup=False)
        answer = client.chat(history, chosen, lambda text: console.out(printable(text), end="", highlight=False))
        console.print()
        history.append(Message("assistant", answer.text))
        turns.append(Turn(number, speculation, answer))
    return turns


def report(console: Console, settings: AppSettings, turns: list[Turn]) -> None:
    """Print the numbers, whether the tokens agree, and what the numbers do not show.

    Raises PacelineError if drafts are configured and not one candidate was verified.
    """
    console.print()
    console.print(turn_table(turns))
    console.print(
        f"Same tokens with and without drafts: {agreement(turns)}", style="bold", markup=False, soft_wrap=True
    )
    console.print(speed_note(settings), style="dim", markup=False, soft_wrap=True)
    if drafts_wanted(settings) and not any(turn.answer.metrics.drafted for turn in turns if turn.speculation):
        raise PacelineError("drafts are deployed, but not one candidate reached a target; see the log above")


def measure_speed(client: Client, console: Console) -> dict[bool, list[float]]:
    """Tokens a second after the first token, of one stream, with (True) and without drafts: a figure for each round.

    The modes take turns, so that a busy machine slows both; a round before the first warms up what is measured.
    """
    from paceline.cli.client import ChatOptions, Message

    found: dict[bool, list[float]] = {True: [], False: []}
    with console.status("measuring the speed with and without drafts"):
        for number in range(SPEED_ROUNDS + 1):
            for speculation, rates in found.items():
                options = ChatOptions(speculation=speculation, temperature=0.0, max_tokens=SPEED_TOKENS)
                answers = [
                    client.chat([Message("user", question)], options, lambda _: None) for question in SPEED_QUESTIONS
                ]
                tokens = sum(answer.metrics.completion_tokens - 1 for answer in answers)
                decode_s = sum(answer.metrics.total_s - answer.metrics.ttft_s for answer in answers)
                if number and decode_s:
                    rates.append(tokens / decode_s)
    return found


def speed_line(rates: dict[bool, list[float]]) -> str:
    """What `measure_speed` found, in one line."""
    if not (rates[True] and rates[False]):
        return "Speed of one stream: too fast to measure"
    with_drafts, without = (statistics.median(rates[mode]) for mode in (True, False))
    spread = ", ".join(
        f"{name} {min(rates[mode]):.0f}-{max(rates[mode]):.0f}" for mode, name in ((True, "with"), (False, "without"))
    )
    return (
        f"Speed of one stream, {len(SPEED_QUESTIONS)} answers of up to {SPEED_TOKENS} tokens, medians of "
        f"{len(rates[True])}: {with_drafts:.0f} tok/s with drafts, {without:.0f} without: "
        f"{with_drafts / without:.2f}x ({spread})"
    )


def turn_table(turns: list[Turn]) -> Table:
    """Each turn of each round: who served it, what it cost, what the drafts contributed. Fits in 80 columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for name in ("turn", "drafts", "target"):
        table.add_column(name, no_wrap=True)
    for name in ("prompt", "cached", "answer", "TTFT", "tok/s", "drafted", "accepted", "late"):
        table.add_column(name, justify="right", no_wrap=True)
    for turn in turns:
        metrics = turn.answer.metrics
        table.add_row(
            str(turn.number),
            "on" if turn.speculation else "off",
            turn.answer.replica_id,
            str(metrics.prompt_tokens),
            str(metrics.cached_tokens),
            str(metrics.completion_tokens),
            f"{metrics.ttft_s:.2f} s",
            f"{metrics.decode_tokens_per_s:.1f}",
            str(metrics.drafted),
            str(metrics.accepted),
            str(metrics.late),
        )
    return table


def agreement(turns: list[Turn]) -> str:
    """Whether both rounds gave the same tokens, and if not, where they part.

    Only the first difference counts: after it, the next turn has another history.
    """
    with_drafts = [turn for turn in turns if turn.speculation]
    without = [turn for turn in turns if not turn.speculation]
    for drafted, plain in zip(with_drafts, without, strict=True):
        if (place := first_difference(drafted.answer.token_ids, plain.answer.token_ids)) is not None:
            return (
                f"NO, turn {drafted.number} differs from token {place + 1} on. "
                "A floating-point near-tie between two tokens can do that; anything else is a bug, please report it."
            )
    return f"yes, all {sum(len(turn.answer.token_ids) for turn in with_drafts)}"


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first position at which two sequences differ, None if they are equal."""
    if left == right:
        return None
    differing = (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(differing, min(len(left), len(right)))


def speed_note(settings: AppSettings) -> str:
    """What the table does and does not show."""
    if settings.draft_model != settings.model:
        return f"Drafts run {settings.draft_model}, targets {settings.model}."
    return (
        f"The drafts run the target's own model ({settings.model}): this shows the path, not the speed. "
        "Each candidate costs as much as a token of the target, and all of them share this machine."
    )


def draft_warning(found: ServerStatus) -> str | None:
    """What to say if a target wants drafters and has none; None if all is well.

    A target that speculates reports how many drafters it knows of and how many it is connected to.
    """
    alone = [target for target in found.targets if "drafters_known" in target and not target.get("drafters_connected")]
    if not alone:
        return None
    names = ", ".join(str(target.get("replica_id")) for target in alone)
    reasons = "; ".join(dict.fromkeys(str(why) for target in alone if (why := target.get("drafter_problems"))))
    because = f" ({reasons})" if reasons else ""
    return f"speculation is on, but no drafter is connected to {names}{because}: answers are right, and slower"
