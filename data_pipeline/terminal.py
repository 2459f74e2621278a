"""What the command lines of this package share: options, progress, and how they end."""

import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable, Container, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from data_pipeline.errors import InputError
from data_pipeline.progress import FittedProgress

console = Console(stderr=True, emoji=False)  # `:b:` in a path or key is no emoji


CHECK_ARGUMENTS = "--check-arguments"


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


def run_app(
    app: typer.Typer, name: str, arguments: list[str] | None, on_ranks: Container[str] = ()
) -> None:
    """Runs a command line; what goes wrong is one paragraph, of which rank, and an exit status.

    Args:
        app: its commands.
        name: as the user calls it.
        arguments: `None` takes those of the process. After `--check-arguments` they are parsed, as
            they would be, and nothing is run.
        on_ranks: names of the commands whose work several ranks can share.
    """
    rank = os.environ.get("RANK", "0")
    speaker = "maskbank" if rank == "0" else f"maskbank: rank {rank}"
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    commands = _commands(command)
    for one in commands:
        if one.name in on_ranks:
            one.params.append(_nproc())
        elif on_ranks and not _below(one) and os.environ.get("WORLD_SIZE", "1") != "1":
            one.callback = _refuse_ranks
    if given[:1] == [CHECK_ARGUMENTS]:
        given = given[1:]
        for one in commands:
            one.callback = None
    try:
        command(given, name, help_option_names=["-h", "--help"])
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


def _commands(command: Any) -> list[Any]:
    """A command of typer and all below it."""
    return [command, *(one for each in _below(command) for one in _commands(each))]


def _below(command: Any) -> list[Any]:
    return list(getattr(command, "commands", {}).values())


def _nproc() -> Any:
    """`--nproc`, for the help: `maskbank` takes it out before it starts the ranks."""
    app = typer.Typer()

    @app.command()
    def holder(
        nproc: Annotated[
            int | None,
            typer.Option(
                metavar="N",
                help="Ranks on this machine: one a GPU, or CPU part. Default: 1.",
                callback=_refuse_nproc,
            ),
        ] = None,
    ) -> None: ...

    (option,) = (one for one in typer.main.get_command(app).params if one.name == "nproc")
    option.expose_value = False
    return option


def _refuse_nproc(value: int | None) -> None:
    if value is not None:
        raise InputError(
            f"--nproc {value} is for `maskbank`, which starts the ranks; here they are torchrun's "
            "--nproc-per-node, or --gpus-per-node or --ranks-per-node of `maskbank submit`"
        )


def _refuse_ranks(**_: Any) -> None:
    raise InputError("this command works in one process; leave --nproc out")
