"""What a release that is not ready is waiting for, in one line. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from paceline.k8s.kinds import Obj, name_of, title
from paceline.k8s.snapshot import Snapshot, age_s, condition, group_of, is_head, pod_ready
from paceline.k8s.troubles import troubles

HEAD_WAIT = "wait-gcs-ready"
"""The init container by which KubeRay holds a worker back until the head answers."""


def waits_for(seen: Snapshot) -> str:
    """The first thing that must happen next; a trouble, if there is one, before what is merely slow."""
    return next(_waits(seen), "the operator to report it ready")


def _waits(seen: Snapshot) -> Iterator[str]:
    if found := troubles(seen):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        yield found[0].what + more
    if not seen.observed:
        yield f"the KubeRay operator to take up RayService {seen.name}"
    for claim in seen.claims:
        if (claim.get("status") or {}).get("phase") != "Bound":
            yield f"a volume for claim {name_of(claim)}"
    yield from _jobs(seen)
    yield from _pods(seen)
    yield from _serve(seen)
    if seen.condition("UpgradeInProgress").get("status") == "True":
        pending = seen.status.get("pendingServiceStatus") or {}
        routed = pending.get("trafficRoutedPercent")
        share = "" if routed is None else f", {routed} % of requests go there"
        yield f"the switch to RayCluster {pending.get('rayClusterName', '')}{share}"
    if seen.condition("Ready").get("reason") == "ZeroServeEndpoints":
        yield "a pod whose Serve proxy is ready"


def _jobs(seen: Snapshot) -> Iterator[str]:
    for job in seen.jobs:
        done = any(condition(job, kind).get("status") == "True" for kind in ("Complete", "Failed"))
        if not done:
            began = (job.get("status") or {}).get("startTime")
            since = f", {age_s(began, seen.now):.0f} s by now" if began else ""
            yield f"the model's download: Job {name_of(job)}{since}"


def _pods(seen: Snapshot) -> Iterator[str]:
    alive = [pod for pod in seen.ray_pods if not pod["metadata"].get("deletionTimestamp")]
    if not any(is_head(pod) for pod in alive):
        yield "the head's pod to be made"
    for pod in alive:
        if not pod_ready(pod):
            ready = sum(map(pod_ready, alive))
            yield f"{_state(pod)}; pods ready: {ready} of {len(alive)}"


def _state(pod: Obj) -> str:
    """What one pod is at."""
    status, name = pod.get("status") or {}, f"{title(pod)} of group {group_of(pod)}"
    if condition(pod, "PodScheduled").get("status") != "True":
        return f"a node for {name}"
    first = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    for each in first:
        state = each.get("state") or {}
        if (state.get("waiting") or {}).get("reason") in ("ContainerCreating", "PodInitializing"):
            return f"{name}: pulling image {each.get('image')} or mounting volumes"
        if "running" in state and each["name"] == HEAD_WAIT:
            return f"{name}: the head to answer"
    if not first:
        return f"{name} to be created on {pod['spec'].get('nodeName')}"
    return f"{name} to start Ray"


def _serve(seen: Snapshot) -> Iterator[str]:
    for application, told in seen.applications:
        if told.get("status") in ("RUNNING", "", None):
            continue
        deployments = told.get("serveDeploymentStatuses") or {}
        parts = [
            f"{name} {str(each.get('status', '')).lower()}" for name, each in deployments.items() if each.get("status")
        ]
        told_more = [str(each["message"]) for each in deployments.values() if each.get("message")]
        detail = f": {', '.join(parts)}" if parts else ""
        why = f" ({' '.join(told_more[0].split())[:200]})" if told_more else ""
        yield f"Serve, {application} {str(told['status']).lower().replace('_', ' ')}{detail}{why}"
    if not seen.applications and any(is_head(pod) and pod_ready(pod) for pod in seen.ray_pods):
        yield "Serve to be given the application"
