"""Frames of bytes between rank 0 and another rank: one TCP connection each, open for as long as both live.

Both sides prove that they know the meeting's key before anything is read, and nothing that is read is ever code. When
one end dies, whatever way, the other reads the end of the stream at once: no timer is needed to notice.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

from paceline.errors import EngineError

PROOF = hashlib.sha256().digest_size
LENGTH = struct.Struct("<Q")
RANK = struct.Struct("<I")
HANDSHAKE_S = 10.0
"""Whoever connects and does not prove itself in that time is no rank."""
KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))
"""A host that vanishes without a word is noticed after half a minute."""


class Channel:
    """One end. A frame goes out whole or the channel is of no further use; not for several threads at once."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection = connection

    def send(self, *frames: bytes | memoryview) -> None:
        """Raises OSError if the other end is gone."""
        for frame in frames:
            size = LENGTH.pack(len(frame))
            if len(frame) < 1 << 16:
                self._connection.sendall(size + bytes(frame))
            else:
                self._connection.sendall(size)
                self._connection.sendall(frame)

    def receive(self) -> bytearray | None:
        """The next frame; None at the end of the stream. Waits for as long as it takes."""
        try:
            size = _exactly(self._connection, LENGTH.size)
            return None if size is None else _exactly(self._connection, LENGTH.unpack(size)[0])
        except OSError:
            return None

    def close(self) -> None:
        """Also wakes whoever waits in `receive`."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def listen(host: str) -> socket.socket:
    """A listening socket on a port the kernel picks."""
    family = socket.getaddrinfo(host, None)[0][0]
    return socket.create_server((host, 0), family=family)


def accept(listener: socket.socket, key: bytes, ranks: Sequence[int], timeout_s: float) -> tuple[int, Channel] | None:
    """The next of these ranks that connects; None if nobody did, or somebody who is none of them."""
    listener.settimeout(timeout_s)
    try:
        connection, _ = listener.accept()
    except TimeoutError:
        return None
    connection.settimeout(HANDSHAKE_S)
    try:
        rank = _verified(connection, key)
    except OSError:
        rank = None
    if rank is None or rank not in ranks:
        connection.close()
        return None
    return rank, Channel(connection)


def connect(host: str, port: int, key: bytes, rank: int) -> Channel:
    """Rank 0's, for one of the others. Raises EngineError if it is not there, or is somebody else."""
    try:
        connection = socket.create_connection((host, port), timeout=HANDSHAKE_S)
        challenge = _exactly(connection, PROOF)
        if challenge is not None:
            own, name = secrets.token_bytes(PROOF), RANK.pack(rank)
            connection.sendall(name + own + _proof(key, challenge, name))
            answer = _exactly(connection, PROOF)
            if answer is not None and hmac.compare_digest(answer, _proof(key, own, b"rank 0")):
                return Channel(connection)
        connection.close()
    except OSError as error:
        raise EngineError(f"rank {rank}: rank 0 at {host}:{port} is not reached: {error}") from error
    raise EngineError(f"rank {rank}: what listens at {host}:{port} is not this replica's rank 0")


def _verified(connection: socket.socket, key: bytes) -> int | None:
    """The rank that the other end proves to be."""
    challenge = secrets.token_bytes(PROOF)
    connection.sendall(challenge)
    said = _exactly(connection, RANK.size + 2 * PROOF)
    if said is None:
        return None
    name, theirs, proof = said[: RANK.size], said[RANK.size : RANK.size + PROOF], said[RANK.size + PROOF :]
    if not hmac.compare_digest(proof, _proof(key, challenge, name)):
        return None
    connection.sendall(_proof(key, theirs, b"rank 0"))
    found: int = RANK.unpack(name)[0]
    return found


def _proof(key: bytes, challenge: bytes | bytearray, name: bytes | bytearray) -> bytes:
    return hmac.digest(key, bytes(challenge) + bytes(name), "sha256")


def _exactly(connection: socket.socket, size: int) -> bytearray | None:
    """So many bytes; None if the stream ends before."""
    data = bytearray(size)
    view, read = memoryview(data), 0
    while read < size:
        count = connection.recv_into(view[read:])
        if not count:
            return None
        read += count
    return data
