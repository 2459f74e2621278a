"""Pictures and curves of the report: PNG data URIs, and charts in units of an SVG view box."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]
Segments = NDArray[np.int16]  # ids, -1 for void
Floats = NDArray[np.float64]
Metrics = list[dict[str, Any]]

VOID = -1
MAX_CLASSES = 1024  # ImageNet-S has 920; the last colour is that of void
MAX_PICTURE = 224  # px; shown at most about 190 px wide, the rest is for dense screens
MAX_BINS = 120
CHART = {"width": 360, "height": 190, "left": 44, "right": 10, "top": 14, "bottom": 24}

# uint8 [256, 3]: proposals have no class, so they must not borrow a class's colour.
PROPOSAL_PALETTE = np.resize(
    np.array(
        [[255, 120, 40], [255, 196, 0], [0, 190, 255], [255, 70, 160], [90, 230, 90]],
        dtype=np.uint8,
    ),
    (256, 3),
)
PROPOSAL_PALETTE[VOID] = 224


def class_palette(count: int) -> Bytes:
    """Colours of PASCAL VOC, uint8 [count, 3]; the last of all MAX_CLASSES, void, is light grey.

    The bits of an id are dealt to red, green, blue in turn, highest colour bit first, which
    keeps neighbouring ids far apart.
    """
    ids = np.arange(count)
    colours = np.zeros((count, 3), dtype=np.int64)
    for shift in range(8):
        for channel in range(3):
            colours[:, channel] |= ((ids >> (3 * shift + channel)) & 1) << (7 - shift)
    palette = colours.astype(np.uint8)
    palette[MAX_CLASSES - 1 :] = 224
    return palette


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


def chart(entries: Metrics, curve: tuple[str, str, str, float, str]) -> dict[str, Any]:
    """A curve in units of the SVG view box: bin means as a line, ranges as a band behind it."""
    key, title, note, factor, unit = curve
    pairs = [(entry["step"], number(entry[key])) for entry in entries if key in entry]
    points = np.array([(s, v * factor) for s, v in pairs if v is not None], dtype=np.float64)
    result = {"title": title, "note": note, "skipped": len(pairs) - len(points), "latest": ""}
    if not len(points):
        return result
    bins = np.array_split(points, min(len(points), MAX_BINS))
    steps, means = np.array([b.mean(axis=0) for b in bins]).T
    lows, highs = np.array([[b[:, 1].min(), b[:, 1].max()] for b in bins]).T
    low, high = float(lows.min()), float(highs.max())
    ticks = nice_ticks(0.0 if 0 <= low < 0.6 * high else low, high)
    first, last = float(points[0, 0]), float(points[-1, 0])
    start = 0.0 if 0 <= first < 0.3 * last else first
    stop = last if last > start else start + 1
    right, base = CHART["width"] - CHART["right"], CHART["height"] - CHART["bottom"]

    def across(step: Floats) -> Floats:
        return CHART["left"] + (step - start) / (stop - start) * (right - CHART["left"])

    def up(value: Floats) -> Floats:
        return base - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (base - CHART["top"])

    xs, ys = across(steps), up(means)
    cuts = np.concatenate([[CHART["left"]], (xs[1:] + xs[:-1]) / 2, [right]])
    around = np.concatenate([xs, xs[::-1]]), np.concatenate([up(highs), up(lows)[::-1]])
    x_ticks = np.array([tick for tick in nice_ticks(start, stop) if start <= tick <= stop])
    y_ticks = np.array(ticks)
    return result | {
        "latest": compact(float(points[-1, 1])) + unit,
        "line": path_data(xs, ys),
        "band": path_data(*around) + "Z" if len(points) > len(bins) else "",
        "end": (xs[-1], ys[-1]),
        "x_ticks": [(x, compact(t)) for x, t in zip(across(x_ticks), x_ticks, strict=True)],
        "y_ticks": [(y, compact(t) + unit) for y, t in zip(up(y_ticks), y_ticks, strict=True)],
        "hits": [
            {"x": x, "y": y, "left": a, "width": b - a, "text": f"{compact(v)}{unit} at {s:,.0f}"}
            for x, y, a, b, v, s in zip(xs, ys, cuts, cuts[1:], means, steps, strict=False)
        ],
    }
