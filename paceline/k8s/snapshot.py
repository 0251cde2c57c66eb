"""How a release is at one moment: its objects as the API server has them. Read here, judged elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from paceline.k8s.api import Api, selector
from paceline.k8s.errors import Denied
from paceline.k8s.kinds import CLAIMS, EVENTS, JOBS, NODES, PODS, RAY_CLUSTERS, RAY_SERVICES, Obj, labels_of, name_of
from paceline.k8s.release import INSTANCE, find_service, release_of

CLUSTER_LABEL, GROUP_LABEL, TYPE_LABEL = "ray.io/cluster", "ray.io/group", "ray.io/node-type"
ORIGIN_NAME, ORIGIN_KIND = "ray.io/originated-from-cr-name", "ray.io/originated-from-crd"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`nodes` is None where the account may not read them, or nobody asked."""

    service: Obj
    clusters: Sequence[Obj] = ()
    pods: Sequence[Obj] = ()
    jobs: Sequence[Obj] = ()
    claims: Sequence[Obj] = ()
    events: Sequence[Obj] = ()
    nodes: Sequence[Obj] | None = None
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def name(self) -> str:
        return name_of(self.service)

    @property
    def status(self) -> Mapping[str, Any]:
        return self.service.get("status") or {}

    @property
    def ray_pods(self) -> list[Obj]:
        """Head first, then by group and name."""
        found = [pod for pod in self.pods if CLUSTER_LABEL in labels_of(pod)]
        return sorted(found, key=lambda pod: (not is_head(pod), group_of(pod), name_of(pod)))

    def condition(self, kind: str) -> Mapping[str, Any]:
        """Of the RayService; empty if it has none of this kind."""
        return condition(self.service, kind)

    @property
    def observed(self) -> bool:
        """Whether the operator has seen the object as it is now."""
        return int(self.status.get("observedGeneration") or 0) >= int(self.service["metadata"].get("generation") or 0)

    @property
    def applications(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Serve's applications, those of a cluster that is being brought up before those that serve."""
        found: list[tuple[str, Mapping[str, Any]]] = []
        for part in ("pendingServiceStatus", "activeServiceStatus"):
            found += list(((self.status.get(part) or {}).get("applicationStatuses") or {}).items())
        return found

    @property
    def ready(self) -> bool:
        """It serves what was last asked for, all of it."""
        return (
            self.observed
            and self.condition("Ready").get("status") == "True"
            and self.condition("UpgradeInProgress").get("status") != "True"
            and all(app.get("status") in (None, "", "RUNNING") for _, app in self.applications)
        )


def take(api: Api, release: str | None, *, nodes: bool = False) -> Snapshot:
    """Look at a release now. Raises NotFound if there is none."""
    service = find_service(api, release)
    instance = release_of(service)
    origin = {ORIGIN_NAME: name_of(service), ORIGIN_KIND: RAY_SERVICES.kind}
    clusters = api.list_all(RAY_CLUSTERS, selector(origin))
    pods = {name_of(pod): pod for pod in api.list_all(PODS, selector({INSTANCE: instance}))}
    if clusters:
        ray = api.list_all(PODS, selector({CLUSTER_LABEL: [name_of(cluster) for cluster in clusters]}))
        pods |= {name_of(pod): pod for pod in ray}
    jobs, claims = (api.list_all(kind, selector({INSTANCE: instance})) for kind in (JOBS, CLAIMS))
    claims += _mounted(api, pods.values(), claims)
    named = {(obj["kind"], name_of(obj)) for obj in (service, *clusters, *pods.values(), *jobs, *claims)}
    events = [event for event in api.list_all(EVENTS) if _about(event) in named]
    return Snapshot(
        service, clusters, list(pods.values()), jobs, claims, events, _nodes(api) if nodes else None, datetime.now(UTC)
    )


def _mounted(api: Api, pods: Iterable[Obj], known: Sequence[Obj]) -> list[Obj]:
    """Claims the pods mount that are not the release's own, such as one made beforehand."""
    names = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods
        for volume in pod["spec"].get("volumes") or ()
        if "persistentVolumeClaim" in volume
    } - {name_of(claim) for claim in known}
    return [claim for claim in api.list_all(CLAIMS) if name_of(claim) in names] if names else []


def _nodes(api: Api) -> list[Obj] | None:
    try:
        return api.list_all(NODES)
    except Denied:  # they belong to the whole cluster: many accounts may not
        return None


def _about(event: Obj) -> tuple[str, str]:
    about = event.get("involvedObject") or {}
    return str(about.get("kind")), str(about.get("name"))


def condition(obj: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """A condition of an object's status; empty if it has none of this kind."""
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return next((each for each in conditions if each.get("type") == kind), {})


def is_head(pod: Obj) -> bool:
    return labels_of(pod).get(TYPE_LABEL) == "head"


def group_of(pod: Obj) -> str:
    return "head" if is_head(pod) else labels_of(pod).get(GROUP_LABEL, "-")


def pod_ready(pod: Obj) -> bool:
    return condition(pod, "Ready").get("status") == "True"


def age_s(stamp: str | None, now: datetime) -> float:
    """Seconds since a time as Kubernetes writes it; 0 without one."""
    if not stamp:
        return 0.0
    return max(0.0, (now - datetime.fromisoformat(stamp.replace("Z", "+00:00"))).total_seconds())


def event_time(event: Mapping[str, Any]) -> str:
    """When it was last seen; old and new events write it in different places."""
    series = event.get("series") or {}
    found = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return str(found or event["metadata"].get("creationTimestamp") or "")
