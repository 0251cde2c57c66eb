"""Up, status and down over an `ssh` that runs each command here, in a home of the host's own with tools of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.cli.app import main
from paceline.errors import Unavailable
from paceline.launcher import Cluster, load_cluster_file

HEAD, WORKER = "10.0.0.1", "10.0.0.2"
RAYLET = " 97 /venv/raylet/raylet --x\n"
SSH = """#!/bin/sh
for last; do :; done
for word; do case $word in me@*) host=${word#me@};; esac; done
export HOME=HOSTS/$host
test -d "$HOME" || { echo "connect to host $host port 22: No route to host" >&2; exit 255; }
exec sh -c "$last"
"""
# A host's tools: what runs is a file, which `ray` writes and empties.
BASHRC = """
pkill() { :; }
sleep() { :; }
ps() { cat ~/ps; }
python3() { cat ~/../head; }
ray() { case $1 in stop) : > ~/ps;; start) echo ' 97 /venv/raylet/raylet --x' > ~/ps; cp ~/../both ~/../head;; esac; }
echo a greeting
"""


def seen(*addresses: str) -> str:
    nodes = [{"node_ip": each, "state": "ALIVE", "resources_total": {"CPU": 2.0}} for each in addresses]
    return "paceline-json " + json.dumps({"nodes": {"data": {"result": {"result": nodes}}}, "serve": {}}) + "\n"


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A head that runs, and a worker that does not."""
    folder = tmp_path / "hosts"
    for host, processes in ((HEAD, RAYLET), (WORKER, "")):
        (folder / host).mkdir(parents=True)
        (folder / host / ".bashrc").write_text(BASHRC)
        (folder / host / "ps").write_text(processes)
    (folder / "head").write_text(seen(HEAD))
    (folder / "both").write_text(seen(HEAD, WORKER))
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(SSH.replace("HOSTS", str(folder)))
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        f"provider: {{type: local, head_ip: {HEAD}, worker_ips: [{WORKER}]}}\nauth: {{ssh_user: me}}\n"
        "worker_start_ray_commands: [ray stop, 'ray start --address=$RAY_HEAD_IP:6379']\n"
    )
    return path


def lose(hosts: Path, host: str) -> None:
    (hosts / host).rename(hosts / "lost")


def test_a_host_that_has_not_joined_is_told_from_one_that_has(hosts: Path, file: Path) -> None:
    states = Cluster(load_cluster_file(file)).status()
    assert [(state.host, state.ray_runs, state.joined) for state in states] == [
        (HEAD, True, True),
        (WORKER, False, False),
    ]


def test_a_host_that_is_not_reached_says_why(hosts: Path, file: Path) -> None:
    lose(hosts, WORKER)
    state = Cluster(load_cluster_file(file)).status()[1]
    assert state.problem == f"not reached: connect to host {WORKER} port 22: No route to host"


def test_status_fails_while_a_host_is_missing(hosts: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["cluster", "status", str(file), "--json"])
    assert ended.value.code == 1
    assert [each["joined"] for each in json.loads(capsys.readouterr().out)] == [True, False]


def test_up_joins_what_is_missing_to_a_head_that_runs(hosts: Path, file: Path) -> None:
    states = Cluster(load_cluster_file(file)).up(timeout_s=20)
    assert [state.joined for state in states] == [True, True]


def test_up_leaves_a_head_that_runs_alone(hosts: Path, file: Path) -> None:
    (hosts / HEAD / ".bashrc").write_text(BASHRC + "ray() { echo touched > ~/touched; }\n")
    Cluster(load_cluster_file(file)).up(timeout_s=20)
    assert not (hosts / HEAD / "touched").exists()


def test_up_names_a_command_that_fails_and_what_it_said(hosts: Path, file: Path) -> None:
    (hosts / WORKER / ".bashrc").write_text(BASHRC + "ray() { echo no room left; return 3; }\n")
    said: list[str] = []
    with pytest.raises(Unavailable, match=f"{WORKER} was not set up: `ray stop` failed"):
        Cluster(load_cluster_file(file), said.append).up(timeout_s=20)
    assert said[-1].endswith("no room left")


def test_up_names_the_host_that_it_cannot_reach(hosts: Path, file: Path) -> None:
    lose(hosts, WORKER)
    said: list[str] = []
    with pytest.raises(Unavailable, match=f"1 of 2 hosts have not joined: {WORKER};"):
        Cluster(load_cluster_file(file), said.append).up(timeout_s=0)
    assert f"{WORKER} has not joined:\n  not reached: connect to host {WORKER} port 22: No route to host" in said


def test_up_without_its_head_says_so_and_starts_nothing(hosts: Path, file: Path) -> None:
    lose(hosts, HEAD)
    with pytest.raises(Unavailable, match=f"{HEAD}: not reached"):
        Cluster(load_cluster_file(file)).up(timeout_s=20)


def test_down_stops_workers_whose_head_is_gone(hosts: Path, file: Path) -> None:
    (hosts / HEAD / "ps").write_text("")
    (hosts / WORKER / "ps").write_text(RAYLET)
    assert Cluster(load_cluster_file(file)).down() == {HEAD: 0, WORKER: 1}
    assert (hosts / WORKER / "ps").read_text() == ""


def test_down_names_what_is_left(hosts: Path, file: Path) -> None:
    (hosts / HEAD / "ps").write_text("")
    (hosts / WORKER / "ps").write_text(RAYLET)
    (hosts / WORKER / ".bashrc").write_text(BASHRC + "ray() { :; }\n")
    with pytest.raises(Unavailable, match=f"not known to be stopped: {WORKER}: still runs 97 /venv/raylet"):
        Cluster(load_cluster_file(file)).down()


def test_down_fails_for_a_host_of_which_it_knows_nothing(hosts: Path, file: Path) -> None:
    (hosts / HEAD / "ps").write_text("")
    lose(hosts, WORKER)
    with pytest.raises(Unavailable, match=f"not known to be stopped: {WORKER}: not reached"):
        Cluster(load_cluster_file(file)).down()
