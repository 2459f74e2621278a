"""A network over all images of a set of shards, spread over the ranks."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from data_pipeline.errors import CannotScore, InputError
from data_pipeline.labelled import LabelledSet
from data_pipeline.pieces import single_threaded_pool
from data_pipeline.progress import FittedProgress
from data_pipeline.whole_images import WholeImage, WholeImages, normalise
from evaluation.miou import Counts
from trainer.distributed import Ranks
from trainer.model import PixelOutput
from trainer.partial import PartialOutput

T = TypeVar("T")
Output = TypeVar("Output", Tensor, PixelOutput, PixelOutput | PartialOutput)
PRECISIONS = ("float32", "bf16")
_SECONDS_BETWEEN_LINES = 30.0  # where the output is a file


def require_pixels(counts: Counts, samples: LabelledSet) -> None:
    """Raises CannotScore where all labels are ignored: there is nothing to score."""
    if counts.sum() == 0:
        raise CannotScore(f"every label pixel of {samples} is 255 (ignored); check the labels")


def own_samples(count: int, ranks: Ranks) -> NDArray[np.int64]:
    """The sample numbers that this rank works on; the ranks' shares differ by one at most."""
    return np.arange(ranks.rank, count, ranks.world_size, dtype=np.int64)


def require_precision(name: str) -> None:
    """Raises InputError unless `name` is bf16 or float32."""
    if name not in PRECISIONS:
        raise InputError(f"--precision is {name!r}; it can be {' or '.join(PRECISIONS)}")


def precision(name: str, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to bf16, or nothing for float32."""
    require_precision(name)
    return nullcontext() if name == "float32" else torch.autocast(device.type, torch.bfloat16)


def forward(call: Callable[[Tensor], Output], images: Tensor, precision_name: str) -> Output:
    """What a network, or a part of it, says of images [b, …], without gradients.

    On CPUs each thread takes an image at a time and works alone: the bits then depend neither on
    the other images of a batch nor on the number of threads, and no thread waits for a team.
    """

    def said(part: Tensor) -> Output:
        with torch.inference_mode(), precision(precision_name, images.device):
            return call(part)

    if images.device.type != "cpu":
        return said(images)
    with single_threaded_pool(min(len(images), torch.get_num_threads())) as pool:
        parts = list(pool.map(said, torch.split(images, 1)))
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return type(parts[0])(*(torch.cat(of_all) for of_all in zip(*parts, strict=True)))


def own_batches(
    images: WholeImages, batch_size: int, ranks: Ranks, title: str
) -> Iterator[tuple[list[WholeImage], Tensor]]:
    """This rank's images with their normalised pixels [b, 3, S, S] on the device."""
    numbers = own_samples(len(images), ranks)
    batches = images.batches(numbers, batch_size)
    for batch in shown(batches, title, -(-len(numbers) // batch_size), ranks):
        pixels = torch.stack([image.pixels for image in batch]).to(ranks.device)
        yield batch, normalise(pixels).contiguous(memory_format=torch.channels_last)


def shown(items: Iterable[T], title: str, total: int, ranks: Ranks) -> Iterator[T]:
    """Passes the items on, while rank 0 shows its progress, which is close to that of all.

    On the error stream: as a bar, or as a line now and then where that is a file. Without a title
    nothing is shown.
    """
    if not ranks.is_main or not title:
        yield from items
        return
    console = Console(stderr=True)
    if console.is_terminal:
        with FittedProgress(console) as bar:
            yield from bar.track(items, total, description=title)
        return
    last_line = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if done == total or time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            print(f"{title}: {done}/{total}", file=sys.stderr, flush=True)
