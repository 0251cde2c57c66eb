"""`paceline chat`: talk to a running server, token by token."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.errors import PacelineError, UnknownSession

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.cli.client import Client
    from paceline.cli.conversation import Conversation

EPILOG = """\b
Examples:
  paceline chat
  paceline chat "What is the capital of France?" --temperature 0
  paceline chat --system "You answer in one sentence." --session trip-planning
  paceline chat --ctx-size 512
"""


def chat(
    message: options.Question = None,
    url: options.Url = options.DEFAULT_URL,
    api_key: options.ApiKey = None,
    session: options.Session = None,
    system: options.System = None,
    temperature: options.Temperature = 0.7,
    seed: options.Seed = None,
    max_tokens: options.MaxTokens = 512,
    ctx_size: options.CtxSize = None,
    no_speculation: options.NoSpeculation = False,
    plain: options.Plain = False,
) -> None:
    """Chat with a running server, or ask it one question.

    In the interactive chat /help lists the commands: /session, /stats, /fork and others. Tab completes them. Ctrl-C
    stops the current answer and Ctrl-D leaves. While an answer streams a line shows tokens a second and the share of
    candidates accepted; after it, a line says what it cost. The server keeps the history: with --session a
    conversation goes on where it ended.
    """
    from paceline.cli.client import ChatOptions, Client
    from paceline.cli.console import note, stdout
    from paceline.cli.conversation import Conversation, new_session_id
    from paceline.cli.stats import several

    begun = new_session_id() if message is None else None
    chosen = ChatOptions(
        session_id=session or begun,
        speculation=not no_speculation,
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens,
        ctx_size=ctx_size,
        return_token_ids=True,
    )
    console = stdout()
    with Client(url, api_key=api_key) as client:
        talk = Chat(client, console, Conversation(client, chosen, system), plain=plain)
        said = talk.conversation.resume_or_begin(session) if session is not None else 0
        if message is not None:
            talk.say(message)
            return
        note(console, f"{client.model()} at {client.url}; /help lists commands, Ctrl-D leaves")
        if said:
            note(console, f"session {session} goes on after {several(said, 'message')}")
        talk.interact()


class Chat:
    """A conversation on a console."""

    def __init__(self, client: Client, console: Console, conversation: Conversation, *, plain: bool = False) -> None:
        self._client = client
        self._plain = plain
        self.console = console
        self.conversation = conversation

    def interact(self, read: Callable[[str], str] = input) -> None:
        """Read messages and commands and act on them until Ctrl-D or /exit."""
        from paceline.cli.commands import COMMANDS, Leave
        from paceline.cli.console import note
        from paceline.cli.prompt import install_completion, read_message

        install_completion(list(COMMANDS), self._session_names)
        prompt = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                line = read_message(read, prompt)
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                note(self.console, "\nCtrl-D leaves")
                continue
            try:
                self.act(line)
            except Leave:
                return
            if self.console.is_terminal:
                self.console.print()

    def act(self, line: str) -> None:
        """Do what one message says: a command, or a question. A failure does not end the chat."""
        from paceline.cli import commands
        from paceline.cli.console import note

        try:
            if line.startswith("/"):
                commands.act(self, line)
            elif line:
                self.say(line)
        except KeyboardInterrupt:
            note(self.console, "stopped")
        except PacelineError as error:
            self.console.print(f"error: {error.message}", style="red", markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Ask, show the answer as it arrives, and what it cost."""
        from paceline.cli.console import note
        from paceline.cli.stats import stats_line
        from paceline.cli.streaming import display_for

        answer = self.conversation.ask(text, display_for(self.console, plain=self._plain))
        note(self.console, stats_line(answer))

    def recall(self, text: str) -> None:
        """Show what was said earlier."""
        from paceline.cli.streaming import display_for

        with display_for(self.console, plain=self._plain) as display:
            display.text(text)

    def known(self, session_id: str) -> dict[str, Any]:
        """What the server knows of a session; nothing if it has none."""
        try:
            return self._client.session(session_id)
        except UnknownSession:
            return {}

    def _session_names(self) -> list[str]:
        """For completion, which must not fail."""
        try:
            return [str(card["session_id"]) for card in self._client.sessions()]
        except (PacelineError, KeyError):
            return []
