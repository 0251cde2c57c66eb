"""What a served cluster makes of hostile requests, and of clients that go away.

    python benchmarks/hostile.py                          # a small cluster of its own, with API keys
    python benchmarks/hostile.py --url http://host:8000   # another, with an admin's key in PACELINE_API_KEY

Each case is sent over a socket of its own; the time is from its first byte to the end of the answer. Behind every case
a small chat must be answered. Then clients leave at random moments, and the targets must get idle with no KV in use.
Fails if a case is not refused as it should be, in `--within` seconds, or if anything is left; `--json FILE` keeps the
numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from paceline.api.keys import KeyEntry, hash_of, new_key
from paceline.config import default_deployment, parse_settings
from paceline.ports import free_ports
from paceline.serving.cluster import LocalCluster

CHATS = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
IDLE_TIMEOUT_S = 60.0
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Case:
    """Bytes to send after a head, and the statuses that refuse them."""

    name: str
    head: Mapping[str, str]
    parts: tuple[bytes, ...] = ()
    refusals: tuple[int, ...] = (400,)
    path: str = CHATS
    method: str = "POST"


@dataclass(frozen=True)
class Outcome:
    case: str
    status: int
    seconds: float
    refused: bool
    chat_s: float


def bodies() -> Iterator[Case]:
    message = b'{"role":"user","content":"x"}'
    named = {
        "malformed UTF-8": b'{"messages":[{"role":"user","content":"\xff\xfe"}]}',
        "1e6 messages of nothing": b'{"messages":[' + b",".join([b"{}"] * 1_000_000) + b"]}",
        "250000 messages in 7.5 MB": b'{"messages":[' + b",".join([message] * 250_000) + b"]}",
        "8e6 open lists": b"[" * 8_000_000,
        "NaN": b'{"messages":[' + message + b'],"temperature":NaN}',
        "1e999": b'{"messages":[' + message + b'],"temperature":1e999}',
        "5000 digits": b'{"messages":[' + message + b'],"seed":' + b"9" * 5000 + b"}",
        "one field twice": b'{"messages":[],"messages":[' + message + b"]}",
        "500000 fields": b"{" + b",".join(b'"%d":0' % n for n in range(500_000)) + b"}",
        "an 8 MB message": b'{"messages":[{"role":"user","content":"' + b"x" * 8_000_000 + b'"}]}',
        "a session id of 1 MB": b'{"messages":[' + message + b'],"session_id":"' + b"s" * 1_000_000 + b'"}',
    }
    for name, body in named.items():
        yield Case(name, JSON | {"content-length": str(len(body))}, (body,))


def cases() -> Iterator[Case]:
    yield from bodies()
    huge, megabyte = JSON | {"content-length": "100000000"}, b"x" * 1_000_000
    yield Case("100 MB announced", huge, refusals=(413,))
    yield Case("100 MB sent", huge, (megabyte,) * 100, (413,))
    chunk = b"%x\r\n" % len(megabyte) + megabyte + b"\r\n"
    yield Case("chunks without end", JSON | {"transfer-encoding": "chunked"}, (chunk,) * 1000, (413,))
    many = {f"x-{n}": "v" for n in range(1000)}
    yield Case("1000 headers", many, refusals=(431, 400), path="/v1/models", method="GET")
    yield Case("a header of 60 kB", {"x-large": "v" * 60_000}, refusals=(431, 400), path="/v1/models", method="GET")
    yield Case("a path of 60 kB", {}, refusals=(414, 400), path="/v1/models/" + "m" * 60_000, method="GET")
    yield Case("no key", JSON | {"authorization": "Bearer nonsense", "content-length": "2"}, (b"{}",), (401, 400))


class Victim:
    """The server."""

    def __init__(self, url: str, key: str | None) -> None:
        self._host, self._port = urlsplit(url).hostname or "", urlsplit(url).port or 80
        self._bearer = {} if key is None else {"authorization": f"Bearer {key}"}
        self.http = httpx.AsyncClient(base_url=url, headers=self._bearer, timeout=TIMEOUT_S)

    def head(self, case: Case) -> bytes:
        fields = {"host": self._host} | self._bearer | dict(case.head)
        lines = [f"{case.method} {case.path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return "\r\n".join([*lines, "", ""]).encode()

    async def send(self, case: Case) -> tuple[int, float]:
        """Status (0: the connection was cut) and seconds."""
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection(self._host, self._port)
        saying = asyncio.create_task(self._say(writer, (self.head(case), *case.parts)))
        status = 0
        try:
            async with asyncio.timeout(TIMEOUT_S):
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                    status = int((await reader.readuntil(b"\r\n")).split(b" ")[1])
        finally:
            saying.cancel()
            await asyncio.gather(saying, return_exceptions=True)
            writer.transport.abort()
        return status, time.perf_counter() - began

    async def _say(self, writer: asyncio.StreamWriter, parts: tuple[bytes, ...]) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()

    async def chat(self) -> float:
        """Seconds a small chat takes. Raises if it is not answered."""
        began = time.perf_counter()
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        (await self.http.post(CHATS, json=body)).raise_for_status()
        return time.perf_counter() - began

    async def leave(self, number: int) -> None:
        """Begin a chat and go away."""
        chance = random.Random(number)
        body = json.dumps({"messages": [{"role": "user", "content": f"hello {number}"}], "stream": True}).encode()
        request = self.head(Case("", JSON | {"content-length": str(len(body))})) + body
        reader, writer = await asyncio.open_connection(self._host, self._port)
        with contextlib.suppress(ConnectionError, TimeoutError):
            writer.write(request[: chance.choice((chance.randrange(len(request)), len(request), len(request)))])
            await writer.drain()
            async with asyncio.timeout(chance.choice((0.01, 0.1, 1.0))):
                while await reader.read(500):
                    pass
        writer.transport.abort()

    async def idle(self) -> list[dict[str, int]]:
        """What the targets hold once they are idle, or after a minute."""
        names = ("running", "waiting", "queued_prefill_tokens", "kv_tokens_in_use")
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while True:
            targets = (await self.http.get("/status")).raise_for_status().json()["targets"]
            held = [{name: int(target[name]) for name in names} for target in targets]
            if not any(sum(each.values()) for each in held) or time.monotonic() > deadline:
                return held
            await asyncio.sleep(0.5)


async def attack(victim: Victim, within_s: float, disconnects: int) -> tuple[list[Outcome], list[dict[str, int]]]:
    await victim.chat()
    outcomes = []
    for case in cases():
        status, seconds = await victim.send(case)
        refused = status in case.refusals and seconds <= within_s
        outcomes.append(Outcome(case.name, status, round(seconds, 3), refused, round(await victim.chat(), 3)))
    for start in range(0, disconnects, 16):
        await asyncio.gather(*(victim.leave(number) for number in range(start, min(start + 16, disconnects))))
    held = await victim.idle()
    await victim.chat()
    return outcomes, held


def report(outcomes: list[Outcome], held: list[dict[str, int]], disconnects: int) -> bool:
    """Print the table. Whether all is well."""
    for each in outcomes:
        verdict = "" if each.refused else "  NOT REFUSED AS IT SHOULD BE"
        print(f"{each.case:28} {each.status:4} {each.seconds:7.3f} s   then a chat: {each.chat_s:6.3f} s{verdict}")
    print(f"after {disconnects} clients that left: {held}")
    return all(each.refused for each in outcomes) and not any(sum(each.values()) for each in held)


@contextlib.contextmanager
def own_cluster() -> Iterator[tuple[str, str]]:
    """URL and key of a cluster of one target and one draft."""
    key = new_key()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.yaml"
        file.write_text(KeyEntry(name="operator", hash=hash_of(key), admin=True).line())
        one = {"num_replicas": 1, "num_cpus": 0.1, "engine": {"threads": 1, "kv_tokens": 16384}}
        settings = parse_settings({"target": one, "draft": one, "api_keys": {"file": str(file)}})
        http_port, grpc_port = free_ports(2)
        deployment = default_deployment(settings, http_port=http_port, grpc_port=grpc_port)
        with LocalCluster(deployment) as endpoints:
            yield endpoints.http, key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--within", type=float, default=1.0)
    parser.add_argument("--disconnects", type=int, default=200)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    given = contextlib.nullcontext((asked.url, os.environ.get("PACELINE_API_KEY")))
    with given if asked.url else own_cluster() as (url, key):
        outcomes, held = asyncio.run(attack(Victim(url, key), asked.within, asked.disconnects))
    well = report(outcomes, held, asked.disconnects)
    if asked.json is not None:
        asked.json.write_text(json.dumps({"cases": [asdict(each) for each in outcomes], "left": held}, indent=1))
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
