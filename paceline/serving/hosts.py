"""Under which address a replica is reached."""

from __future__ import annotations

import ray


def own_host(configured: str) -> str:
    """The host to listen on: as configured, or with `auto` the address by which Ray knows this node."""
    return ray.util.get_node_ip_address() if configured == "auto" else configured
