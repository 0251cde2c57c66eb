"""A Ray cluster of several raylets on one machine: a head and workers, each with resources of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ray._private.services import get_node_ip_address

from tests.serve.conftest import free_port
from tests.serve.fake_nodes import START_TIMEOUT_S, STOP_TIMEOUT_S, wait_for

RAY = str(Path(sys.executable).with_name("ray"))


@contextmanager
def ray_of(
    folder: Path, head: Mapping[str, float], workers: Sequence[Mapping[str, float]], environment: Mapping[str, str]
) -> Iterator[str]:
    """The cluster's address. `head` and `workers` are the resources of a node each, CPU among them."""
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"  # a driver finds it by no other
    with ExitStack() as running:
        first = _node(running, folder / "head.log", head, environment, "--head", f"--port={port}")
        wait_for(address, first, folder / "head.log")
        for number, resources in enumerate(workers):  # one after the other: they share the machine's cores
            log = folder / f"worker-{number}.log"
            _wait_joined(_node(running, log, resources, environment, f"--address={address}"), log)
        yield address


def _node(
    running: ExitStack, log: Path, resources: Mapping[str, float], environment: Mapping[str, str], *options: str
) -> subprocess.Popen[bytes]:
    cpus = resources["CPU"]
    custom = ",".join(f'"{name}":{amount}' for name, amount in resources.items() if name != "CPU")
    command = [RAY, "start", "--block", *options, f"--num-cpus={cpus:g}", f"--resources={{{custom}}}"]
    command += ["--object-store-memory=80000000", "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0"]
    command += ["--include-dashboard=false"] if "--head" in options else []
    file = running.enter_context(log.open("w"))
    variables = {**os.environ, **environment, "RAY_raylet_start_wait_time_s": f"{START_TIMEOUT_S:g}"}
    process = subprocess.Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT)
    running.callback(_end, process)
    return process


def _wait_joined(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while "will now block" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.25)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # `ray start --block` then ends what it has started
    process.wait(STOP_TIMEOUT_S)
