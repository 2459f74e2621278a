"""Pictures and curves of the report: PNG data URIs, and charts in units of an SVG view box."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evaluation.palettes import MAX_CLASSES, VOID, Bytes, class_palette

Segments = NDArray[np.int16]  # ids, -1 for void
Floats = NDArray[np.float64]
Metrics = list[dict[str, Any]]

MAX_PICTURE = 224  # px; shown at most about 190 px wide, the rest is for dense screens
MAX_THUMBNAIL = 144  # px, of contact sheets, which hold hundreds of pictures
MAX_BINS = 120
CHART = {"width": 360, "height": 190, "left": 48, "right": 10, "top": 14, "bottom": 24}

# uint8 [256, 3]: proposals have no class, so they must not borrow a class's colour.
PROPOSAL_PALETTE = np.resize(
    np.array(
        [[255, 120, 40], [255, 196, 0], [0, 190, 255], [255, 70, 160], [90, 230, 90]],
        dtype=np.uint8,
    ),
    (256, 3),
)
PROPOSAL_PALETTE[VOID] = 224


def colour_segments(segments: Segments, palette: Bytes | None = None) -> Bytes:
    """Ids [H, W] painted with `palette` (by default the class colours), uint8 [H, W, 3]."""
    colours: Bytes = (class_palette(MAX_CLASSES) if palette is None else palette)[segments]
    return colours


def overlay(
    image: Bytes, segments: Segments, palette: Bytes | None = None, alpha: float = 0.62
) -> Bytes:
    """`segments` [H, W] over `image` [H, W, 3]: tinted inside, outlined, background greyed.

    Greying the background leaves the picture recognisable and makes even a dark class colour
    stand out, which a tint alone does not.
    """
    colours = colour_segments(segments, palette).astype(np.float32)
    photo = image.astype(np.float32)
    inside = (segments != 0)[..., None]
    grey = 0.55 * photo.mean(axis=-1, keepdims=True) + 0.45 * 128
    mixed = np.where(inside, (1 - alpha) * photo + alpha * colours, grey)
    solid = np.pad(np.where(segments == VOID, 0, segments), (0, 1), mode="edge")
    mixed[(solid[:-1, 1:] != solid[:-1, :-1]) | (solid[1:, :-1] != solid[:-1, :-1])] = 255
    painted: Bytes = np.clip(mixed.round(), 0, 255).astype(np.uint8)
    return painted


def png_data_uri(picture: Bytes, colours: int | None = None) -> str:
    """`picture` [H, W] or [H, W, 3] as a PNG data URI, reduced to MAX_PICTURE pixels.

    `colours` allows that many only: an overlay looks the same and takes a third of the bytes.
    """
    image = Image.fromarray(np.ascontiguousarray(picture))
    image.thumbnail((MAX_PICTURE, MAX_PICTURE), Image.Resampling.LANCZOS)
    if colours is not None:
        image = image.quantize(colours, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def outlined(image: Bytes, segments: Segments) -> Bytes:
    """`image` [H, W, 3] with the borders of `segments` [H, W]: two pixels in their class's colour.

    A white line outside keeps a dark colour visible on a dark ground.
    """
    painted: Bytes = image.copy()
    ring = _border(segments)
    # what remains of each segment without its border has the next pixel's
    ring |= _border(np.where(ring, 0, segments)) & (segments != 0)
    painted[ring & (segments == 0)] = 255
    inside = ring & (segments != 0)
    painted[inside] = colour_segments(segments)[inside]
    return painted


def _border(segments: Segments) -> NDArray[np.bool_]:
    """Pixels [H, W] of which one of four neighbours is of another segment."""
    height, width = segments.shape
    padded = np.pad(segments, 1, mode="edge")
    around = [padded[r : r + height, c : c + width] for r, c in ((0, 1), (2, 1), (1, 0), (1, 2))]
    border: NDArray[np.bool_] = (np.stack(around) != segments).any(axis=0)
    return border


def jpeg_data_uri(picture: Bytes) -> str:
    """`picture` [H, W, 3] as a JPEG data URI, reduced to MAX_THUMBNAIL pixels."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    image.thumbnail((MAX_THUMBNAIL, MAX_THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def css_colour(index: int) -> str:
    """Class colour as CSS text."""
    red, green, blue = class_palette(MAX_CLASSES)[index % MAX_CLASSES].tolist()
    return f"rgb({red} {green} {blue})"


