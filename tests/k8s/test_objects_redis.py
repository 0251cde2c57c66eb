"""Redis: one that is there, or the one that the chart installs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paceline.ports import free_ports
from tests.k8s.charts import args, container, find, groups, head, rayservice, refusal, render
from tests.redis_server import PASSWORD, running

INSTALLED = {"enabled": True, "install": True, "existingSecret": "redis-password"}


def _redis(**values: Any) -> dict[str, Any]:
    return {"redis": values}


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = args(rayservice(values))["sessions"]
    return found


def _password(of: dict[str, Any], name: str) -> Any:
    return next((each["valueFrom"] for each in of["env"] if each["name"] == name), None)


def test_none_is_installed_unless_it_is_said() -> None:
    assert "StatefulSet" not in {each["kind"] for each in render(_redis(enabled=True, host="redis.example.org"))}


@pytest.mark.parametrize(
    ("values", "address"),
    [
        ({"host": "r"}, "redis://r:6379/0"),
        ({"host": "r", "port": 6380, "database": 3}, "redis://r:6380/3"),
        ({"host": "r", "tls": True, "username": "app"}, "rediss://app@r:6379/0"),
        ({"install": True, "existingSecret": "s"}, "redis://demo-redis:6379/0"),
    ],
)
def test_sessions_are_kept_at_its_address(values: dict[str, Any], address: str) -> None:
    assert _settings(_redis(enabled=True, **values))["store"] == address


def test_the_service_has_the_name_that_sessions_use() -> None:
    objects = render(_redis(**INSTALLED, port=7000))
    service = find(objects, "Service")
    (port,) = service["spec"]["ports"]
    assert (
        args(find(objects, "RayService"))["sessions"]["store"]
        == f"redis://{service['metadata']['name']}:{port['port']}/0"
    )


def test_the_service_selects_the_pod() -> None:
    objects = render(_redis(**INSTALLED))
    labels = find(objects, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert find(objects, "Service")["spec"]["selector"].items() <= labels.items()


def test_the_password_reaches_both_ends_from_the_secret_alone() -> None:
    objects = render(_redis(**INSTALLED, passwordKey="word"))
    secret = {"secretKeyRef": {"name": "redis-password", "key": "word"}}
    service = find(objects, "RayService")
    (server,) = find(objects, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    variable = args(service)["sessions"]["password_environment"]
    assert _password(server, "REDIS_PASSWORD") == _password(server, "REDISCLI_AUTH") == secret
    assert [_password(container(each), variable) for each in (head(service), *groups(service).values())] == [secret] * 3


def test_no_secret_is_made() -> None:
    """One that is drawn anew at each render would lock everybody out at the next upgrade."""
    assert "Secret" not in {each["kind"] for each in render(_redis(**INSTALLED))}
    assert render(_redis(**INSTALLED)) == render(_redis(**INSTALLED))


def test_without_a_secret_no_password_is_looked_for() -> None:
    assert "password_environment" not in _settings(_redis(enabled=True, host="r"))


def test_the_head_s_state_goes_to_the_same_redis() -> None:
    values = {**_redis(enabled=True, host="r", username="app", tls=True, existingSecret="s")}
    service = rayservice(values | {"gcsFaultTolerance": {"enabled": True}})
    assert service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"] == {
        "redisAddress": "rediss://r:6379",
        "redisUsername": {"value": "app"},
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "s", "key": "password"}}},
    }


def test_it_keeps_every_write_and_drops_nothing() -> None:
    (server,) = find(render(_redis(**INSTALLED)), "StatefulSet")["spec"]["template"]["spec"]["containers"]
    command = " ".join(server["command"])
    assert "--appendonly yes" in command and "--maxmemory-policy noeviction" in command and "--dir /data" in command


def test_its_command_keeps_what_was_written_over_a_crash(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    (server,) = find(render(_redis(**INSTALLED, port=port)), "StatefulSet")["spec"]["template"]["spec"]["containers"]
    told = {"/data": str(tmp_path), "$(REDIS_PASSWORD)": PASSWORD}
    command = [told.get(word, word) for word in server["command"]]
    with running(command, port, tmp_path) as client:
        client.set("k", "v")
    with running(command, port, tmp_path) as client:
        assert client.get("k") == b"v"
        assert client.config_get("requirepass", "maxmemory-policy") == {
            "requirepass": PASSWORD,
            "maxmemory-policy": "noeviction",
        }


def test_it_meets_the_restricted_profile() -> None:
    pod = find(render(_redis(**INSTALLED)), "StatefulSet")["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    assert (
        pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    )
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_its_volume_has_no_label_that_an_upgrade_changes() -> None:
    """A StatefulSet's volume template can never be changed."""
    (claim,) = find(render(_redis(**INSTALLED)), "StatefulSet")["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["labels"] == {"app.kubernetes.io/name": "redis", "app.kubernetes.io/instance": "demo"}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"enabled": True}, "redis.host"),
        ({"install": True}, "redis.existingSecret"),
        ({"install": True, "existingSecret": "s", "host": "r"}, "redis.install"),
        ({"install": True, "existingSecret": "s", "tls": True}, "redis.install"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    assert f"{named}: " in refusal(_redis(**values))


def test_a_typo_is_refused_by_name() -> None:
    assert "instal" in refusal(_redis(instal=True)) and "redis" in refusal(_redis(instal=True))
