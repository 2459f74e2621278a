"""One self-contained HTML page about a set of shards: numbers, histograms, classes, pictures.

Keys and class names are untrusted text: the page is written by an autoescaping template, and what
reaches an attribute of a drawing is a number made here.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from data_pipeline.files import atomic_write
from data_pipeline.stats import (
    QUANTILES,
    Stats,
    area_bins,
    class_names,
    pixel_unit,
    quantiles,
    quarantined,
)

FRAME = {"width": 360, "height": 170, "left": 4, "right": 4, "top": 16, "bottom": 22}
BARS = 30  # of a histogram of sizes
MAX_STEP = 44  # units from bar to bar
_NAMES = ("smallest", "5%", "25%", "median", "75%", "95%", "largest")
assert len(_NAMES) == len(QUANTILES)


def write_page(stats: Stats, target: Path) -> None:
    """Writes the page; a reader never sees half of it."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = Path(__file__).with_name("stats_template.html").read_text(encoding="utf-8")
    page = environment.from_string(source).render(page_context(stats)).lstrip()
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as file:
        file.write(page.encode("utf-8", "replace"))  # a key may hold lone surrogates


def page_context(stats: Stats) -> dict[str, Any]:
    """All that the template shows."""
    manifest, found = stats.manifest, stats.measures
    images = sum(found.widths.values())
    return {
        "name": manifest.root.resolve().name,
        "manifest": manifest,
        "found": found,
        "tiles": list(_tiles(stats)),
        "mean_bytes": {name: size / max(1, images) for name, size in found.bytes.items() if size},
        "size_rows": [
            (name, quantiles(counts))
            for name, counts in (
                ("width, pixels", found.widths),
                ("height, pixels", found.heights),
                ("pixels an image", found.pixels),
            )
        ],
        "quantile_names": _NAMES,
        "size_charts": [
            histogram("Width", "images by width, pixels", found.widths),
            histogram("Height", "images by height, pixels", found.heights),
            histogram(
                "Pixels", "images by width × height", found.pixels, pixel_unit(max(found.pixels))
            ),
        ],
        "mask_charts": [
            bars(
                "Objects an image",
                "images by mask proposals",
                [(str(count), found.proposals[count]) for count in _range(found.proposals)],
            ),
            bars(
                "Area of an object",
                "objects by share of their image, ≤ %",
                [(name, count) for name, count in area_bins(found) if found.areas],
            ),
            histogram("Covered", "masks by percent of pixels inside objects", found.covered),
        ],
        "classes": list(_class_rows(stats)),
        "configuration": sorted(manifest.configuration.items()),
        "frame": FRAME,
    }


def _tiles(stats: Stats) -> Iterator[dict[str, str]]:
    manifest, found = stats.manifest, stats.measures
    images, shards, masks = found.widths.total(), len(manifest.shards), found.proposals.total()
    width, height = (quantiles(counts)[3] for counts in (found.widths, found.heights))
    away = quarantined(manifest)
    text = f"in {shards:,} shard" + ("" if shards == 1 else "s")
    text += f", and {away:,} in quarantine." if away else "."
    yield _tile("Samples", f"{images:,}", "", text)
    yield _tile("Size", *_size(manifest.bytes), "of all archives.")
    text = "pixels, width and height each on its own."
    yield _tile("Median image", f"{width} × {height}", "", text)
    if masks:
        text = f"mask proposals, in {masks:,} masks."
        yield _tile("Objects an image", f"{found.objects / masks:.2f}", "", text)
        share = 100 * found.without_objects / masks
        text = f"{share:.1f} % of masks hold no proposal; training learns nothing from them."
        yield _tile("Without objects", f"{found.without_objects:,}", "", text)
    else:
        yield _tile("Objects an image", "–", "", "No sample has a mask; training needs some.")
    if found.ignored:
        share = 100 * found.ignored / found.mask_pixels
        yield _tile("Ignored", f"{share:.1f}", "%", "of the masks' pixels.")
    if found.class_pixels:
        count = len(list(class_names(stats)))
        yield _tile("Classes", f"{count:,}", "", "of the labels, which training never sees.")
    if manifest.failures:
        text = "samples that could not be used when the shards were made; failures.jsonl says why."
        yield _tile("Left out", f"{manifest.failures:,}", "", text)


def _tile(label: str, value: str, unit: str, text: str) -> dict[str, str]:
    return {"label": label, "value": value, "unit": unit, "text": text}


def _size(count: int) -> tuple[str, str]:
    """In the largest unit that leaves at least one."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 2**power:
            return f"{count / 2**power:.1f}", unit
    return f"{count / 2**10:.1f}", "KiB"


def histogram(title: str, note: str, counts: Counter[int], unit: int = 1) -> dict[str, Any]:
    """Values in at most BARS bins of one width, a multiple of the unit they were rounded to."""
    if not counts:
        return bars(title, note, [])
    low, high = min(counts) // unit * unit, max(counts)
    width = unit * max(1, -(-(high - low + 1) // (BARS * unit)))
    binned: Counter[int] = Counter()
    for value, count in counts.items():
        binned[(value - low) // width] += count
    named = []
    for number in range((high - low) // width + 1):
        first = low + number * width
        last = min(high, first + width - 1)
        named.append((f"{first:,}–{last:,}" if last > first else f"{first:,}", binned[number]))
    chart = bars(title, note, named)
    ends = [(FRAME["left"], "start", f"{low:,}")]
    if high > low:
        ends.append((FRAME["width"] - FRAME["right"], "end", f"{high:,}"))
    chart["ticks"] = ends
    return chart


def bars(title: str, note: str, named: list[tuple[str, int]]) -> dict[str, Any]:
    """Bars in units of the SVG view box, each with its name and count for those who point at it."""
    total = sum(count for _, count in named) or 1
    top = max((count for _, count in named), default=0) or 1
    inner = FRAME["width"] - FRAME["left"] - FRAME["right"]
    base = FRAME["height"] - FRAME["bottom"]
    step = min(MAX_STEP, inner / max(1, len(named)))
    drawn, ticks = [], []
    every = max(1, -(-len(named) // 12))
    for number, (name, count) in enumerate(named):
        height = (base - FRAME["top"]) * count / top
        left = FRAME["left"] + number * step
        drawn.append(
            {
                "left": left,
                "step": step,
                "x": left + min(1.0, step * 0.1),
                "y": base - height,
                "width": max(0.5, step - 2 * min(1.0, step * 0.1)),
                "height": height,
                "text": f"{name}: {count:,} ({100 * count / total:.1f}%)",
            }
        )
        if number % every == 0:
            ticks.append((left + step / 2, "middle", name.strip("≤ %")))
    return {"title": title, "note": note, "bars": drawn, "ticks": ticks, "total": total}


def _range(counts: Counter[int]) -> range:
    return range(max(counts, default=-1) + 1)


def _class_rows(stats: Stats) -> Iterator[dict[str, Any]]:
    found = stats.measures
    pixels = found.class_pixels.total() or 1
    most = max((count for index, count in found.class_images.items() if index), default=1)
    largest = max((count for index, count in found.class_pixels.items() if index), default=1)
    for index, name in class_names(stats):
        count = found.class_pixels[index]
        yield {
            "index": index,
            "name": name,
            "images": found.class_images[index],
            "image_bar": min(100.0, 100 * found.class_images[index] / most),
            "share": 100 * count / pixels,
            "share_bar": min(100.0, 100 * count / largest),
        }
