"""An answer on its way to the screen: Markdown block by block on a terminal, plain text elsewhere.

printed for good   finished blocks, which the terminal scrolls as any other text
────────────────
drawn anew         the block that still grows, as much of its end as fits, and a line with tokens/s and acceptance
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Heading, Markdown
from rich.segment import Segment
from rich.text import Text

from paceline.cli.console import printable
from paceline.cli.stats import Meter

if TYPE_CHECKING:
    from paceline.cli.client import Step

REFRESHES_PER_S = 12
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ITEM = re.compile(r"\s*([-*+]|\d{1,9}[.)])\s")
_HEADING = re.compile(r"#{1,6}\s")


class Display(ABC):
    """Where one answer goes while it streams. A context manager; however it ends, what came is left on the screen."""

    @abstractmethod
    def text(self, piece: str) -> None:
        """More of the answer."""

    @abstractmethod
    def step(self, step: Step) -> None:
        """What an engine step brought."""

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def display_for(console: Console, *, plain: bool) -> Display:
    return PlainDisplay(console) if plain or not console.is_terminal else MarkdownDisplay(console)


class PlainDisplay(Display):
    """Text as it comes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._any = False

    def text(self, piece: str) -> None:
        self._any = True
        self._console.out(printable(piece), end="", highlight=False)

    def step(self, step: Step) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._any:
            self._console.print()


class MarkdownDisplay(Display):
    """Markdown; the block that grows, and the figures, are drawn a dozen times a second."""

    def __init__(self, console: Console, meter: Meter | None = None) -> None:
        self._console = console
        self._meter = meter or Meter()
        self._growing = ""
        self._before = ""
        self._live = Live(
            console=console, get_renderable=self._view, refresh_per_second=REFRESHES_PER_S, transient=True
        )

    def text(self, piece: str) -> None:
        self._growing += printable(piece)
        while ends := finished(self._growing):
            done, self._growing = self._growing[:ends], self._growing[ends:]
            self._print(done)

    def step(self, step: Step) -> None:
        self._meter.note(step)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        rest, self._growing = self._growing, ""
        self._live.stop()
        self._print(rest)

    def _print(self, block: str) -> None:
        if not block.strip():
            return
        self._console.print(Group(*self._spaced(block)))
        self._before = block

    def _view(self) -> RenderableType:
        figures = Text(self._meter.line(), style="dim")
        if not self._growing.strip():
            return figures
        return Group(Tail(Group(*self._spaced(self._growing)), spare=2), figures)

    def _spaced(self, block: str) -> list[RenderableType]:
        """A block, an empty line above it unless it is the first, or one of several items of a list."""
        together = not self._before or (_ITEM.match(self._before) and _ITEM.match(block))
        return [Block(block)] if together else ["", Block(block)]


class Block:
    """A block without the empty lines that Rich puts around some kinds."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(markdown(self._text), options, pad=False)
        said = [n for n, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
        for line in lines[said[0] : said[-1] + 1] if said else []:
            yield from line
            yield Segment.line()


class Tail:
    """The last lines of something, as many as the terminal has, less `spare`."""

    def __init__(self, content: RenderableType, spare: int) -> None:
        self._content, self._spare = content, spare

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options, pad=False)
        for line in lines[-max(1, console.height - self._spare) :]:
            yield from line
            yield Segment.line()


class LeftHeading(Heading):
    """Rich centres headings and draws a box around the first kind."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        self.text.stylize("bold")
        yield self.text


class ModelMarkdown(Markdown):
    """What a model writes: HTML is text, links show where they lead, code has the terminal's own colours."""

    elements: ClassVar = {**Markdown.elements, "heading_open": LeftHeading}


def markdown(text: str) -> Markdown:
    found = ModelMarkdown("", code_theme="ansi_dark", hyperlinks=False)
    found.parsed = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).parse(text)
    return found


def finished(text: str) -> int:
    """How much of a growing text is its first block, if nothing said later changes that; else 0.

    A block ends where a fence closes, after a heading's line, and at an empty line once the next one has begun without
    an indent, which could belong to a list.
    """
    at, fence, empty = 0, "", False
    for line in text.splitlines(keepends=True):
        whole = line.endswith("\n")
        opened = _FENCE.match(line)
        if fence:
            if whole and opened is not None and opened[1].startswith(fence) and not line.strip(" `~\n"):
                return at + len(line)
        elif line.strip():
            if empty and not line[0].isspace():
                return at
            if opened is not None:
                fence = opened[1]
            elif whole and _HEADING.match(line):
                return at + len(line)
            empty = False
        else:
            empty = whole
        at += len(line)
    return 0
