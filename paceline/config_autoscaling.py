"""Settings of how many replicas there are, and by what they are counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from paceline.config_base import Auto, Positive, Seconds, Settings

Preset = Literal["latency", "throughput", "cost"]
Share = Annotated[float, Field(gt=0, le=1)]


class PoolScaling(Settings):
    """What the bounds of either pool have in common."""

    min_replicas: int
    max_replicas: int
    utilization: Share | Auto

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self


class TargetScaling(PoolScaling):
    """How many target replicas there may be, and how full they run."""

    min_replicas: Positive = Field(1, description="Fewest target replicas.")
    max_replicas: Positive = Field(4, description="Most target replicas.")
    utilization: Share | Auto = Field(
        "auto",
        description="How full a target replica may be, by its seats (sequences it runs within `itl_s`), by the time "
        "its prompts take and by its KV cache; whichever is fullest counts. auto: latency 0.5, throughput 0.7, "
        "cost 0.85.",
    )


class DraftScaling(PoolScaling):
    """How many draft replicas there may be, and what they must bring."""

    min_replicas: Annotated[int, Field(ge=0)] = Field(0, description="Fewest draft replicas; 0 lets all of them go.")
    max_replicas: Positive = Field(4, description="Most draft replicas.")
    utilization: Share | Auto = Field(
        "auto",
        description="Share of its time a draft replica should compute. auto: latency 0.5, throughput 0.7, cost 0.85.",
    )
    min_gain: Annotated[float, Field(ge=0)] | Auto = Field(
        "auto",
        description="Seconds of targets that a second of a draft replica must save, as measured; below it drafters are "
        "scaled away. auto: what a draft replica costs in target replicas (`price`) times 0.25 under latency, 1 under "
        "throughput and cost.",
    )
    price: Annotated[float, Field(gt=0)] = Field(
        0.25, description="What a draft replica costs, in target replicas: 0.25 is a quarter of one."
    )
    max_late: Share = Field(
        0.1, description="Share of the steps wanting drafts that may go without: more, and a drafter is added."
    )
    retry_s: Seconds = Field(
        600.0,
        description="After drafters were scaled away one is tried again so much later, if sequences want drafts; twice "
        "as long after each try in vain, up to a day.",
    )


class AutoscalingSettings(Settings):
    """How many replicas there are: as many as the load needs.

    With `enabled`, `target.num_replicas` and `draft.num_replicas` are only what the deployment begins with.
    """

    enabled: bool = Field(
        False,
        description="Let the number of replicas follow the load. In a Serve config of your own the application also "
        "needs `autoscaling_policy: {policy_function: 'paceline.serving.autoscaling:Autoscaler'}`.",
    )
    preset: Preset = Field(
        "throughput",
        description="What `auto` means below: latency keeps room for bursts, cost runs replicas full.",
    )
    ttft_s: Seconds | Auto = Field(
        "auto",
        description="Objective for the time to first token, p95, in seconds. auto: latency 1, throughput 3, cost 8.",
    )
    itl_s: Seconds | Auto = Field(
        "auto",
        description="Objective for the time between tokens, p95, in seconds. auto: latency 0.05, throughput 0.1, cost "
        "0.2; on a CPU four times as much.",
    )
    target: TargetScaling = Field(default_factory=TargetScaling)
    draft: DraftScaling = Field(default_factory=DraftScaling)
    start_s: Seconds | Auto = Field(
        "auto",
        description="How long a target replica takes to start, which is how far ahead the load is forecast; auto is "
        "measured, 60 s before the first measurement.",
    )
    upscale_delay_s: Annotated[float, Field(ge=0)] | Auto = Field(
        "auto", description="More replicas must be wanted for so long. auto: latency 0, throughput 2, cost 10."
    )
    downscale_delay_s: Annotated[float, Field(ge=0)] | Auto = Field(
        "auto", description="Fewer must have been enough for so long. auto: latency 600, throughput 180, cost 60."
    )
    max_upscale: Annotated[float, Field(gt=1)] = Field(
        2.0, description="In one step the replicas may become so many times as many, and always four more."
    )
    max_downscale: Share = Field(0.25, description="Share of the replicas that may go in one step, and always one.")
    interval_s: Seconds = Field(1.0, description="Seconds between two looks at the load.")


@dataclass(frozen=True, slots=True)
class ReplicaRange:
    """How many replicas of a pool there are at first, and how few or many later; all the same if nothing scales."""

    fewest: int
    first: int
    most: int

    @classmethod
    def of(cls, num_replicas: int, enabled: bool, bounds: PoolScaling) -> Self:
        if not enabled:
            return cls(num_replicas, num_replicas, num_replicas)
        fewest, most = bounds.min_replicas, bounds.max_replicas
        return cls(fewest, min(max(num_replicas, fewest), most), most)
