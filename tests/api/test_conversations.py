"""Whose turn a request is: named, recognized, appended; and what becomes of its answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from paceline.api import Gateway
from paceline.api import conversations as conversations_module
from paceline.api.conversations import Conversations
from paceline.api.gateway import Prepared
from paceline.api.prompts import ANSWER_MARK, ChatMessage, PromptEncoder
from paceline.errors import InvalidRequest, SessionConflict, Unavailable, UnknownSession
from paceline.sessions.history import Session, SessionSummary
from paceline.sessions.store import MemoryStore
from paceline.types import Accepted, Delta, FinishReason, Frame, Request, SamplingParams
from tests.api.scripted import CONTEXT, HELLO, MODEL, Hang, ScriptedTargets, tokenizer

FREE = SamplingParams(max_tokens=8)
Said = tuple[str, str]


class Saying(ScriptedTargets):
    """Answers with these texts in turn, each two tokens that are not what the tokenizer makes of the text."""

    def __init__(self, *answers: str) -> None:
        super().__init__()
        self.answers = list(answers)

    async def generate(self, request: Request) -> AsyncIterator[Frame]:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        yield Accepted("target-1", request.params.seed or 0, len(request.token_ids))
        yield Delta((100,), answer[:1])
        yield Delta((101,), answer[1:], FinishReason.STOP)


def ids(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text))


def front(targets: ScriptedTargets | None = None, store: MemoryStore | None = None, name: str = MODEL) -> Gateway:
    return Gateway(targets or Saying("hello"), tokenizer(), name, CONTEXT, 30.0, store=store)


def messages(said: Sequence[Said]) -> list[ChatMessage]:
    return [ChatMessage(*each) for each in said]


async def run(gateway: Gateway, prepared: Prepared) -> str:
    """The whole answer."""
    async with await gateway.open(prepared) as stream:
        return "".join([delta.text async for delta in stream])


async def chat(gateway: Gateway, *said: Said, session_id: str | None = None) -> str:
    """One turn to its end; the name of its session."""
    prepared = await gateway.prepare_chat(messages(said), FREE, session_id=session_id)
    await run(gateway, prepared)
    assert prepared.request.session_id is not None
    return prepared.request.session_id


START: tuple[Said, ...] = (("system", "be brief"), ("user", "hi"))
NEXT: tuple[Said, ...] = (*START, ("assistant", "hello"), ("user", "and?"))


async def test_a_conversation_finds_its_session_every_turn() -> None:
    gateway = front(Saying("hello", "well", "bye"))
    third = (*NEXT, ("assistant", "well"), ("user", "so?"))
    names = [await chat(gateway, *said) for said in (START, NEXT, third)]
    assert names == [names[0]] * 3


async def test_conversations_that_begin_alike_are_two_sessions() -> None:
    gateway = front()
    first, second = [await chat(gateway, *START) for _ in range(2)]
    assert first != second
    # Both were answered alike: which of them goes on cannot be told, but they stay two.
    assert {await chat(gateway, *NEXT), await chat(gateway, *NEXT[:-1], ("user", "or?"))} == {first, second}


@pytest.mark.parametrize(
    "other",
    [
        [("system", "be long"), *NEXT[1:]],
        [("user", "be brief"), *NEXT[1:]],
        [*NEXT[:2], ("assistant", "hullo"), NEXT[3]],
        NEXT[1:],
        [("system", "be"), ("system", " brief"), *NEXT[1:]],
    ],
)
async def test_another_beginning_is_another_session(other: list[Said]) -> None:
    gateway = front()
    assert await chat(gateway, *START) != await chat(gateway, *other)


async def test_another_model_is_another_session() -> None:
    store = MemoryStore(60)
    first = await chat(front(store=store), *START)
    assert first != await chat(front(store=store, name="other"), *NEXT)


async def test_routers_that_share_a_store_recognize_each_others_sessions() -> None:
    store = MemoryStore(60)
    assert await chat(front(store=store), *START) == await chat(front(store=store), *NEXT)


async def test_a_client_that_strips_an_answer_is_recognized() -> None:
    gateway = front(Saying(" hello\n", "well"))
    assert await chat(gateway, *START) == await chat(gateway, *NEXT)


async def test_a_turn_asked_anew_is_a_session_of_its_own() -> None:
    gateway = front()
    first, second, again = await chat(gateway, *START), await chat(gateway, *NEXT), await chat(gateway, *NEXT)
    assert first == second != again


async def test_a_turn_that_failed_can_be_asked_again() -> None:
    targets = Saying("hello")
    gateway = front(targets)
    first = await chat(gateway, *START)
    failing = front(ScriptedTargets([*HELLO[:2], Unavailable("lost")]))
    failing._conversations = gateway._conversations
    with pytest.raises(Unavailable):
        await chat(failing, *NEXT)
    assert await chat(gateway, *NEXT) == first


async def test_a_turn_whose_client_left_can_be_asked_again() -> None:
    gateway = front()
    first = await chat(gateway, *START)
    hanging = front(ScriptedTargets([*HELLO[:2], Hang()]))
    hanging._conversations = gateway._conversations
    async with await hanging.open(await hanging.prepare_chat(messages(NEXT), FREE)) as stream:
        await anext(stream)
    assert await chat(gateway, *NEXT) == first


async def test_a_named_session_is_nobody_elses() -> None:
    gateway = front()
    await chat(gateway, *START, session_id="mine")
    assert await chat(gateway, *NEXT) != "mine"


async def test_a_recognized_session_that_is_then_named_is_nobody_elses() -> None:
    gateway = front(Saying("hello", "well"))
    first = await chat(gateway, *START)
    assert await chat(gateway, *NEXT, session_id=first) == first
    assert await chat(gateway, *NEXT) != first
    assert await chat(gateway, *NEXT, ("assistant", "well"), ("user", "so?")) == first


async def test_of_several_choices_the_first_is_the_history() -> None:
    store = MemoryStore(60)
    end = FinishReason.STOP
    script = [Accepted("t", 1, 3), Delta((7,), "one", end, index=1), Delta((5,), "zero", end)]
    gateway = front(ScriptedTargets(script), store)
    prepared = await gateway.prepare_chat(messages(START), SamplingParams(max_tokens=8, n=2, seed=1), session_id="s")
    await run(gateway, prepared)
    kept = await store.get("s")
    assert kept is not None and kept.messages[-1] == ChatMessage("assistant", "zero")
    assert kept.token_ids == (*prepared.request.token_ids, 5)


async def test_a_history_has_the_tokens_as_computed() -> None:
    store = MemoryStore(60)
    prompt = ids("<|system|>be brief<|user|>hi<|assistant|>")
    name = await chat(front(store=store), *START)
    kept = await store.get(name)
    assert kept is not None
    assert kept.token_ids == (*prompt, 100, 101)
    assert kept.messages == (*messages(START), ChatMessage("assistant", "hello"))
    assert kept.turns == 1


async def test_the_answer_is_kept_before_the_client_has_its_end() -> None:
    store = MemoryStore(60)
    gateway = front(store=store)
    async with await gateway.open(await gateway.prepare_chat(messages(START), FREE, session_id="s")) as stream:
        async for delta in stream:
            assert (await store.get("s") is not None) == delta.finished


async def test_a_plain_completion_of_a_named_session_has_a_history_too() -> None:
    store = MemoryStore(60)
    gateway = front(store=store)
    await run(gateway, await gateway.prepare_completion("hi", FREE, session_id="s"))
    kept = await store.get("s")
    assert kept is not None and (kept.token_ids, kept.messages) == ((*ids("hi"), 100, 101), ())


async def test_a_completion_without_a_name_leaves_nothing() -> None:
    store = MemoryStore(60)
    gateway = front(store=store)
    await run(gateway, await gateway.prepare_completion("hi", FREE))
    assert await store.summaries() == []


async def append(gateway: Gateway, session_id: str, text: str, params: SamplingParams = FREE) -> Request:
    prepared = await gateway.prepare_turn(session_id, [ChatMessage("user", text)], params)
    await run(gateway, prepared)
    return prepared.request


async def test_an_appended_turn_goes_on_from_the_tokens_as_computed() -> None:
    gateway = front()
    created = await gateway.create_session("s", messages(START[:1]))
    assert (created.history_tokens, created.turns, created.replica_id) == (0, 0, None)
    first = await append(gateway, "s", "hi")
    second = await append(gateway, "s", "and?")
    assert first.token_ids == ids("<|system|>be brief<|user|>hi<|assistant|>")
    assert second.token_ids == (*first.token_ids, 100, 101, *ids("<|user|>and?<|assistant|>"))
    assert second.session_id == "s"
    assert (await gateway.session("s")).turns == 2


async def test_a_session_begun_by_resending_can_be_appended_to() -> None:
    gateway = front()
    name = await chat(gateway, *START)
    assert (await append(gateway, name, "and?")).token_ids[-1] == ids("<|assistant|>")[0]


async def test_the_sessions_seed_is_that_of_its_turns() -> None:
    gateway = front()
    await gateway.create_session("s", seed=77)
    assert (await append(gateway, "s", "hi")).params.seed == 77
    assert (await append(gateway, "s", "hi", SamplingParams(max_tokens=8, seed=5))).params.seed == 5
    assert (await append(gateway, "s", "hi")).params.seed == 77


async def test_a_turn_of_an_unknown_session_is_not_found() -> None:
    with pytest.raises(UnknownSession):
        await front().prepare_turn("nobody", messages([("user", "hi")]), FREE)


async def test_a_session_of_plain_completions_takes_no_messages() -> None:
    gateway = front()
    await run(gateway, await gateway.prepare_completion("hi", FREE, session_id="s"))
    with pytest.raises(InvalidRequest, match="plain completions"):
        await gateway.prepare_turn("s", messages([("user", "hi")]), FREE)


async def test_two_turns_at_once_are_a_conflict_and_the_first_goes_on() -> None:
    store = MemoryStore(60)
    gateway = front(store=store)
    await gateway.create_session("s")
    prepared = await gateway.prepare_turn("s", messages([("user", "hi")]), FREE)
    async with await gateway.open(prepared) as stream:
        with pytest.raises(SessionConflict, match="under way"):
            await gateway.open(await gateway.prepare_turn("s", messages([("user", "ho")]), FREE))
        assert [delta.text async for delta in stream] == ["h", "ello"]
    assert (await append(gateway, "s", "ho")).token_ids[-1] == ids("<|assistant|>")[0]


async def test_a_session_is_created_once() -> None:
    gateway = front()
    await gateway.create_session("s")
    with pytest.raises(SessionConflict, match="exists"):
        await gateway.create_session("s")


async def test_a_fork_has_the_history_and_goes_its_own_way() -> None:
    store = MemoryStore(60)
    gateway = front(store=store)
    await gateway.create_session("s")
    first = await append(gateway, "s", "hi")
    fork = await gateway.fork_session("s", "t")
    assert (fork.parent, fork.turns, fork.history_tokens) == ("s", 1, len(first.token_ids) + 2)
    ours, theirs = await append(gateway, "s", "and?"), await append(gateway, "t", "or?")
    shared = (*first.token_ids, 100, 101)
    assert ours.token_ids[: len(shared)] == theirs.token_ids[: len(shared)] == shared
    assert ours.token_ids != theirs.token_ids
    assert (await gateway.session("s")).turns == (await gateway.session("t")).turns == 2


async def test_a_fork_of_nothing_or_onto_something_is_refused() -> None:
    gateway = front()
    await gateway.create_session("s")
    with pytest.raises(UnknownSession):
        await gateway.fork_session("nobody")
    with pytest.raises(SessionConflict):
        await gateway.fork_session("s", "s")


async def test_sessions_are_listed_with_kv_and_history() -> None:
    gateway = front()
    await gateway.create_session("only-history")
    await chat(gateway, *START, session_id="s2")
    found = {info.session_id: info for info in await gateway.sessions()}
    assert (found["s/1"].replica_id, found["s/1"].turns) == ("target-1", None)
    assert (found["s2"].replica_id, found["s2"].turns) == ("target-2", 1)
    assert (found["only-history"].replica_id, found["only-history"].turns) == (None, 0)


async def test_closing_a_session_drops_its_history() -> None:
    gateway = front()
    await gateway.create_session("s")
    await gateway.close_session("s")
    with pytest.raises(UnknownSession):
        await gateway.session("s")
    with pytest.raises(UnknownSession):
        await gateway.close_session("s")


class Broken(MemoryStore):
    """Does not answer."""

    async def claim(self, key: str) -> str | None:
        raise Unavailable("the session store does not answer")

    async def summary(self, session_id: str) -> SessionSummary | None:
        return await asyncio.Event().wait()  # type: ignore[func-returns-value]

    async def get(self, session_id: str) -> Session | None:
        raise Unavailable("the session store does not answer")

    async def summaries(self, limit: int = 1000) -> list[SessionSummary]:
        raise Unavailable("the session store does not answer")


async def test_a_store_that_does_not_answer_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations_module, "STORE_TIMEOUT_S", 0.01)
    gateway = front(store=Broken(60))
    prepared = await gateway.prepare_chat(messages(NEXT), FREE)
    assert await run(gateway, prepared) == "hello"
    assert [info.session_id for info in await gateway.sessions()] == ["s/1", "s2"]
    with pytest.raises(Unavailable):
        await gateway.prepare_turn("s", messages(START), FREE)


async def test_recognizing_takes_no_turn_without_an_answer() -> None:
    names = Conversations(MemoryStore(60), MODEL)
    first, second = [await names.recognize(messages(START)) for _ in range(2)]
    assert first.session_id != second.session_id
    assert first.claimed is None


class Trimming:
    """A tokenizer with an end token, whose template trims answers and ends them; or moves them."""

    chat_template = "…"
    all_special_ids = (0,)
    words = ("<end>", "<user>", "<bot>")

    def __init__(self, moves: bool = False) -> None:
        self.moves = moves

    def apply_chat_template(self, conversation: object, *, tokenize: bool, add_generation_prompt: bool) -> object:
        assert isinstance(conversation, list)
        names = {"user": "<user>", "assistant": "<bot>"}
        parts = [f"{names[each['role']]}{each['content'].strip()}<end>" for each in conversation]
        if self.moves:
            parts = [part.replace(ANSWER_MARK, "") for part in parts]
        text = "".join(parts) + "<bot>"
        return self.encode(text) if tokenize else text

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        found, rest = [], text
        while rest:
            special = next((word for word in self.words if rest.startswith(word)), None)
            found.append(self.words.index(special) if special else 3 + ord(rest[0]))
            rest = rest[len(special) if special else 1 :]
        return found

    def get_vocab(self) -> dict[str, int]:
        return {"a": 1000}


SAID = [ChatMessage("user", "a"), ChatMessage("assistant", "b")]
MORE = [ChatMessage("user", "c")]
BEHIND = Trimming().encode("<end><user>c<end><bot>")


async def test_an_answer_cut_short_is_ended_by_the_template() -> None:
    assert await PromptEncoder(Trimming()).turn((50, 51), SAID, MORE) == (50, 51, *BEHIND)  # type: ignore[arg-type]


async def test_an_answer_that_ended_itself_is_not_ended_twice() -> None:
    assert await PromptEncoder(Trimming()).turn((50, 51, 0), SAID, MORE) == (50, 51, *BEHIND)  # type: ignore[arg-type]


async def test_a_template_that_moves_answers_renders_all_anew() -> None:
    anew = Trimming().encode("<user>a<end><bot>b<end><user>c<end><bot>")
    assert await PromptEncoder(Trimming(moves=True)).turn((50, 51), SAID, MORE) == tuple(anew)  # type: ignore[arg-type]


async def test_without_an_answer_all_is_rendered_anew() -> None:
    anew = Trimming().encode("<user>a<end><user>c<end><bot>")
    assert await PromptEncoder(Trimming()).turn((), SAID[:1], MORE) == tuple(anew)  # type: ignore[arg-type]
