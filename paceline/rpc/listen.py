"""Opening a replica's own port."""

from __future__ import annotations

from collections.abc import Callable


def listening(open_port: Callable[[str], int], host: str, port: int, key: str) -> str:
    """The address that `open_port` came to listen on, at host:port (0: a free one). An IPv6 host is bracketed.

    Raises OSError that names the setting `key` if the port is taken.
    """
    bracketed = f"[{host}]" if ":" in host else host
    try:
        return f"{bracketed}:{open_port(f'{bracketed}:{port}')}"
    except RuntimeError as error:
        raise OSError(f"{key}: cannot listen on {bracketed}:{port}") from error
