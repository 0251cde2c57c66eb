"""What the chart makes of its values: the RayService, its Serve config and its pods."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from paceline import __version__
from paceline.api.nodes import START_S
from paceline.cli.app import app
from paceline.config import GRPC_SERVICER, IMPORT_PATH, parse_settings
from paceline.serving.environment import CLUSTER
from paceline.serving.leaving import longest_leaving_s
from tests.k8s import charts
from tests.k8s.charts import ROOT, args, container, environment, groups, head, pod, serve_config
from tests.k8s.leaves import REDIS, SCALES, nested


@cache
def default() -> charts.Object:
    return charts.rayservice()


def service(values: dict[str, Any]) -> charts.Object:
    """By dotted path."""
    return charts.rayservice(nested(values))


def all_groups(of: charts.Object) -> list[charts.Object]:
    return [head(of), *groups(of).values()]


def volume(group: charts.Object, path: str) -> charts.Object:
    """What is mounted there."""
    (name,) = (each["name"] for each in container(group)["volumeMounts"] if each["mountPath"] == path)
    (found,) = (each for each in pod(group)["volumes"] if each["name"] == name)
    return found


# --- Versions and names


def test_ray_is_the_version_that_is_pinned() -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and default()["spec"]["rayClusterConfig"]["rayVersion"] == pinned[1]


def test_the_image_is_of_this_version() -> None:
    assert {container(each)["image"] for each in all_groups(default())} == {f"ghcr.io/paceline/paceline:{__version__}"}


def test_a_digest_goes_before_a_tag() -> None:
    digest = f"sha256:{'0' * 64}"
    image = container(head(service({"image.digest": digest, "image.tag": "x"})))["image"]
    assert image == f"ghcr.io/paceline/paceline@{digest}"


def test_a_long_name_is_cut_to_what_kuberay_takes() -> None:
    assert len(charts.rayservice(name="r" * 53)["metadata"]["name"]) == 40


def test_a_new_version_of_the_chart_asks_for_no_new_cluster() -> None:
    cluster = json.dumps(default()["spec"]["rayClusterConfig"])
    assert "helm.sh/chart" not in cluster
    assert "app.kubernetes.io/version" not in cluster


# --- The Serve config


def test_serve_loads_paceline_on_both_ports() -> None:
    config = serve_config(default())
    (application,) = config["applications"]
    assert application["import_path"] == IMPORT_PATH
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8000}
    assert config["grpc_options"] == {"port": 9000, "grpc_servicer_functions": [GRPC_SERVICER]}


def test_every_node_has_a_proxy_since_readiness_asks_it() -> None:
    assert serve_config(default())["proxy_location"] == "EveryNode"


def test_the_policy_is_there_with_autoscaling_alone() -> None:
    (fixed,), (scaled,) = serve_config(default())["applications"], serve_config(service(SCALES))["applications"]
    assert "autoscaling_policy" not in fixed
    assert scaled["autoscaling_policy"] == {"policy_function": "paceline.serving.autoscaling:Autoscaler"}


def test_further_settings_are_passed_on() -> None:
    settings = parse_settings(args(service({"config.target.engine.max_num_seqs": 4, "config.limits.max_messages": 9})))
    assert (settings.target.engine.max_num_seqs, settings.limits.max_messages) == (4, 9)
    assert settings.target.engine.tensor_parallel_size == 1


def test_the_demo_model_has_its_draft() -> None:
    assert args(default())["draft"]["model"] == "smollm2-135m-draft"


def test_another_model_has_none_but_what_is_named() -> None:
    assert "model" not in args(service({"model": "Qwen/Qwen3-0.6B"}))["draft"]


def test_no_drafts() -> None:
    without = service({"draft.enabled": False})
    assert parse_settings(args(without)).draft_replicas.most == 0
    assert groups(without).keys() == {"target"}


def test_a_redis_password_is_no_argument() -> None:
    with_redis = service(REDIS)
    settings = parse_settings(args(with_redis)).sessions
    assert settings.store == "redis://redis:6379/0"
    for group in all_groups(with_redis):
        (variable,) = (each for each in container(group)["env"] if each["name"] == settings.password_environment)
        assert variable["valueFrom"] == {"secretKeyRef": {"name": "redis", "key": "password"}}


def test_api_keys_are_read_where_they_are_mounted() -> None:
    with_keys = service({"apiKeys.existingSecret": "keys", "apiKeys.key": "k.yaml"})
    settings = parse_settings(args(with_keys)).api_keys
    assert settings.file == "/etc/paceline/api-keys/k.yaml"
    assert all(
        volume(each, "/etc/paceline/api-keys")["secret"]["secretName"] == "keys" for each in all_groups(with_keys)
    )


# --- Placement


def test_replicas_go_to_pods_of_their_role() -> None:
    assert args(default())["target"]["resources"] == {"paceline_target": 1}
    assert groups(default())["target"]["resources"] == {"CPU": "3", "paceline_target": "1"}
    assert args(default())["draft"]["resources"] == {"paceline_draft": 1}
    assert groups(default())["draft"]["resources"] == {"CPU": "2", "paceline_draft": "1"}


def test_a_group_for_any_role_has_room_for_both() -> None:
    resources = groups(service({"groups.both.role": "any"}))["both"]["resources"]
    assert resources == {"CPU": "3", "paceline_target": "1", "paceline_draft": "1"}


def test_ranks_of_one_replica_are_spread_over_the_hosts_of_a_set() -> None:
    spread = {"target.tensorParallelSize": 4, "target.numCpus": 0.5, "groups.target.numOfHosts": 2}
    assert groups(service(spread))["target"]["resources"]["paceline_target"] == "2"


@pytest.mark.parametrize(("requested", "cpus"), [("3", "3"), (4, "4"), ("3.5", "3"), ("3500m", "3"), ("2999m", "2")])
def test_ray_finds_the_whole_cpus_that_are_requested(requested: str | int, cpus: str) -> None:
    values = {"groups.target.resources.requests.cpu": requested, "groups.target.resources.limits.cpu": "9"}
    assert groups(service(values))["target"]["resources"]["CPU"] == cpus


def test_the_head_keeps_replicas_away() -> None:
    assert head(default())["resources"] == {"CPU": "0"}


# --- Groups


def test_groups_are_of_fixed_size_without_autoscaling() -> None:
    group = groups(service({"groups.target.minReplicas": 2, "groups.target.maxReplicas": 5}))["target"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)


def test_groups_grow_with_autoscaling() -> None:
    group = groups(service(SCALES | {"groups.target.maxReplicas": 5}))["target"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 5)


def test_a_group_may_be_empty() -> None:
    assert groups(service(SCALES | {"groups.draft.minReplicas": 0}))["draft"]["minReplicas"] == 0


def test_a_group_says_only_what_differs() -> None:
    values = {"pods.nodeSelector.a": "1", "groupDefaults.nodeSelector.b": "2", "groups.target.nodeSelector.c": "3"}
    found = groups(service(values))
    assert pod(found["target"])["nodeSelector"] == {"a": "1", "b": "2", "c": "3"}
    assert pod(found["draft"])["nodeSelector"] == {"a": "1", "b": "2"}


def test_lists_of_a_group_are_put_behind_those_of_all_pods() -> None:
    values = {"pods.env": [{"name": "A", "value": "1"}], "groups.target.env": [{"name": "B", "value": "2"}]}
    found = groups(service(values))
    assert [each["name"] for each in container(found["target"])["env"]][-2:] == ["A", "B"]
    assert "B" not in environment(found["draft"])


def test_gpus_come_with_what_their_nodes_tolerate() -> None:
    group = groups(service({"groups.target.accelerator": {"count": 2, "product": "NVIDIA-L4"}}))["target"]
    resources = container(group)["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == 2
    assert pod(group)["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert pod(group)["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def test_spot_nodes() -> None:
    group = pod(groups(service({"groups.draft.spot": "gke"}))["draft"])
    assert group["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert [(each["key"], each["value"]) for each in group["tolerations"]] == [("cloud.google.com/gke-spot", "true")]


def test_sockets_of_its_own_need_limits_that_are_requests() -> None:
    group = groups(charts.rayservice(charts.preset("xeon")))["target"]
    assert container(group)["resources"]["limits"] == container(group)["resources"]["requests"]
    assert group["resources"]["paceline_target"] == "2"


# --- Pods


def test_ray_serve_is_told_what_paceline_needs_of_it() -> None:
    assert all(environment(each).items() >= CLUSTER.items() for each in all_groups(default()))


def test_pods_meet_the_restricted_profile() -> None:
    for group in all_groups(default()):
        assert pod(group)["securityContext"]["runAsNonRoot"]
        assert pod(group)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container(group)["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container(group)["securityContext"]["allowPrivilegeEscalation"] is False


def test_a_root_filesystem_that_is_read_only_leaves_room_to_write() -> None:
    for group in all_groups(service({"pods.securityContext.readOnlyRootFilesystem": True})):
        assert volume(group, "/tmp")["emptyDir"] == volume(group, "/home/paceline")["emptyDir"] == {}


def test_shared_memory_has_a_size() -> None:
    for group in all_groups(service({"pods.sharedMemory": "3Gi"})):
        assert volume(group, "/dev/shm")["emptyDir"] == {"medium": "Memory", "sizeLimit": "3Gi"}


def test_models_are_kept_where_paceline_looks() -> None:
    cached = service({"modelCache.enabled": True, "modelCache.mountPath": "/m"})
    for group in all_groups(cached):
        assert volume(group, "/m")["persistentVolumeClaim"] == {"claimName": "demo-paceline-models"}
        assert environment(group)["PACELINE_CACHE"] == "/m/paceline"
        assert environment(group)["HF_HOME"] == "/m/huggingface"


def hook(group: charts.Object) -> list[str]:
    """The command that runs before the pod ends."""
    command: list[str] = container(group)["lifecycle"]["preStop"]["exec"]["command"]
    return command


def within(group: charts.Object) -> float:
    command = hook(group)
    return float(command[command.index("--within") + 1])


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"target.drainTimeoutSeconds": 100, "target.handoffTimeoutSeconds": 50},
        {"config.router_drain_timeout_s": 250.5},
        {"config.router_drain_timeout_s": 0},
    ],
)
def test_a_pod_has_the_time_its_replicas_take_to_start_elsewhere_and_leave(values: dict[str, Any]) -> None:
    found = service(values)
    least = longest_leaving_s(parse_settings(args(found))) + START_S
    assert all(within(group) >= least for group in groups(found).values())


@pytest.mark.parametrize("seconds", [0, 20, 45, 600])
def test_a_worker_hands_over_within_the_time_it_has(seconds: int) -> None:
    for group in groups(service({"pods.terminationGracePeriodSeconds": seconds})).values():
        assert 0 < within(group) <= pod(group)["terminationGracePeriodSeconds"] - 15


def test_the_hook_is_a_command_that_paceline_has() -> None:
    for group in groups(default()).values():
        program, *arguments = hook(group)
        assert program == "paceline"
        arguments[arguments.index("--log") + 1] = os.devnull
        done = CliRunner(env={"RAY_ADDRESS": ""}).invoke(app, arguments)
        assert (done.exit_code, "set RAY_ADDRESS" in done.output) == (0, True)


def test_the_head_has_no_hook() -> None:
    assert "lifecycle" not in container(head(default()))


def test_handing_over_can_be_switched_off() -> None:
    found = groups(service({"pods.handOver": False, "groups.draft.handOver": True}))
    assert "lifecycle" not in container(found["target"])
    assert hook(found["draft"])


def test_a_hook_of_ones_own_takes_its_place() -> None:
    own = {"preStop": {"sleep": {"seconds": 5}}}
    assert all(container(each)["lifecycle"] == own for each in all_groups(service({"pods.lifecycle": own})))


def test_another_hook_is_beside_it() -> None:
    start = {"exec": {"command": ["true"]}}
    (group, *_) = groups(service({"pods.lifecycle": {"postStart": start}})).values()
    assert container(group)["lifecycle"]["postStart"] == start
    assert hook(group)


def test_workers_are_ready_when_their_proxy_answers() -> None:
    for group in groups(default()).values():
        assert container(group)["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": "serve"}


def test_the_head_is_ready_when_ray_is_healthy() -> None:
    assert container(head(default()))["readinessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}


def test_a_start_may_take_ten_minutes() -> None:
    for group in all_groups(default()):
        probe = container(group)["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] == 600


def test_nodes_of_the_head_may_be_scaled_down() -> None:
    assert "cluster-autoscaler.kubernetes.io/safe-to-evict" not in json.dumps(default())


def test_the_service_has_both_ports() -> None:
    ports = {each["name"]: each["containerPort"] for each in container(head(default()))["ports"]}
    assert ports["serve"] == 8000
    assert ports["serve-grpc"] == 9000


def test_the_hub_token_comes_from_its_secret() -> None:
    for group in all_groups(service({"hub.existingSecret": "hf", "hub.tokenKey": "t"})):
        (token,) = (each for each in container(group)["env"] if each["name"] == "HF_TOKEN")
        assert token["valueFrom"] == {"secretKeyRef": {"name": "hf", "key": "t"}}


# --- The cluster


def test_requests_stay_off_the_head() -> None:
    assert default()["spec"]["excludeHeadPodFromServeSvc"] is True


def test_an_old_cluster_stays_as_long_as_a_request_may_take() -> None:
    settings = parse_settings(args(default()))
    assert default()["spec"]["rayClusterDeletionDelaySeconds"] >= settings.request_timeout_s


def test_autoscaler_v2() -> None:
    cluster = service(SCALES)["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert {pod(each)["restartPolicy"] for each in all_groups(service(SCALES))} == {"Never"}


def test_the_autoscaler_meets_the_restricted_profile() -> None:
    options = service(SCALES)["spec"]["rayClusterConfig"]["autoscalerOptions"]
    assert options["securityContext"] == container(head(default()))["securityContext"]


def test_workers_do_not_get_the_autoscalers_rights() -> None:
    scaled = service(SCALES)
    assert "serviceAccountName" not in pod(head(scaled))
    assert {pod(each)["serviceAccountName"] for each in groups(scaled).values()} == {"demo-paceline"}
    assert {pod(each)["automountServiceAccountToken"] for each in groups(scaled).values()} == {False}


def test_a_head_survives_in_redis() -> None:
    options = service(REDIS | {"gcsFaultTolerance.enabled": True})["spec"]["rayClusterConfig"][
        "gcsFaultToleranceOptions"
    ]
    assert options["redisAddress"] == "redis:6379"
    assert options["redisPassword"] == {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}


def test_ray_asks_for_a_token() -> None:
    cluster = service({"ray.auth.secretName": "mine"})["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "mine"}


def test_values_of_presets_are_values_of_the_chart() -> None:
    assert {key for name in charts.PRESETS for key in charts.preset(name)} - charts.defaults().keys() == set()


def test_the_chart_has_the_packages_version() -> None:
    chart = yaml.safe_load((charts.CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
