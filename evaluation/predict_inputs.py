"""Images to predict: those that paths, folders and patterns name, and what outputs are called."""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.sources.match_trees import pictures

# folders below the output, one for each kind that --write can name
OUTPUT_KINDS = ("colour", "index", "overlay", "saliency", "embedding", "imagenet-s")
LEGEND = "legend.png"
_LONGEST = 200  # bytes of a name in a folder; suffixes and what `atomic_write` adds come on top


@dataclass(frozen=True)
class PictureFile:
    """An image file.

    Attributes:
        path: of the file.
        name: of its outputs, relative, `/` between folders, without suffix; no other image has it.
    """

    path: str
    name: str


def find_pictures(arguments: Sequence[str], output: Path) -> list[PictureFile]:
    """The images that arguments name, each once, in the order of their paths.

    A folder is searched deeply, hidden files and those without an image's suffix aside; a file is
    taken whatever it is called. Names are relative to a folder that is the only argument, to the
    part of a pattern without wildcards, and else to the folder that all arguments have in common.
    What an earlier prediction wrote to `output` is passed over.

    Args:
        arguments: files, folders, or patterns such as `photos/**/*.jpg`.
        output: folder of predictions.

    Raises:
        InputError: an argument names nothing, or there is no image at all.
    """
    root = os.path.realpath(output)
    if any(os.path.isdir(each) and os.path.realpath(each) == root for each in arguments):
        raise InputError(f"--output {output} is a folder of images itself; give another one")
    written = tuple(
        os.path.join(root, *each) for each in ((LEGEND,), *((k, "") for k in OUTPUT_KINDS))
    )
    paths = sorted(
        path
        for path in {path for argument in arguments for path in _expand(argument)}
        if not os.path.realpath(path).startswith(written)
    )
    if not paths:
        raise InputError(
            f"{', '.join(arguments)} holds no image; give image files, folders of images (what was "
            "written to --output is not read), or a pattern in quotes"
        )
    base = _common_folder(arguments)
    names = _names([os.path.relpath(path, base) for path in paths])
    return [PictureFile(*each) for each in zip(paths, names, strict=True)]


def _expand(argument: str) -> Iterator[str]:
    """Absolute paths of the images that an argument names."""
    if os.path.isdir(argument):
        folder = os.path.abspath(argument)
        yield from (os.path.join(folder, path) for path in pictures(Path(folder)))
    elif os.path.lexists(argument):
        yield os.path.abspath(argument)
    elif glob.has_magic(argument):
        matches = list(glob.iglob(argument, recursive=True))
        if not matches:
            raise InputError(f"no file is called {argument}")
        for path in matches:
            # of `**/*.jpg` and `**` the files; a folder whose files match too is not searched twice
            if not os.path.isdir(path):
                yield os.path.abspath(path)
            elif "**" not in argument:
                yield from _expand(path)
    else:
        raise InputError(f"there is no file, folder or pattern {argument}")


def _common_folder(arguments: Sequence[str]) -> str:
    folders = []
    for argument in arguments:
        path = os.path.abspath(argument)
        if os.path.isdir(argument) and len(arguments) == 1:
            return path
        if not os.path.lexists(argument):
            parts = path.split(os.sep)
            first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
            path = os.sep.join(parts[: first + 1])
        folders.append(os.path.dirname(path))
    return os.path.commonpath(folders)


def _names(paths: list[str]) -> Iterator[str]:
    """Distinct names of outputs: a.jpg is `a`, but `a.jpg` where there is an a.png."""
    stems = [os.path.splitext(path)[0] for path in paths]
    counts = Counter(stems)
    taken = {stem for stem in stems if counts[stem] == 1}
    for path, stem in zip(paths, stems, strict=True):
        name = stem
        if counts[stem] > 1:
            name, number = path, 2
            while name in taken:
                name, number = f"{path}-{number}", number + 1
            taken.add(name)
        yield "/".join(_short(part) for part in name.split(os.sep))


def _short(part: str) -> str:
    data = part.encode("utf-8", "surrogateescape")
    if len(data) <= _LONGEST:
        return part
    digest = hashlib.sha1(data).hexdigest()[:8]
    return data[: _LONGEST - 9].decode("utf-8", "ignore") + "-" + digest
