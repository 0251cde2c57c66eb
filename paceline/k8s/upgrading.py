"""What an upgrade changes, what KubeRay makes of it, and the canary that is looked at first. Nothing here asks anybody.

KubeRay brings up another Ray cluster beside the one that serves when the pods' specification changes, and switches
when it is ready; a change of Serve's config alone goes into the running cluster, where replicas roll and hand their
sessions over; numbers of pods change in place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from paceline.config import IMPORT_PATH, AppSettings, parse_settings
from paceline.errors import ConfigError
from paceline.k8s.errors import NotReady
from paceline.k8s.kinds import Obj, name_of
from paceline.k8s.release import INSTANCE

Way = Literal["nothing", "in place", "new cluster"]

CANARY = "-canary"
MAX_NAME = 47
"""KubeRay makes names of pods and services of it."""
PROBE = "paceline/upgrade-probe"
"""On the canary: the session that the checks began, so that an upgrade that was interrupted finds it again."""
MAX_LINES = 20
SECRET = "…"
PER_GROUP = ("replicas", "minReplicas", "maxReplicas")


@dataclass(frozen=True, slots=True)
class Change:
    """One value that becomes another; None is none."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.after)}"


@dataclass(frozen=True, slots=True)
class UpgradePlan:
    """Of one RayService, as it is and as the API server would have it."""

    way: Way
    changes: tuple[Change, ...]
    before: AppSettings
    after: AppSettings

    @property
    def same_output(self) -> bool:
        """Whether a seed has the same output before and after: model, engine and code stay. Another image may add in
        another order, and where two tokens are all but equally likely that decides."""
        images = any(change.key.endswith(".image") for change in self.changes)
        return not images and _deciding(self.before) == _deciding(self.after)

    def lines(self) -> list[str]:
        """For people: what changes, and how."""
        shown = [f"  {change}" for change in self.changes[:MAX_LINES]]
        more = len(self.changes) - MAX_LINES
        return shown + ([f"  and {more} more"] if more > 0 else [])


def plan_upgrade(live: Obj, wanted: Obj) -> UpgradePlan:
    """`wanted` is the live object with the new specification applied to it, as a dry run gives it.

    Raises ConfigError for a Serve config that is not Paceline's, NotReady if KubeRay would not act on the change.
    """
    changes = tuple(_changes(live["spec"], wanted["spec"]))
    way: Way = "nothing" if not changes else "in place"
    if _hashed(live) != _hashed(wanted):
        way = "new cluster"
        strategy = (wanted["spec"].get("upgradeStrategy") or {}).get("type")
        if strategy == "None":
            raise NotReady(
                "the pods change, and with upgradeStrategy None KubeRay keeps the cluster as it is: set "
                "upgrade.strategy to NewCluster"
            )
    return UpgradePlan(way, changes, settings_of(live), settings_of(wanted))


def check_store(plan: UpgradePlan, *, lose_sessions: bool) -> None:
    """Raise ConfigError if the sessions would not be there in the new cluster."""
    if plan.way != "new cluster" or lose_sessions:
        return
    before, after = plan.before.sessions.store, plan.after.sessions.store
    if before == "memory":
        raise ConfigError(
            "sessions.store: it is memory, in the routers of the cluster that goes: every session would be lost; set "
            "it to redis://… first, or give --lose-sessions",
            param="sessions.store",
        )
    if before != after:
        raise ConfigError(
            "sessions.store: the new cluster has another, without the sessions of this one; keep it, or give "
            "--lose-sessions",
            param="sessions.store",
        )


def settings_of(service: Obj) -> AppSettings:
    """Paceline's settings in a RayService. Raises ConfigError."""
    return parse_settings(_arguments(serve_config(service)))


def serve_config(service: Obj) -> dict[str, Any]:
    found = yaml.safe_load(service["spec"].get("serveConfigV2") or "")
    return found if isinstance(found, dict) else {}


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    for application in config.get("applications") or ():
        if application.get("import_path") == IMPORT_PATH:
            return application.setdefault("args", {}) or {}
    raise ConfigError(f"serveConfigV2: no application with import_path {IMPORT_PATH}", param="serveConfigV2")


