"""What keeps a release from being ready, found in a snapshot: each with its reason and what to do about it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from paceline.k8s.kinds import Obj, name_of, title
from paceline.k8s.placing import placing
from paceline.k8s.snapshot import Snapshot, age_s, condition, event_time, group_of

UNNOTICED_S = 60.0
"""An operator that runs takes a new object up within seconds."""

PULL_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
START_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
SERVE_FAILURES = ("DEPLOY_FAILED", "UNHEALTHY")
MESSAGE_LINES = 4


@dataclass(frozen=True, slots=True)
class Trouble:
    """`lasting`: it does not go away by itself, so waiting on is in vain. `log` names the container whose end tells."""

    what: str
    remedy: str
    lasting: bool = True
    pod: str = ""
    log: str = ""
    previous: bool = False  # the log of the container before this one


def troubles(seen: Snapshot) -> list[Trouble]:
    """Causes before what follows from them: the object itself, volumes, pods, jobs, then Serve."""
    return [*_of_service(seen), *_of_claims(seen), *_of_pods(seen), *_of_jobs(seen), *_of_serve(seen)]


def _of_service(seen: Snapshot) -> Iterator[Trouble]:
    ready = seen.condition("Ready")
    if ready.get("reason") == "ValidationFailed":
        yield Trouble(
            f"the KubeRay operator refuses RayService {seen.name}: {_line(ready)}", "change the value it names"
        )
    if ready.get("reason") == "InitializingTimeout":
        yield Trouble(
            f"RayService {seen.name} was not ready in time: {_line(ready)}",
            "mend what is below, then apply with a change, so that the operator begins anew",
        )
    if seen.condition("Suspended").get("status") == "True":
        yield Trouble(f"RayService {seen.name} is suspended", "set spec.suspend to false, or apply anew")
    made = seen.service["metadata"].get("creationTimestamp")
    if not seen.observed and "observedGeneration" not in seen.status and age_s(made, seen.now) > UNNOTICED_S:
        yield Trouble(
            f"no operator has taken up RayService {seen.name} in {age_s(made, seen.now):.0f} s",
            "see whether the KubeRay operator runs and watches this namespace: "
            "kubectl get pods -A -l app.kubernetes.io/name=kuberay-operator",
            lasting=False,
        )
    for cluster in seen.clusters:
        failed = condition(cluster, "ReplicaFailure")
        if failed.get("status") == "True":
            yield Trouble(
                f"the operator cannot make pods of RayCluster {name_of(cluster)}: {_line(failed)}",
                "a quota, an admission policy or a missing service account is named there",
            )


def _of_claims(seen: Snapshot) -> Iterator[Trouble]:
    for claim in seen.claims:
        phase = (claim.get("status") or {}).get("phase")
        if phase == "Lost":
            yield Trouble(f"volume of claim {name_of(claim)} is lost", "delete the claim and apply again")
        elif phase != "Bound" and (event := _newest(seen, claim, "ProvisioningFailed", "FailedBinding")) is not None:
            wanted = claim["spec"].get("storageClassName")
            yield Trouble(
                f"claim {name_of(claim)} has no volume: {event['message']}",
                f"see that storage class {wanted} exists and can give it"
                if wanted
                else "name a storageClass in the values",
            )
    missing = {name for pod in seen.pods for name in _claims_of(pod)} - {name_of(claim) for claim in seen.claims}
    for name in sorted(missing):
        yield Trouble(f"claim {name} is mounted and does not exist", "make it, or have the values name another")


def _claims_of(pod: Obj) -> list[str]:
    volumes = pod["spec"].get("volumes") or ()
    return [each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each]


def _of_pods(seen: Snapshot) -> Iterator[Trouble]:
    for pod in [*seen.ray_pods, *(pod for pod in seen.pods if pod not in seen.ray_pods)]:
        if pod["metadata"].get("deletionTimestamp"):
            continue
        scheduled = condition(pod, "PodScheduled")
        if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable":
            yield _unschedulable(seen, pod, str(scheduled.get("message") or ""))
        if (mount := _newest(seen, pod, "FailedMount", "FailedAttachVolume")) is not None and _waits(pod):
            yield Trouble(
                f"{_called(pod)} cannot mount: {_short(mount['message'])}",
                "make the secret, claim or volume that is named there",
                lasting=False,
                pod=name_of(pod),
            )
        status = pod.get("status") or {}
        for each in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
            if (found := _of_container(pod, each)) is not None:
                yield found
        if status.get("reason") == "Evicted":
            yield Trouble(
                f"{_called(pod)} was evicted: {status.get('message')}", "give its group more of what it ran out of"
            )


def _unschedulable(seen: Snapshot, pod: Obj, message: str) -> Trouble:
    detail, remedy = placing(pod, seen.nodes)
    growing = _newest(seen, pod, "TriggeredScaleUp") is not None
    more = "; an autoscaler is adding a node" if growing else ""
    said = _short(message) or "no node takes it"
    return Trouble(
        f"{_called(pod)} cannot be placed: {said}{f'; {detail}' if detail else ''}{more}",
        "wait for the node" if growing else remedy,
        lasting=not growing,
        pod=name_of(pod),
    )


def _of_container(pod: Obj, status: Mapping[str, Any]) -> Trouble | None:
    """Of one container's status: cannot be pulled, cannot be started, or does not stay up."""
    name, waiting = status["name"], (status.get("state") or {}).get("waiting") or {}
    reason, message = waiting.get("reason"), _short(str(waiting.get("message") or ""))
    if reason in PULL_REASONS:
        why = f"{reason}: {message}" if message else reason
        return Trouble(
            f"{_called(pod)}: image {status.get('image')} cannot be pulled ({why})",
            "check image.repository and image.tag, and image.pullSecrets for a private registry",
            lasting=reason != "ErrImagePull",  # the first try of several
            pod=name_of(pod),
        )
    if reason in START_REASONS:
        return Trouble(
            f"{_called(pod)}: container {name} cannot start ({reason}: {message})",
            "make the secret or config map that is named there, or mend the values",
            pod=name_of(pod),
        )
    ended = (status.get("lastState") or {}).get("terminated") or (status.get("state") or {}).get("terminated") or {}
    if ended.get("reason") == "OOMKilled":
        return Trouble(
            f"{_called(pod)}: container {name} was killed for memory ({int(status.get('restartCount') or 0)} restarts)",
            f"raise resources.limits.memory of group {group_of(pod)}, or lower engine.kv_tokens",
            pod=name_of(pod),
            log=name,
            previous="terminated" in (status.get("lastState") or {}),
        )
    if reason == "CrashLoopBackOff" or (ended.get("exitCode") and not status.get("ready")):
        return Trouble(
            f"{_called(pod)}: container {name} ended with exit code {ended.get('exitCode', '?')}"
            f" ({int(status.get('restartCount') or 0)} restarts)",
            "its last lines are below",
            lasting=reason == "CrashLoopBackOff",
            pod=name_of(pod),
            log=name,
            previous="terminated" in (status.get("lastState") or {}),
        )
    return None


