"""Throws requests at the public gRPC service and reports every call that ends as none should.

    python -m tests.fuzz.grpc --seconds 600                          over a tiny engine in this process
    python -m tests.fuzz.grpc --seconds 600 --address 127.0.0.1:9000 --logs /tmp/ray/session_latest/logs/serve

A finding is a call that ends with INTERNAL, UNKNOWN or not at all within its deadline, an error in the log, or a server
that no longer answers. Exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import grpc

from paceline.v1 import inference_pb2 as pb
from tests.fuzz.messages import Case, cases

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]
WRONG = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
DEADLINE_S = 20.0
MOST_EVENTS = 5
AT_ONCE = 8
OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", -1)]
ENTRY = re.compile(r"^(?=(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) )", re.MULTILINE)
LOGGED = re.compile(r"Traceback|unexpected error|^ERROR", re.MULTILINE)


@dataclass(slots=True)
class Report:
    """What came of it: calls by method and status, the slowest answer of a refused one, and what was wrong."""

    calls: Counter[str] = field(default_factory=Counter)
    slowest_refusal_s: float = 0.0
    findings: list[str] = field(default_factory=list)

    def note(self, case: Case, code: grpc.StatusCode, details: str, seconds: float) -> None:
        self.calls[f"{case.method} {code.name}"] += 1
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            self.slowest_refusal_s = max(self.slowest_refusal_s, seconds)
        late = code is grpc.StatusCode.DEADLINE_EXCEEDED and seconds >= DEADLINE_S
        if code in WRONG or late:
            self.findings.append(f"{case.method} {code.name} {details!r} for {case.raw[:200].hex()} {case.metadata}")


async def call(channel: grpc.aio.Channel, case: Case) -> tuple[grpc.StatusCode, str]:
    """How it ends. A stream is left after some events: its text is of no interest."""
    path = f"/{SERVICE.full_name}/{case.method}"
    try:
        if not case.streams:
            await channel.unary_unary(path)(case.raw, timeout=DEADLINE_S, metadata=case.metadata)
            return grpc.StatusCode.OK, ""
        stream = channel.unary_stream(path)(case.raw, timeout=DEADLINE_S, metadata=case.metadata)
        events = 0
        async for _ in stream:
            events += 1
            if events == MOST_EVENTS:
                stream.cancel()
                break
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


async def fuzz(address: str, thrown: Iterable[Case]) -> Report:
    """Some at once, until there are no more; then the server must answer a plain question."""
    report = Report()
    queue = iter(thrown)
    async with grpc.aio.insecure_channel(address, OPTIONS) as channel:

        async def worker() -> None:
            for case in queue:
                began = time.monotonic()
                code, details = await call(channel, case)
                report.note(case, code, details, time.monotonic() - began)

        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
        code, details = await call(channel, Case("ListModels", b""))
        if code is not grpc.StatusCode.OK:
            report.findings.append(f"the server does not answer any more: {code.name} {details}")
    return report


def for_seconds(thrown: Iterator[Case], seconds: float) -> Iterator[Case]:
    """Those that fit into so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield next(thrown)


class Errors(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))


@asynccontextmanager
async def own_server() -> AsyncIterator[str]:
    """The real service over a tiny engine in this process."""
    from paceline.rpc.inference_service import InferenceHandlers
    from tests.api.scripted import gateway
    from tests.rpc.engine_target import engine_target
    from tests.rpc.served import serving

    with engine_target() as replica:
        async with serving(InferenceHandlers(gateway(replica))) as address:
            yield address


def log_sizes(folder: Path | None) -> dict[Path, int]:
    return {file: file.stat().st_size for file in folder.rglob("*.log")} if folder else {}


def logged_since(before: dict[Path, int], folder: Path | None) -> list[str]:
    """Errors that were added to the logs, with the file each is in."""
    found = []
    for file in log_sizes(folder):
        with file.open(errors="replace") as log:
            log.seek(before.get(file, 0))
            found += [f"{file.name}: {entry.strip()}" for entry in ENTRY.split(log.read()) if wrong(entry)]
    return found


def wrong(entry: str) -> bool:
    """Whether a log's entry tells of an error. Serve's proxy logs a client that leaves between two events as one."""
    return bool(LOGGED.search(entry)) and not entry.rstrip().endswith("GeneratorExit")


async def run(options: argparse.Namespace) -> Report:
    thrown = for_seconds(cases(SERVICE, options.seed), options.seconds)
    if options.address:
        before = log_sizes(options.logs)
        report = await fuzz(options.address, thrown)
        report.findings += logged_since(before, options.logs)
        return report
    errors = Errors()
    logging.getLogger().addHandler(errors)
    async with own_server() as address:
        report = await fuzz(address, thrown)
    report.findings += errors.found
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.grpc", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--address", help="of a server; without it one is made in this process")
    parser.add_argument("--logs", type=Path, help="folder of that server's *.log files")
    report = asyncio.run(run(parser.parse_args()))
    for name, count in sorted(report.calls.items()):
        print(f"{count:8} {name}")
    print(f"{report.calls.total():8} calls; slowest refusal {report.slowest_refusal_s:.3f} s")
    for finding in islice(report.findings, 50):
        print(f"FINDING {finding}", file=sys.stderr)
    print(f"{len(report.findings)} findings")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
