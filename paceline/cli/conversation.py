"""One conversation of `paceline chat`: what was said, and the server's session that it is.

While both agree a turn is appended to the session, and nothing is sent twice. After an answer that was stopped or is
asked for anew, which the server does not have so, the conversation is sent whole once; then the session is that.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from paceline.cli.client import Answer, ChatOptions, Client, Message
from paceline.errors import ConfigError, UnknownSession

if TYPE_CHECKING:
    from paceline.cli.streaming import Display


class Conversation:
    """The history of one session and the answers to it."""

    def __init__(self, client: Client, options: ChatOptions, system: str | None = None) -> None:
        self._client = client
        self._options = options
        self._agreed = False
        self._previous: str | None = None
        self.system = system
        self.history: list[Message] = self._opening()
        self.answers: list[Answer] = []

    @property
    def session_id(self) -> str | None:
        return self._options.session_id

    def ask(self, text: str, display: Display) -> Answer:
        """Send one message, show the answer as it arrives and remember both.

        If it ends early the history keeps what was shown, or forgets the question if nothing was.
        """
        asked = Message("user", text)
        received: list[str] = []

        def show(piece: str) -> None:
            received.append(piece)
            display.text(piece)

        agreed, self._agreed = self._agreed, False
        try:
            with display:
                answer = self._answer(asked, agreed, show, display)
            self._agreed = self.session_id is not None
        finally:
            if received:
                self.history += [asked, Message("assistant", "".join(received))]
            else:
                self._agreed = self._agreed or agreed
        self.answers.append(answer)
        return answer

    def restart(self, system: str | None = None) -> None:
        """Forget everything said; the next message opens a new session, with this system prompt if there is one."""
        self.system = self.system if system is None else system
        self._switch(new_session_id(), self._opening(), agreed=False)

    def resume(self, session_id: str) -> int:
        """Go on in a stored session; how many messages it has. `back` is the one before. Raises UnknownSession."""
        wanted = self._previous if session_id == "back" and self._previous is not None else session_id
        said = self._client.messages(wanted)
        self._switch(wanted, said, agreed=bool(said))
        return len(said)

    def resume_or_begin(self, session_id: str) -> int:
        """As `resume`, or a new session of that name."""
        try:
            return self.resume(session_id)
        except UnknownSession:
            return 0

    def fork(self, name: str | None) -> str:
        """Go on in another session with the same history; its name. Raises UnknownSession, SessionConflict."""
        if self.session_id is None or not self._agreed:
            raise ConfigError("nothing to fork: the server has no complete answer of this conversation yet")
        fork = self._client.fork(self.session_id, name)
        self._switch(fork, list(self.history), agreed=True)
        return fork

    def take_back(self) -> str | None:
        """Forget the last answer and its question, which is returned; None if there is none."""
        if not self.history or self.history[-1].role != "assistant":
            return None
        *self.history, asked, _ = self.history
        self._agreed = False
        return asked.content

    def _answer(self, asked: Message, agreed: bool, show: Callable[[str], None], display: Display) -> Answer:
        if agreed:
            try:
                return self._client.chat([asked], self._options, show, append=True, on_step=display.step)
            except UnknownSession:
                pass  # the server forgot the session; we have not
        return self._client.chat([*self.history, asked], self._options, show, on_step=display.step)

    def _switch(self, session_id: str, history: list[Message], *, agreed: bool) -> None:
        self._previous = self.session_id
        self._options = replace(self._options, session_id=session_id)
        self.history, self.answers, self._agreed = history, [], agreed

    def _opening(self) -> list[Message]:
        return [Message("system", self.system)] if self.system else []


def new_session_id() -> str:
    return f"chat-{secrets.token_hex(6)}"
