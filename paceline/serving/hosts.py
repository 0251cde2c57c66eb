"""Where a replica runs, and under which address it is reached."""

from __future__ import annotations

import socket

import ray


def own_host(configured: str) -> str:
    """The host to listen on: as configured, or with `auto` the address by which Ray knows this node."""
    return ray.util.get_node_ip_address() if configured == "auto" else configured


def whereabouts() -> dict[str, str]:
    """This process's node, for /status: by Ray's id, by address, and by name, which in Kubernetes is the pod's."""
    return {
        "node_id": ray.get_runtime_context().get_node_id(),
        "node_ip": ray.util.get_node_ip_address(),
        "host": socket.gethostname(),
    }
