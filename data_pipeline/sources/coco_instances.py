"""COCO's instance annotations as pixels: polygons and run-length codes, drawn over one another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import SampleError
from data_pipeline.sample import IGNORE, MAX_PIXELS, MAX_PROPOSAL

Bools = NDArray[np.bool_]
UInt8 = NDArray[np.uint8]
_MAX_INSTANCES = 10_000  # of one image; more are not drawn by hand
_FARTHEST = 1e7  # pixels


@dataclass(frozen=True)
class Region:
    """The pixels of one instance: a rectangle [h, w] at (top, left) of its image."""

    top: int
    left: int
    inside: Bools
    area: int
    category: int
    crowd: bool


def draw_regions(annotations: Sequence[dict[str, Any]], height: int, width: int) -> list[Region]:
    """Rasterises annotations; largest first, then in the order given.

    Raises:
        SampleError: one is no valid annotation, or the size is absurd.
    """
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise SampleError("mask", f"{width}×{height} is no size of an image that is read")
    if len(annotations) > _MAX_INSTANCES:
        raise SampleError(
            "mask", f"has {len(annotations):,} instances; {_MAX_INSTANCES:,} are read"
        )
    regions = []
    for annotation in annotations:
        try:
            top, left, inside = _rasterise(annotation["segmentation"], height, width)
            category = int(annotation["category_id"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"{type(error).__name__}: {error}"
            raise SampleError(
                "mask", f"annotation {annotation.get('id', '')} is damaged ({what})"
            ) from None
        crowd = bool(annotation.get("iscrowd", 0))
        regions.append(Region(top, left, inside, int(inside.sum()), category, crowd))
    return sorted(regions, key=lambda region: -region.area)


def draw_proposals(
    regions: Sequence[Region], height: int, width: int, min_area: float = 0.0
) -> UInt8:
    """Proposal ids [H, W], 1 for the largest instance; smaller ones lie on top.

    Crowds are 255 where no instance is. At most 254 instances, the largest ones, are drawn.

    Args:
        regions: largest first.
        height, width: of the image.
        min_area: instances below this share of the image are background.
    """
    mask = np.zeros((height, width), np.uint8)
    for region in regions:
        if region.crowd:
            _paint(mask, region, IGNORE)
    large = (
        region
        for region in regions
        if not region.crowd and region.area > 0 and region.area >= min_area * height * width
    )
    for number, region in zip(range(1, MAX_PROPOSAL + 1), large, strict=False):
        _paint(mask, region, number)
    return mask


def draw_classes(
    regions: Sequence[Region], height: int, width: int, classes: dict[int, int]
) -> UInt8:
    """Class indices [H, W], 0 where no instance is; crowds lie below instances, large below small.

    Raises:
        SampleError: a category is none of `classes`.
    """
    label = np.zeros((height, width), np.uint8)
    for region in (*(r for r in regions if r.crowd), *(r for r in regions if not r.crowd)):
        if region.category not in classes:
            raise SampleError("label", f"has category {region.category}, which is none of COCO's")
        _paint(label, region, classes[region.category])
    return label


def _paint(values: UInt8, region: Region, value: int) -> None:
    rows, columns = region.inside.shape
    part = values[region.top : region.top + rows, region.left : region.left + columns]
    part[region.inside] = value


def _rasterise(segmentation: Any, height: int, width: int) -> tuple[int, int, Bools]:
    if isinstance(segmentation, dict):
        if [int(side) for side in segmentation["size"]] != [height, width]:
            raise ValueError(f"its size is {segmentation['size']}, the image's {[height, width]}")
        return 0, 0, _decode_runs(segmentation["counts"], height, width)
    polygons = [np.asarray(each, np.float64).reshape(-1, 2) for each in segmentation]
    if not all((np.abs(polygon) <= _FARTHEST).all() for polygon in polygons):
        raise ValueError("a corner is not a number, or far away")
    corners = np.concatenate([*polygons, np.zeros((0, 2))])
    if not len(corners):
        return 0, 0, np.zeros((0, 0), np.bool_)
    left, top = np.clip(np.floor(corners.min(0)), 0, (width, height)).astype(int).tolist()
    right, bottom = np.clip(np.ceil(corners.max(0)), 0, (width, height)).astype(int).tolist()
    inside = np.zeros((bottom - top, right - left), np.bool_)
    for polygon in polygons:
        inside |= _fill(polygon - (left, top), *inside.shape)
    return top, left, inside


def _fill(polygon: NDArray[np.float64], height: int, width: int) -> Bools:
    """Pixels whose centre is inside, by the even-odd rule; pixel (0, 0) covers [0, 1)×[0, 1)."""
    flips = np.zeros((height, width + 1), np.bool_)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        first, last = (np.clip(np.ceil(y - 0.5), 0, height) for y in sorted((y0, y1)))
        rows = np.arange(int(first), int(last))
        crossings = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0)) if len(rows) else np.zeros(0)
        columns = np.clip(np.ceil(crossings - 0.5), 0, width).astype(int)
        flips[rows, columns] ^= True
    return np.logical_xor.accumulate(flips[:, :width], axis=1)


def _decode_runs(counts: Any, height: int, width: int) -> Bools:
    """Runs of outside and inside in turn, column by column; a string is COCO's compressed form."""
    runs = list(_uncompress(counts)) if isinstance(counts, str) else [int(run) for run in counts]
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(f"its runs cover {sum(runs):,} pixels of {height * width:,}")
    values = np.arange(len(runs)) % 2 == 1
    inside: Bools = np.repeat(values, runs).reshape(width, height).T
    return inside


def _uncompress(text: str) -> Iterator[int]:
    """Numbers of 5 bits a character, lowest first, from the third on as differences."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError("its run-length code has a wrong character")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        yield runs[-1]
        value = shift = 0
    if shift:
        raise ValueError("its run-length code is cut off")
