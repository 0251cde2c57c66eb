"""The fuzzer's first cases, the same in every run; and that it finds what it looks for."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError

from paceline.rpc.inference_service import InferenceHandlers
from paceline.types import Frame, Request
from tests.api.scripted import ScriptedTargets, gateway
from tests.fuzz.grpc import SERVICE, Errors, fuzz, log_sizes, logged_since, own_server
from tests.fuzz.messages import cases
from tests.rpc.served import serving

CASES = 2000


async def test_no_request_is_an_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    async with own_server() as address:
        report = await fuzz(address, islice(cases(SERVICE, 1), CASES))
    assert report.findings == []
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert report.calls.total() == CASES


def test_every_method_is_called_with_good_and_with_broken_bytes() -> None:
    thrown = list(islice(cases(SERVICE, 1), CASES))
    kinds = {method.name: method.input_type._concrete_class for method in SERVICE.methods}
    seen = {(case.method, _parses(kinds[case.method], case.raw)) for case in thrown}
    assert seen == {(name, parses) for name in kinds for parses in (True, False)}


def test_cases_are_the_same_for_the_same_seed() -> None:
    assert list(islice(cases(SERVICE, 7), 50)) == list(islice(cases(SERVICE, 7), 50))


async def test_an_unexpected_exception_is_a_finding(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ScriptedTargets):
        async def generate(self, request: Request) -> AsyncIterator[Frame]:
            raise RuntimeError("bug")
            yield

    async with serving(InferenceHandlers(gateway(Broken()))) as address:
        report = await fuzz(address, islice(cases(SERVICE, 1), CASES // 20))
    assert {finding.split(" ", 2)[1] for finding in report.findings} == {grpc.StatusCode.INTERNAL.name}
    assert report.findings


def test_errors_in_the_log_are_kept() -> None:
    errors, logger = Errors(), logging.getLogger("tests.fuzz")
    logger.addHandler(errors)
    try:
        logger.warning("no")
        logger.error("yes")
    finally:
        logger.removeHandler(errors)
    assert errors.found == ["yes"]


def test_what_was_added_to_a_log_is_searched(tmp_path: Path) -> None:
    log = tmp_path / "replica.log"
    log.write_text("ERROR old\n")
    before = log_sizes(tmp_path)
    left = "ERROR proxy -- failed\nTraceback (most recent call last):\nGeneratorExit\n"
    with log.open("a") as more:
        more.write(f"INFO fine\n{left}INFO fine\nERROR new\nTraceback (most recent call last):\nKeyError: 'x'\n")
    assert logged_since(before, tmp_path) == [
        "replica.log: ERROR new\nTraceback (most recent call last):\nKeyError: 'x'"
    ]


def _parses(kind: Any, raw: bytes) -> bool:
    try:
        kind.FromString(raw)
    except DecodeError:
        return False
    return True
