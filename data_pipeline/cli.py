"""Command line of the data pipeline: `maskbank shards …`."""

import signal
import sqlite3
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.build_cli import Interrupted, build_command
from data_pipeline.errors import InputError
from data_pipeline.sources.item import Listing, read_class_names

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")
build_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(build_app, name="build", help="Pack images, masks and labels into WebDataset shards.")


@app.callback()
def shards() -> None:
    """Prepare shards for training and evaluation."""


@build_command(build_app)
def folder(
    images: Annotated[str, typer.Option(help="Folder of images, searched recursively.")],
    masks: Annotated[str | None, typer.Option(help="Folder of masks, same stems.")] = None,
    labels: Annotated[str | None, typer.Option(help="Folder of class-index labels.")] = None,
    classes: Annotated[Path | None, typer.Option(help="Class names, one a line.")] = None,
) -> Listing:
    """Images and masks in two folders, matched by relative path and stem.

    Example: `maskbank shards build folder --images photos --masks masks -o shards/train`
    """
    from data_pipeline.sources.folder import list_folder

    if (labels is None) != (classes is None):
        raise InputError(
            "--labels and --classes go together: evaluation needs a name for every class index; "
            "give both, or neither"
        )
    names = () if classes is None else read_class_names(classes)
    return list_folder(Path(images), masks and Path(masks), labels and Path(labels), names)


@build_command(build_app)
def voc(
    root: Annotated[Path, typer.Option(help="The PASCAL tree: released layout or VOCdevkit.")],
    split: Annotated[str, typer.Option(help="Name of the split's list: trainaug, train, val.")],
    masks: Annotated[str | None, typer.Option(help="Folder of masks, in the tree or not.")] = None,
    labels: Annotated[bool, typer.Option(help="Take the labels along.")] = True,
) -> Listing:
    """A split of PASCAL VOC, in the released archive's layout or VOCdevkit's.

    Example: `maskbank shards build voc --root VOCSegmentation --split trainaug
    --masks saliency_unsupervised_model -o shards/trainaug`
    """
    from data_pipeline.sources.voc import list_voc

    return list_voc(root, split, masks, labels)


@build_command(build_app)
def scenes(
    count: Annotated[int, typer.Option(help="Scenes to generate.")] = 1000,
    size: Annotated[int, typer.Option(help="About how many pixels a side.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the series; another for another split.")] = 0,
) -> Listing:
    """Generated scenes with masks and labels: data to try everything on.

    Example: `maskbank shards build scenes --count 1000 -o shards/scenes`
    """
    from data_pipeline.sources.generated import list_scenes

    return list_scenes(count, seed, size)


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
