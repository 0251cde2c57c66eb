"""Errors cross processes, and each knows how both front ends report it."""

from __future__ import annotations

import pickle

import grpc
import pytest

from paceline import errors
from paceline.errors import InvalidRequest, Overloaded, PacelineError, by_code


def tree(kind: type[PacelineError]) -> list[type[PacelineError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in tree(child))]


KINDS = [kind for kind in tree(PacelineError) if kind.__module__ == errors.__name__]
RAISED = [kind for kind in KINDS if kind is not PacelineError]
SHOWN = {
    "InvalidRequest": (400, "INVALID_ARGUMENT"),
    "UnknownModel": (404, "NOT_FOUND"),
    "UnknownSession": (404, "NOT_FOUND"),
    "SessionConflict": (409, "ABORTED"),
    "UnknownNode": (404, "NOT_FOUND"),
    "NodeConflict": (409, "FAILED_PRECONDITION"),
    "Unauthorized": (401, "UNAUTHENTICATED"),
    "Forbidden": (403, "PERMISSION_DENIED"),
    "Overloaded": (429, "RESOURCE_EXHAUSTED"),
    "RequestTimeout": (504, "DEADLINE_EXCEEDED"),
    "Unavailable": (503, "UNAVAILABLE"),
    "EngineError": (500, "INTERNAL"),
    "ConfigError": (500, "INTERNAL"),
    "ModelError": (500, "INTERNAL"),
    "DraftError": (500, "INTERNAL"),
    "ClusterError": (500, "INTERNAL"),
}


def test_the_tree_is_the_one_drawn() -> None:
    assert {kind.__name__: (kind.http_status, kind.grpc_code) for kind in RAISED} == SHOWN


@pytest.mark.parametrize("kind", KINDS)
def test_its_grpc_code_exists(kind: type[PacelineError]) -> None:
    assert grpc.StatusCode[kind.grpc_code].name == kind.grpc_code


@pytest.mark.parametrize("kind", KINDS)
def test_its_http_status_is_an_error(kind: type[PacelineError]) -> None:
    assert 400 <= kind.http_status < 600


@pytest.mark.parametrize("kind", KINDS)
def test_it_survives_pickling(kind: type[PacelineError]) -> None:
    back = pickle.loads(pickle.dumps(kind("what", param="field", retry_after=2.5)))
    assert (type(back), back.message, back.param, back.retry_after) == (kind, "what", "field", 2.5)


@pytest.mark.parametrize("kind", RAISED)
def test_its_code_finds_it_again(kind: type[PacelineError]) -> None:
    assert by_code(kind.code) is kind


def test_codes_are_not_shared() -> None:
    assert len({kind.code for kind in RAISED}) == len(RAISED)


def test_an_unknown_code_is_the_base() -> None:
    assert by_code("of a newer version") is PacelineError


def test_it_reads_as_its_message() -> None:
    assert str(InvalidRequest("prompt: too long", param="prompt")) == "prompt: too long"


def test_a_pickled_error_is_caught_as_its_parent() -> None:
    with pytest.raises(PacelineError):
        raise pickle.loads(pickle.dumps(Overloaded("full", retry_after=1.0)))


def test_a_message_that_quotes_too_much_is_cut() -> None:
    assert len(InvalidRequest("x" * 5000).message) == errors.MAX_MESSAGE_CHARS + 1
