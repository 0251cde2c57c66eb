"""The model cache: its claim, and the job that fills it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.k8s.charts import container, find, groups, rayservice, refusal, render

CACHE: dict[str, Any] = {"modelCache": {"enabled": True}}


def _job(values: dict[str, Any]) -> dict[str, Any]:
    return find(render(CACHE | values), "Job")


def _commands(job: dict[str, Any]) -> list[str]:
    return [" ".join(each["command"]) for each in job["spec"]["template"]["spec"]["containers"]]


def _kinds(values: dict[str, Any]) -> set[str]:
    return {each["kind"] for each in render(values)}


def test_without_a_cache_there_is_neither_claim_nor_job() -> None:
    assert not {"PersistentVolumeClaim", "Job"} & _kinds({})


def test_the_job_pulls_model_and_draft() -> None:
    job = _job({"model": "org/large", "draft": {"model": "org/small"}})
    assert _commands(job) == ["paceline models pull org/large", "paceline models pull org/small"]


@pytest.mark.parametrize(
    ("values", "pulled"),
    [
        ({"model": "org/m", "draft": {"enabled": False, "model": "org/d"}}, ["org/m"]),
        ({"model": "org/m", "draft": {"model": "org/m"}}, ["org/m"]),
        ({"model": "org/m", "draft": {"model": "/models/mine"}}, ["org/m"]),
        ({"model": "smollm2-135m"}, ["smollm2-135m"]),  # its draft comes with the package
    ],
)
def test_only_what_is_to_be_fetched_is_pulled_and_once(values: dict[str, Any], pulled: list[str]) -> None:
    assert _commands(_job(values)) == [f"paceline models pull {each}" for each in pulled]


@pytest.mark.parametrize("model", ["/models/mine", "./mine", "~/mine", "/models/Q8_0.gguf"])
def test_files_need_no_job(model: str) -> None:
    assert "Job" not in _kinds(CACHE | {"model": model, "draft": {"enabled": False}})


def test_an_upgrade_that_changes_nothing_keeps_the_job() -> None:
    assert _job({}) == _job({"routers": 2, "servedModelName": "other"})


@pytest.mark.parametrize(
    "change",
    [
        {"model": "org/other"},
        {"image": {"tag": "next"}},
        {"hub": {"existingSecret": "hub"}},
        {"modelCache": {"enabled": True, "job": {"resources": {"limits": {"memory": "8Gi"}}}}},
        {"modelCache": {"enabled": True, "existingClaim": "theirs"}},
    ],
    ids=["model", "image", "token", "resources", "claim"],
)
def test_a_job_whose_pod_changes_is_another_job(change: dict[str, Any]) -> None:
    """The API server refuses another pod in a job that exists."""
    before, after = _job({}), _job(change)
    assert before["metadata"]["name"] != after["metadata"]["name"]
    assert before["spec"]["template"] != after["spec"]["template"]


def test_the_longest_name_fits_a_label() -> None:
    """Kubernetes puts a job's name into a label of its pods."""
    assert len(_job({"fullnameOverride": "n" * 60})["metadata"]["name"]) <= 63


def test_job_and_replicas_share_claim_folder_and_variables() -> None:
    objects = render(CACHE | {"hub": {"existingSecret": "hub"}})
    pod = find(objects, "Job")["spec"]["template"]["spec"]
    (ours,) = pod["containers"]
    worker = groups(find(objects, "RayService"))["target"]
    theirs = container(worker)
    assert all(each in theirs["env"] for each in ours["env"])
    assert {"HF_TOKEN", "PACELINE_CACHE", "HF_HOME"} == {each["name"] for each in ours["env"]}
    assert all(
        {"name": "models", "persistentVolumeClaim": {"claimName": "demo-paceline-models"}} in spec["volumes"]
        for spec in (pod, worker["template"]["spec"])
    )
    assert all({"name": "models", "mountPath": "/models"} in each["volumeMounts"] for each in (ours, theirs))


def test_the_job_meets_the_restricted_profile() -> None:
    pod = _job({})["spec"]["template"]["spec"]
    (only,) = pod["containers"]
    assert (
        pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    )
    assert only["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert only["securityContext"]["allowPrivilegeEscalation"] is False
    assert pod["automountServiceAccountToken"] is False


def test_a_claim_is_kept_unless_it_is_said_otherwise() -> None:
    kept = {"helm.sh/resource-policy": "keep"}
    claims = [
        find(render({"modelCache": {"enabled": True, "keep": keep}}), "PersistentVolumeClaim") for keep in (True, False)
    ]
    assert [each["metadata"].get("annotations") for each in claims] == [kept, None]


def test_a_claim_that_exists_is_used_and_not_made() -> None:
    values = {"modelCache": {"enabled": True, "existingClaim": "theirs"}}
    assert "PersistentVolumeClaim" not in _kinds(values)
    volumes = groups(rayservice(values))["target"]["template"]["spec"]["volumes"]
    assert {"name": "models", "persistentVolumeClaim": {"claimName": "theirs"}} in volumes


def test_the_claim_is_what_the_values_say() -> None:
    cache = {"enabled": True, "size": "1Ti", "storageClass": "nfs", "accessMode": "ReadWriteOnce"}
    assert find(render({"modelCache": cache}), "PersistentVolumeClaim")["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "nfs",
        "resources": {"requests": {"storage": "1Ti"}},
    }


@pytest.mark.parametrize(
    ("field", "value"), [("size", "big"), ("accessMode", "RWX"), ("mountPath", "models"), ("enabled", "yes")]
)
def test_a_wrong_value_is_refused_by_name(field: str, value: str) -> None:
    assert f"modelCache/{field}" in refusal({"modelCache": {field: value}}).replace(".", "/")
