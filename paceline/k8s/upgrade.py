"""A new version without a lost session: looked at as a canary, then switched to, then looked at again.

    plan ── canary beside the release ── checks ── the release itself changes, KubeRay switches ── checks ── canary gone

Until the checks of the canary are over nothing of the release is touched. Every step finds out what is done already, so
that the same command goes on with an upgrade that was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from paceline.errors import PacelineError, Unavailable
from paceline.k8s import canary
from paceline.k8s.api import Api
from paceline.k8s.apply import apply_objects, check
from paceline.k8s.errors import NotReady
from paceline.k8s.kinds import RAY_SERVICES, Obj, Resource, name_of
from paceline.k8s.pace import Pace
from paceline.k8s.server import ServerProxy
from paceline.k8s.switching import active_cluster, pending_words, problem, switched
from paceline.k8s.upgrading import CANARY, PROBE, UpgradePlan, canary_of, check_store, plan_upgrade

LOOK_S = 2.0
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What the user decides."""

    lose_sessions: bool = False
    same_output: bool = False
    force_conflicts: bool = False
    always_canary: bool = False


class Upgrade:
    """Of one release. `say` hears what is waited for, `tell` what is done and found."""

    def __init__(
        self,
        api: Api,
        release: str,
        objects: Sequence[Obj],
        options: Options,
        pace: Pace,
        *,
        say: Say,
        tell: Say,
        api_key: str | None = None,
    ) -> None:
        self._api, self._release, self._objects, self._options = api, release, list(objects), options
        self._pace, self._say, self._tell, self._api_key = pace, say, tell, api_key
        (self._rendered,) = [each for each in objects if each["kind"] == RAY_SERVICES.kind]
        self._name = name_of(self._rendered)
        self._kinds: Mapping[str, Resource] = {}
        self.touched = False
        """Whether the release itself has been changed."""

    def plan(self) -> UpgradePlan:
        """What would change. Asks the API server, and changes nothing. Raises NotFound if there is no release."""
        self._kinds = check(self._api, self._release, self._objects, wait=True)
        live = self._api.get(RAY_SERVICES, self._name)
        wanted = self._api.apply(RAY_SERVICES, self._rendered, force=self._options.force_conflicts, dry_run=True)
        return plan_upgrade(live, wanted)

    def run(self) -> None:
        """Raises PacelineError if the canary fails, and then has deleted it; or if the switch does."""
        plan = self.plan()
        check_store(plan, lose_sessions=self._options.lose_sessions)
        live, present = self._api.get(RAY_SERVICES, self._name), self._api.find(RAY_SERVICES, self._name + CANARY)
        if plan.way == "nothing" and present is None and switched(live, None):
            self._tell(f"{self._name} is so already: nothing to do")
            return
        before = self._count()
        looked = plan.way == "new cluster" or (plan.way == "in place" and self._options.always_canary)
        probe = self._probe(live, present)
        if looked:
            self._check_canary(plan, probe)
        if plan.way != "nothing":
            self._switch(live, new_cluster=plan.way == "new cluster")
        self._settle(None if plan.way != "new cluster" else active_cluster(live))
        if looked or present is not None:
            self._verify(probe, before)
            self._delete_canary()
        deletion = live["spec"].get("rayClusterDeletionDelaySeconds", 60)
        if plan.way == "new cluster":
            self._tell(f"answers that still run on the old cluster have {deletion} s to end")
        self._tell(f"{self._name} is upgraded")

    # the canary

    def _probe(self, live: Obj, present: Obj | None) -> str:
        """The session of the checks: of an interrupted upgrade, the one it began."""
        annotations = {} if present is None else present["metadata"].get("annotations") or {}
        return annotations.get(PROBE) or f"upgrade-check-{live['metadata']['uid']}-{live['metadata']['generation']}"

    def _check_canary(self, plan: UpgradePlan, probe: str) -> None:
        """Bring it up beside the release and look at it; whatever it fails at, it is gone again and nothing touched."""
        self._apply_new()
        try:
            self._say(f"bringing up {self._name}{CANARY}")
            self._api.apply(RAY_SERVICES, canary_of(self._rendered, probe), force=True)
            self._wait_canary()
            self._look_at_canary(plan, probe)
        except PacelineError as error:
            self._delete_canary()
            kind = type(error)
            raise kind(f"the canary failed, and nothing was changed: {error.message}", param=error.param) from None

    def _apply_new(self) -> None:
        """What the canary may mount and is not there yet. What is there the release uses: it changes later."""
        for obj in self._objects:
            resource = self._kinds[f"{obj['apiVersion']}/{obj['kind']}"]
            if obj["kind"] == RAY_SERVICES.kind:
                continue
            # a list, though of one: the commands have that right on every kind already
            if not self._api.list_all(resource, fields=f"metadata.name={name_of(obj)}"):
                self._api.apply(resource, obj)
                self._tell(f"{obj['kind']} {name_of(obj)} created")

    def _wait_canary(self) -> None:
        name = self._name + CANARY
        while True:
            found = self._api.get(RAY_SERVICES, name)
            if switched(found, None):
                return
            if (why := problem(found)) is not None:
                raise NotReady(why)
            if self._pace.over:
                raise NotReady(f"{name} was not ready in time: {pending_words(found)}")
            self._say(f"{name}: {pending_words(found)}")
            self._pace.sleep(LOOK_S)

    def _look_at_canary(self, plan: UpgradePlan, probe: str) -> None:
        old, new = self._server(self._name), self._server(self._name + CANARY)
        self._say("asking the canary")
        targets = self._patiently(lambda: canary.check_replicas(new))
        self._tell(f"canary: {targets} target replica{'s' if targets > 1 else ''}")
        found = canary.compare(old, new)
        self._tell(f"canary: {found}")
        if found.same < found.questions and (plan.same_output or self._options.same_output):
            why = "nothing that decides the output changes" if plan.same_output else "--same-output"
            raise NotReady(f"{found}, although {why}")
        if self._options.lose_sessions:
            return
        canary.begin_probe(old, probe)
        if not canary.probe_turns(new, probe):
            raise NotReady(
                "a session that was begun on the running version is not seen by the new one: they do not share "
                "a store; check sessions.store, or give --lose-sessions"
            )
        self._tell("canary: sees the sessions of the running version")

    def _delete_canary(self) -> None:
        name = self._name + CANARY
        if not self._api.delete(RAY_SERVICES, name):
            return
        while self._api.find(RAY_SERVICES, name) is not None:
            if self._pace.over:
                self._tell(f"{name} is being deleted")
                return
            self._say(f"{name}: ending")
            self._pace.sleep(LOOK_S)
        self._tell(f"{name} is deleted")

    # the switch

    def _switch(self, live: Obj, *, new_cluster: bool) -> None:
        self.touched = True
        way = f"KubeRay brings up another cluster beside {active_cluster(live)}" if new_cluster else "changed in place"
        self._tell(f"{self._name}: {way}")
        for done in apply_objects(
            self._api, self._release, self._objects, self._kinds, force=self._options.force_conflicts
        ):
            if done.outcome not in ("unchanged", "kept"):
                self._tell(f"{done.what} {done.outcome}")

    def _settle(self, before: str | None) -> None:
        """Wait until the release serves what was asked for; with `before`, from another cluster than that."""
        while True:
            found = self._api.get(RAY_SERVICES, self._name)
            if switched(found, before):
                return
            if (why := problem(found)) is not None:
                raise NotReady(f"{why}; the old version goes on serving: apply its values again, or mend these")
            if self._pace.over:
                raise NotReady(
                    f"the switch is not over: {pending_words(found)}; run it again to go on, `paceline k8s diagnose` "
                    "says more"
                )
            self._say(f"{self._name}: {pending_words(found)}")
            self._pace.sleep(LOOK_S)

    def _verify(self, probe: str, before: int | None) -> None:
        """What was said before the switch is known after it."""
        if self._options.lose_sessions:
            return
        server = self._server(self._name)
        self._say("looking for the sessions")
        if self._patiently(lambda: canary.probe_turns(server, probe)):
            tokens = canary.follow_up(server, probe)
            self._tell(f"a session begun before the switch goes on from its history of {tokens} tokens")
            canary.end_probe(server, probe)
        after = self._count()
        if before is not None and after is not None:
            self._tell(f"sessions: {before} before, {after} now")

    def _count(self) -> int | None:
        try:
            return len(self._server(self._name).sessions())
        except Unavailable:
            return None

    def _patiently(self, ask: Callable[[], int]) -> int:
        """A Service that has just been pointed elsewhere may need a moment."""
        while True:
            try:
                return ask()
            except Unavailable as error:
                if self._pace.over:
                    raise
                self._say(error.message)
                self._pace.sleep(LOOK_S)

    def _server(self, name: str) -> ServerProxy:
        return ServerProxy.of_service(self._api, name, api_key=self._api_key)
