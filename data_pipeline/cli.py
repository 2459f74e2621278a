"""Command line of the data pipeline: `maskbank shards …`."""

import typer

from data_pipeline.inspect_cli import add_commands
from data_pipeline.source_cli import build_app
from data_pipeline.terminal import run_app

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(build_app, name="build", help="Pack images, masks and labels into WebDataset shards.")
add_commands(app)


@app.callback()
def shards() -> None:
    """Prepare shards for training and evaluation."""


def main(arguments: list[str] | None = None) -> None:
    run_app(app, "maskbank shards", arguments)


if __name__ == "__main__":
    main()
