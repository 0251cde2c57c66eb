"""Taking a release away: all it has by its labels, the other way round than it was made, until it is gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paceline.errors import ConfigError
from paceline.k8s.api import Api, selector
from paceline.k8s.errors import Denied, NotReady
from paceline.k8s.kinds import RAY_SERVICES, Obj, Resource, name_of, title
from paceline.k8s.release import INSTANCE, MANAGED_BY, OURS, in_order, kept, made_by_helm, noted_kinds

KINDS = (
    "v1/ServiceAccount",
    "v1/Secret",
    "v1/ConfigMap",
    "v1/PersistentVolumeClaim",
    "v1/Service",
    "apps/v1/StatefulSet",
    "batch/v1/Job",
    "policy/v1/PodDisruptionBudget",
    "networking.k8s.io/v1/NetworkPolicy",
    "networking.k8s.io/v1/Ingress",
    "gateway.networking.k8s.io/v1/HTTPRoute",
    "gateway.networking.k8s.io/v1/GRPCRoute",
    "monitoring.coreos.com/v1/ServiceMonitor",
    "monitoring.coreos.com/v1/PodMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
    "ray.io/v1/RayService",
)
"""What the chart can render, for a release whose RayService, which notes its kinds, is gone already."""

LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Found:
    """What a release has. `unseen` are kinds that this account may not list."""

    objects: Sequence[Obj]
    unseen: Sequence[str]


def find(api: Api, release: str) -> Found:
    """Every object of a release that `apply` made. Raises Denied for a kind it certainly has."""
    resources = {f"{RAY_SERVICES.api_version}/{RAY_SERVICES.kind}": RAY_SERVICES}
    services = []
    if RAY_SERVICES.kind in api.resources(RAY_SERVICES.api_version):
        services = api.list_all(RAY_SERVICES, selector({INSTANCE: release}))
    if any(made_by_helm(service) for service in services):
        raise ConfigError(f"release {release} is Helm's: take it away with `helm uninstall {release}`", param="name")
    certain = {kind for service in services for kind in noted_kinds(service)}
    objects, unseen = [], []
    for kind in sorted({*KINDS, *certain}):
        if (resource := resources.get(kind) if services else None) is None:
            resource = _known(api, kind)
        if resource is None:
            continue
        try:
            objects += api.list_all(resource, selector({INSTANCE: release, MANAGED_BY: OURS}))
        except Denied:
            if kind in certain:
                raise
            unseen.append(resource.qualified)
    return Found(objects, unseen)


def _known(api: Api, kind: str) -> Resource | None:
    version, _, name = kind.rpartition("/")
    return api.resources(version).get(name)


def delete(
    api: Api,
    release: str,
    *,
    keep_cache: bool,
    timeout_s: float,
    say: Callable[[str], None],
    found: Found | None = None,
) -> list[str]:
    """Delete it and wait until it is gone; what was deleted, by name. With `keep_cache`, claims stay.

    Objects go in the foreground: a RayService is gone when its pods are. Raises NotReady at the end of time.
    """
    found = find(api, release) if found is None else found
    going = [obj for obj in reversed(in_order(found.objects)) if not (keep_cache and kept(obj))]
    for obj in going:
        say(f"deleting {title(obj)}")
        api.delete(api.resource(obj["apiVersion"], obj["kind"]), name_of(obj))
    deadline = time.monotonic() + timeout_s
    left = going
    while left := [now for obj in left if (now := _now(api, obj)) is not None]:
        if time.monotonic() > deadline:
            held = "; ".join(f"{title(obj)}{_holders(obj)}" for obj in left)
            raise NotReady(f"still there after {timeout_s:g} s: {held}; the same command waits on")
        say(f"waiting until {title(left[0])} is gone{f' (and {len(left) - 1} more)' if len(left) > 1 else ''}")
        time.sleep(LOOK_EVERY_S)
    return [title(obj) for obj in going]


def _now(api: Api, obj: Obj) -> Obj | None:
    """It as it is, if it is there; one of the same name made since is another. Listed: no right to `get` is asked."""
    resource = api.resource(obj["apiVersion"], obj["kind"])
    same = api.list_all(resource, fields=f"metadata.name={name_of(obj)}")
    return next((each for each in same if each["metadata"]["uid"] == obj["metadata"]["uid"]), None)


def _holders(obj: Obj) -> str:
    held = obj["metadata"].get("finalizers") or ()
    return f" (held by {', '.join(held)})" if held else ""
