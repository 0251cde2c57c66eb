"""Ports: is one free, and which are. Asked before anything starts, so that the answer costs no start-up."""

from __future__ import annotations

import errno
import ipaddress
import socket
from contextlib import ExitStack

from paceline.errors import ConfigError

ALL_INTERFACES = ""


def why_unusable(host: str, port: int) -> str | None:
    """Why a server could not listen on `host`:`port`, in a few words; None if it could.

    The empty host stands for all interfaces, IPv4 and IPv6.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        return f"{host!r} is not a known host"
    for family, _, _, _, address in found:
        try:
            socket.create_server(address[:2], family=family).close()
        except OSError as error:
            if reason := _reason(error, host):
                return reason
    return None


def _reason(error: OSError, host: str) -> str | None:
    if error.errno == errno.EADDRINUSE:
        return "already in use"
    if error.errno == errno.EACCES:
        return "not allowed for this user"
    if error.errno == errno.EADDRNOTAVAIL and host:
        return f"{host} is no address of this machine"
    return None  # a family this machine does not have, such as IPv6 in many containers


def require_free(host: str, port: int, *, key: str, option: str) -> None:
    """Raise ConfigError (its `param` is `key`) with the remedy if nothing can listen on `host`:`port`."""
    if reason := why_unusable(host, port):
        raise ConfigError(
            f"port {port} ({key}): {reason}; stop what uses it or choose another with {option}", param=key
        )


def free_ports(count: int) -> list[int]:
    """`count` different ports that are free on all interfaces right now, picked by the kernel."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server((ALL_INTERFACES, 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in sockets]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