def _of_jobs(seen: Snapshot) -> Iterator[Trouble]:
    for job in seen.jobs:
        failed = condition(job, "Failed")
        if failed.get("status") == "True":
            pods = [pod for pod in seen.pods if _owner(pod) == name_of(job)]
            pod = name_of(pods[-1]) if pods else ""
            yield Trouble(
                f"Job {name_of(job)} failed: {failed.get('reason')}: {_line(failed)}",
                "see its last lines; a model's name, the hub token or the way to the hub is wrong; "
                f"then delete the job and apply again: kubectl delete job {name_of(job)}",
                lasting=False,  # a replica fetches what it lacks by itself
                pod=pod,
                log=pods[-1]["spec"]["containers"][0]["name"] if pods else "",
            )


def _owner(pod: Obj) -> str:
    owners = pod["metadata"].get("ownerReferences") or ()
    return next((str(each["name"]) for each in owners if each.get("kind") == "Job"), "")


def _of_serve(seen: Snapshot) -> Iterator[Trouble]:
    for application, told in seen.applications:
        deployments = told.get("serveDeploymentStatuses") or {}
        failing = {name: each for name, each in deployments.items() if each.get("status") in SERVE_FAILURES}
        for name, each in failing.items():
            yield Trouble(f"Serve: {name} is {each['status']}: {_end(each.get('message'))}", _serve_remedy(each))
        if not failing and told.get("status") in SERVE_FAILURES:
            what = f"Serve: application {application} is {told['status']}: {_end(told.get('message'))}"
            yield Trouble(what, _serve_remedy(told))


def _serve_remedy(told: Mapping[str, Any]) -> str:
    message = str(told.get("message") or "")
    if "ModelError" in message or "ConfigError" in message:
        return "change the value it names, and apply again"
    return "the replica's whole log is in its pod: kubectl logs, or /tmp/ray/session_latest/logs/serve in it"


def _newest(seen: Snapshot, obj: Obj, *reasons: str) -> Mapping[str, Any] | None:
    """The latest event of these reasons about an object."""
    about = [
        event
        for event in seen.events
        if event.get("reason") in reasons
        and (event["involvedObject"].get("kind"), event["involvedObject"].get("name")) == (obj["kind"], name_of(obj))
    ]
    return max(about, key=event_time, default=None)


def _waits(pod: Obj) -> bool:
    return (pod.get("status") or {}).get("phase") == "Pending"


def _called(pod: Obj) -> str:
    group = group_of(pod)
    return f"{title(pod)}" if group == "-" else f"{title(pod)} of group {group}"


def _line(told: Mapping[str, Any]) -> str:
    return _short(str(told.get("message") or told.get("reason") or ""))


def _short(text: str, limit: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "…"


def _end(message: object) -> str:
    """The last lines of a message, which of a traceback are what matters."""
    lines = [line.strip() for line in str(message or "it does not say why").splitlines() if line.strip()]
    return _short(" / ".join(lines[-MESSAGE_LINES:]))
