"""Which target replica leaves first."""

from __future__ import annotations

from math import nan

from paceline.autoscaling.victims import Candidate, order


def test_one_that_does_not_run_goes_first():
    assert order([Candidate("runs", sessions=0), Candidate("starts", running=False, on_head=True)])[0] == "starts"


def test_the_head_node_keeps_its_replicas():
    assert order([Candidate("head", on_head=True, sessions=0), Candidate("worker", sessions=50)])[0] == "worker"


def test_the_fewest_sessions_go():
    assert order([Candidate("a", sessions=3), Candidate("b", sessions=1), Candidate("c", sessions=2)]) == [
        "b",
        "c",
        "a",
    ]


def test_sessions_count_before_emptying_a_node():
    assert order([Candidate("a", sessions=3, node_replicas=1), Candidate("b", sessions=1, node_replicas=8)])[0] == "b"


def test_a_replica_that_does_not_say_what_it_holds_goes_last():
    assert order([Candidate("silent"), Candidate("full", sessions=1000), Candidate("odd", sessions=nan)])[0] == "full"


def test_of_equals_the_one_goes_whose_node_is_emptiest():
    assert order([Candidate("a", sessions=1, node_replicas=3), Candidate("b", sessions=1, node_replicas=1)])[0] == "b"


def test_of_equals_on_equal_nodes_the_newest_goes():
    assert order([Candidate("old", sessions=1, age=0), Candidate("new", sessions=1, age=5)])[0] == "new"


def test_nobody_is_lost():
    assert sorted(order([Candidate(name) for name in "bca"])) == ["a", "b", "c"]
