"""`paceline leave`: hand over what runs on this node of a Ray cluster, before the node is taken away."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

EPILOG = """\b
Examples:
  paceline leave --within 120                     # in a pod of KubeRay, as the chart does when one ends
  paceline leave --address 10.0.0.1:6379 && ray stop
"""

LATE_S = 3.0
"""A last look may be under way at the deadline."""

Within = Annotated[
    float,
    typer.Option(
        "--within", metavar="SECONDS", min=1, help="Return then, whatever is left; replicas end in time for it."
    ),
]
Address = Annotated[
    str | None, typer.Option("--address", metavar="HOST:PORT", help="Of the cluster's head; default: RAY_ADDRESS.")
]
Log = Annotated[
    Path | None,
    typer.Option("--log", metavar="FILE", help="Write the lines there too, such as /proc/1/fd/1: a container's log."),
]


def leave(within: Within = 120.0, address: Address = None, log: Log = None) -> None:
    """Empty the node of a Ray cluster that this host is, or this pod.

    Nothing new is placed on the node. Replicas start elsewhere if there is room, those here end, and their sessions go
    to other replicas with their KV. Returns when nothing is left; a node that drains already is waited for. The head is
    left alone.

    Ends with 0 whatever becomes of it, since the node goes all the same; the lines say what was left.
    """
    say = Lines(log)
    # Ray's calls have timeouts, which they overrun when a cluster ends meanwhile: then they are left behind.
    work = threading.Thread(target=_leave, args=(time.time() + within, address, say), daemon=True)
    work.start()
    work.join(within + LATE_S)
    if work.is_alive():
        say("out of time, and the cluster does not answer")


def _leave(deadline: float, address: str | None, say: Lines) -> None:
    try:
        _empty(deadline, address, say)
    except Exception as error:
        why = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        say(f"sessions may lose their KV: {' '.join(why.split())}")


def _empty(deadline: float, address: str | None, say: Lines) -> None:
    import socket

    from paceline.config import ray_node
    from paceline.errors import ConfigError
    from paceline.serving.control_store import ControlStore
    from paceline.serving.own_node import find
    from paceline.serving.own_node import leave as leave_node

    from_environment, instance = ray_node()
    where = address or from_environment
    if where is None:
        raise ConfigError("address: no Ray cluster is named; set RAY_ADDRESS, or give --address", param="address")
    cluster = ControlStore(where)
    leave_node(cluster, find(cluster.nodes(), instance, socket.gethostname()), deadline, say)


class Lines:
    """Prints lines, also into a file if that can be done without waiting."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def __call__(self, text: str) -> None:
        line = f"leave: {text}"
        print(line, flush=True)
        if self._file is not None:
            _append(self._file, f"{line}\n")


def _append(file: Path, line: str) -> None:
    """A pipe that nobody empties must not hold the node; nor must a file that is not ours."""
    try:
        opened = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CREAT, 0o600)
        try:
            os.write(opened, line.encode())
        finally:
            os.close(opened)
    except OSError as error:
        print(f"leave: {file}: {error.strerror}", flush=True)
