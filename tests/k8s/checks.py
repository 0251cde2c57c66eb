"""What an API server and KubeRay's operator would say of rendered objects."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
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
        yield from _core(json.dumps(resource))


@cache
def _core(resource: str) -> tuple[str, ...]:
    """Most objects are the same in most releases, and the check takes 40 ms."""
    try:
        kubernetes_validate.validate(json.loads(resource), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (str(error).splitlines()[0],)
    return ()


def _nulls(value: Any, path: str) -> Iterator[str]:
    if value is None:
        yield path
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _nulls(each, f"{path}.{key}")
    if isinstance(value, list):
        for index, each in enumerate(value):
            yield from _nulls(each, f"{path}[{index}]")
