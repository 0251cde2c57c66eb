"""What a draft replica that leaves gives its peers, without a cluster."""

from __future__ import annotations

from typing import Any

from paceline.serving.draft_exchange import DraftExchange
from tests.serving.exchanges import World


class Drafters(World):
    """The same replicas, as drafters."""

    def __init__(self, *names: str, within_s: float = 5.0) -> None:
        super().__init__(*names)
        for name, replica in self.items():
            loop: Any = replica.loop
            replica.exchange = DraftExchange(name, loop, lambda own=replica: own, within_s=within_s)  # type: ignore


async def test_what_a_leaving_drafter_computed_is_found_at_its_peer_by_anybody() -> None:
    drafters = Drafters("a", "b")
    drafters["a"].hold(None, 40)
    (text,) = drafters["a"].kv.recent(1)
    await drafters["a"].exchange.finish()
    assert drafters["b"].kv.match([*text.tolist(), 0]) == 40
    assert (drafters["b"].kv.sessions(), drafters["a"].stopped) == ({}, True)


async def test_a_leaving_drafter_takes_nothing() -> None:
    drafters = Drafters("a", "b")
    await drafters["b"].exchange.finish()
    drafters["a"].hold(None, 40)
    await drafters["a"].exchange.finish()
    assert drafters.sent == []


async def test_with_no_deadline_nothing_is_handed_over() -> None:
    drafters = Drafters("a", "b", within_s=0)
    drafters["a"].hold(None, 40)
    await drafters["a"].exchange.finish()
    assert drafters.sent == []
