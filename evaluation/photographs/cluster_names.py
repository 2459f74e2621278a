"""Names of clusters: a text file that people edit, read by predictions and the report.

    01 = birds
    02 = flowers
    03 = birds

Clusters with the same name become one class; clusters named `background` become background.
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data_pipeline.errors import InputError
from data_pipeline.files import atomic_write
from evaluation.saved_head import SavedHead, read_head

NAMES = "names.txt"
BACKGROUND = "background"
_MAX_BYTES = 1 << 20
_LONGEST = 100  # characters of a name
_LINE = re.compile(r"\s*(?:cluster\s+)?(\d{1,6})\s*=\s*(.*?)\s*")
_HEADER = """# Names of the clusters for `maskbank predict` and the report: edit what follows "=".
# Clusters with the same name become one class; clusters named "background" become background.
"""


def default_names(clusters: int) -> tuple[str, ...]:
    """cluster 01, cluster 02, …"""
    width = max(2, len(str(clusters)))
    return tuple(f"cluster {number:0{width}}" for number in range(1, clusters + 1))


def write_names(folder: Path, names: tuple[str, ...]) -> None:
    """Writes the file that `read_names` reads."""
    width = max(2, len(str(len(names))))
    lines = [f"{number:0{width}} = {name}\n" for number, name in enumerate(names, 1)]
    with atomic_write(folder / NAMES) as file:
        file.write("".join([_HEADER, *lines]).encode())


def read_names(folder: Path, clusters: int) -> tuple[str, ...]:
    """The name of each cluster; its number where the file does not name it, or is missing.

    Raises:
        InputError: a line does not name one of these clusters.
    """
    path = folder / NAMES
    names = list(default_names(clusters))
    for place, line in enumerate(_lines(path), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        number = int(match[1]) if match else 0
        if match is None or not match[2]:
            raise InputError(f"{path}, line {place}: expected a line like `03 = birds`")
        if not 1 <= number <= clusters:
            raise InputError(f"{path}, line {place}: no cluster {number} among {clusters}")
        if len(match[2]) > _LONGEST or not match[2].isprintable():
            raise InputError(
                f"{path}, line {place}: a name has up to {_LONGEST} printable characters"
            )
        names[number - 1] = match[2]
    return tuple(names)


def read_named_head(path: Path) -> SavedHead:
    """A head, and where names of its clusters lie beside it, with these as classes.

    Raises:
        InputError: it or the names cannot be used.
    """
    head = read_head(path)
    if head.kind != "kmeans" or not path.with_name(NAMES).is_file():
        return head
    return name_classes(head, read_names(path.parent, len(head.tensors["centres"])))


def name_classes(head: SavedHead, names: tuple[str, ...]) -> SavedHead:
    """The head with these names of its clusters as classes, in the order of their first cluster.

    Raises:
        InputError: every cluster is named background.
    """
    classes = tuple(dict.fromkeys((BACKGROUND, *names)))
    if len(classes) == 1:
        raise InputError(f"every cluster is named {BACKGROUND}, which leaves nothing to predict")
    match = np.array([0, *(classes.index(name) for name in names)], np.int64)
    tensors = head.tensors | {"class_of_cluster": torch.from_numpy(match)}
    return replace(head, classes=classes, tensors=tensors)


def _lines(path: Path) -> list[str]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is larger than any list of names")
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8") from None
