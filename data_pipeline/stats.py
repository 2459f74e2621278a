"""Measures what shards hold: image sizes and objects from the index, areas from the masks."""

import base64
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import InputError, SampleError
from data_pipeline.index import DatasetIndex, ShardIndex
from data_pipeline.manifest import Manifest, ShardEntry, read_manifest
from data_pipeline.reader import SampleReader
from data_pipeline.sample import IGNORE, MAX_PROPOSAL, UInt8, decode_grey, decode_rgb
from data_pipeline.stored_sample import decode_label
from data_pipeline.workers import run_tasks

# upper edges of the bins of object areas, in shares of the image: half a decade each
AREA_EDGES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
PICTURE_SIDE = 256  # pixels; shown at about half of that, the rest is for dense screens
_COLOURS = np.array(  # of proposals, in turn: far from each other and from most pictures
    [[255, 120, 40], [0, 190, 255], [255, 196, 0], [255, 70, 160], [90, 230, 90]], np.uint8
)
_IGNORED = np.array([150, 150, 150], np.uint8)


@dataclass(frozen=True)
class Picture:
    """One image with its mask drawn over it: JPEG in a data URI; shard and key; objects."""

    uri: str
    name: str
    objects: int


@dataclass
class Measures:
    """What is added up, over a shard or over all.

    Attributes:
        widths, heights: pixels -> images.
        pixels: pixels an image, rounded to three digits -> images.
        formats: image component -> images.
        bytes: component -> bytes.
        proposals: objects in the mask -> samples with a mask.
        unusable_shards: shards whose index cannot be read; nothing of them is counted.
        decoded, unreadable: samples whose mask and label were decoded, and could not be.
        areas: objects in each bin of AREA_EDGES.
        covered: percent of a mask's pixels inside objects -> masks.
        ignored: pixels of masks that are to be ignored.
        mask_pixels: pixels of masks.
        class_pixels, class_images: class index -> pixels, and images that show it.
        pictures: as many as were asked for, or fewer.
    """

    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    pixels: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    proposals: Counter[int] = field(default_factory=Counter)
    unusable_shards: int = 0
    decoded: int = 0
    unreadable: int = 0
    areas: Counter[int] = field(default_factory=Counter)
    covered: Counter[int] = field(default_factory=Counter)
    ignored: int = 0
    mask_pixels: int = 0
    class_pixels: Counter[int] = field(default_factory=Counter)
    class_images: Counter[int] = field(default_factory=Counter)
    pictures: list[Picture] = field(default_factory=list)

    def add(self, other: "Measures") -> None:
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    @property
    def without_objects(self) -> int:
        return self.proposals[0]

    @property
    def objects(self) -> int:
        return sum(number * count for number, count in self.proposals.items())


@dataclass(frozen=True)
class Stats:
    """A data set, and what was measured of it."""

    manifest: Manifest
    measures: Measures


@dataclass(frozen=True)
class _Task:
    """A shard to measure, its samples to decode (`None`: all), and those to draw, in order."""

    manifest: Manifest
    number: int
    chosen: NDArray[np.int64] | None
    drawn: tuple[int, ...]


def collect_stats(
    root: Path,
    sample: int = 2000,
    seed: int = 0,
    pictures: int = 0,
    processes: int = 1,
    progress: Callable[[], None] | None = None,
) -> Stats:
    """Measures a folder of shards.

    Args:
        root: the folder.
        sample: samples whose masks and labels are decoded, drawn at random; 0: all.
        seed: of the draw.
        pictures: how many of them are drawn with their masks.
        processes: workers; the result does not depend on them.
        progress: called after each shard.

    Raises:
        InputError: no manifest, or not one index can be read.
    """
    manifest = read_manifest(root, check_files=False)
    parts: dict[int, Measures] = {}
    total = Measures()
    following = 0
    for number, measures in run_tasks(
        _measure, _tasks(manifest, sample, seed, pictures), processes
    ):
        parts[number] = measures
        while following in parts:  # in order, so that the result is the same
            total.add(parts.pop(following))
            following += 1
        if progress is not None:
            progress()
    if total.unusable_shards == len(manifest.shards):
        raise InputError(
            f"not one shard index in {root} can be read; look with `maskbank shards verify {root}`"
        )
    return Stats(manifest, total)


