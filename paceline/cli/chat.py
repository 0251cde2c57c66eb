"""`paceline chat`: talk to a running server, token by token."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from paceline.cli import options
from paceline.errors import PacelineError

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.cli.client import Answer, ChatOptions, Client, Message

EPILOG = """\b
Examples:
  paceline chat
  paceline chat "What is the capital of France?" --temperature 0
  paceline chat --system "You answer in one sentence." --session trip-planning
  paceline chat --ctx-size 512
"""

COMMANDS = "/new starts over, /stats sums up, /exit leaves"


def chat(
    message: options.Question = None,
    url: options.Url = options.DEFAULT_URL,
    session: options.Session = None,
    system: options.System = None,
    temperature: options.Temperature = 0.7,
    seed: options.Seed = None,
    max_tokens: options.MaxTokens = 512,
    ctx_size: options.CtxSize = None,
    no_speculation: options.NoSpeculation = False,
) -> None:
    """Chat with a running server, or ask it one question.

    In the interactive chat /new starts over, /stats sums up and /exit leaves; Ctrl-C stops the current answer and
    Ctrl-D leaves. After each answer a line says what it cost.
    """
    from paceline.cli.client import ChatOptions, Client
    from paceline.cli.console import stdout

    if message is None and session is None:
        session = new_session_id()
    chosen = ChatOptions(
        session_id=session,
        speculation=not no_speculation,
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens,
        ctx_size=ctx_size,
    )
    console = stdout()
    with Client(url) as client:
        conversation = Conversation(client, console, chosen, system)
        if message is not None:
            conversation.say(message)
        else:
            console.print(f"{client.model()} at {client.url}; {COMMANDS}", style="dim", markup=False)
            interact(conversation, console)


class Conversation:
    """The history of one session and the answers to it. The history lives here; the server holds a cache of it."""

    def __init__(self, client: Client, console: Console, options: ChatOptions, system: str | None) -> None:
        from paceline.cli.client import Message

        self._client = client
        self._console = console
        self._options = options
        self._opening = [Message("system", system)] if system is not None else []
        self.history: list[Message] = list(self._opening)
        self.answers: list[Answer] = []

    def restart(self) -> None:
        """Forget everything said; the next message opens a new session."""
        self.history = list(self._opening)
        self.answers = []
        self._options = replace(self._options, session_id=new_session_id())

    def say(self, text: str) -> None:
        """Send one message, print the answer as it arrives and remember both.

        If it ends early the history keeps what was printed, or forgets the question if nothing was.
        """
        from paceline.cli.client import Message
        from paceline.cli.console import printable
        from paceline.cli.stats import stats_line

        asked = Message("user", text)
        received: list[str] = []

        def show(piece: str) -> None:
            received.append(piece)
            self._console.out(printable(piece), end="", highlight=False)

        try:
            answer = self._client.chat([*self.history, asked], self._options, show)
        finally:
            if received:
                self._console.print()
                self.history += [asked, Message("assistant", "".join(received))]
        self.answers.append(answer)
        self._console.print(stats_line(answer), style="dim", markup=False, soft_wrap=True)


def interact(conversation: Conversation, console: Console, read: Callable[[str], str] = input) -> None:
    """Read lines and act on them until Ctrl-D or /exit."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` line editing and history)

    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = read(prompt).strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            note(console, "\nCtrl-D leaves")
            continue
        if line == "/exit":
            return
        if line:
            act(conversation, console, line)


def act(conversation: Conversation, console: Console, line: str) -> None:
    """Do what one line says: a command, or a message whose failure does not end the chat."""
    command = line.split()[0]
    if command == "/new":
        conversation.restart()
        note(console, "new session")
    elif command == "/stats":
        note(console, summary(conversation.answers))
    elif command.startswith("/"):
        note(console, f"unknown command {command}; {COMMANDS}")
    else:
        try:
            conversation.say(line)
        except KeyboardInterrupt:
            note(console, "stopped")
        except PacelineError as error:
            console.print(f"error: {error.message}", style="red", markup=False)


def note(console: Console, text: str) -> None:
    console.print(text, style="dim", markup=False)


def new_session_id() -> str:
    return f"chat-{secrets.token_hex(6)}"


def summary(answers: list[Answer]) -> str:
    """The session so far, in one line."""
    from paceline.cli.stats import drafts_in_words, total

    if not answers:
        return "no answers yet"
    metrics = total([answer.metrics for answer in answers])
    return (
        f"session {answers[-1].session_id}: {len(answers)} answers · {metrics.completion_tokens} tokens"
        f" · {metrics.cached_tokens} of {metrics.prompt_tokens} prompt tokens cached · {drafts_in_words(metrics)}"
    )
