"""Evictions: a pod is taken away as its disruption budgets allow, and waited for until it is gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from paceline.k8s.api import Api
from paceline.k8s.errors import NotFound, NotReady, TooMany
from paceline.k8s.kinds import PODS, Obj, name_of
from paceline.k8s.pace import Pace
from paceline.k8s.refusals import Asked

RETRY_S = 2.0


@dataclass(frozen=True, slots=True)
class Evictions:
    """`say` hears what is waited for; `again` is called before each new attempt, since time has passed."""

    api: Api
    pace: Pace
    say: Callable[[str], None]

    def evict(self, pod: Obj, again: Callable[[], None] = lambda: None) -> None:
        """Raises NotReady if a disruption budget, or the pod itself, keeps it there until the deadline."""
        name, body = name_of(pod), self._body(pod)
        while True:
            try:
                self.api.create(PODS, body, "eviction", name)
                break
            except NotFound:
                return
            except TooMany as error:
                why = error.message.partition(": ")[2]
                if self.pace.over:
                    raise NotReady(f"pod {name} is not evicted: {why}; run it again, or raise --timeout") from None
                self.say(f"{name}: waiting for a disruption budget: {why}")
                self.pace.sleep(RETRY_S)
                again()
        self._wait(pod)

    def _wait(self, pod: Obj) -> None:
        name = name_of(pod)
        while (found := self.api.find(PODS, name)) is not None and found["metadata"]["uid"] == pod["metadata"]["uid"]:
            if self.pace.over:
                raise NotReady(f"pod {name} is evicted and not gone; `kubectl describe pod {name}` says why")
            self.say(f"{name}: ending")
            self.pace.sleep(RETRY_S / 2)

    def _body(self, pod: Obj) -> Obj:
        metadata = {"name": name_of(pod), "namespace": self.api.namespace}
        # Only if it is still the same pod: another of its name has done nothing.
        options = {"preconditions": {"uid": pod["metadata"]["uid"]}}
        return {
            "apiVersion": f"policy/{self._version()}",
            "kind": "Eviction",
            "metadata": metadata,
            "deleteOptions": options,
        }

    def _version(self) -> str:
        """What this server takes: v1 since Kubernetes 1.22, v1beta1 before."""
        told = self.api.call(Asked("discover", "v1"), "GET", "/api/v1")
        entry: Obj = next((each for each in told["resources"] if each["name"] == "pods/eviction"), {})
        return str(entry.get("version") or "v1")
