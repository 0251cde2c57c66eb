"""What of a cluster launcher file concerns us: the hosts, and how to reach them. The rest is Ray's to check."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from paceline.errors import ConfigError

# Neither may begin with a dash: both become words of an ssh command.
ADDRESS = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:_-]*")
USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
LOCAL = "local"
JOIN = ("initialization_commands", "setup_commands", "worker_setup_commands", "worker_start_ray_commands")


@dataclass(frozen=True, slots=True)
class Auth:
    """How ssh gets in."""

    user: str
    private_key: Path | None = None
    proxy_command: str | None = None


@dataclass(frozen=True, slots=True)
class ClusterFile:
    """`head` and `workers` are what Ray calls the hosts; `head_outside` is where this machine finds the head."""

    path: Path
    name: str
    head: str
    head_outside: str
    workers: tuple[str, ...]
    auth: Auth
    join_commands: tuple[str, ...] = ()
    """What makes a host a worker, in Ray's order."""

    @property
    def hosts(self) -> tuple[str, ...]:
        return self.head, *self.workers

    def reached_at(self, host: str) -> str:
        """The address that this machine uses for a host."""
        return self.head_outside if host == self.head else host


def load_cluster_file(path: Path) -> ClusterFile:
    """Raises ConfigError naming the file and the key."""
    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", param="file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}", param="file") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a cluster launcher file: it must have cluster_name, provider, auth")
    try:
        return _parse(path, config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", param=error.param) from None


def _parse(path: Path, config: Mapping[str, Any]) -> ClusterFile:
    provider = _mapping(config, "provider")
    if provider.get("type") != LOCAL:
        raise ConfigError(
            f"provider.type: {provider.get('type')!r} needs nothing of us: use `ray up`, `ray status` and `ray down`; "
            f"these commands are for hosts of your own ({LOCAL})",
            param="provider.type",
        )
    if "coordinator_address" in provider:
        raise ConfigError(
            "provider.coordinator_address: which hosts belong to the cluster is known to the coordinator alone; list "
            "them as head_ip and worker_ips",
            param="provider.coordinator_address",
        )
    head = _address(provider.get("head_ip"), "provider.head_ip")
    workers = provider.get("worker_ips")
    if not isinstance(workers, list):
        raise ConfigError("provider.worker_ips: must be a list of addresses, [] for none", param="provider.worker_ips")
    found = tuple(_address(worker, f"provider.worker_ips[{index}]") for index, worker in enumerate(workers))
    twice = [host for host in found if host == head or found.count(host) > 1]
    if twice:
        raise ConfigError(f"provider.worker_ips: {twice[0]} is there twice; the head is no worker", param="worker_ips")
    outside = provider.get("external_head_ip")
    return ClusterFile(
        path=path,
        name=str(config.get("cluster_name", "default")),
        head=head,
        head_outside=_address(outside, "provider.external_head_ip") if outside else head,
        workers=found,
        auth=_auth(_mapping(config, "auth")),
        join_commands=tuple(str(command) for key in JOIN for command in config.get(key) or ()),
    )


def _auth(auth: Mapping[str, Any]) -> Auth:
    user = auth.get("ssh_user")
    if not isinstance(user, str) or not USER.fullmatch(user):
        raise ConfigError("auth.ssh_user: must be the name of a user of every host", param="auth.ssh_user")
    key = Path(str(auth["ssh_private_key"])).expanduser() if auth.get("ssh_private_key") else None
    if key is not None and not key.is_file():
        raise ConfigError(
            f"auth.ssh_private_key: {key}: no such file; make one with ssh-keygen, and put its .pub into "
            f"~{user}/.ssh/authorized_keys of every host",
            param="auth.ssh_private_key",
        )
    proxy = auth.get("ssh_proxy_command")
    return Auth(user, key, str(proxy) if proxy else None)


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: must be a mapping, as in cluster/onprem.yaml", param=key)
    return value


def _address(value: object, key: str) -> str:
    if not isinstance(value, str) or not ADDRESS.fullmatch(value):
        raise ConfigError(f"{key}: must be an address or a name of a host, got {value!r}", param=key)
    return value