def quantiles(counts: Counter[int]) -> list[int]:
    """Values at QUANTILES of what is counted, the lower one where two are as near."""
    values = sorted(counts)
    ends = np.cumsum([counts[value] for value in values])
    places = [min(int(share * ends[-1]), int(ends[-1]) - 1) for share in QUANTILES]
    return [values[int(np.searchsorted(ends, place, side="right"))] for place in places]


def quarantined(manifest: Manifest) -> int:
    """Samples that were taken out."""
    away = sum(shard.quarantined for shard in manifest.shards)
    return away + sum(shard.entry.samples for shard in manifest.dropped)


def summary_rows(stats: Stats) -> Iterator[tuple[str, str]]:
    """Name and value of what is printed."""
    manifest, found = stats.manifest, stats.measures
    yield "samples", f"{manifest.samples:,}"
    yield "shards", f"{len(manifest.shards):,}, {manifest.bytes / 2**20:,.1f} MiB"
    if away := quarantined(manifest):
        yield "in quarantine", f"{away:,}"
    if found.unusable_shards:
        yield "not counted", f"{found.unusable_shards:,} shards without a usable index"
    yield "formats", ", ".join(f"{name} {count:,}" for name, count in found.formats.most_common())
    heading = "smallest, 5%, 25%, median, 75%, 95%, largest"
    for name, counts in (("width", found.widths), ("height", found.heights)):
        yield f"{name}, pixels", f"{' '.join(map(str, quantiles(counts)))}  ({heading})"
    yield "pixels an image", " ".join(f"{value:,}" for value in quantiles(found.pixels))
    masks = found.proposals.total()
    yield "with masks", f"{masks:,}"
    if masks:
        share = 100 * found.without_objects / masks
        yield "without objects", f"{found.without_objects:,} ({share:.1f}%)"
        yield "objects an image", f"{found.objects / masks:.2f}, at most {max(found.proposals)}"
    yield "decoded", f"{found.decoded:,}, {found.unreadable:,} could not be"
    objects = found.areas.total()
    if objects:
        shares = [f"{name} {100 * count / objects:.0f}%" for name, count in area_bins(found)]
        yield "object areas", " · ".join(shares)
    pixels = found.class_pixels.total()
    for index, name in class_names(stats):
        share = 100 * found.class_pixels[index] / pixels
        yield (
            f"class {index} {name}",
            f"{found.class_images[index]:,} images, {share:.2f}% of pixels",
        )


def area_bins(found: Measures) -> Iterator[tuple[str, int]]:
    """Name of each bin of object areas, and objects in it."""
    for number, edge in enumerate(AREA_EDGES):
        yield f"≤ {100 * edge:g}%", found.areas[number]


def class_names(stats: Stats) -> Iterator[tuple[int, str]]:
    """Index and name of every class that is named or seen, if any label was decoded."""
    if not stats.measures.class_pixels:
        return
    named = stats.manifest.classes
    for index in sorted({*range(len(named)), *stats.measures.class_pixels}):
        yield index, named[index] if index < len(named) else "(no name)"


# ---------------------------------------------------------------- one shard, in a worker


def _tasks(manifest: Manifest, sample: int, seed: int, pictures: int) -> Iterator[_Task]:
    draw = np.random.Generator(np.random.Philox(key=seed))
    samples = manifest.samples
    everything = sample == 0 or sample >= samples
    wanted = min(pictures, samples) if everything else min(sample, samples)
    chosen = draw.choice(samples, wanted, replace=False)
    drawn = np.sort(chosen[:pictures])
    chosen = np.sort(chosen)
    start = 0
    for number, entry in enumerate(manifest.shards):
        alone = Manifest(manifest.root, (entry,), manifest.classes, 0, {})
        part, shown = (
            (ids[np.searchsorted(ids, start) : np.searchsorted(ids, start + entry.samples)] - start)
            for ids in (chosen, drawn)
        )
        yield _Task(alone, number, None if everything else part, tuple(shown.tolist()))
        start += entry.samples


