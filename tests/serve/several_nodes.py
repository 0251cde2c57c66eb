"""A Ray cluster of several raylets on one machine: a head and workers, each with resources of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ray._private.services import get_node_ip_address

from tests.serve.conftest import free_port
from tests.serve.fake_nodes import STOP_TIMEOUT_S, wait_for

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
        for number, resources in enumerate(workers):
            _node(running, folder / f"worker-{number}.log", resources, environment, f"--address={address}")
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
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT)
    running.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # `ray start --block` then ends what it has started
    process.wait(STOP_TIMEOUT_S)
