"""What the command lines of this package share: options, progress, and how they end."""

import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import typer
from rich.console import Console

from data_pipeline.errors import InputError
from data_pipeline.progress import FittedProgress

console = Console(stderr=True, emoji=False)  # `:b:` in a path or key is no emoji


class Interrupted(Exception):
    """Ctrl-C, after everything has been put in order; says what is left."""


def option(panel: str) -> Callable[..., Any]:
    """Makes options that help shows in one panel: `option("How")("help", "--name", …)`."""

    def make(help: str, *names: str, **more: Any) -> Any:
        return typer.Option(*names, help=help, rich_help_panel=panel, **more)

    return make


def with_shared_options(
    own: Callable[..., Any],
    shared: Mapping[str, inspect.Parameter],
    run: Callable[[dict[str, Any], dict[str, Any]], None],
    shared_first: bool = False,
) -> Callable[..., None]:
    """A command with the options of `own` and the shared ones, for typer to read.

    Args:
        own: its name, help and options are the command's.
        shared: further options.
        run: called with the values of both kinds.
        shared_first: in help.
    """
    kinds = [inspect.signature(own).parameters, shared]
    parameters = [each for kind in kinds[:: -1 if shared_first else 1] for each in kind.values()]

    @functools.wraps(own)
    def command(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in shared}
        run(arguments, given)

    signature = inspect.Signature(
        [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    )
    command.__signature__ = signature  # type: ignore[attr-defined]  # functions may have one
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def progress_bar() -> FittedProgress:
    """A bar on a terminal, nothing elsewhere; gone at the end, where a table says the same."""
    return FittedProgress(console, transient=True)


def print_tenths(before: int, done: int, total: int, text: str) -> None:
    """Where no bar is seen, as in a log: `text` each time another tenth is done."""
    if not console.is_terminal and 10 * before // total < 10 * done // total:
        print(text, file=sys.stderr)


def run_app(app: typer.Typer, name: str, arguments: list[str] | None) -> None:
    """Runs a command line; what goes wrong is one paragraph, of which rank, and an exit status."""
    rank = os.environ.get("RANK", "0")
    speaker = "maskbank" if rank == "0" else f"maskbank: rank {rank}"
    try:
        app(args=arguments, prog_name=name)
    except InputError as error:
        print(f"{speaker}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"{speaker}: {what}", file=sys.stderr, flush=True)
        sys.exit(1)
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"{speaker}: {str(stop) or 'interrupted'}", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
