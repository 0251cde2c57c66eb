"""What an API server and KubeRay's operator would say of rendered objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import kubernetes_validate

from tests.k8s import crds, operator_rules
from tests.k8s.charts import Object

KUBERNETES = "1.37"
OTHERS = ("monitoring.coreos.com/", "gateway.networking.k8s.io/")
"""Groups of custom resources whose schema is not here; tests of their own look at their fields."""


def problems(objects: Iterable[Object]) -> list[str]:
    """Empty if all is well."""
    return [f"{each['kind']} {each['metadata']['name']}: {problem}" for each in objects for problem in _of(each)]


def _of(resource: Object) -> Iterator[str]:
    # Helm 4 applies on the server's side, which refuses a null.
    yield from (f"{path} is null" for path in _nulls(resource, ""))
    if resource["apiVersion"].startswith("ray.io/"):
        yield from crds.errors(resource)
        yield from operator_rules.violations(resource)
    elif not resource["apiVersion"].startswith(OTHERS):
        try:
            kubernetes_validate.validate(resource, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield str(error).splitlines()[0]


def _nulls(value: Any, path: str) -> Iterator[str]:
    if value is None:
        yield path
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _nulls(each, f"{path}.{key}")
    if isinstance(value, list):
        for index, each in enumerate(value):
            yield from _nulls(each, f"{path}[{index}]")
