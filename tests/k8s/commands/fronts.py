"""Real Paceline HTTP servers behind a Service of the API server: reached through its proxy, as commands reach them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import uvicorn
from fastapi import FastAPI

from paceline.k8s.api import Api
from paceline.k8s.kinds import SERVICES, Resource

ENDPOINTS = Resource("", "v1", "endpoints", "Endpoints")
PORT = 8000


def own_address() -> str:
    """Of this machine, and none that only it can reach: the API server refuses those. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


@contextmanager
def running(app: FastAPI) -> Iterator[tuple[str, int]]:
    """Its address and port."""
    host = own_address()
    with socket.create_server((host, 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield host, listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def point(api: Api, service: str, address: tuple[str, int]) -> None:
    """Have a Service lead there, as KubeRay has it lead to the pods that serve."""
    host, port = address
    api.apply(
        SERVICES,
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": service},
            "spec": {"ports": [{"port": PORT, "protocol": "TCP"}]},
        },
    )
    pod = {"kind": "Pod", "name": "head", "namespace": api.namespace}  # a proxy goes to no address but a pod's
    subsets = [{"addresses": [{"ip": host, "targetRef": pod}], "ports": [{"port": port, "protocol": "TCP"}]}]
    api.apply(
        ENDPOINTS,
        {"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": service}, "subsets": subsets},
        force=True,
    )
