"""What drafts bring and what is asked of them, counted since the start: by this drafters are added or sent away."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class DraftGain:
    """Seconds of this target that drafts saved; negative if they cost more than they saved."""

    saved_s: float = 0.0

    def note(self, *, took: float, without: float, tokens: int, added: int, decode: float) -> None:
        """A step for which drafts were asked took so many seconds, its waiting for them included.

        It gave `tokens`, `added` of them because of drafts alone. Without drafts a step takes `without`, and `decode`
        where no prompts are beside it: so long as it takes to make up for the tokens that are missing then.
        """
        self.saved_s += without + added * decode / (tokens - added) - took


@dataclass(slots=True)
class DraftDemand:
    """Of sequences that want drafts: a sequence in a step counts once.

    `tokens` candidates were asked for. `steps` would have had some, `without` of them had none: they came late, or no
    drafter had the sequence, for lack of room or since it is new to them.
    """

    tokens: int = 0
    steps: int = 0
    without: int = 0
