"""Command line of the evaluations: `maskbank evaluate …`; under torchrun they share the work."""

import logging
import os
import sys

import typer

from data_pipeline.errors import InputError
from evaluation.commands.finetune import finetune
from evaluation.commands.kmeans import kmeans
from evaluation.commands.linear import linear
from evaluation.commands.report import compare, report
from evaluation.commands.retrieval import retrieval
from evaluation.commands.table import table
from evaluation.commands.transfer import transfer
from evaluation.commands.video import video

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def evaluate() -> None:
    """Measure what a trained network knows, on labelled shards or on a data set where it lies."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")


for command in (kmeans, linear, retrieval, finetune, transfer, video, table, report, compare):
    app.command()(command)


def main(arguments: list[str] | None = None) -> None:
    rank = os.environ.get("RANK", "0")
    speaker = "maskbank" if rank == "0" else f"maskbank: rank {rank}"
    try:
        app(args=arguments, prog_name="maskbank evaluate")
    except InputError as error:
        print(f"{speaker}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:
        print(f"{speaker}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
