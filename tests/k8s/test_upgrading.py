"""What an upgrade is found to be, before anybody is asked for anything."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from paceline.errors import ConfigError
from paceline.k8s.errors import NotReady
from paceline.k8s.kinds import Obj
from paceline.k8s.release import INSTANCE
from paceline.k8s.switching import pending_words, problem, switched
from paceline.k8s.upgrading import PROBE, canary_of, check_store, plan_upgrade, serve_config, settings_of

REDIS = {"sessions": {"store": "redis://:secret@redis:6379"}}


def service(image: str = "paceline:1", replicas: int = 2, **args: Any) -> Obj:
    group = {
        "groupName": "targets",
        "replicas": replicas,
        "minReplicas": replicas,
        "template": {"spec": {"containers": [{"name": "ray", "image": image}]}},
    }
    application = {"name": "paceline", "import_path": "paceline.serving.app:build", "args": {**REDIS, **args}}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "p", "labels": {INSTANCE: "p"}, "generation": 2},
        "spec": {
            "serveConfigV2": yaml.safe_dump({"applications": [application]}),
            "rayClusterConfig": {"headGroupSpec": {"template": {"spec": {}}}, "workerGroupSpecs": [group]},
        },
    }


@pytest.mark.parametrize(
    ("after", "way"),
    [
        (service(), "nothing"),
        (service(request_timeout_s=60), "in place"),
        (service(replicas=5), "in place"),
        (service("paceline:2"), "new cluster"),
    ],
    ids=["the same", "settings", "pods more", "image"],
)
def test_only_another_specification_of_pods_makes_a_new_cluster(after: Obj, way: str) -> None:
    assert plan_upgrade(service(), after).way == way


def test_a_toleration_makes_no_new_cluster() -> None:
    after = service()
    pod = after["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    pod["tolerations"] = [{"key": "spot", "operator": "Exists"}]
    assert plan_upgrade(service(), after).way == "in place"


def test_changes_are_told_by_their_names() -> None:
    found = plan_upgrade(service(), service("paceline:2", request_timeout_s=60)).lines()
    assert found == [
        "  rayClusterConfig.workerGroupSpecs.[targets].template.spec.containers.[ray].image: paceline:1 -> paceline:2",
        "  serveConfigV2.applications.[paceline].args.request_timeout_s: none -> 60",
    ]


def test_a_store_s_password_is_not_shown() -> None:
    (line,) = plan_upgrade(service(), service(sessions={"store": "redis://:other@redis:6379"})).lines()
    assert "secret" not in line
    assert "other" not in line


def test_a_change_that_kuberay_would_not_act_on_is_refused() -> None:
    after = service("paceline:2")
    after["spec"]["upgradeStrategy"] = {"type": "None"}
    with pytest.raises(NotReady, match=r"set upgrade\.strategy to NewCluster"):
        plan_upgrade(service(), after)


@pytest.mark.parametrize(
    ("before", "after"),
    [({"store": "memory"}, {"store": "memory"}), ({"store": "redis://a"}, {"store": "redis://b"})],
    ids=["memory", "another"],
)
def test_sessions_that_would_be_lost_are_refused_unless_that_is_wanted(before: Any, after: Any) -> None:
    plan = plan_upgrade(service(sessions=before), service("paceline:2", sessions=after))
    check_store(plan, lose_sessions=True)
    with pytest.raises(ConfigError, match=r"^sessions\.store: .* --lose-sessions"):
        check_store(plan, lose_sessions=False)


@pytest.mark.parametrize(
    ("args", "same"),
    [
        ({"request_timeout_s": 60}, True),
        ({"model": "other"}, False),
        ({"target": {"engine": {"kv_dtype": "int8"}}}, False),
        ({"image": "paceline:2"}, False),
        ({"replicas": 5}, True),
    ],
    ids=["a deadline", "the model", "its rounding", "the code", "more pods"],
)
def test_what_decides_the_output_is_known(args: dict[str, Any], same: bool) -> None:
    assert plan_upgrade(service(), service(**args)).same_output is same


def test_a_canary_is_the_new_version_with_one_replica_of_each() -> None:
    wanted = service("paceline:2", replicas=4, num_routers=3, target={"num_replicas": 4}, draft={"num_replicas": 3})
    canary = canary_of(wanted, "probe")
    settings, group = settings_of(canary), canary["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert (settings.num_routers, settings.target.num_replicas, settings.draft.num_replicas) == (1, 1, 1)
    assert (group["replicas"], group["minReplicas"]) == (1, 1)
    assert group["template"]["spec"]["containers"][0]["image"] == "paceline:2"


def test_a_canary_is_of_another_release_and_remembers_its_session() -> None:
    metadata = canary_of(service(), "probe")["metadata"]
    assert (metadata["name"], metadata["labels"][INSTANCE]) == ("p-canary", "p-canary")
    assert metadata["annotations"] == {PROBE: "probe"}


def test_making_a_canary_leaves_the_release_as_it_is() -> None:
    wanted = service("paceline:2")
    before = copy.deepcopy(wanted)
    canary_of(wanted, "probe")
    assert wanted == before


def test_a_name_too_long_for_a_canary_is_refused() -> None:
    wanted = service()
    wanted["metadata"]["name"] = "x" * 41
    with pytest.raises(ConfigError, match="--name"):
        canary_of(wanted, "probe")


def status(active: str, pending: str = "", observed: int = 2, app: str = "RUNNING", ready: str = "True") -> Obj:
    found = service()
    states = {"paceline": {"status": app, "message": "ValueError: no such model"}}
    found["status"] = {
        "observedGeneration": observed,
        "conditions": [
            {"type": "Ready", "status": ready, "reason": "NonZeroServeEndpoints"},
            {"type": "UpgradeInProgress", "status": "True" if pending else "False"},
        ],
        "activeServiceStatus": {"rayClusterName": active, "applicationStatuses": {} if pending else states},
        "pendingServiceStatus": {"rayClusterName": pending, "applicationStatuses": states} if pending else {},
    }
    return found


@pytest.mark.parametrize(
    ("found", "over"),
    [
        (status("b"), True),
        (status("a"), False),
        (status("a", "b"), False),
        (status("b", observed=1), False),
        (status("b", app="DEPLOYING"), False),
        (status("b", ready="False"), False),
    ],
    ids=["over", "not begun", "under way", "not seen", "deploying", "not ready"],
)
def test_a_switch_is_over_when_another_cluster_serves_what_was_asked_for(found: Obj, over: bool) -> None:
    assert switched(found, "a") is over


def test_an_application_that_cannot_be_deployed_ends_the_wait() -> None:
    assert problem(status("a", "b", app="DEPLOY_FAILED")) == (
        "Serve: application paceline is DEPLOY_FAILED: ValueError: no such model"
    )


def test_progress_names_the_cluster_that_comes_up_and_the_traffic() -> None:
    found = status("a", "b", app="DEPLOYING")
    found["status"]["pendingServiceStatus"]["trafficRoutedPercent"] = 40
    assert pending_words(found) == "cluster b comes up; paceline DEPLOYING; 40% of the traffic goes there"


def test_the_serve_config_is_read_from_the_service() -> None:
    assert serve_config(service())["applications"][0]["name"] == "paceline"
