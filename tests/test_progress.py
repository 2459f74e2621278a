"""Progress fits the terminal: what matters first, and nothing runs into it."""

import io
import logging
import os
import pty
import subprocess
import sys

import pytest
from rich.console import Console

from data_pipeline.progress import (
    ETA,
    FittedProgress,
    LineHandler,
    clock,
    fitted_line,
    print_line,
)

PARTS = ("loss 2.809", "56 images/s", "ETA 1:02:33", "K-means 12.3", "accuracy 8.1%", "lr 0.2")


@pytest.mark.parametrize("width", range(1, 201))
def test_a_line_never_wraps(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    line = fitted_line("making masks of pictures", 1234, 400_000, PARTS, 3, width)
    assert len(console.render_lines(line, pad=False)) == 1


@pytest.mark.parametrize(
    ("width", "first", "shown"),
    [
        (60, "1,234/4,000 ━", 3),
        (80, "step 1,234/4,000 ━━", 3),
        (120, "step 1,234/4,000 ━━", 6),
        (160, "step 1,234/4,000 ━━━━━━━━━", 6),
    ],
)
def test_what_matters_comes_first(width: int, first: str, shown: int) -> None:
    line = fitted_line("step", 1234, 4000, PARTS, 3, width).plain
    assert line.startswith(first)
    assert line.endswith("─ " + " · ".join(PARTS[:shown]))
    assert len(line) <= width - 2


def test_without_a_total_it_counts() -> None:
    assert fitted_line("reading", 7, 0, ["3 failed"], 0, 80).plain == "reading 7 3 failed"


def test_remaining_time_is_as_on_a_clock() -> None:
    assert [clock(s) for s in (None, 3.2, 75, 3800, 93_000)] == [
        *("–", "00:03", "01:15", "1:03:20", "1 day, 1:50:00")
    ]


def test_a_task_shows_its_parts_and_the_time_that_is_left() -> None:
    console = Console(file=io.StringIO(), width=70, force_terminal=True)
    progress = FittedProgress(console)
    task = progress.add_task("step", total=8, parts=("loss 1.500", ETA), ends=0.0)
    progress.advance(task, 4)
    (line,) = console.render_lines(progress.get_renderable())
    text = "".join(segment.text for segment in line).rstrip()
    assert text == f"step 4/8 {'━' * 15}{'─' * 15} loss 1.500 · ETA 00:00"


def test_log_lines_erase_a_bar_before_them_and_do_so_on_terminals_alone() -> None:
    """What another rank prints lands in the line that rank 0 is drawing."""
    program = (
        "import logging\n"
        "from data_pipeline.progress import log_above_bars\n"
        "log_above_bars()\n"
        "logging.getLogger('trainer.x').warning('disk')\n"
    )
    command = [sys.executable, "-c", program]
    plain = subprocess.run(command, stderr=subprocess.PIPE, check=True)
    assert plain.stderr == b"WARNING: disk\n"
    ours, theirs = pty.openpty()
    subprocess.run(command, stderr=theirs, check=True)
    assert os.read(ours, 1000) == b"\r\x1b[2KWARNING: disk\r\n"
    os.close(ours)
    os.close(theirs)


def test_lines_of_the_process_that_draws_are_above_its_bar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=60, force_terminal=True)
    record = logging.LogRecord("x", logging.WARNING, "", 0, "disk", None, None)
    monkeypatch.setattr(sys, "stderr", screen)
    with FittedProgress(console) as progress:
        progress.add_task("step", total=2)
        progress.refresh()
        LineHandler().emit(record)
        print_line("maskbank: done")
    lines = screen.getvalue().split("\n")
    for text in ("disk", "maskbank: done"):
        (line,) = [line for line in lines if text in line]
        assert line.endswith(text)  # nothing of the bar is left in it
