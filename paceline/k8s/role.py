"""The rights the commands take, as data: `paceline k8s role` prints them, `apply` asks for them before it begins.

The tests run every command with exactly these, and find for each one of them a command that fails without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from paceline.k8s.api import Api
from paceline.k8s.errors import Denied
from paceline.k8s.kinds import (
    ACCESS_REVIEWS,
    CLAIMS,
    EVENTS,
    JOBS,
    NODES,
    PODS,
    RAY_CLUSTERS,
    RAY_SERVICES,
    SERVICES,
    Obj,
    Resource,
)


@dataclass(frozen=True, slots=True, order=True)
class Right:
    """One verb on one thing."""

    group: str
    resource: str  # plural, with the part of it behind a slash: `pods/log`
    verb: str
    cluster: bool = False

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}{f'.{self.group}' if self.group else ''}"


def rights(resource: Resource, *verbs: str, part: str = "") -> set[Right]:
    plural = f"{resource.plural}/{part}" if part else resource.plural
    return {Right(resource.group, plural, verb, not resource.namespaced) for verb in verbs}


SEEING = (
    rights(RAY_SERVICES, "list")
    | rights(RAY_CLUSTERS, "list")
    | rights(PODS, "list")
    | rights(EVENTS, "list")
    | rights(JOBS, "list")
    | rights(CLAIMS, "list")
)
"""To see how a release is: waiting for it, `status`, `diagnose`."""

WAITING = SEEING | rights(RAY_SERVICES, "watch")
STATUS = SEEING | rights(SERVICES, "get", part="proxy")
DIAGNOSE = SEEING | rights(PODS, "get", part="log") | rights(NODES, "list")
EVICTING = SEEING | rights(PODS, "get") | rights(PODS, "create", part="eviction")
DRAIN = EVICTING | rights(SERVICES, "get", "create", part="proxy") | rights(NODES, "get", "patch")
"""A pod is drained without the rights on nodes."""
UPGRADE = (
    WAITING
    | rights(RAY_SERVICES, "get", "create", "patch", "delete")
    | rights(SERVICES, "get", "create", "delete", part="proxy")
)
MANAGING = ("create", "patch", "list", "delete")
"""On every kind a release has: server-side apply takes two verbs, finding and taking away the other two."""


def managing(resources: Iterable[Resource]) -> set[Right]:
    return {right for resource in resources for right in rights(resource, *MANAGING)}


def applying(resources: Sequence[Resource], *, wait: bool = True) -> set[Right]:
    return managing(resources) | (WAITING if wait else set())


def needed(resources: Sequence[Resource]) -> set[Right]:
    """For every command, on a release of these kinds."""
    return applying([*resources, RAY_SERVICES]) | STATUS | DIAGNOSE | DRAIN | UPGRADE


def missing(api: Api, wanted: Iterable[Right]) -> list[Right]:
    """Those of the rights that the account has not."""
    return [right for right in sorted(wanted) if not _allowed(api, right)]


def require(api: Api, wanted: Iterable[Right]) -> None:
    """Raises Denied, naming every right that is missing."""
    if absent := missing(api, wanted):
        raise Denied(
            f"in namespace {api.namespace} this account may not: {', '.join(map(str, absent))}; "
            "`paceline k8s role` prints the Role it takes"
        )


def _allowed(api: Api, right: Right) -> bool:
    plural, _, part = right.resource.partition("/")
    attributes = {"group": right.group, "resource": plural, "verb": right.verb}
    attributes |= {"subresource": part} if part else {}
    attributes |= {} if right.cluster else {"namespace": api.namespace}
    review = {
        "apiVersion": ACCESS_REVIEWS.api_version,
        "kind": ACCESS_REVIEWS.kind,
        "metadata": {},
        "spec": {"resourceAttributes": attributes},
    }
    return bool(api.create(ACCESS_REVIEWS, review)["status"].get("allowed"))


def roles(wanted: Iterable[Right], *, name: str, namespace: str, subject: Obj | None = None) -> list[Obj]:
    """A Role, a ClusterRole for what has no namespace, and with a subject the bindings of both."""
    held = sorted(wanted)
    local, everywhere = [each for each in held if not each.cluster], [each for each in held if each.cluster]
    found = [_role("Role", name, namespace, local)]
    if everywhere:
        found.append(_role("ClusterRole", f"{name}-{namespace}", None, everywhere))
    return found + ([] if subject is None else [_binding(role, subject) for role in found])


def subject_of(user: str | None, service_account: str | None, namespace: str) -> Obj | None:
    """Whom a binding names."""
    if service_account is not None:
        return {"kind": "ServiceAccount", "name": service_account, "namespace": namespace}
    return None if user is None else {"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": user}


def _role(kind: str, name: str, namespace: str | None, held: Sequence[Right]) -> Obj:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": kind,
        "metadata": {"name": name} | ({} if namespace is None else {"namespace": namespace}),
        "rules": _rules(held),
    }


def _rules(held: Sequence[Right]) -> list[Obj]:
    """One rule for the resources of a group that share their verbs."""
    verbs: dict[tuple[str, str], list[str]] = {}
    for right in held:
        verbs.setdefault((right.group, right.resource), []).append(right.verb)
    together: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (group, resource), its in verbs.items():
        together.setdefault((group, tuple(its)), []).append(resource)
    return [
        {"apiGroups": [group], "resources": resources, "verbs": list(its)}
        for (group, its), resources in together.items()
    ]


def _binding(role: Obj, subject: Obj) -> Obj:
    return {
        "apiVersion": role["apiVersion"],
        "kind": f"{role['kind']}Binding",
        "metadata": dict(role["metadata"]),
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": role["kind"], "name": role["metadata"]["name"]},
        "subjects": [subject],
    }
