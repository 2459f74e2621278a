"""Large images in tiles: each has a core of its own, and context from its neighbours around it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.sample import UInt8


class Span(NamedTuple):
    """Of an axis, pixels: a tile's `start` to `stop`, and of its core `first` to `last`."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class Tile:
    """A rectangle of an image."""

    rows: Span
    columns: Span

    @property
    def target(self) -> tuple[slice, slice]:
        """The core in the image; those of all tiles cover it once."""
        rows, columns = (slice(span.first, span.last) for span in (self.rows, self.columns))
        return rows, columns

    @property
    def core(self) -> tuple[slice, slice]:
        """The core in the tile."""
        rows, columns = (
            slice(span.first - span.start, span.last - span.start)
            for span in (self.rows, self.columns)
        )
        return rows, columns

    def padded(self, stride: int) -> tuple[int, int]:
        """Height and width of the tile, up to the next multiple of the stride."""
        height, width = (
            -(-(span.stop - span.start) // stride) * stride for span in (self.rows, self.columns)
        )
        return height, width

    def cut(self, image: UInt8, stride: int) -> Tensor:
        """The tile's pixels, uint8 [1, 3, h, w], padded with those at the edge."""
        height, width = self.padded(stride)
        part = image[self.rows.start : self.rows.stop, self.columns.start : self.columns.stop]
        pixels = torch.tensor(part).permute(2, 0, 1)[None]
        margins = (0, width - pixels.shape[3], 0, height - pixels.shape[2])
        return F.pad(pixels.float(), margins, mode="replicate").to(torch.uint8)

    def core_mask(self, size: tuple[int, int]) -> Tensor:
        """Where the core is in the padded tile, bool [*size]."""
        mask = torch.zeros(size, dtype=torch.bool)
        mask[self.core] = True
        return mask


def tiles(height: int, width: int, side: int, overlap: int, stride: int) -> Iterator[Tile]:
    """Tiles of an image, all of it one tile if it is no larger than `side` pixels.

    Args:
        height: of the image, as `width`.
        width: see `height`.
        side: of a tile.
        overlap: pixels that neighbours share at least, to one stride less.
        stride: starts of tiles and borders of cores are multiples of it.
    """
    for rows in spans(height, side, overlap, stride):
        for columns in spans(width, side, overlap, stride):
            yield Tile(rows, columns)


def spans(length: int, side: int, overlap: int, stride: int) -> list[Span]:
    """The tiles along an axis of so many pixels."""
    if length <= side:
        return [Span(0, length, 0, length)]
    side = max(stride, side // stride * stride)
    step = max(stride, (side - overlap) // stride * stride)
    last = -(-(length - side) // stride) * stride
    starts = [*range(0, last, step), last]
    stops = [min(start + side, length) for start in starts]
    between = [
        (start + stop) // 2 // stride * stride
        for start, stop in zip(starts[1:], stops[:-1], strict=True)
    ]
    cuts = [0, *between, length]
    return [Span(*each) for each in zip(starts, stops, cuts[:-1], cuts[1:], strict=True)]
