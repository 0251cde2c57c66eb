"""What a replica can do: a profile, as measured, and the pace that follows from it.

A step of n decoding sequences takes `step_s`; prompt tokens in it add their time at `prefill_tokens_per_s`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator, model_validator

from paceline.config import config_error
from paceline.config_base import Positive, Seconds, Settings
from paceline.errors import ConfigError

Array = NDArray[np.float64]
Points = Annotated[dict[Positive, Seconds], Field(min_length=1)]


class DraftProfile(Settings):
    """What drafters bring, and what that costs."""

    acceptance: Annotated[float, Field(ge=0, lt=1)] = Field(description="Chance that a candidate is accepted.")
    depth: Positive = Field(description="Candidates in a step of a sequence.")
    verify_s: Points = Field(description="Seconds of a step that verifies `depth` candidates, by running sequences.")
    token_s: Seconds = Field(description="Seconds of a draft replica for one candidate, with many sequences at once.")
    start_s: Seconds = Field(description="Seconds a draft replica takes to start.")

    @property
    def tokens_per_step(self) -> float:
        """Leviathan et al. 2211.17192, equation 1: (1 - a^(k+1)) / (1 - a)."""
        a, k = self.acceptance, self.depth
        return (1 - a ** (k + 1)) / (1 - a)


class Profile(Settings):
    """One kind of target replica, measured."""

    name: str
    source: str = Field(description="Where the figures are from.")
    device: Literal["gpu", "cpu"] = Field("gpu", description="For objectives that are auto.")
    step_s: Points = Field(description="Seconds of a step by decoding sequences: points, straight lines between.")
    prefill_tokens_per_s: Annotated[float, Field(gt=0)]
    chunk_tokens: Positive = Field(description="Prompt tokens in a step in which sequences decode.")
    max_num_seqs: Positive = Field(description="Sequences in one step.")
    max_queued_requests: Positive = Field(64, description="Requests that wait; one more is refused, and comes again.")
    kv_tokens: Positive
    start_s: Seconds = Field(description="Seconds a replica takes to start.")
    start_spread: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Its standard deviation, as a share.")
    drafts: DraftProfile | None = None

    @field_validator("step_s")
    @classmethod
    def _no_faster(cls, points: dict[int, float]) -> dict[int, float]:
        seconds = [points[n] for n in sorted(points)]
        if seconds != sorted(seconds):
            raise ValueError("a step of more sequences cannot be faster")
        return points

    @model_validator(mode="after")
    def _same_extent(self) -> Self:
        if max(self.step_s) < self.max_num_seqs and len(self.step_s) < 2:
            raise ValueError("step_s: one point says nothing of more sequences; give another or lower max_num_seqs")
        return self


class Pace:
    """A profile's curves over arrays of replicas."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._plain = _Curve(profile.step_s)
        self._verify = _Curve(profile.drafts.verify_s) if profile.drafts else None
        self.chunk_s = profile.chunk_tokens / profile.prefill_tokens_per_s

    def step(self, running: Array) -> Array:
        """Seconds of a plain step of so many sequences, at least one."""
        return self._plain(running)

    def verify(self, running: Array) -> Array:
        """Seconds of a step that verifies candidates of every sequence."""
        assert self._verify is not None
        return self._verify(running)

    def seats(self, itl_s: float) -> int:
        """Most sequences whose step, with a chunk of a prompt, takes no longer than `itl_s`; at least one."""
        counts = np.arange(1, self.profile.max_num_seqs + 1)
        return max(1, int(np.count_nonzero(self.step(counts.astype(float)) + self.chunk_s <= itl_s)))


class _Curve:
    """Straight lines between points, and on beyond the last two."""

    def __init__(self, points: Mapping[int, float]) -> None:
        self._n = np.array(sorted(points), dtype=float)
        self._s = np.array([points[int(n)] for n in self._n])
        rises = len(self._n) > 1
        self._slope = float((self._s[-1] - self._s[-2]) / (self._n[-1] - self._n[-2])) if rises else 0.0

    def __call__(self, n: Array) -> Array:
        beyond = np.maximum(n - self._n[-1], 0.0)
        return np.asarray(np.interp(n, self._n, self._s) + self._slope * beyond)


def shipped() -> list[str]:
    """Names of the profiles that come with the package."""
    folder = resources.files(__package__) / "profiles"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load(name: str) -> Profile:
    """A shipped profile by its name, or one of a YAML or JSON file. Raises ConfigError."""
    if name in shipped():
        text = (resources.files(__package__) / "profiles" / f"{name}.yaml").read_text()
    elif Path(name).is_file():
        text = Path(name).read_text()
    else:
        known = ", ".join(shipped())
        raise ConfigError(f"profile: {name}: no such file, nor one of {known}", param="profile")
    try:
        values: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"profile: {name}: not readable as YAML or JSON", param="profile") from None
    if not isinstance(values, dict):
        raise ConfigError(f"profile: {name}: has no fields; see docs/autoscaling-simulation.md", param="profile")
    try:
        return Profile(**values)
    except ValidationError as error:
        raise config_error(error, "profile") from None
