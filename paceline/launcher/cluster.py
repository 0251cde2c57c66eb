"""Up, status and down of a cluster whose hosts are one's own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from paceline.config import launcher_environment
from paceline.errors import Unavailable
from paceline.launcher.file import ClusterFile
from paceline.launcher.ssh import Answer, Ssh
from paceline.launcher.state import (
    HEAD,
    PROCESSES,
    HeadView,
    HostState,
    head_view,
    last_command,
    ray_processes,
    update_failed,
)

LOOK_TIMEOUT_S = 25.0
STOP_TIMEOUT_S = 90.0
DOWN_TIMEOUT_S = 180.0
POLL_S = 2.0
LOG_LINES = 12

# `ray stop` ends every Ray of this user on the host, and leaves Serve's HAProxy behind. The brackets keep pkill from
# finding the shell that runs it.
STOP = "ray stop; pkill -u \"$(id -u)\" -f '[r]ay_haproxy/bin/haproxy'; sleep 1; " + PROCESSES
LOGS = "test -d /tmp/ray/session_latest/logs && tail -qn 3 /tmp/ray/session_latest/logs/raylet.{err,out}"
SETUP_LOG = "tail -n 2000 /tmp/ray/session_latest/logs/monitor.out"

Report = Callable[[str], None]


class Cluster:
    """Of one launcher file. `report` hears short lines about the progress."""

    def __init__(self, file: ClusterFile, report: Report = lambda _: None) -> None:
        self._file = file
        self._report = report
        self._ssh = Ssh(file.auth)

    def up(self, timeout_s: float) -> list[HostState]:
        """Start what does not run, and return when every host has joined; what runs is not touched.

        Reports why, for each host that did not join, and raises Unavailable.
        """
        deadline = time.monotonic() + timeout_s
        self._report("looking at the hosts")
        before = self.status()
        if before[0].problem is not None:
            raise Unavailable(f"{before[0].host}: {before[0].problem}")
        if before[0].joined:
            self._join([state.host for state in before if not state.joined and state.problem is None], deadline)
        else:
            self._report("ray up")
            self._ray(["up", "--yes", "--no-config-cache", str(self._file.path)], timeout_s)
        return self._wait(deadline)

    def _wait(self, deadline: float) -> list[HostState]:
        while True:
            view = self._view()
            missing = [host for host in self._file.hosts if host not in view.nodes]
            if not missing:
                return self.status()
            if time.monotonic() > deadline or self._given_up(missing):
                self._explain(missing)
                why = f": the head does not run: {view.problem}" if view.problem is not None else ""
                raise Unavailable(
                    f"{len(missing)} of {len(self._file.hosts)} hosts have not joined: {', '.join(missing)}{why}; "
                    "the same command again tries those anew"
                )
            joined = len(self._file.hosts) - len(missing)
            self._report(f"{joined} of {len(self._file.hosts)} hosts have joined; waiting for {', '.join(missing)}")
            time.sleep(POLL_S)

    def _given_up(self, hosts: Sequence[str]) -> bool:
        """Whether Ray's updater failed on all of them: it never tries a host of one's own twice."""
        log = self._setup_log()
        return all(update_failed(log, host) for host in hosts)

    def _join(self, hosts: Sequence[str], deadline: float) -> None:
        """Make them workers of the head that runs, as Ray's updater would: it has given them up, or lost them.

        A host on which the updater is at work is left to it.
        """
        on_head = self._ssh.run(self._file.head_outside, PROCESSES, LOOK_TIMEOUT_S).output
        for host in hosts:
            if f"@{host} " in on_head:
                continue
            try:
                self._set_up(host, deadline)
            except Unavailable as error:
                # Ray gives a node 30 s to start, which a busy host may overrun. The commands may be given again.
                self._report(f"{error.message}; once more")
                self._set_up(host, deadline)

    def _set_up(self, host: str, deadline: float) -> None:
        for command in self._file.join_commands:
            self._report(f"{host}: {' '.join(command.split())[:100]}")
            script = f"export RAY_HEAD_IP={self._file.head}; {command}"
            answer = self._ssh.run(host, script, max(1.0, deadline - time.monotonic()))
            if answer.problem is not None or answer.code:
                end = answer.output.strip().splitlines()[-LOG_LINES:]
                self._report("\n  ".join((f"{host}: that failed:", answer.problem or "", *end)))
                raise Unavailable(f"{host} was not set up: `{command.split(chr(10))[0][:80]}` failed")

    def status(self) -> list[HostState]:
        """Of every host of the file, the head first."""
        view = self._view()
        answers = self._on_all(self._file.hosts, PROCESSES, LOOK_TIMEOUT_S)
        return [
            HostState(
                host=host,
                head=host == self._file.head,
                problem=answer.problem,
                processes=ray_processes(answer.output),
                joined=host in view.nodes,
                resources=view.nodes.get(host, {}),
                replicas=view.replicas.get(host, ()),
            )
            for host, answer in zip(self._file.hosts, answers, strict=True)
        ]

    def down(self) -> dict[str, int]:
        """Stop it everywhere: how many processes each host had. Raises Unavailable if some host is not known to be rid.

        The head goes first, since its autoscaler would start what is stopped elsewhere.
        """
        self._report("looking at the hosts")
        before = {state.host: state for state in self.status()}
        if before[self._file.head].processes:
            self._report("ray down")
            self._ray(["down", "--yes", str(self._file.path)], DOWN_TIMEOUT_S)
        running = [host for host, state in before.items() if state.problem is None]
        self._report(f"stopping Ray on {', '.join(running)}")
        answers = dict(zip(running, self._on_all(running, STOP, STOP_TIMEOUT_S), strict=True))
        problems = [f"{host}: {state.problem}" for host, state in before.items() if state.problem is not None]
        for host, answer in answers.items():
            left = ray_processes(answer.output)
            if answer.problem is not None or left:
                problems.append(f"{host}: {answer.problem or 'still runs ' + '; '.join(each[:80] for each in left)}")
        if problems:
            raise Unavailable("not known to be stopped: " + "; ".join(problems))
        return {host: len(state.processes) for host, state in before.items()}

    def _view(self) -> HeadView:
        answer = self._ssh.run(self._file.head_outside, HEAD, LOOK_TIMEOUT_S)
        return HeadView(problem=answer.problem) if answer.problem is not None else head_view(answer.output)

    def _setup_log(self) -> str:
        return self._ssh.run(self._file.head_outside, SETUP_LOG, LOOK_TIMEOUT_S).output

    def _on_all(self, hosts: Sequence[str], script: str, timeout_s: float) -> list[Answer]:
        if not hosts:
            return []
        with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
            return list(pool.map(lambda host: self._ssh.run(self._file.reached_at(host), script, timeout_s), hosts))

    def _explain(self, missing: Sequence[str]) -> None:
        """Report why each host has not joined: not reached, or the end of the log that says most."""
        setup = self._setup_log()
        for host, answer in zip(missing, self._on_all(missing, LOGS, LOOK_TIMEOUT_S), strict=True):
            said = [*last_command(setup, host), *answer.output.strip().splitlines()]
            lines = [answer.problem] if answer.problem is not None else said[:LOG_LINES]
            self._report("\n  ".join((f"{host} has not joined:", *(lines or ["no log says why"]))))

    def _ray(self, words: Sequence[str], timeout_s: float) -> None:
        """Ray's own launcher, its output passed on as it comes. Raises Unavailable if it fails or takes too long."""
        command = [sys.executable, "-m", "ray.scripts.scripts", *words]
        try:
            done = subprocess.run(command, env=launcher_environment(), timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"`ray {words[0]}` was not done after {timeout_s:g} s") from None
        if done.returncode:
            raise Unavailable(f"`ray {words[0]}` failed; its last lines are above")
