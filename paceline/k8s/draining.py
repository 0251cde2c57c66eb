"""Which pods a drain is about, and what is said of them while it goes on. Nothing here asks anybody."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.k8s.errors import NotReady
from paceline.k8s.kinds import Obj, name_of
from paceline.k8s.snapshot import is_head

FINISHED = ("Succeeded", "Failed")
WAITS_FOR_A_PLACE = "PENDING_MIGRATION"
HEAD_ENDS = (
    "its Ray cluster ends with it: running answers fail, every session loses its KV, and histories are kept only by a "
    "store outside of the pods"
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Pods of the release that are to go: workers, which hand over what they hold, and the head, which cannot.

    `node` is the Kubernetes node to be cordoned, if a node is drained; `others` are pods of the namespace on it that
    are not the release's.
    """

    workers: tuple[Obj, ...]
    head: Obj | None = None
    node: str | None = None
    others: tuple[str, ...] = ()

    @property
    def pods(self) -> tuple[Obj, ...]:
        """In the order in which they go."""
        return self.workers if self.head is None else (*self.workers, self.head)

    def lines(self) -> list[str]:
        """What would be done, for people."""
        found = [] if self.node is None else [f"cordon node {self.node}"]
        found += [f"drain, then evict pod {name_of(pod)}" for pod in self.workers]
        if self.head is not None:
            found.append(f"evict the head pod {name_of(self.head)}: {HEAD_ENDS}")
        if not self.pods:
            found.append("no pod of the release is on it")
        return found + self.told_of_others()

    def told_of_others(self) -> list[str]:
        if not self.others:
            return []
        return [f"left alone, since they are not the release's: {', '.join(self.others)}"]


def plan_pod(pod: Obj, ray_pods: Sequence[Obj], *, force: bool) -> Plan:
    """To drain one pod. Raises NotReady for the head unless `force`, and for a pod that is not the release's."""
    if name_of(pod) not in {name_of(each) for each in ray_pods}:
        raise NotReady(f"pod {name_of(pod)} runs no Ray of this release; `paceline k8s status` lists those that do")
    return _plan([pod], force=force)


def plan_node(node: str, ray_pods: Sequence[Obj], namespace_pods: Sequence[Obj], *, force: bool) -> Plan:
    """To drain what the release has on a node. Raises NotReady if the head is on it, unless `force`."""
    mine = [pod for pod in ray_pods if pod["spec"].get("nodeName") == node]
    names = {name_of(pod) for pod in mine}
    there = (pod for pod in namespace_pods if pod["spec"].get("nodeName") == node and not _over(pod))
    others = tuple(sorted(name_of(pod) for pod in there if name_of(pod) not in names))
    return _plan(mine, force=force, node=node, others=others)


def _plan(pods: Sequence[Obj], *, force: bool, node: str | None = None, others: tuple[str, ...] = ()) -> Plan:
    here = [pod for pod in pods if not _over(pod)]
    head = next((pod for pod in here if is_head(pod)), None)
    if head is not None and not force:
        raise NotReady(f"{name_of(head)} is the head pod, {HEAD_ENDS}; --force does it all the same")
    return Plan(tuple(pod for pod in here if not is_head(pod)), head, node, others)


def _over(pod: Obj) -> bool:
    """It has ended. One that is being deleted is still waited for."""
    return (pod.get("status") or {}).get("phase") in FINISHED


def address(pod: Obj) -> str:
    """By which Ray knows it; empty if it has none yet."""
    return str((pod.get("status") or {}).get("podIP") or "")


def card_of(nodes: Sequence[Mapping[str, Any]], node_id: str) -> Mapping[str, Any] | None:
    """A Ray node, as the server tells of it; None if it is forgotten or gone."""
    found = next((each for each in nodes if each["node_id"] == node_id), None)
    return None if found is None or found["state"] == "gone" else found


def emptied(card: Mapping[str, Any] | None) -> bool:
    """Nothing of the server is there any more."""
    return card is None or bool(card["empty"])


def progress(pod: str, card: Mapping[str, Any], now: float | None = None) -> str:
    """What a pod that drains still has, in one line."""
    roles = [str(each["role"]) for each in card["replicas"]]
    counts = [f"{roles.count(role)} {role}{'s' if roles.count(role) > 1 else ''}" for role in dict.fromkeys(roles)]
    left = ", ".join([f"{card['sessions']} sessions", *counts]) if counts else "nothing but its front end"
    return f"{pod}: {left} left{_waiting(card, time.time() if now is None else now)}"


def _waiting(card: Mapping[str, Any], now: float) -> str:
    """Why nothing moves, if that is so: Serve keeps a replica until there is another, or the deadline comes near."""
    if all(each["state"] != WAITS_FOR_A_PLACE for each in card["replicas"]) or card.get("deadline") is None:
        return ""
    return f"; replicas start elsewhere, or leave without at the deadline in {max(0.0, card['deadline'] - now):.0f} s"
