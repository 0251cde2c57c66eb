"""Whether drafters pay, and how many may be tried.

What a drafter saves cannot be known before it runs. So it is tried, judged by what was measured, and if it was in vain
the next try comes later, twice as late each time.
"""

from __future__ import annotations

from collections import deque

from paceline.autoscaling.damping import down_step
from paceline.autoscaling.goals import Goals
from paceline.autoscaling.loads import DraftPool

SETTLE_S = 10.0
"""After a drafter came: it compiles and reads the sequences' histories. Not counted."""
TRIAL_S = 30.0
"""Of measured gain before a try is judged."""
LONGEST_RETRY_S = 86400.0
MORE_SEQUENCES = 1.5
"""With so many times as many sequences wanting drafts, one more drafter is another question than it was."""


class Gain:
    """What drafters save, mean of the seconds since their number changed."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._samples: deque[tuple[float, float, float, float]] = deque()
        """(seconds that it stands for, gain, all that is saved, sequences wanting drafts)"""
        self._drafters = (0, 0)
        self.age = 0.0

    def note(self, passed: float, pool: DraftPool) -> None:
        wanted, reported = self._drafters
        if pool.replicas != wanted or pool.reported > reported:
            self._drafters = (pool.replicas, pool.reported)
            self.restart()
        if pool.gain is None or pool.saved is None or pool.wanted == 0:
            return  # Nobody would use them: that says nothing of what they are worth.
        self.age += passed
        if self.age <= 0 or passed <= 0:
            return
        self._samples.append((passed, pool.gain, pool.saved, pool.wanted or 0.0))
        self._forget()

    def restart(self) -> None:
        self._samples.clear()
        self.age = -SETTLE_S

    def _forget(self) -> None:
        kept = sum(sample[0] for sample in self._samples)
        while len(self._samples) > 1 and kept - self._samples[0][0] >= self._seconds:
            kept -= self._samples.popleft()[0]

    def mean(self, least_s: float) -> float | None:
        """A second of a drafter; None before it was measured for `least_s`."""
        return self._mean(1) if self._samples and self.age >= least_s else None

    @property
    def saved(self) -> float:
        """All drafters together, in a second."""
        return self._mean(2)

    @property
    def sequences(self) -> float:
        """Those that wanted drafts meanwhile."""
        return self._mean(3)

    def _mean(self, column: int) -> float:
        weight = sum(sample[0] for sample in self._samples)
        return sum(sample[0] * sample[column] for sample in self._samples) / weight


class Retry:
    """How many drafters may be tried: after a try in vain no more than before, for a while."""

    def __init__(self, retry_s: float) -> None:
        self._retry_s = retry_s
        self._vain = 0
        self._left = 0.0
        self._limit: int | None = None
        self._sequences = 0.0

    def passed(self, seconds: float, sequences: float) -> None:
        self._left = max(0.0, self._left - seconds)
        if self._limit and self._sequences and sequences > MORE_SEQUENCES * self._sequences:
            self._left = 0.0

    def in_vain(self, limit: int, sequences: float) -> None:
        """More than `limit` did not pay."""
        self._left = min(LONGEST_RETRY_S, self._retry_s * 2.0 ** min(self._vain, 40))
        self._vain += 1
        self._limit, self._sequences = limit, sequences

    def paid(self, drafters: int) -> None:
        if self._limit is not None and drafters > self._limit:
            self._vain, self._limit = 0, None

    @property
    def limit(self) -> int | None:
        """Drafters there may be; None is any number."""
        return self._limit if self._left > 0 else None

    @property
    def tries(self) -> int:
        """In vain so far."""
        return self._vain

    @property
    def seconds(self) -> float:
        """Until the next try."""
        return self._left


class Worth:
    """Judges the drafters there are. `pays` is None before they are judged."""

    def __init__(self, goals: Goals) -> None:
        self._goals = goals
        self.patience = max(TRIAL_S, goals.draft.downscale_delay_s)
        self.gain = Gain(self.patience)
        self.retry = Retry(goals.retry_s)
        self.pays: bool | None = None
        self.mean: float | None = None
        self._trying = False
        self._before: tuple[int, float, float] | None = None
        """Drafters, what they saved, and for how many sequences, before more of them came."""
        self._late: tuple[int, float] | None = None
        """Drafters that came because drafts were late, and for how many sequences."""

    def look(self, passed: float, pool: DraftPool) -> int | None:
        """How many drafters there may be at most, if that is fewer than there are."""
        sequences = pool.wanted or 0.0
        self.retry.passed(passed, sequences)
        if pool.replicas == 0:
            self.pays, self.mean, self._before, self._trying = None, None, None, True
        self.gain.note(passed, pool)
        self.mean = self.gain.mean(TRIAL_S)
        if self.mean is None:
            return None
        if self.mean >= self._goals.min_gain:
            self._note_paid(pool)
            return None
        self.pays = False
        if self.gain.age < (TRIAL_S if self._trying else self.patience):
            return None
        return self._fewer(pool, sequences)

    def kept(self, pool: DraftPool) -> int:
        """Drafters without which drafts would be late again: that they are in time now is no reason to let one go."""
        if self._late is None:
            return 0
        drafters, sequences = self._late
        return drafters if (pool.wanted or 0.0) * MORE_SEQUENCES >= sequences else 0

    def grew(self, pool: DraftPool, drafters: int, *, late: bool) -> None:
        """So many drafters are on their way, because drafts were `late` or for another reason."""
        if late:
            self._late = (drafters, pool.wanted or 0.0)
        if self.mean is not None and self._before is None:
            self._before = (pool.reported, self.gain.saved, self.gain.sequences)

    def _note_paid(self, pool: DraftPool) -> None:
        self.pays, self._trying = True, False
        if self._before is not None and pool.replicas <= self._before[0]:
            self._before = None
        if self._before is None:
            self.retry.paid(pool.reported)
            return
        drafters, saved, then = self._before
        if pool.reported <= drafters:
            return  # those that came do not run yet
        self._before = None
        # With fewer sequences there was less to save; with more, the drafters there were had their hands full.
        sequences = self.gain.sequences
        expected = saved * min(1.0, sequences / then) if then else saved
        if (self.gain.saved - expected) / (pool.reported - drafters) >= self._goals.min_gain:
            self.retry.paid(pool.reported)
        else:
            self.retry.in_vain(pool.reported, sequences)

    def _fewer(self, pool: DraftPool, sequences: float) -> int | None:
        """As many as what is saved would pay for; towards that, a step."""
        goals, before = self._goals.draft, pool.replicas
        if before <= goals.min_replicas:
            return None
        paid_for = max(0, int(self.gain.saved / self._goals.min_gain)) if self._goals.min_gain else 0
        fewer = max(goals.min_replicas, before - down_step(before, goals), min(before - 1, paid_for))
        self.retry.in_vain(fewer, sequences)
        self.gain.restart()
        self._before = self._late = None
        return fewer
