"""A Ray cluster of several raylets on one machine: a head and workers, each with resources of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ray._private.services import get_node_ip_address

from tests.serve.conftest import free_port
from tests.serve.fake_nodes import START_TIMEOUT_S, STOP_TIMEOUT_S, wait_for

RAY = str(Path(sys.executable).with_name("ray"))
JOINED = "will now block"


@dataclass
class SeveralNodes:
    """Its `address`. Nodes have the resources they are given, CPU among them."""

    folder: Path
    environment: Mapping[str, str]
    running: ExitStack
    address: str = ""
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def head(self, resources: Mapping[str, float]) -> None:
        port, log = free_port(), self.folder / "head.log"
        self.address = f"{get_node_ip_address()}:{port}"  # a driver finds it by no other
        wait_for(self.address, self._start(log, resources, "--head", f"--port={port}"), log)

    def join(self, resources: Mapping[str, float]) -> None:
        """Another worker; returns when it has joined."""
        name = worker_name(len(self.workers))
        log = self.folder / f"{name}.log"
        process = self._start(log, resources, f"--address={self.address}", instance=name)
        self.workers.append(process)
        deadline = time.monotonic() + START_TIMEOUT_S
        while JOINED not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.25)

    def _start(
        self, log: Path, resources: Mapping[str, float], *options: str, instance: str = ""
    ) -> subprocess.Popen[bytes]:
        custom = ",".join(f'"{name}":{amount}' for name, amount in resources.items() if name != "CPU")
        command = [RAY, "start", "--block", *options, f"--num-cpus={resources['CPU']:g}", f"--resources={{{custom}}}"]
        command += ["--object-store-memory=80000000", "--disable-usage-stats"]
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        command += ["--include-dashboard=false"] if "--head" in options else []
        variables = {**os.environ, **self.environment, "RAY_raylet_start_wait_time_s": f"{START_TIMEOUT_S:g}"}
        variables |= {"RAY_CLOUD_INSTANCE_ID": instance} if instance else {}
        file = self.running.enter_context(log.open("w"))
        process = subprocess.Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT)
        self.running.callback(_end, process)
        return process


def worker_name(number: int) -> str:
    """Under which a worker joins, as a pod of KubeRay does under the pod's."""
    return f"worker-{number}"


@contextmanager
def ray_of(folder: Path, head: Mapping[str, float], environment: Mapping[str, str]) -> Iterator[SeveralNodes]:
    """A cluster of a head so far."""
    with ExitStack() as running:
        cluster = SeveralNodes(folder, environment, running)
        cluster.head(head)
        yield cluster


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # `ray start --block` then ends what it has started
    process.wait(STOP_TIMEOUT_S)
