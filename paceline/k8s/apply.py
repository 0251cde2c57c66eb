"""Making a release what was rendered: checked first, applied in order, what is no longer rendered taken away.

Every step can be done again: interrupted anywhere, the same call finishes what is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from paceline.errors import ConfigError
from paceline.k8s.api import Api, selector
from paceline.k8s.errors import NotFound, NotReady, UnknownKind, Unreachable
from paceline.k8s.kinds import NAMESPACES, RAY_SERVICES, Obj, Resource, name_of, title
from paceline.k8s.release import (
    INSTANCE,
    MANAGED_BY,
    OURS,
    in_order,
    kept,
    kinds_of,
    made_by_helm,
    noted_kinds,
    with_kinds,
)
from paceline.k8s.role import applying, require
from paceline.k8s.snapshot import Snapshot, take
from paceline.k8s.troubles import troubles
from paceline.k8s.waiting import waits_for
from paceline.k8s.watching import Watch

LOOK_EVERY_S = 3.0
"""A change of the RayService is seen at once, those of pods, jobs and volumes by looking so often."""

Outcome = Literal["created", "changed", "unchanged", "deleted", "kept"]


@dataclass(frozen=True, slots=True)
class Done:
    what: str
    outcome: Outcome


def resources_of(api: Api, objects: Iterable[Obj]) -> dict[str, Resource]:
    """The server's name for every kind, by `apiVersion/Kind`. Raises UnknownKind for all that it does not know."""
    found: dict[str, Resource] = {}
    unknown: list[UnknownKind] = []
    for kind in sorted(kinds_of(objects)):
        version, _, name = kind.rpartition("/")
        try:
            found[kind] = api.resource(version, name)
        except UnknownKind as error:
            unknown.append(error)
    if unknown:
        raise UnknownKind("; ".join(error.message for error in unknown))
    return found


def check(api: Api, release: str, objects: Sequence[Obj], *, wait: bool) -> dict[str, Resource]:
    """That the server knows every kind, and this account may do all of it. Raises ClusterError; changes nothing."""
    if not any(obj["kind"] == RAY_SERVICES.kind for obj in objects):
        raise ConfigError("values: they render no RayService", param="values")
    resources = resources_of(api, objects)
    elsewhere = {
        str(obj["metadata"]["namespace"])
        for obj in objects
        if obj["metadata"].get("namespace", api.namespace) != api.namespace
    }
    if elsewhere:
        raise ConfigError(
            f"extraObjects: one is for namespace {', '.join(elsewhere)}; apply it by itself", param="values"
        )
    require(api, applying(list(resources.values()), wait=wait))
    for service in api.list_all(RAY_SERVICES, selector({INSTANCE: release})):
        if made_by_helm(service):
            raise ConfigError(f"release {release} is Helm's: change it with `helm upgrade {release}`", param="name")
    return resources


def make_namespace(api: Api) -> None:
    """The connection's namespace, unless it is there."""
    name = api.namespace
    api.apply(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})


def apply_objects(
    api: Api, release: str, objects: Sequence[Obj], resources: Mapping[str, Resource], *, force: bool = False
) -> Iterator[Done]:
    """Apply all of them in order, then delete what the release had and has no longer."""
    before = _present(api, release, resources.values())
    service = next((obj for obj in before.values() if obj["kind"] == RAY_SERVICES.kind), None)
    now = kinds_of(objects)
    known = now | noted_kinds(service)
    # Until what is left over is gone, the note names old and new kinds: an interrupted call is found out by the next.
    for obj in in_order(with_kinds(objects, known)):
        yield _applied(api, resources[_kind(obj)], obj, before, force=force)
    yield from _pruned(api, release, objects, known, before)
    if known != now:
        (noted,) = [obj for obj in with_kinds(objects, now) if obj["kind"] == RAY_SERVICES.kind]
        api.apply(resources[_kind(noted)], noted, force=force)


