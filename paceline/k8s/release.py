"""What belongs to a release: its labels, its RayService, the order in which its objects are applied."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

from paceline.errors import ConfigError
from paceline.k8s.api import Api, selector
from paceline.k8s.errors import NotFound
from paceline.k8s.kinds import RAY_SERVICES, Obj, labels_of, name_of

INSTANCE = "app.kubernetes.io/instance"
PART_OF = "app.kubernetes.io/part-of"
MANAGED_BY = "app.kubernetes.io/managed-by"
OURS = "paceline"
KINDS_ANNOTATION = "paceline/kinds"
"""On the RayService: every kind the release has been given, so that what is no longer rendered is found again."""

KEPT = ("helm.sh/resource-policy", "keep")

FIRST = ("Namespace", "ServiceAccount", "Secret", "ConfigMap", "PersistentVolumeClaim", "Role", "RoleBinding")
LAST = ("StatefulSet", "Deployment", "Job", "RayService", "Ingress", "HTTPRoute", "GRPCRoute")
"""Pods find what they mount; routes come when there is something behind them. Other kinds go between the two."""


def stamped(obj: Obj, release: str) -> Obj:
    """A copy that is labelled as one of `release`, made by us and not by Helm."""
    found = copy.deepcopy(obj)
    labels = found["metadata"].get("labels") or {}
    found["metadata"]["labels"] = {**labels, INSTANCE: release, MANAGED_BY: OURS, PART_OF: OURS}
    return found


def release_of(obj: Obj) -> str:
    return labels_of(obj).get(INSTANCE, name_of(obj))


def made_by_helm(obj: Obj) -> bool:
    return labels_of(obj).get(MANAGED_BY) == "Helm"


def kept(obj: Obj) -> bool:
    """Whether it outlives its release, unless told otherwise: it holds data."""
    key, value = KEPT
    return obj["kind"] == "PersistentVolumeClaim" or (obj["metadata"].get("annotations") or {}).get(key) == value


def in_order(objects: Iterable[Obj]) -> list[Obj]:
    """As they are applied; the other way round is how they are deleted."""

    def rank(obj: Obj) -> int:
        kind = obj["kind"]
        if kind in FIRST:
            return FIRST.index(kind)
        return len(FIRST) + 1 + LAST.index(kind) if kind in LAST else len(FIRST)

    return sorted(objects, key=rank)


def with_kinds(objects: Sequence[Obj], kinds: Iterable[str]) -> list[Obj]:
    """The objects, the RayService noting these kinds."""
    noted = " ".join(sorted(kinds))
    found = []
    for obj in objects:
        if obj["kind"] == RAY_SERVICES.kind:
            obj = copy.deepcopy(obj)
            obj["metadata"]["annotations"] = {**(obj["metadata"].get("annotations") or {}), KINDS_ANNOTATION: noted}
        found.append(obj)
    return found


def kinds_of(objects: Iterable[Mapping[str, str]]) -> set[str]:
    """`apiVersion/Kind` of each."""
    return {f"{obj['apiVersion']}/{obj['kind']}" for obj in objects}


def noted_kinds(service: Obj | None) -> set[str]:
    annotations = {} if service is None else service["metadata"].get("annotations") or {}
    return set(annotations.get(KINDS_ANNOTATION, "").split())


def find_service(api: Api, release: str | None) -> Obj:
    """The RayService of a release; without a name, of the only one there is.

    Raises NotFound, or ConfigError where there are several to choose from.
    """
    api.resource(RAY_SERVICES.api_version, RAY_SERVICES.kind)
    labels = {PART_OF: OURS} | ({} if release is None else {INSTANCE: release})
    found = api.list_all(RAY_SERVICES, selector(labels))
    if release is not None:
        # of several in a release, such as a canary beside it, the shortest name is the release's own
        found = sorted(found, key=lambda obj: len(name_of(obj)))[:1]
    if not found:
        what = "Paceline" if release is None else f"release {release}"
        raise NotFound(
            f"no {what} in namespace {api.namespace}; `paceline k8s apply` makes one, --namespace looks elsewhere"
        )
    names = sorted({release_of(obj) for obj in found})
    if len(names) > 1:
        raise ConfigError(f"--name: namespace {api.namespace} has {', '.join(names)}: say which", param="name")
    return min(found, key=lambda obj: len(name_of(obj)))
