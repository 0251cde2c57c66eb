"""What the policy aims at: the settings as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from paceline.autoscaling.presets import resolved
from paceline.config_autoscaling import AutoscalingSettings, PoolScaling


@dataclass(frozen=True, slots=True)
class PoolGoals:
    """What both pools have: how many replicas, how full they run, and how fast the number follows."""

    min_replicas: int
    max_replicas: int
    utilization: float
    upscale_delay_s: float
    downscale_delay_s: float
    max_upscale: float
    max_downscale: float


@dataclass(frozen=True, slots=True)
class Goals:
    """As in `AutoscalingSettings`, without "auto"; `start_s` is None if it is measured."""

    target: PoolGoals
    draft: PoolGoals
    ttft_s: float
    itl_s: float
    start_s: float | None
    interval_s: float
    min_gain: float
    max_late: float
    retry_s: float

    @classmethod
    def of(cls, settings: AutoscalingSettings, *, cpu: bool = False) -> Self:
        known = resolved(settings, cpu=cpu)
        return cls(
            target=_pool(known, known.target),
            draft=_pool(known, known.draft),
            ttft_s=float(known.ttft_s),
            itl_s=float(known.itl_s),
            start_s=None if known.start_s == "auto" else known.start_s,
            interval_s=known.interval_s,
            min_gain=float(known.draft.min_gain),
            max_late=known.draft.max_late,
            retry_s=known.draft.retry_s,
        )


def _pool(settings: AutoscalingSettings, pool: PoolScaling) -> PoolGoals:
    return PoolGoals(
        min_replicas=pool.min_replicas,
        max_replicas=pool.max_replicas,
        utilization=float(pool.utilization),
        upscale_delay_s=float(settings.upscale_delay_s),
        downscale_delay_s=float(settings.downscale_delay_s),
        max_upscale=settings.max_upscale,
        max_downscale=settings.max_downscale,
    )
