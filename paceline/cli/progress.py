"""How getting a model ready looks: bars on a terminal, one line for each step in a log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars
from rich.progress import Task as BarTask
from rich.table import Column
from rich.text import Text

from paceline.models import Progress, Task


@contextmanager
def model_progress(console: Console) -> Iterator[Progress]:
    """A `paceline.models.Progress` that shows on `console`; what it drew is gone at the end of the context."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True)),
        BarColumn(bar_width=24),
        _BytesOnly(DownloadColumn()),
        _BytesOnly(TransferSpeedColumn()),
        _BytesOnly(TimeRemainingColumn(compact=True)),
        _StepsOnly(TimeElapsedColumn()),
    )
    with Bars(*columns, console=console, transient=True, expand=True) as bars:
        yield _Bars(bars)


class _Bars:
    """Each step is one bar, taken away when the step ends."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        task = self._bars.add_task(escape(label), total=total)
        try:
            yield _BarTask(self._bars, task)
        finally:
            self._bars.remove_task(task)


class _BarTask:
    def __init__(self, bars: Bars, task: int) -> None:
        self._bars = bars
        self._task = task

    def advance(self, n: int) -> None:
        self._bars.advance(self._task, n)  # type: ignore[arg-type]


class _Lines:
    """Each step is one line, printed when it begins: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        size = "" if total is None else f" ({total / 1e6:.0f} MB)"
        self._console.print(Text(f"{label}{size}"), soft_wrap=True)
        yield _LineTask()


class _LineTask:
    def advance(self, n: int) -> None:
        pass


class _BytesOnly(ProgressColumn):
    """`column` where bytes are counted, nothing elsewhere."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def shows(self, task: BarTask) -> bool:
        return task.total is not None or task.completed > 0

    def render(self, task: BarTask) -> Text:
        rendered = self._column(task) if self.shows(task) else Text()
        return rendered if isinstance(rendered, Text) else Text(str(rendered))


class _StepsOnly(_BytesOnly):
    """`column` where no bytes are counted."""

    def shows(self, task: BarTask) -> bool:
        return not super().shows(task)
