"""Which labelled images a semi-supervised evaluation learns on: nested draws, or lists of ids."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.errors import InputError, SampleError
from data_pipeline.labelled import LabelledSet
from data_pipeline.order import generator
from data_pipeline.sample import decode_label
from evaluation.features import own_samples, shown
from trainer.distributed import Ranks, all_reduce_sum

Numbers = NDArray[np.int64]
_SPLIT = 15  # stream of the generator
_SHOWN = 3  # ids that a message names


def present_classes(samples: LabelledSet, ranks: Ranks, threads: int) -> NDArray[np.bool_]:
    """Which classes each image has: bool [n, C], read once by all ranks together; a collective.

    Raises:
        InputError: a label cannot be read.
    """
    numbers = own_samples(len(samples), ranks).tolist()
    found = np.zeros((len(samples), len(samples.classes)), np.uint8)

    def read(number: int) -> tuple[int, NDArray[np.int16]]:
        try:
            label = decode_label(samples.read(number).label or b"")
        except SampleError as error:
            raise InputError(
                f"{samples}, {samples.key(number)}: {error.reason}; every label is needed: "
                f"{samples.remedy()}"
            ) from None
        return number, np.unique(label[label >= 0])

    with ThreadPoolExecutor(threads) as pool:
        # a few hundred at a time, since a pool holds on to every result that waits
        blocks = (numbers[first : first + 256] for first in range(0, len(numbers), 256))
        read_all = (one for block in blocks for one in pool.map(read, block))
        for number, classes in shown(read_all, "reading labels", len(numbers), ranks):
            found[number, classes] = 1
    on_device = torch.from_numpy(found).to(ranks.device)
    present: NDArray[np.bool_] = all_reduce_sum(on_device, ranks).cpu().numpy() > 0
    return present


def balanced_order(present: NDArray[np.bool_], seed: int) -> Numbers:
    """All images in an order whose every beginning is balanced over the classes: int64 [n].

    One after the other, the image that is drawn has the class (besides background, class 0) that
    the fewest of those before it have. So a smaller share is contained in a larger one, and a class
    is missing only where there are fewer images than classes. Images without any class come last.
    """
    count, classes = present.shape
    shuffled = generator(seed, _SPLIT, 0).permutation(count)
    waiting = [shuffled[present[shuffled, c]].tolist()[::-1] for c in range(1, classes)]
    had = np.array([0 if queue else count + 1 for queue in waiting], np.int64)
    drawn = np.zeros(count, np.bool_)
    order: list[int] = []
    while had.size and had.min() <= count:
        rarest = int(had.argmin())
        queue = waiting[rarest]
        while queue and drawn[queue[-1]]:
            queue.pop()
        if not queue:
            had[rarest] = count + 1  # all of its images are drawn
            continue
        image = queue.pop()
        drawn[image] = True
        order.append(image)
        had[present[image, 1:] & (had <= count)] += 1
    rest = shuffled[~drawn[shuffled]]
    return np.concatenate([np.array(order, np.int64), rest])


def share_of(order: Numbers, percent: float) -> Numbers:
    """The first `percent` of an order, at least one image."""
    return order[: max(1, round(len(order) * percent / 100))]


def read_ids(path: Path, samples: LabelledSet) -> Numbers:
    """Numbers of the samples that a list names, one key a line; the last part of a key will do.

    Raises:
        InputError: the list is missing or empty, names what is not there, or is ambiguous.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--ids {path} cannot be read: {error}") from None
    wanted = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not wanted:
        raise InputError(f"--ids {path} is empty; give one key a line")
    numbers: dict[str, int] = {}
    last_parts: dict[str, list[int]] = {}
    for number in range(len(samples)):
        key = samples.key(number)
        numbers[key] = number
        last_parts.setdefault(key.rpartition("/")[2], []).append(number)
    found = {name: [numbers[name]] if name in numbers else last_parts.get(name, [])
             for name in wanted}  # fmt: skip
    _require(path, samples, [name for name in wanted if not found[name]], "are not in")
    _require(path, samples, [name for name in wanted if len(found[name]) > 1], "are ambiguous in")
    return np.unique(np.array([found[name][0] for name in wanted], np.int64))


def _require(path: Path, samples: LabelledSet, wrong: list[str], what: str) -> None:
    if wrong:
        more = " …" if len(wrong) > _SHOWN else ""
        raise InputError(
            f"--ids {path}: {len(wrong):,} of its keys {what} {samples}: "
            f"{', '.join(wrong[:_SHOWN])}{more}; give the keys of the images to learn on"
        )


def drawn_splits(
    present: NDArray[np.bool_], fractions: tuple[float, ...], splits: int
) -> dict[float, list[Numbers]]:
    """Images of each share, percent, for each split; the shares of a split are nested."""
    orders = [balanced_order(present, seed) for seed in range(splits)]
    return {percent: [share_of(order, percent) for order in orders] for percent in fractions}


def listed_splits(paths: list[Path], samples: LabelledSet) -> dict[float, list[Numbers]]:
    """The lists' images by their share, in percent to three digits; lists of one share are splits.

    Raises:
        InputError: see `read_ids`.
    """
    found: dict[float, list[Numbers]] = {}
    for path in paths:
        numbers = read_ids(path, samples)
        share = float(f"{100 * len(numbers) / len(samples):.3g}")
        found.setdefault(share, []).append(numbers)
    return found
