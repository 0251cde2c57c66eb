"""What begins with a slash in `paceline chat`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.cli.console import note
from paceline.cli.stats import several, source_table, summary_line
from paceline.errors import ConfigError
from paceline.speculation.telemetry import merged

if TYPE_CHECKING:
    from paceline.cli.chat import Chat


@dataclass(frozen=True, slots=True)
class Command:
    """`run` gets the chat and what stands behind the name."""

    usage: str
    help: str
    run: Callable[[Chat, str], None]


class Leave(Exception):
    """The chat is over."""


def act(chat: Chat, line: str) -> None:
    """Do what a line says. Raises PacelineError, and Leave if the chat is over."""
    name, _, argument = line.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise ConfigError(f"unknown command {name}; /help lists them")
    command.run(chat, argument.strip())


def show_help(chat: Chat, argument: str) -> None:  # noqa: ARG001
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for command in COMMANDS.values():
        table.add_row(Text(command.usage, style="bold"), Text(command.help))
    chat.console.print(table)
    note(chat.console, 'A line that ends with \\ goes on in the next one; """ begins and ends several lines.')


def session(chat: Chat, argument: str) -> None:
    """Switch to another session, or show where this one is."""
    talk = chat.conversation
    if argument:
        count = talk.resume(argument)
        note(chat.console, f"session {talk.session_id}, {several(count, 'message')}")
        if count and talk.history[-1].role == "assistant":
            chat.recall(talk.history[-1].content)
        return
    known = {} if talk.session_id is None else chat.known(talk.session_id)
    note(chat.console, f"session {talk.session_id}: {session_line(known) if known else 'new'}")


def session_line(card: Mapping[str, Any]) -> str:
    """Where a session is and how large, in one line."""
    home = card.get("replica_id")
    held = f"{card.get('cached_tokens', 0)} KV tokens on {card.get('kv_tier') or 'device'} of target {home}"
    parts = [held if home else "no replica holds its KV"]
    if card.get("turns") is not None:
        parts.append(f"{card.get('history_tokens')} tokens in {several(card['turns'], 'turn')}")
    if card.get("parent"):
        parts.append(f"fork of {card['parent']}")
    return " · ".join(parts)


def stats(chat: Chat, argument: str) -> None:  # noqa: ARG001
    answers = chat.conversation.answers
    if not answers:
        note(chat.console, "no answers yet")
        return
    note(chat.console, f"session {answers[-1].session_id}: {summary_line(answers)}")
    if (table := source_table(merged(answer.metrics.sources for answer in answers))) is not None:
        chat.console.print(table, style="dim")


def fork(chat: Chat, argument: str) -> None:
    before = chat.conversation.session_id
    name = chat.conversation.fork(argument or None)
    note(chat.console, f"session {name}, a fork of {before}; /session back returns")


def new(chat: Chat, argument: str) -> None:  # noqa: ARG001
    chat.conversation.restart()
    note(chat.console, "new session")


def retry(chat: Chat, argument: str) -> None:  # noqa: ARG001
    question = chat.conversation.take_back()
    if question is None:
        raise ConfigError("nothing to ask again")
    note(chat.console, f"> {question}")
    chat.say(question)


def system(chat: Chat, argument: str) -> None:
    if not argument:
        note(chat.console, f"system prompt: {chat.conversation.system or 'none'}")
        return
    chat.conversation.restart(argument)
    note(chat.console, "new session with this system prompt")


def save(chat: Chat, argument: str) -> None:
    if not argument:
        raise ConfigError("/save needs a file's name")
    path = Path(argument).expanduser()
    said = [f"**{message.role}**\n\n{message.content.strip()}\n" for message in chat.conversation.history]
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write("\n".join(said))
    except OSError as error:
        raise ConfigError(f"/save: {path}: {error.strerror or error}") from None
    note(chat.console, f"{several(len(said), 'message')} in {path}")


def leave(chat: Chat, argument: str) -> None:  # noqa: ARG001
    raise Leave


COMMANDS = {
    "/session": Command("/session [ID]", "where this session is; or go on in another one, back: in the last", session),
    "/stats": Command("/stats", "what this conversation cost, and each source of candidates", stats),
    "/fork": Command("/fork [NAME]", "go on in a second session with the same history", fork),
    "/retry": Command("/retry", "ask the last question again", retry),
    "/new": Command("/new", "start over in a new session", new),
    "/system": Command("/system [TEXT]", "the system prompt; with a text, start over under it", system),
    "/save": Command("/save FILE", "write the conversation as Markdown", save),
    "/help": Command("/help", "this list", show_help),
    "/exit": Command("/exit", "leave, as Ctrl-D does", leave),
}
