"""What every section of the settings is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Auto = Literal["auto"]
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]

RAY_OWN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")


def _custom(resources: dict[str, float]) -> dict[str, float]:
    for name in resources:
        if name in RAY_OWN_RESOURCES:
            raise ValueError(f"{name} is Ray's own; num_cpus and num_gpus reserve those")
    return resources


CustomResources = Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_custom)]
"""By name."""


class Settings(BaseModel):
    """Base: frozen, strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
