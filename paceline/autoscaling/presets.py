"""What "auto" means in the `autoscaling` settings."""

from __future__ import annotations

from typing import Any

from paceline.config_autoscaling import AutoscalingSettings

CPU_ITL = 4.0
"""A step on a CPU may take so many times as long."""

OBJECTIVES: dict[str, dict[str, float]] = {
    "latency": {"ttft_s": 1.0, "itl_s": 0.05, "upscale_delay_s": 0.0, "downscale_delay_s": 600.0},
    "throughput": {"ttft_s": 3.0, "itl_s": 0.1, "upscale_delay_s": 2.0, "downscale_delay_s": 180.0},
    "cost": {"ttft_s": 8.0, "itl_s": 0.2, "upscale_delay_s": 10.0, "downscale_delay_s": 60.0},
}
UTILIZATION = {"latency": 0.5, "throughput": 0.7, "cost": 0.85}
GAIN = {"latency": 0.25, "throughput": 1.0, "cost": 1.0}
"""Of a draft replica's price."""


def resolved(settings: AutoscalingSettings, *, cpu: bool = False) -> AutoscalingSettings:
    """Without "auto", but for `start_s`, which is measured; `cpu` says that targets run on one."""
    known: dict[str, Any] = {}
    for name, value in OBJECTIVES[settings.preset].items():
        if getattr(settings, name) == "auto":
            known[name] = value * CPU_ITL if name == "itl_s" and cpu else value
    target, draft = settings.target, settings.draft
    if target.utilization == "auto":
        target = target.model_copy(update={"utilization": UTILIZATION[settings.preset]})
    if draft.utilization == "auto":
        draft = draft.model_copy(update={"utilization": UTILIZATION[settings.preset]})
    if draft.min_gain == "auto":
        draft = draft.model_copy(update={"min_gain": GAIN[settings.preset] * draft.price})
    return settings.model_copy(update={**known, "target": target, "draft": draft})
