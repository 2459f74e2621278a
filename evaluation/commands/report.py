"""`maskbank evaluate report` and `maskbank evaluate compare`."""

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from data_pipeline.errors import InputError
from data_pipeline.files import require_writable_file
from evaluation.compare import read_columns, show_comparison, write_comparison
from evaluation.report import write_report

console = Console(width=None)


def report(
    run: Annotated[Path, typer.Argument(help="Run directory, or another folder of results.")],
    output: Annotated[Optional[Path], typer.Option(help="Where; default RUN/report.html.")] = None,  # noqa: UP045 (typer)
) -> None:
    """One self-contained HTML page about a run: numbers, pictures, curves, tables.

    Example: `maskbank evaluate report runs/demo`
    """
    require_writable_file(output or run / "report.html")
    console.print(f"report: {write_report(run, output)}", soft_wrap=True)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or folders of results.")],
    html: Annotated[Optional[Path], typer.Option(help="Write a page, too.")] = None,  # noqa: UP045 (typer)
) -> None:
    """Several runs side by side: every figure, the settings that differ, curves, pictures.

    Example: `maskbank evaluate compare runs/a runs/b --html compared.html`
    """
    if html is not None:
        require_writable_file(html, "--html")
    columns = read_columns(runs)
    if len(columns) < 2:
        raise InputError(f"{runs[0]} is one network; give a second run to compare it with")
    show_comparison(columns, console)
    if html is not None:
        write_comparison(columns, html)
        console.print(f"written: {html}", soft_wrap=True)
