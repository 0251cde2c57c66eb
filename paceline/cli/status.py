"""`paceline status`: which replicas a running server has, which sessions, and what speculation does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from paceline.cli import options
from paceline.errors import PacelineError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from paceline.cli.client import Client
    from paceline.cli.status_view import Seen

EPILOG = """\b
Examples:
  paceline status
  paceline status --watch --every 1
  paceline status --url http://10.0.0.5:8000 --all
  paceline status --json | jq '.targets[].replica_id'
"""


def status(
    url: options.Url = options.DEFAULT_URL,
    api_key: options.ApiKey = None,
    watch: options.Watch = False,
    every: options.Every = 2.0,
    all_facts: options.AllFacts = False,
    as_json: options.Json = False,
) -> None:
    """Show the replicas, drafters and sessions of a running server.

    Of each target how busy it is, how full its KV cache, and the share of candidates it accepted; of each drafter what
    it does; the sessions used last, and where their KV is; for each source of candidates how many were verified and
    became output, and at which places of a run; where each rank of a replica runs. A server whose speculation is
    configured and idle answers correctly and slower; this says so, and why.
    """
    from paceline.cli.client import Client
    from paceline.cli.console import stdout
    from paceline.cli.status_view import Seen, view

    def ask() -> Seen:
        return Seen(client.status(), tuple(client.sessions()), client.url, time.time())

    console = stdout()
    with Client(url, api_key=api_key) as client:
        if as_json:
            print_json(client, every if watch else None)
        elif watch:
            keep_showing(console, lambda: view(ask(), all_facts=all_facts, columns=console.width), every)
        else:
            console.print(view(ask(), all_facts=all_facts, columns=console.width), soft_wrap=False)


def print_json(client: Client, every: float | None, sleep: Callable[[float], None] = time.sleep) -> None:
    """What the server says: once, or with a pause of so many seconds a line each time until Ctrl-C."""
    if every is None:
        print(json.dumps(client.status().raw, indent=2))
        return
    try:
        while True:
            print(json.dumps(client.status().raw), flush=True)
            sleep(every)
    except KeyboardInterrupt:
        return


def keep_showing(
    console: Console,
    look: Callable[[], RenderableType],
    every: float,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Draw what `look` gives until Ctrl-C: in place on a terminal, one below the other elsewhere.

    A server that does not answer is said to, and asked again.
    """
    from rich.live import Live
    from rich.text import Text

    screen = Live(console=console, screen=True, auto_refresh=False) if console.is_terminal else None
    try:
        with screen or nullcontext():
            while True:
                try:
                    shown = look()
                except PacelineError as error:
                    shown = Text(f"{error.message}\nasking again in {every:g} s; Ctrl-C ends", style="red")
                if screen is not None:
                    screen.update(shown, refresh=True)
                else:
                    console.print(shown)
                sleep(every)
    except KeyboardInterrupt:
        return
