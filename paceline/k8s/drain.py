"""Empties a Kubernetes node, or one pod, of a release without loss: sessions first, pods afterwards.

    cordon the node ── drain its Ray nodes, all at once ── each one empty: evict its pod ── wait until it is gone

The node is cordoned first, although nothing is evicted before sessions are elsewhere: a cordon touches nothing that
runs, and without it Serve's replacements could make KubeRay put a new pod on the very node that is to be emptied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from paceline.errors import NodeConflict, Unavailable, UnknownNode
from paceline.k8s.api import Api
from paceline.k8s.draining import Plan, address, card_of, emptied, plan_node, plan_pod, progress
from paceline.k8s.errors import NotFound, NotReady
from paceline.k8s.evict import Evictions
from paceline.k8s.kinds import NODES, PODS, Obj, name_of
from paceline.k8s.pace import Pace
from paceline.k8s.server import ServerProxy
from paceline.k8s.snapshot import take

LOOK_S = 1.0
SPARE_S = 30.0
"""Beyond the deadline of the Ray nodes: replicas end, and somebody has to see it."""

Say = Callable[[str], None]


def plan(api: Api, name: str, release: str | None, *, force: bool) -> Plan:
    """What is to be done for the pod or the node of that name. Raises NotFound if there is neither."""
    snapshot = take(api, release)
    pods = api.list_all(PODS, fields=f"metadata.name={name}")
    if pods:
        return plan_pod(pods[0], snapshot.ray_pods, force=force)
    if api.find(NODES, name) is None:
        raise NotFound(
            f"{name}: neither a pod in namespace {api.namespace} nor a node; `paceline k8s status` lists both"
        )
    there = api.list_all(PODS, fields=f"spec.nodeName={name}")
    return plan_node(name, snapshot.ray_pods, there, force=force)


class Drain:
    """Carries a plan out. May be run again at any time, and goes on where the last one was ended.

    `done` tells, for whoever ends it, what has been done so far.
    """

    def __init__(
        self, api: Api, server: ServerProxy, plan: Plan, pace: Pace, say: Say, *, deadline_s: float, force: bool = False
    ) -> None:
        self._api, self._server, self._plan, self._pace, self._say = api, server, plan, pace, say
        self._deadline_s, self._force = deadline_s, force
        self._evictions = Evictions(api, pace, say)
        self._ids: dict[str, str] = {}
        """Of the Ray nodes that drain, by their pods."""
        self.done: list[str] = []

    def run(self) -> None:
        """Raises NotReady if something is left at the end, NodeConflict if sessions have nowhere to go."""
        if self._plan.node is not None:
            self.cordon(self._plan.node)
        for pod in self._plan.workers:
            self._begin(pod)
        waiting = list(self._plan.workers)
        while waiting:
            nodes = self._nodes()
            empty = [pod for pod in waiting if nodes is not None and emptied(self._card(pod, nodes))]
            for pod in empty:
                self._evict(pod)
                waiting.remove(pod)
            if waiting and not empty:
                self._wait(waiting, nodes)
        if self._plan.head is not None:
            self._evict(self._plan.head)

    def cordon(self, node: str) -> None:
        """Keep new pods off the node."""
        if not self._api.get(NODES, node)["spec"].get("unschedulable"):
            self._api.patch(NODES, node, {"spec": {"unschedulable": True}})
        self.done.append(f"node {node} is cordoned")

    def _begin(self, pod: Obj) -> None:
        """Have a pod's Ray node drain, if it has one: a pod that never came up has not."""
        if not address(pod):
            return
        body: dict[str, Any] = {"deadline_s": self._deadline_s, "force": self._force}
        while True:
            try:
                card = self._server.post(f"/v1/nodes/{address(pod)}/drain", body)
                break
            except UnknownNode:
                return
            except NodeConflict as error:
                raise NotReady(f"pod {name_of(pod)}: {error.message}; --force drains it all the same") from None
            except Unavailable as error:
                if self._pace.over:
                    raise
                self._say(f"{name_of(pod)}: {error.message}")
                self._pace.sleep(LOOK_S)
        if name_of(pod) not in self._ids:
            self.done.append(f"pod {name_of(pod)} drains")
        self._ids[name_of(pod)] = str(card["node_id"])

    def _nodes(self) -> list[dict[str, Any]] | None:
        """None if nobody answers at the moment: the front end may be on its way to another pod."""
        try:
            found: list[dict[str, Any]] = self._server.ask("GET", "/v1/nodes")["data"]
        except Unavailable as error:
            self._say(error.message)
            return None
        return found

    def _card(self, pod: Obj, nodes: list[dict[str, Any]]) -> Mapping[str, Any] | None:
        return card_of(nodes, self._ids.get(name_of(pod), ""))

    def _wait(self, waiting: list[Obj], nodes: list[dict[str, Any]] | None) -> None:
        names = ", ".join(name_of(pod) for pod in waiting)
        if self._pace.over:
            raise NotReady(f"{names}: not empty in time, and not evicted; run it again to go on, or raise --deadline")
        for pod in waiting:
            if nodes is not None and (card := self._card(pod, nodes)) is not None:
                self._say(progress(name_of(pod), card))
        self._pace.sleep(LOOK_S)

    def _evict(self, pod: Obj) -> None:
        # A pod whose Ray has ended starts it anew, if it may stay for long.
        again = (lambda: self._begin(pod)) if pod in self._plan.workers else lambda: None
        self._evictions.evict(pod, again)
        self.done.append(f"pod {name_of(pod)} is evicted")
        self._say(f"{name_of(pod)}: gone")
