"""Colours of classes, and a picture that says which is which."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Bytes = NDArray[np.uint8]

VOID = -1
MAX_CLASSES = 1024  # ImageNet-S has 920; the last colour is that of void
_OBJECT = (255, 120, 40)  # of a foreground without a class
_ROWS, _SWATCH, _MARGIN, _FONT = 32, 18, 8, 14  # of the legend; the last three in pixels


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


def object_palette() -> Bytes:
    """Of masks that know background and object only: `class_palette`, but for colour 1."""
    palette = class_palette(MAX_CLASSES)
    palette[1] = _OBJECT
    return palette


def legend(names: tuple[str, ...], palette: Bytes) -> Image.Image:
    """The classes' colours beside their names, in columns of 32."""
    font = ImageFont.load_default(_FONT)
    labels = [f"{index} {name}" for index, name in enumerate(names)]
    column = _SWATCH + 3 * _MARGIN + int(max(font.getlength(label) for label in labels))
    rows = min(len(names), _ROWS)
    columns = -(-len(names) // _ROWS)
    line = _SWATCH + _MARGIN
    picture = Image.new("RGB", (column * columns + _MARGIN, line * rows + _MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for index, label in enumerate(labels):
        left, top = _MARGIN + column * (index // _ROWS), _MARGIN + line * (index % _ROWS)
        colour = tuple(palette[index].tolist())
        draw.rectangle((left, top, left + _SWATCH, top + _SWATCH), colour, "grey")
        draw.text((left + _SWATCH + _MARGIN, top), label, "black", font)
    return picture