def canary_of(wanted: Obj, probe: str) -> Obj:
    """A RayService of its own with the new specification and the fewest replicas.

    It belongs to no Gateway, and to another release: applying the real one must not take it for a leftover.
    """
    found = copy.deepcopy(wanted)
    name = name_of(wanted) + CANARY
    if len(name) > MAX_NAME:
        raise ConfigError(f"--name: {name_of(wanted)} leaves no room for {CANARY}: {MAX_NAME} characters are the most")
    metadata, spec = found["metadata"], found["spec"]
    found.pop("status", None)
    labels = metadata.get("labels") or {}
    found["metadata"] = {
        "name": name,
        "labels": {**labels, INSTANCE: labels.get(INSTANCE, name_of(wanted)) + CANARY},
        "annotations": {**(metadata.get("annotations") or {}), PROBE: probe},
    }
    spec["upgradeStrategy"] = {"type": "NewCluster"}
    spec["serveConfigV2"] = yaml.safe_dump(_smallest(serve_config(wanted)), sort_keys=False)
    for group in spec["rayClusterConfig"].get("workerGroupSpecs") or ():
        group |= {key: min(1, int(group[key])) for key in ("replicas", "minReplicas") if group.get(key) is not None}
    storage = spec["rayClusterConfig"].get("gcsFaultToleranceOptions") or {}
    if storage.get("externalStorageNamespace"):
        storage["externalStorageNamespace"] += CANARY
    return found


def _smallest(config: dict[str, Any]) -> dict[str, Any]:
    """The same application with one replica of each kind, and no autoscaler."""
    arguments = _arguments(config)
    settings = parse_settings(arguments)
    arguments["num_routers"] = 1
    arguments["target"] = {**(arguments.get("target") or {}), "num_replicas": 1}
    drafts = min(1, settings.draft_replicas.most)
    arguments["draft"] = {**(arguments.get("draft") or {}), "num_replicas": drafts}
    arguments.pop("autoscaling", None)
    for application in config["applications"]:
        application.pop("autoscaling_policy", None)
    return config


def _hashed(service: Obj) -> Any:
    """What KubeRay compares to decide on a new cluster: all of the pods' specification but these fields. More groups
    behind those there are would go in place as well; that is told as a new cluster, the more careful of the two."""
    spec = copy.deepcopy(service["spec"]["rayClusterConfig"])
    spec.pop("suspend", None)
    spec.pop("upgradeStrategy", None)
    head, groups = spec.get("headGroupSpec") or {}, spec.get("workerGroupSpecs") or []
    for group in groups:
        for key in PER_GROUP:
            group.pop(key, None)
        (group.get("scaleStrategy") or {}).pop("workersToDelete", None)
    for group in (head, *groups):
        pod = (group.get("template") or {}).get("spec") or {}
        pod.pop("tolerations", None)
        pod.pop("schedulingGates", None)
    return spec


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    """Of two specifications; of Serve's config by its settings, of everything else by its place."""
    yield from _differences(_flat(before), _flat(after))


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield Change(key, before.get(key), after.get(key))


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """Every leaf by its path; items of lists by their names, where they have some."""
    if at == "serveConfigV2" and isinstance(value, str):
        config = yaml.safe_load(value) or {}
        return _flat(config, at)
    if isinstance(value, Mapping) and value:
        pairs = [(str(key), each) for key, each in value.items()]
    elif isinstance(value, list) and value:
        pairs = [(_item_name(each, index), each) for index, each in enumerate(value)]
    else:
        return {} if value in ({}, [], None) else {at: value}
    found: dict[str, Any] = {}
    for key, each in pairs:
        found |= _flat(each, f"{at}.{key}" if at else key)
    return found


def _item_name(item: Any, index: int) -> str:
    named = item.get("name") or item.get("groupName") if isinstance(item, Mapping) else None
    return f"[{named if isinstance(named, str) else index}]"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    text = str(value)
    if "://" in text and "@" in text:  # a password of a store is nobody's to see
        scheme, _, rest = text.partition("://")
        text = f"{scheme}://{SECRET}@{rest.rpartition('@')[2]}"
    return text if len(text) <= 80 else text[:79] + SECRET


def _deciding(settings: AppSettings) -> tuple[Any, ...]:
    """What beside the request a seed's output comes from."""
    return settings.model, settings.target.engine, settings.speculation.verification
