"""Command line of the evaluations: `maskbank evaluate …`; under torchrun they share the work."""

import sys
from importlib import import_module

import typer

from data_pipeline.progress import log_above_bars
from data_pipeline.terminal import CHECK_ARGUMENTS, run_app

# a command's function has its name, in a file that is loaded when it is wanted: a report needs
# none of the seconds that torch takes
COMMANDS = {
    "cluster": "cluster",
    "kmeans": "kmeans",
    "linear": "linear",
    "retrieval": "retrieval",
    "finetune": "finetune",
    "transfer": "transfer",
    "video": "video",
    "table": "table",
    "report": "report",
    "compare": "report",
}
IN_ONE_PROCESS = {"report", "compare"}


def build_app(arguments: list[str]) -> typer.Typer:
    """The command that the arguments name, or all of them, for the help."""
    app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")

    @app.callback()
    def evaluate() -> None:
        """Measure what a trained network knows, on labelled shards or a data set where it lies."""
        log_above_bars()

    wanted = arguments[:1] if arguments[:1] and arguments[0] in COMMANDS else list(COMMANDS)
    for name in wanted:
        module = import_module(f"evaluation.commands.{COMMANDS[name]}")
        app.command(name)(getattr(module, name))
    return app


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    named = given[1:] if given[:1] == [CHECK_ARGUMENTS] else given
    run_app(build_app(named), "maskbank evaluate", given, on_ranks=COMMANDS.keys() - IN_ONE_PROCESS)


if __name__ == "__main__":
    main()