def number(value: object) -> float | None:
    """`value` as a finite float, None for anything else (missing, text, NaN)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # An int too long for a float is no more usable than an infinite one.
    return float(value) if abs(value) < 1e300 else None


def compact(value: float) -> str:
    """Short number for an axis: 2.5, 400, 12k, 1e-05."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.3g}"


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round values a constant step apart that cover low..high."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def path_data(xs: Floats, ys: Floats) -> str:
    """SVG path through the points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))


@dataclass(frozen=True)
class Axes:
    """Where steps start..stop and values ticks[0]..ticks[-1] lie in the view box."""

    start: float
    stop: float
    ticks: list[float]

    def across(self, step: Floats) -> Floats:
        """x of steps."""
        right = CHART["width"] - CHART["right"]
        share = (step - self.start) / (self.stop - self.start)
        return CHART["left"] + share * (right - CHART["left"])

    def up(self, value: Floats) -> Floats:
        """y of values."""
        base = CHART["height"] - CHART["bottom"]
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return base - share * (base - CHART["top"])

    def marks(self, unit: str) -> dict[str, list[tuple[float, str]]]:
        """Places and texts of the ticks."""
        steps = [t for t in nice_ticks(self.start, self.stop) if self.start <= t <= self.stop]
        xs, ys = self.across(np.array(steps)), self.up(np.array(self.ticks))
        return {
            "x_ticks": [(x, compact(t)) for x, t in zip(xs, steps, strict=True)],
            "y_ticks": [(y, compact(t) + unit) for y, t in zip(ys, self.ticks, strict=True)],
        }


def axes_of(first: float, last: float, low: float, high: float) -> Axes:
    """Axes for these steps and values, from 0 on where that is near."""
    start = 0.0 if 0 <= first < 0.3 * last else first
    ticks = nice_ticks(0.0 if 0 <= low < 0.6 * high else low, high)
    return Axes(start, last if last > start else start + 1, ticks)


def points_of(entries: Metrics, key: str, factor: float) -> tuple[Floats, int]:
    """Steps and values [n, 2] of a metric, and how many values were not finite."""
    pairs = [(entry["step"], number(entry[key])) for entry in entries if key in entry]
    points = [(s, v * factor) for s, v in pairs if v is not None]
    return np.array(points, dtype=np.float64).reshape(-1, 2), len(pairs) - len(points)


def chart(entries: Metrics, curve: tuple[str, str, str, float, str]) -> dict[str, Any]:
    """A curve in units of the SVG view box: bin means as a line, ranges as a band behind it."""
    key, title, note, factor, unit = curve
    points, skipped = points_of(entries, key, factor)
    result = {"title": title, "note": note, "skipped": skipped, "latest": ""}
    if not len(points):
        return result
    bins = np.array_split(points, min(len(points), MAX_BINS))
    steps, means = np.array([b.mean(axis=0) for b in bins]).T
    lows, highs = np.array([[b[:, 1].min(), b[:, 1].max()] for b in bins]).T
    first, last = float(points[0, 0]), float(points[-1, 0])
    axes = axes_of(first, last, float(lows.min()), float(highs.max()))
    xs, ys = axes.across(steps), axes.up(means)
    right = CHART["width"] - CHART["right"]
    cuts = np.concatenate([[CHART["left"]], (xs[1:] + xs[:-1]) / 2, [right]])
    around = np.concatenate([xs, xs[::-1]]), np.concatenate([axes.up(highs), axes.up(lows)[::-1]])
    return result | {
        "latest": compact(float(points[-1, 1])) + unit,
        "line": path_data(xs, ys),
        "band": path_data(*around) + "Z" if len(points) > len(bins) else "",
        "end": (xs[-1], ys[-1]),
        **axes.marks(unit),
        "hits": [
            {"x": x, "y": y, "left": a, "width": b - a, "text": f"{compact(v)}{unit} at {s:,.0f}"}
            for x, y, a, b, v, s in zip(xs, ys, cuts, cuts[1:], means, steps, strict=False)
        ],
    }


def overlaid_chart(
    runs: dict[int, Metrics], curve: tuple[str, str, str, float, str]
) -> dict[str, Any] | None:
    """The same curve of several runs, by their number, on common axes; None where none has it."""
    key, title, note, factor, unit = curve
    found = {number: points_of(entries, key, factor)[0] for number, entries in runs.items()}
    found = {number: points for number, points in found.items() if len(points)}
    if not found:
        return None
    lines = {
        number: np.array([b.mean(axis=0) for b in np.array_split(p, min(len(p), MAX_BINS))])
        for number, p in found.items()
    }
    every = np.concatenate(list(lines.values()))
    (first, low), (last, high) = every.min(axis=0).tolist(), every.max(axis=0).tolist()
    axes = axes_of(first, last, low, high)
    return {
        "title": title,
        "note": note,
        "lines": [
            {
                "run": number,
                "path": path_data(axes.across(line[:, 0]), axes.up(line[:, 1])),
                "latest": compact(float(found[number][-1, 1])) + unit,
            }
            for number, line in lines.items()
        ],
        **axes.marks(unit),
    }
