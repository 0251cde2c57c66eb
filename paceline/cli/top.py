"""`paceline top`: what a running server does right now, in rates."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from paceline.cli import options
from paceline.cli.status import keep_showing

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.cli.client import Client
    from paceline.cli.scrape import Scrape
    from paceline.cli.top_view import Look

EPILOG = """\b
Examples:
  paceline top
  paceline top --every 1 --url http://10.0.0.5:8000
  paceline top --once --every 10 > load.txt
"""


def top(
    url: options.Url = options.DEFAULT_URL,
    api_key: options.ApiKey = None,
    every: options.Looks = 2.0,
    once: options.Once = False,
) -> None:
    """Show what a running server does, anew until Ctrl-C.

    Rates, times and shares are of the time between two looks: tokens a second, time to first token and between tokens,
    the share of candidates accepted, each drafter's load. Below are the last decisions of the autoscaler with their
    reasons. The busiest replicas come first.
    """
    from paceline.cli.client import Client
    from paceline.cli.console import stdout
    from paceline.cli.top_view import view

    console = stdout()
    with Client(url, api_key=api_key) as client:
        watch = Watch(client)
        if once:
            watch.look()
            time.sleep(every)
            console.print(view(watch.look(), console.width))
        else:
            keep_showing(console, lambda: view(watch.look(), console.width, console.height), every)


class Watch:
    """Remembers the look before."""

    def __init__(self, client: Client, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._before: Scrape | None = None

    def look(self) -> Look:
        from paceline.cli.scrape import Interval, Scrape
        from paceline.cli.top_view import Look

        status = self._client.status()
        scrape = Scrape.read(self._client.metrics(), self._clock())
        interval, self._before = Interval(self._before, scrape), scrape
        return Look(status, interval, self._client.url, time.time())
