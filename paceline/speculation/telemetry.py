"""What became of candidates: counted by source and place, for one request and for a whole engine alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from paceline.types import Metrics, SourceMetrics


@dataclass(eq=False, slots=True)
class _Counts:
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    wasted: int = 0


@dataclass(eq=False, slots=True)
class SpeculationTally:
    """Counts that only grow. `late` steps found no candidates in time; `wasted` candidates were never verified.

    `requests` were begun, `declined` of them asked for no speculation; `steps` decoded, one for each sequence in a
    forward pass.
    """

    late: int = 0
    requests: int = 0
    declined: int = 0
    steps: int = 0
    _by_source: dict[str, _Counts] = field(default_factory=dict)

    @property
    def drafted(self) -> int:
        return sum(sum(counts.drafted) for counts in self._by_source.values())

    @property
    def accepted(self) -> int:
        return sum(sum(counts.accepted) for counts in self._by_source.values())

    @property
    def wasted(self) -> int:
        return sum(counts.wasted for counts in self._by_source.values())

    def waste(self, source: str, candidates: int) -> None:
        """So many were there and found no room in the step."""
        if candidates:
            self._by_source.setdefault(source, _Counts()).wasted += candidates

    def note(self, source: str, drafted: int, accepted: int) -> None:
        """Of `drafted` candidates the first `accepted` became output."""
        counts = self._by_source.setdefault(source, _Counts())
        while len(counts.drafted) < drafted:
            counts.drafted.append(0)
            counts.accepted.append(0)
        for place in range(drafted):
            counts.drafted[place] += 1
        for place in range(accepted):
            counts.accepted[place] += 1

    def sources(self) -> tuple[SourceMetrics, ...]:
        """Of every source that had candidates."""
        return tuple(
            SourceMetrics(source, tuple(counts.drafted), tuple(counts.accepted), counts.wasted)
            for source, counts in list(self._by_source.items())
        )


def merged(parts: Iterable[Iterable[SourceMetrics]]) -> tuple[SourceMetrics, ...]:
    """The sums by source: of several outputs, or of several replicas."""
    found: dict[str, SourceMetrics] = {}
    for part in parts:
        for each in part:
            before = found.get(each.source, SourceMetrics(each.source))
            drafted, accepted = _added(before.drafted, each.drafted), _added(before.accepted, each.accepted)
            found[each.source] = SourceMetrics(each.source, drafted, accepted, before.wasted + each.wasted)
    return tuple(found.values())


def summed(parts: Sequence[Metrics]) -> Metrics:
    """What several requests, or several outputs of one, cost one after the other."""
    return Metrics(
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        cached_tokens=sum(part.cached_tokens for part in parts),
        completion_tokens=sum(part.completion_tokens for part in parts),
        drafted=sum(part.drafted for part in parts),
        accepted=sum(part.accepted for part in parts),
        late=sum(part.late for part in parts),
        steps=sum(part.steps for part in parts),
        queue_s=sum(part.queue_s for part in parts),
        ttft_s=sum(part.ttft_s for part in parts),
        total_s=sum(part.total_s for part in parts),
        wasted=sum(part.wasted for part in parts),
        sources=merged(part.sources for part in parts),
        resumptions=sum(part.resumptions for part in parts),
    )


def _added(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip_longest(a, b, fillvalue=0))


@dataclass(frozen=True, slots=True)
class DraftedSequence:
    """What a drafter did for one sequence, from its opening to its close, in nanoseconds since 1970.

    `trace` is the traceparent it was opened with, `history` the tokens it was opened with. `rolled_back` tokens were
    not what the target said.
    """

    trace: str
    opened: int
    closed: int
    history: int
    drafted: int
    rolled_back: int
