"""A Ray cluster on one machine whose autoscaler starts and stops nodes: Ray's fake node provider, real raylets.

`ray.cluster_utils.AutoscalingCluster` does the same, but needs a file that is not in Ray's wheel and runs `ray stop`,
which stops every Ray of the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray._private.services import get_node_ip_address
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from tests.serve.conftest import free_port

HEAD_ID = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"  # the provider calls it so
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 60.0


@contextmanager
def autoscaling_ray(
    folder: Path,
    *,
    head: Mapping[str, int],
    worker: Mapping[str, int],
    max_workers: int,
    idle_s: float,
    environment: Mapping[str, str],
) -> Iterator[str]:
    """The cluster's address. Nodes with the resources `worker` come when they are asked for, up to `max_workers`, and
    go after `idle_s` of doing nothing."""
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"  # a driver finds it by no other
    config = folder / "autoscaling.json"
    config.write_text(json.dumps(_config(address, head, worker, max_workers, idle_s)))
    variables = {
        **os.environ,
        **environment,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    command += [f"--autoscaling-config={config}", f"--num-cpus={head['CPU']}"]
    command += ["--object-store-memory=80000000", "--include-dashboard=false", "--disable-usage-stats"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(address, process, folder / "head.log")
        yield address
    finally:
        process.terminate()  # `ray start --block` then ends what it has started
        process.wait(STOP_TIMEOUT_S)


def nodes(address: str) -> int:
    """Alive, beside the head. Needs no Ray in this process."""
    found = GcsClient(address=address).get_all_node_info().values()
    return sum(node.state == GcsNodeInfo.ALIVE for node in found) - 1


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _listens(address):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.25)


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False


def _config(
    address: str, head: Mapping[str, int], worker: Mapping[str, int], max_workers: int, idle_s: float
) -> dict[str, Any]:
    nothing: dict[str, Any] = {
        name: []
        for name in (
            "cluster_synced_files",
            "initialization_commands",
            "setup_commands",
            "head_setup_commands",
            "worker_setup_commands",
            "head_start_ray_commands",
            "worker_start_ray_commands",
        )
    }
    empty: dict[str, Any] = {name: {} for name in ("head_node", "worker_nodes", "auth", "file_mounts", "docker")}
    return {
        "cluster_name": "fake",
        "max_workers": max_workers,
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": address,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
        },
        "available_node_types": {
            HEAD_TYPE: {"resources": dict(head), "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {**worker, "object_store_memory": 80_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": max_workers,
            },
        },
        "head_node_type": HEAD_TYPE,
        **nothing,
        **empty,
    }
