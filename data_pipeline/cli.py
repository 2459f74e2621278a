"""Command line of the data pipeline: `maskbank shards …`."""

import signal
import sqlite3
import sys
import tempfile

import typer

from data_pipeline.build_cli import Interrupted
from data_pipeline.errors import InputError
from data_pipeline.inspect_cli import add_commands
from data_pipeline.source_cli import build_app

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(build_app, name="build", help="Pack images, masks and labels into WebDataset shards.")
add_commands(app)


@app.callback()
def shards() -> None:
    """Prepare shards for training and evaluation."""


def main(arguments: list[str] | None = None) -> None:
    try:
        app(args=arguments, prog_name="maskbank shards")
    except InputError as error:
        print(f"maskbank: {error}", file=sys.stderr)
        sys.exit(2)
    except sqlite3.OperationalError as error:
        print(
            f"maskbank: the temporary database in {tempfile.gettempdir()} fails ({error}); "
            "give TMPDIR a folder with space and run the same command again",
            file=sys.stderr,
        )
        sys.exit(1)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"maskbank: {what}", file=sys.stderr)
        sys.exit(1)
    except (Interrupted, KeyboardInterrupt):
        print(
            "maskbank: interrupted; run the same command again to go on: finished shards are kept",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
