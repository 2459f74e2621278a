"""Progress on a terminal as one line that fits its width, and lines printed above it.

Where the error stream is not a terminal, as in a job's log, nothing is drawn; whatever makes
progress prints a line now and then instead.
"""

import logging
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import Progress, Task
from rich.text import Text

ETA = "{eta}"  # stands for the time that is left among the parts of a line
_SEPARATOR = " · "
_ERASE_LINE = "\r\x1b[2K"
_WIDEST_BAR, _WIDE_BAR, _NARROWEST_BAR = 30, 10, 4  # columns


class FittedProgress(Progress):
    """A line a task: title, count, bar, and as many of the task's parts as there is room for.

    Fields of a task: `parts`, texts of which the most important comes first and those up to `ETA`
    are essential; `ends`, when it will be done as `time.monotonic()` tells it, if that is
    better known than by the speed so far.

    Args:
        console: where it is drawn; nothing is drawn if that is not a terminal.
        transient: whether the line vanishes at the end.
    """

    def __init__(self, console: Console, transient: bool = False) -> None:
        super().__init__(console=console, transient=transient, disable=not console.is_terminal)

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield _Line(task)


class _Line:
    """A task, drawn anew at each refresh for the width that the terminal has then."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        task = self._task
        ends = task.fields.get("ends")
        left = task.time_remaining if ends is None else max(0.0, ends - time.monotonic())
        parts: Sequence[str] = task.fields.get("parts", (ETA,))
        essential = parts.index(ETA) + 1 if ETA in parts else 0
        shown = [f"ETA {clock(left)}" if part == ETA else part for part in parts]
        done, total = int(task.completed), int(task.total or 0)
        yield fitted_line(task.description, done, total, shown, essential, options.max_width)


def fitted_line(
    title: str, done: int, total: int, parts: Sequence[str], essential: int, width: int
) -> Text:
    """`title done/total bar part · part …` in at most `width` columns.

    Args:
        title: empty for none; cut at a third of the width.
        parts: in order of importance; those from the first that does not fit on are left out.
        essential: so many parts come before a wide bar, the title, and any bar.
    """
    title = title if cell_len(title) <= width // 3 else title[: max(0, width // 3 - 1)] + "…"
    count = f"{done:,}/{total:,} " if total else f"{done:,} "
    titled = f"{title} {count}".lstrip()
    kept: list[str] = []
    for head, least in (
        (titled, _WIDE_BAR),
        (titled, _NARROWEST_BAR),
        (count, _NARROWEST_BAR),
        (count, 0),
    ):
        room = width - cell_len(head) - 3  # so that a ^C at the end does not wrap
        kept = _fitting(parts, room - least)
        if len(kept) >= essential:
            break
    tail = _SEPARATOR.join(kept)
    line = Text(head, no_wrap=True, overflow="ellipsis")
    bar = min(_WIDEST_BAR, room - cell_len(tail) - 1)
    if bar >= _NARROWEST_BAR and total:
        filled = bar * min(done, total) // total
        line.append("━" * filled, "bar.complete").append("─" * (bar - filled), "bar.back")
        line.append(" ")
    return line.append(tail)


def _fitting(parts: Sequence[str], room: int) -> list[str]:
    kept: list[str] = []
    for part in parts:
        if cell_len(_SEPARATOR.join([*kept, part])) >= room:
            break
        kept.append(part)
    return kept


def clock(seconds: float | None) -> str:
    """M:SS, H:MM:SS or D days, H:MM:SS."""
    return "–" if seconds is None else str(timedelta(seconds=round(seconds))).removeprefix("0:")


def print_line(text: str) -> None:
    """A line on the error stream, above a bar that this or another process is drawing there."""
    erase = _ERASE_LINE if sys.stderr.isatty() else ""
    print(f"{erase}{text}", file=sys.stderr, flush=True)


class LineHandler(logging.Handler):
    """Log records as lines above a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print_line(self.format(record))
        except Exception:  # as all handlers do: an error of logging ends nothing
            self.handleError(record)


def log_above_bars(level: int = logging.WARNING) -> None:
    """Sets logging up for a command line."""
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", handlers=[LineHandler()])