def _measure(task: _Task) -> tuple[int, Measures]:
    found = Measures()
    reader = SampleReader(DatasetIndex(task.manifest))
    try:
        index = reader.index.shard(0)
    except InputError:
        found.unusable_shards = 1
        return task.number, found
    _count_index(found, index)
    chosen = range(len(index.keys)) if task.chosen is None else task.chosen.tolist()
    for number in chosen:
        try:
            mask = _decode(found, reader, number)
            found.decoded += 1
            if number in task.drawn:
                found.pictures.append(_picture(reader, task.manifest.shards[0], number, mask))
        except SampleError:
            found.unreadable += 1
    return task.number, found


def _count_index(found: Measures, index: ShardIndex) -> None:
    heights, widths = index.sizes.astype(np.int64).T
    found.widths.update(widths.tolist())
    found.heights.update(heights.tolist())
    found.pixels.update(_rounded(value) for value in (heights * widths).tolist())
    found.formats.update(index.image_names)
    has_mask = index.extents[:, 1, 1] >= 0
    found.proposals.update(index.proposals[has_mask].tolist())
    for slot, name in enumerate(("image", "mask", "label", "info")):
        found.bytes[name] += int(np.maximum(index.extents[:, slot, 1], 0).sum())


def pixel_unit(value: int) -> int:
    """What numbers of pixels are rounded to, so that a counter of them stays small."""
    unit: int = 10 ** max(0, len(str(value)) - 3)
    return unit


def _rounded(value: int) -> int:
    return round(value / pixel_unit(value)) * pixel_unit(value)


def _decode(found: Measures, reader: SampleReader, number: int) -> UInt8 | None:
    """Adds what mask and label of one sample show; returns the mask."""
    raw = reader.read(0, number, label=True)
    mask = None if raw.mask is None else decode_grey(raw.mask, "mask")
    label = None if raw.label is None else decode_label(raw.label)
    if label is not None:
        values, ignore = label
        present, pixels = np.unique(values[values != ignore], return_counts=True)
        found.class_images.update(present.tolist())
        found.class_pixels.update(dict(zip(present.tolist(), pixels.tolist(), strict=True)))
    if mask is not None:
        counts = np.bincount(mask.ravel(), minlength=256)
        found.ignored += int(counts[IGNORE])
        found.mask_pixels += mask.size
        areas = counts[1 : MAX_PROPOSAL + 1]
        found.covered[round(100 * int(areas.sum()) / mask.size)] += 1
        shares = areas[areas > 0] / mask.size
        found.areas.update(np.searchsorted(AREA_EDGES, shares - 1e-12).tolist())
    return mask


def _picture(reader: SampleReader, entry: ShardEntry, number: int, mask: UInt8 | None) -> Picture:
    index = reader.index.shard(0)
    image = Image.fromarray(decode_rgb(reader.read(0, number).image))
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    if mask is not None:
        small = Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST)
        pixels = draw_mask(pixels, np.asarray(small))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=82)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(uri, f"{entry.stem}:{index.keys[number]}", int(index.proposals[number]))


def draw_mask(image: UInt8, mask: UInt8) -> UInt8:
    """Proposals [H, W] tinted and outlined over an image [H, W, 3]; what is ignored is grey."""
    tint = np.resize(_COLOURS, (256, 3))[mask].astype(np.float32)
    tint[mask == IGNORE] = _IGNORED
    inside = (mask != 0)[..., None]
    mixed = np.where(inside, 0.5 * image + 0.5 * tint, image.astype(np.float32))
    edge = np.zeros(mask.shape, bool)
    edge[1:] |= mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    mixed[edge] = 255
    drawn: UInt8 = mixed.round().clip(0, 255).astype(np.uint8)
    return drawn
