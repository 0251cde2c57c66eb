"""An engine with tiers answers as one with plenty of KV, and computes less than one without."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.engine import engine as engine_module
from paceline.engine.engine import Engine
from paceline.engine.kv_files import KVFiles
from paceline.engine.kv_memory import Slabs
from paceline.engine.kv_tiers import KVTiers, Restored
from paceline.engine.loop import EngineLoop
from paceline.engine.pace import Pace
from paceline.engine.restores import AT_ONCE, Restores
from paceline.engine.sequence import Sequence
from paceline.types import Metrics, Request
from tests import tiny
from tests.engine.by_hand import PLENTY, Tiers

MODEL = tiny.tiny_llama()
RUNNER = tiny.ours(MODEL)
SLABS = Slabs(tiny.geometry_of(RUNNER), 512)
LONG = tiny.prompt(100)
WINDOW = {"ctx_size": 96, "n_keep": 4, "n_discard": 40}


def real_tiers(folder: Path | None, host_bytes: int = 0, *, slabs: Slabs = SLABS, quantized: bool = False) -> KVTiers:
    """With threads."""
    files = KVFiles(folder, "a model", PLENTY, 3600.0) if folder is not None else None
    return KVTiers(slabs, host_bytes, files, quantized=quantized)


def engine(tiers: KVTiers | None = None, capacity: int = 400, **options: Any) -> Engine:
    return tiny.engine_for(MODEL, capacity=capacity, runner=RUNNER, tiers=tiers, **options)


def turn(tokens: tuple[int, ...], session: str | None = "s", name: str = "r", **params: Any) -> Request:
    return tiny.request(tokens, name, session, **{"max_tokens": 8, **params})


def answer(made: Engine, *requests: Request) -> dict[str, tuple[list[int], Metrics]]:
    """Tokens and metrics by request."""
    for each in requests:
        made.add(each)
    return finish(made)


def finish(made: Engine, *, work: bool = True) -> dict[str, tuple[list[int], Metrics]]:
    """`work`: threads by hand do what they have to after each step."""
    tokens: dict[str, list[int]] = {}
    metrics: dict[str, Metrics] = {}
    tiers = made.restores.tiers if made.restores is not None else None
    while made.has_work:
        for name, delta in made.step().items():
            tokens.setdefault(name, []).extend(delta.token_ids)
            if delta.metrics is not None:
                metrics[name] = delta.metrics
        made.check()
        if work and isinstance(tiers, Tiers):
            tiers.work()
    return {name: (tokens[name], metrics[name]) for name in metrics}


def evict_all(made: Engine) -> None:
    made.kv.evict(made.kv.usage().total)


def tiny_sequence(request: Request) -> Sequence:
    return Sequence(1, request, None)


def restores_of(made: Engine) -> Restores:
    assert made.restores is not None
    return made.restores


@pytest.mark.parametrize(
    ("host", "disk"), [(PLENTY, False), (0, True), (3 * 10**5, True)], ids=["host", "disk", "both"]
)
@pytest.mark.parametrize("params", [{}, WINDOW], ids=["plain", "window"])
def test_sessions_under_pressure_get_the_tokens_they_get_with_plenty_of_kv(
    tmp_path: Path, host: int, disk: bool, params: dict[str, int]
) -> None:
    tiers = real_tiers(tmp_path if disk else None, host)
    small, large = engine(tiers), engine(capacity=40_000)
    texts = {f"s{n}": tiny.prompt(90 + 7 * n, seed=n) for n in range(8)}
    for _ in range(3):
        requests = [turn(text, name, name, **params) for name, text in texts.items()]
        found, expected = answer(small, *requests), answer(large, *requests)
        for name, text in texts.items():
            assert found[name][0] == expected[name][0]
            texts[name] = (*text, *found[name][0], *tiny.prompt(5, seed=len(text)))
    assert restores_of(small).restored.total() > 4
    assert tiers.stop(60.0)


def test_restored_tokens_are_cached_tokens(tmp_path: Path) -> None:
    made = engine(real_tiers(tmp_path))
    tokens, _ = answer(made, turn(LONG))["r"]
    evict_all(made)
    _, metrics = answer(made, turn((*LONG, *tokens, 5)))["r"]
    assert metrics.cached_tokens == len(LONG) + len(tokens) - 1
    assert restores_of(made).restored == {"host": 1} or restores_of(made).restored == {"disk": 1}
    assert restores_of(made).restored_tokens == metrics.cached_tokens


def test_a_restart_finds_the_sessions_of_before(tmp_path: Path) -> None:
    before = engine(real_tiers(tmp_path))
    tokens, _ = answer(before, turn(LONG))["r"]
    before.close(60.0)
    after = engine(real_tiers(tmp_path))
    _, metrics = answer(after, turn((*LONG, *tokens, 5)))["r"]
    assert metrics.cached_tokens == len(LONG) + len(tokens) - 1
    assert restores_of(after).restored == {"disk": 1}


def test_a_stopped_loop_leaves_its_sessions_on_disk(tmp_path: Path) -> None:
    loop, ended = EngineLoop(engine(real_tiers(tmp_path))), threading.Event()
    loop.submit(turn(LONG), lambda frame: ended.set() if getattr(frame, "finished", True) else None)
    assert ended.wait(60.0)
    loop.stop(60.0)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_shifted_session_is_restored(tmp_path: Path) -> None:
    made, text = engine(real_tiers(tmp_path)), tiny.prompt(200)
    tokens, _ = answer(made, turn(text, **WINDOW))["r"]
    evict_all(made)
    follow_up = turn((*text, *tokens, 5), **WINDOW)
    found, metrics = answer(made, follow_up)["r"]
    assert metrics.cached_tokens == len(text) + len(tokens) - 1
    assert found == answer(engine(), follow_up)["r"][0]


def test_another_session_with_the_same_beginning_profits(tmp_path: Path) -> None:
    made = engine(real_tiers(tmp_path))
    answer(made, turn(LONG, "s"))
    evict_all(made)
    for session in ("t", None):
        _, metrics = answer(made, turn((*LONG, 9, 9), session))["r"]
        assert metrics.cached_tokens >= len(LONG)


def test_int8_kv_is_restored_to_the_bit(tmp_path: Path) -> None:
    slabs = Slabs(tiny.geometry_of(RUNNER, quantized=True), 512)
    made, plain = engine(real_tiers(tmp_path, slabs=slabs), quantized=True), engine(quantized=True)
    tokens, _ = answer(made, turn(LONG))["r"]
    answer(plain, turn(LONG))
    before = plain.kv.export_session("s")
    evict_all(made)
    follow_up = turn((*LONG, *tokens, 5))
    assert answer(made, follow_up)["r"][0] == answer(plain, follow_up)["r"][0]
    after = made.kv.export_session("s")
    assert before is not None and after is not None
    length = len(LONG)
    assert all(
        torch.equal(a[:, :, :length], b[:, :, :length]) for a, b in zip(before.tensors, after.tensors, strict=True)
    )


def test_an_int8_tier_restores_about_what_was_computed_and_says_so(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, PLENTY, tmp_path, quantized=True)
    made = engine(tiers)
    answer(made, turn(LONG))
    exact = made.kv.export_session("s")
    evict_all(made)
    tiers.work()
    answer(made, turn((*LONG, 9, 9), max_tokens=1))
    rounded = made.kv.export_session("s")
    assert exact is not None and rounded is not None
    ours, theirs = (each.keys[:, :, : len(LONG)] for each in (exact, rounded))
    step = ours.abs().amax(dim=-1, keepdim=True) / 127
    assert bool(((theirs - ours).abs() <= 0.51 * step).all())
    assert not torch.equal(theirs, ours)
    assert restores_of(made).status()["kv_tier_dtype"] == "int8"


def flip_a_bit(folder: Path) -> None:
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    content[-50] ^= 8
    file.write_bytes(content)


def truncate(folder: Path) -> None:
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:1000])


def remove(folder: Path) -> None:
    (file,) = folder.iterdir()
    file.unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, remove])
def test_a_damaged_or_missing_file_costs_a_prefill(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    tiers = Tiers(SLABS, 0, tmp_path)
    made = engine(tiers)
    tokens, _ = answer(made, turn(LONG))["r"]
    evict_all(made)
    tiers.work()
    damage(tmp_path)
    follow_up = turn((*LONG, *tokens, 5))
    found, metrics = answer(made, follow_up)["r"]
    assert (found, metrics.cached_tokens) == (answer(engine(), follow_up)["r"][0], 0)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_nothing_costs_a_prefill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paceline.engine.kv_files.save_file", full)
    tiers = Tiers(SLABS, 0, tmp_path)
    made = engine(tiers)
    tokens, _ = answer(made, turn(LONG))["r"]
    evict_all(made)
    tiers.work()
    assert made.sessions() == []
    follow_up = turn((*LONG, *tokens, 5))
    assert answer(made, follow_up)["r"][0] == answer(engine(), follow_up)["r"][0]


def test_others_run_while_a_session_is_on_its_way(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, 0, tmp_path)
    made = engine(tiers, capacity=1000)
    answer(made, turn(LONG))
    evict_all(made)
    tiers.work()
    made.add(turn((*LONG, 9, 9), name="back"))
    made.add(turn(tiny.prompt(20, seed=5), "t", "new"))
    told = set()
    for _ in range(12):
        told |= made.step().keys()
        made.check()
    assert (told, made.num_waiting) == ({"new"}, 1)
    tiers.work()
    assert finish(made)["back"][1].cached_tokens >= len(LONG)


def test_after_the_deadline_a_session_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PAUSE_S", 0.0)
    tiers = Tiers(SLABS, 0, tmp_path)
    made = engine(tiers, restore_timeout_s=40, clock=itertools.count().__next__)
    tokens, _ = answer(made, turn(LONG))["r"]
    evict_all(made)
    tiers.work()
    follow_up = turn((*LONG, *tokens, 5))
    made.add(follow_up)
    found, metrics = finish(made, work=False)["r"]
    assert (found, metrics.cached_tokens) == (answer(engine(), follow_up)["r"][0], 0)
    assert restores_of(made).late == 1


def test_a_cancelled_request_leaves_its_session_in_the_tier(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, PLENTY, tmp_path)
    made = engine(tiers)
    answer(made, turn(LONG))
    evict_all(made)
    made.add(turn((*LONG, 9, 9)))
    made.step()
    tiers.work()
    made.abort("r")
    made.check()
    assert [each.tier for each in made.sessions()] == ["host"]


def test_the_outputs_of_one_request_wait_for_one_restore(tmp_path: Path) -> None:
    made = engine(real_tiers(tmp_path), capacity=1000)
    answer(made, turn(LONG))
    evict_all(made)
    made.add_all(turn((*LONG, 9, 9), n=3, temperature=0.8, seed=1).choices())
    assert [metrics.cached_tokens >= len(LONG) for _, metrics in finish(made).values()] == [True] * 3
    assert restores_of(made).restored.total() == 1


def test_only_so_many_sessions_are_on_their_way_at_once(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, 0, tmp_path)
    made = engine(tiers, capacity=4000)
    texts = {f"s{n}": tiny.prompt(90, seed=n) for n in range(AT_ONCE + 2)}
    answer(made, *(turn(text, name, name) for name, text in texts.items()))
    evict_all(made)
    tiers.work()
    for name, text in texts.items():
        made.add(turn((*text, 9, 9), name, name))
    made.step()
    assert len(tiers.reader._jobs) == AT_ONCE
    finish(made)
    assert restores_of(made).restored.total() == AT_ONCE + 2


def test_a_session_evicted_while_its_request_waits_is_restored(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, 0, tmp_path)
    made = engine(tiers, capacity=400, max_num_seqs=1)
    answer(made, turn(LONG))
    made.add(turn(tiny.prompt(30, seed=4), None, "first", max_tokens=20))
    made.add(turn((*LONG, 9, 9)))
    made.step()
    evict_all(made)
    assert finish(made)["r"][1].cached_tokens >= len(LONG)


def test_a_session_evicted_after_a_look_in_vain_is_restored(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, 0, tmp_path)
    made = engine(tiers, max_num_seqs=1)
    answer(made, turn(LONG))
    made.add(turn(tiny.prompt(30, seed=4), None, "first", max_tokens=20))
    made.add(turn((*LONG, *tiny.prompt(80, seed=6))))
    made.step()
    tiers.work()
    evict_all(made)
    assert finish(made)["r"][1].cached_tokens >= len(LONG)


def test_without_a_slab_of_its_own_an_export_is_imported() -> None:
    made = engine()
    answer(made, turn(LONG))
    export = made.kv.export_session("s")
    assert export is not None
    made.kv.drop_session("s")
    assert Restored(export, None, "disk", 0.0).put_into(made.kv)
    assert answer(made, turn((*LONG, 9, 9)))["r"][1].cached_tokens >= len(LONG)


def test_a_closed_session_is_nowhere(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, 0, tmp_path)
    made = engine(tiers)
    answer(made, turn(LONG))
    evict_all(made)
    tiers.work()
    assert made.drop_session("s")
    tiers.work()
    assert (made.sessions(), list(tmp_path.iterdir())) == ([], [])
    assert not made.drop_session("s")


def test_sessions_are_told_with_where_they_are(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, 105 * SLABS.geometry.bytes_per_token, tmp_path)
    made = engine(tiers)
    for n, name in enumerate(("disk", "host", "device")):
        evict_all(made)
        answer(made, turn(tiny.prompt(90, seed=n), name, max_tokens=3))
    tiers.work()
    assert [(each.session_id, each.tier, each.tokens) for each in made.sessions()] == [
        ("disk", "disk", 92),
        ("host", "host", 92),
        ("device", "device", 92),
    ]


def test_the_status_counts_by_tier(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, 0, tmp_path)
    made = engine(tiers)
    for session, seed in (("s", 1), ("t", 2)):
        answer(made, turn(tiny.prompt(90, seed=seed), session, max_tokens=3))
        evict_all(made)
        tiers.work()
    answer(made, turn((*tiny.prompt(90, seed=1), 9, 9)))
    size = 92 * SLABS.geometry.bytes_per_token
    assert restores_of(made).status() == {
        "kv_tier_dtype": "lossless",
        "kv_host_sessions": 0,
        "kv_host_tokens": 0,
        "kv_host_bytes": 0,
        "kv_host_restores": 0,
        "kv_disk_sessions": 2,
        "kv_disk_tokens": 184,
        "kv_disk_bytes": 2 * size,
        "kv_disk_restores": 1,
        "kv_restored_tokens": 92,
        "kv_restores_late": 0,
        "kv_restores_failed": 0,
        "kv_tier_drops": 0,
    }


def test_prompt_log_probabilities_are_computed_not_restored(tmp_path: Path) -> None:
    made = engine(real_tiers(tmp_path))
    answer(made, turn(LONG))
    evict_all(made)
    _, metrics = answer(made, turn((*LONG, 9, 9), prompt_logprobs=0))["r"]
    assert metrics.cached_tokens == 0


def paced(tiers: Tiers, *, compute_s: float, fetch_s: float) -> Restores:
    """Restores that have seen so many seconds a token."""
    found = Restores(tiny.kv_for(RUNNER), tiers, measured=True)
    found.note_prefill(1000, 1000 * compute_s)
    found._fetch["host"].note(1000, 1000 * fetch_s)
    return found


@pytest.mark.parametrize(("fetch_s", "begun"), [(0.1, True), (2.0, False)])
def test_what_is_computed_sooner_is_not_fetched(fetch_s: float, begun: bool) -> None:
    tiers = Tiers(SLABS)
    made = engine(tiers)
    answer(made, turn(LONG))
    evict_all(made)
    sequence = tiny_sequence(turn((*LONG, 9, 9)))
    assert paced(tiers, compute_s=1.0, fetch_s=fetch_s).awaits(sequence) is begun


def test_a_restore_is_waited_for_as_long_as_computing_takes_twice() -> None:
    tiers, now = Tiers(SLABS), 0.0
    made = engine(tiers)
    answer(made, turn(LONG))
    evict_all(made)
    restores = Restores(tiny.kv_for(RUNNER), tiers, timeout_s=1000.0, clock=lambda: now)
    restores.note_prefill(100, 100.0)
    sequence = tiny_sequence(turn((*LONG, 9, 9)))
    assert restores.awaits(sequence)
    now = 2.0 * (len(LONG) + 1) - 1
    assert restores.awaits(sequence)
    now += 1
    assert not restores.awaits(sequence)


def test_a_pace_is_that_of_the_latest_measurements() -> None:
    pace = Pace()
    assert pace.seconds_per_token is None
    for _ in range(50):
        pace.note(100, 300.0)
    for _ in range(50):
        pace.note(100, 100.0)
    assert pace.seconds_per_token == pytest.approx(1.0, rel=1e-3)
    for _ in range(50):
        pace.relax()
    assert pace.seconds_per_token < 0.5