def _kind(obj: Obj) -> str:
    return f"{obj['apiVersion']}/{obj['kind']}"


def _present(api: Api, release: str, resources: Iterable[Resource]) -> dict[tuple[str, str], Obj]:
    """What the release has of these kinds, by kind and name."""
    labels = selector({INSTANCE: release, MANAGED_BY: OURS})
    found = [obj for resource in resources for obj in api.list_all(resource, labels)]
    return {(obj["kind"], name_of(obj)): obj for obj in found}


def _applied(api: Api, resource: Resource, obj: Obj, before: Mapping[tuple[str, str], Obj], *, force: bool) -> Done:
    try:
        after = api.apply(resource, obj, force=force)
    except NotFound as error:
        if "namespaces" in error.message:
            raise NotFound(f"there is no namespace {api.namespace}; --create-namespace makes it") from None
        raise
    was = before.get((obj["kind"], name_of(obj)))
    if was is None:
        return Done(title(obj), "created")
    return Done(title(obj), "unchanged" if _content(was) == _content(after) else "changed")


def _content(obj: Obj) -> Obj:
    """Without what a server may write anew when nothing changes: an apply can raise the version by itself."""
    written = ("managedFields", "resourceVersion", "generation")
    metadata = {key: value for key, value in obj["metadata"].items() if key not in written}
    return {**obj, "metadata": metadata, "status": None}  # the status is not ours


def _pruned(
    api: Api, release: str, objects: Sequence[Obj], kinds: Iterable[str], before: Mapping[tuple[str, str], Obj]
) -> Iterator[Done]:
    """What the release has and what is no longer rendered, of every kind it was ever given."""
    wanted = {(obj["kind"], name_of(obj)) for obj in objects}
    others = []
    for kind in sorted(set(kinds) - kinds_of(objects)):
        version, _, name = kind.rpartition("/")
        try:
            others.append(api.resource(version, name))
        except UnknownKind:  # gone with its operator, and its objects with it
            continue
    present = {**before, **_present(api, release, others)}
    for obj in reversed(in_order(present.values())):
        if (obj["kind"], name_of(obj)) in wanted:
            continue
        if kept(obj):
            yield Done(title(obj), "kept")
            continue
        api.delete(api.resource(obj["apiVersion"], obj["kind"]), name_of(obj), propagation="Background")
        yield Done(title(obj), "deleted")


def wait_ready(
    api: Api,
    release: str,
    *,
    timeout_s: float,
    say: Callable[[str], None],
    fail_fast: bool = False,
    look_every_s: float = LOOK_EVERY_S,
) -> Snapshot:
    """Look until the release is ready, saying what it waits for. Raises NotReady with the reason at the end of time.

    A pod that no node takes may be waited for: an autoscaler may bring one. With `fail_fast` it is not, nor anything
    else that does not mend itself. What the operator refuses ends the wait at once.
    """
    deadline = time.monotonic() + timeout_s
    watch = Watch(api, RAY_SERVICES, selector=selector({INSTANCE: release}), on_trouble=say)
    text = "the RayService"
    while True:
        try:
            seen = take(api, release)
            if seen.ready:
                return seen
            text = waits_for(seen)
            say(f"waiting for {text}")
            _give_up_if_vain(seen, fail_fast=fail_fast)
        except Unreachable as error:
            say(f"{error.message}; trying again")
        left = deadline - time.monotonic()
        if left <= 0:
            raise NotReady(f"not ready after {timeout_s:g} s: {text}; `paceline k8s diagnose` says more")
        for _ in watch.changes(min(look_every_s, left)):
            break


def _give_up_if_vain(seen: Snapshot, *, fail_fast: bool) -> None:
    if seen.condition("Ready").get("reason") == "ValidationFailed":
        raise NotReady(troubles(seen)[0].what)
    lasting = [trouble for trouble in troubles(seen) if trouble.lasting]
    if fail_fast and lasting:
        raise NotReady(f"{lasting[0].what}; {lasting[0].remedy}")
