"""Procedurally rendered scenes: a small data set that ships as code instead of pictures.

A scene is one salient object (sometimes two) of a known class in front of a cluttered background.
A class is a family of shapes with a pattern and usual hues of its own, near those of other classes;
distractors have any hue. So colour is a hint at class and foreground, and no proof.

An object is a signed distance field (negative inside) and a paint, both over a local frame where it
spans about [-1, 1]^2, u to the right and v down. Distances are approximate away from the border.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

Array = NDArray[Any]
Bytes = NDArray[np.uint8]
Colour = tuple[float, float, float]
Rng = np.random.Generator

VOID = 255
MIN_SIDE, PLACEMENT_ATTEMPTS = 8, 16
MIN_OBJECT_AREA, MAX_TOTAL_AREA = 0.04, 0.45
TWO_OBJECTS, TRUNCATED, OCCLUDED = 0.2, 0.18, 0.2
# On smaller pictures a ring on both sides of the border would eat whole objects.
THIN_RING_BELOW = 48
WHITE, CREAM, BLACK = (0.96, 0.96, 0.93), (0.86, 0.82, 0.74), (0.06, 0.06, 0.07)


@dataclass(frozen=True)
class Scene:
    """One rendered picture with its annotation.

    image: [H, W, 3] uint8, RGB.
    mask: [H, W] uint8, object proposals: 0 background, then one id per object from 1 without gaps.
        The border is off by a pixel or so here and there, as an estimated saliency mask would be.
    label: [H, W] uint8, index into `CLASSES`; `VOID` on a ring of 1-2 pixels around objects.
    """

    image: Bytes
    mask: Bytes
    label: Bytes


# A layer is a signed distance or coverage [H, W] with a paint [H, W, 3]. A painter turns traits,
# numbers in [-1, 1], into the proportions of one member of its class; palettes are [4, 3], by tone.
Layer = tuple[Array, Array]
Painter = Callable[[Array, Array, list[float], Array], Layer]
BASE, ACCENT, LIGHT, DARK = range(4)


def _ellipse(u: Array, v: Array, cu: float, cv: float, a: float, b: float) -> Array:
    return np.asarray(min(a, b) * (np.hypot((u - cu) / a, (v - cv) / b) - 1))


def _box(u: Array, v: Array, cu: float, cv: float, a: float, b: float) -> Array:
    return np.asarray(np.maximum(np.abs(u - cu) - a, np.abs(v - cv) - b))


def _convex(u: Array, v: Array, *corners: tuple[float, float]) -> Array:
    """Convex polygon, corners clockwise as seen on screen."""
    distance = np.full_like(u, -np.inf)
    for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):
        side = (u - u0) * (v1 - v0) - (v - v0) * (u1 - u0)
        distance = np.maximum(distance, side / math.hypot(u1 - u0, v1 - v0))
    return distance


def _capsule(u: Array, v: Array, u0: float, v0: float, u1: float, v1: float, r: float) -> Array:
    du, dv = u1 - u0, v1 - v0
    t = np.clip(((u - u0) * du + (v - v0) * dv) / (du * du + dv * dv), 0, 1)
    return np.asarray(np.hypot(u - u0 - t * du, v - v0 - t * dv) - r)


def _inside(sdf: Array, softness: float = 0.03) -> Array:
    return np.clip(0.5 - sdf / softness, 0, 1)


def _over(below: Colour | Array, above: Colour | Array, weight: Array) -> Array:
    """Layer `above` over `below`; the weight's shape [H, W] gives the picture's."""
    ground = np.asarray(below, np.float32)
    return ground + (np.asarray(above, np.float32) - ground) * weight[..., None]


def _wave(x: Array, period: float) -> Array:
    """Triangle wave: 0 on multiples of the period, 0.5 halfway."""
    return np.asarray(np.abs(x / period - np.round(x / period)))


def _dots(u: Array, v: Array, pitch: float, radius: float) -> Array:
    """Staggered lattice of discs; radius and distance are in units of the pitch."""
    row = np.round(v / pitch)
    aside = _wave(u + 0.5 * pitch * (row % 2), pitch)
    return np.asarray(np.hypot(aside, v / pitch - row) - radius)


def _fish(u: Array, v: Array, t: list[float], pal: Array) -> Layer:
    height, tail, pitch = 0.42 + 0.08 * t[0], 0.45 + 0.09 * t[1], 0.2 + 0.03 * t[2]
    body = _ellipse(u, v, -0.22, 0, 0.74, height)
    upper = _convex(u, v, (0.3, 0.05), (0.3, -0.05), (1, -tail), (0.82, 0.06))
    lower = _convex(u, v, (0.3, 0.05), (0.3, -0.05), (0.82, -0.06), (1, tail))
    fin = _convex(u, v, (-0.45, -height * 0.7), (0.05, -height - 0.2), (0.2, -height * 0.6))
    rgb = _over(pal[BASE], pal[LIGHT], np.clip(v / height * 0.8, 0, 0.8))
    scales = _inside(np.abs(_dots(u, v, pitch, 0.42)) - 0.1, 0.12)
    rgb = _over(rgb, pal[DARK], 0.8 * scales * (u > -0.5))
    rgb = _over(rgb, pal[ACCENT], _inside(-body) * _inside(_wave(v, 0.11) - 0.25, 0.4))
    rgb = _over(rgb, WHITE, _inside(_ellipse(u, v, -0.66, -0.09, 0.12, 0.12)))
    rgb = _over(rgb, BLACK, _inside(_ellipse(u, v, -0.68, -0.09, 0.065, 0.065)))
    return np.minimum.reduce([body, upper, lower, fin]), rgb


def _mushroom(u: Array, v: Array, t: list[float], pal: Array) -> Layer:
    width, rise, stem = 0.85 + 0.13 * t[0], 0.78 + 0.17 * t[1], 0.22 + 0.06 * t[2]
    cap = np.maximum(_ellipse(u, v, 0, 0.02, width, rise), v - 0.1 + 0.1 * u * u)
    stalk = _convex(u, v, (-stem, 0), (stem, 0), (stem + 0.1, 0.9), (-stem - 0.1, 0.9))
    rgb = _over(CREAM, (0.5, 0.43, 0.34), 0.6 * _inside(_wave(u, 0.13) - 0.15, 0.2))
    rgb = _over(rgb, pal[DARK], 0.6 * _inside(v - 0.2, 0.16))
    hood = _over(pal[BASE], pal[DARK], np.clip(np.abs(u) - 0.35, 0, 0.5))
    hood = _over(hood, pal[LIGHT], _inside(_dots(u, v + t[3], 0.4, 0.28), 0.08))
    return np.minimum.reduce([cap, stalk]), _over(rgb, hood, _inside(cap))


def _kite(u: Array, v: Array, t: list[float], pal: Array) -> Layer:
    half, shoulder, pitch = 0.63 + 0.13 * t[0], -0.325 + 0.125 * t[1], 0.25 + 0.05 * t[2]
    sail = _convex(u, v, (0, -1), (half, shoulder), (0, 0.6), (-half, shoulder))
    sway = 0.1 * np.sin(10 * (v - 0.6)) * (1 if t[3] > 0 else -1)
    tail = _box(u - sway, v, 0, 0.86, 0.055, 0.32)
    bows = np.maximum(np.abs(u - sway) - 0.16, np.abs(np.abs(v - 0.95) - 0.14) - 0.05)
    checks = np.sin(math.pi * u / pitch) * np.sin(math.pi * (v - shoulder) / pitch)
    rgb = _over(pal[BASE], pal[LIGHT], _inside(-checks, 0.2))
    spars = np.minimum(np.abs(u), np.abs(v - shoulder)) - 0.025
    rgb = _over(_over(rgb, pal[DARK], 0.9 * _inside(spars)), pal[ACCENT], _inside(0.02 - sail))
    return np.minimum.reduce([sail, tail, bows]), rgb


def _house(u: Array, v: Array, t: list[float], pal: Array) -> Layer:
    half, eave, apex = 0.665 + 0.115 * t[0], -0.125 + 0.125 * t[1], -0.84 + 0.14 * t[2]
    course, door = 0.155 + 0.025 * t[3], 0.12 * t[4]
    roof = _convex(u, v, (0, apex), (half + 0.2, eave + 0.06), (-half - 0.2, eave + 0.06))
    stack = _box(u, v, -0.42, (apex + eave) / 2, 0.1, (eave - apex) / 2)
    wall = _box(u, v, 0, (eave + 0.85) / 2, half, (0.85 - eave) / 2)
    bed, shift = 0.5 - _wave(v, course), 1.1 * course * (np.round(v / course) % 2)
    head = 1.1 - 2.2 * _wave(u + shift, 2.2 * course)
    rgb = _over(pal[BASE], CREAM, 0.9 * _inside(np.minimum(bed, head) - 0.1, 0.12))
    tiles = _over(pal[ACCENT], pal[DARK], 0.8 * _inside(_wave(v, 0.14) - 0.14, 0.2))
    rgb = _over(rgb, tiles, _inside(roof))
    for centre in (door - 0.36, door + 0.36):
        pane = _box(u, v, centre, eave + 0.36, 0.14, 0.15)
        rgb = _over(_over(rgb, WHITE, _inside(pane)), (0.16, 0.2, 0.3), _inside(pane + 0.045))
    rgb = _over(rgb, pal[DARK], _inside(_box(u, v, door, 0.6, 0.13, 0.3)))
    return np.minimum.reduce([roof, stack, wall]), rgb


def _starfish(u: Array, v: Array, t: list[float], pal: Array) -> Layer:
    thick, tip, pitch = 0.3 + 0.06 * t[0], 0.06 + 0.02 * t[1], 0.195 + 0.025 * t[2]
    r, sector = np.hypot(u, v), math.tau / 5
    # Folding the plane into one sector leaves a single arm along x; the bend curls all alike.
    fold = np.arctan2(u, -v) + 0.4 * t[3] * r
    fold = fold - sector * np.round(fold / sector)
    x, y = r * np.cos(fold), np.abs(r * np.sin(fold))
    width = thick * np.clip(1 - x, 0, 1) + tip
    sdf = np.maximum(y - width, x - 0.95) * 0.9
    rgb = _over(pal[BASE], pal[ACCENT], np.clip(1 - 1.6 * x, 0, 1))
    rgb = _over(rgb, pal[DARK], 0.75 * np.clip(y / width, 0, 1) ** 2)
    rgb = _over(rgb, pal[LIGHT], _inside(np.hypot(_wave(x, pitch) * pitch, y) - 0.36 * pitch))
    return sdf, _over(rgb, pal[LIGHT], 0.6 * (y > 0.09) * _inside(_dots(x, y, 0.1, 0.2), 0.25))


def _planet(u: Array, v: Array, t: list[float], pal: Array) -> Layer:
    radius, tilt, bands = 0.63 + 0.07 * t[0], 0.27 + 0.07 * t[1], 9 + 2 * t[2]
    disc, r = np.hypot(u, v) - radius, np.hypot(u, v / tilt)
    ring = np.abs(r - 0.98) * tilt - 0.15 * tilt
    bulge = v / radius + 0.3 * (u / radius) ** 2 + 0.04 * np.sin(9 * u + 6 * t[3])
    rgb = _over(pal[BASE], pal[LIGHT], np.clip(0.5 + np.sin(bands * bulge + 6 * t[3]), 0, 1))
    rgb = _over(rgb, pal[ACCENT], 0.8 * _inside(np.sin(2.3 * bands * bulge) + 0.75, 0.4))
    rgb = _over(rgb, BLACK, np.clip(1.3 * np.hypot(u - 0.3 * t[4], v + 0.25) - 0.5, 0, 0.8))
    belt = _over(pal[ACCENT], pal[DARK], _inside(np.abs(r - 0.99) - 0.025))
    rgb = _over(rgb, belt, _inside(ring) * np.maximum(v > 0, disc > 0))
    return np.minimum.reduce([disc, ring]), rgb


def _leaf(u: Array, v: Array, t: list[float], pal: Array) -> Layer:
    width, blunt, gap = 0.47 + 0.11 * t[0], 0.35 * t[1], 0.205 + 0.035 * t[2]
    x, y = np.clip((u + 0.12) / 0.9, -1, 1), np.abs(v)
    half = width * (1 - x * x) * (1 + blunt * x) - (0.04 + 0.04 * t[3]) * _wave(x, 0.16)
    blade = np.maximum((y - half) * 0.8, np.abs(u + 0.12) - 0.9)
    rgb = _over(pal[BASE], pal[DARK], 0.5 * _inside(v, 0.06))
    rgb = _over(rgb, pal[ACCENT], np.clip(y / width - 0.3, 0, 0.6))
    veins = gap * _wave(u + (0.9 + 0.2 * t[4]) * y, gap) - 0.014
    rgb = _over(rgb, pal[LIGHT], 0.95 * _inside(np.minimum(veins, y - 0.035)))
    return np.minimum.reduce([blade, _capsule(u, v, 0.7, 0, 1.12, 0.1, 0.05)]), rgb


def _gear(u: Array, v: Array, t: list[float], pal: Array) -> Layer:
    teeth, bolts, hole = int(10.45 + 2.45 * t[0]), int(5.45 + 1.45 * t[2]), 0.21 + 0.05 * t[1]
    r, angle = np.hypot(u, v), np.arctan2(v, u)
    rim = 0.83 + (0.105 + 0.025 * t[3]) * np.clip(2.5 * np.sin(teeth * angle), -1, 1)
    # Two bright lobes around the axis are what turned metal shows under one lamp.
    rgb = _over(pal[BASE], pal[LIGHT], (0.5 + 0.5 * np.cos(2 * angle + 6 * t[4])) ** 2)
    rgb = _over(rgb, pal[DARK], 0.15 + 0.15 * np.cos(55 * r))
    rgb = _over(rgb, pal[DARK], 0.9 * _inside(np.abs(r - 0.7) - 0.03))
    rgb = _over(rgb, pal[LIGHT], _inside(np.abs(r - hole - 0.06) - 0.035))
    spoke = _wave(angle, math.tau / bolts) * math.tau / bolts
    bolt = np.hypot(r * np.cos(spoke) - 0.48, r * np.sin(spoke)) - 0.09
    return np.maximum(r - rim, hole - r) * 0.9, _over(rgb, BLACK, 0.9 * _inside(bolt))


def _snail(u: Array, v: Array, t: list[float], pal: Array) -> Layer:
    radius, turns, reach = 0.58 + 0.06 * t[0], 2.2 + 0.4 * t[1], 0.2 + 0.1 * t[2]
    r, angle = np.hypot(u - 0.15, v + 0.1), np.arctan2(v + 0.1, u - 0.15)
    foot = np.maximum(_capsule(u, v, -0.65, 0.5, 0.95, 0.62, 0.17), v - 0.64)
    neck = _capsule(u, v, -0.55, 0.5, -0.82, reach, 0.16)
    left = _capsule(u, v, -0.84, reach, -1.02, reach - 0.42, 0.05)
    right = _capsule(u, v, -0.78, reach, -0.72, reach - 0.45, 0.05)
    turn = turns * r / radius - angle / math.tau + t[3]
    shell = _over(pal[BASE], pal[LIGHT], np.clip(1.3 - 2.4 * (turn - np.floor(turn)), 0, 1))
    shell = _over(shell, pal[DARK], 0.35 * _inside(np.cos(26 * angle) + 0.4, 0.6) * (r > 0.15))
    shell = _over(shell, pal[DARK], _inside(_wave(turn, 1) - 0.12, 0.08))
    rgb = _over(pal[ACCENT], pal[DARK], np.clip(0.9 * (v - 0.25), 0, 0.6))
    rgb = _over(rgb, shell, _inside(r - radius))
    return np.minimum.reduce([r - radius, foot, neck, left, right]), rgb


def _bee(u: Array, v: Array, t: list[float], pal: Array) -> Layer:
    height, band, spread = 0.42 + 0.06 * t[0], 0.32 + 0.05 * t[1], 0.425 + 0.175 * t[2]
    wings = np.full_like(u, np.inf)
    for tilt in (-spread, spread + 0.15):
        x = u * math.cos(tilt) + (v + 0.1) * math.sin(tilt)
        y = (v + 0.1) * math.cos(tilt) - u * math.sin(tilt)
        wings = np.minimum(wings, _ellipse(x, y, 0, -0.48, 0.25, 0.48))
    sting = _convex(u, v, (0.6, -0.02), (1, 0.15), (0.6, 0.32))
    torso = np.minimum.reduce([_ellipse(u, v, 0.05, 0.15, 0.72, height), sting])
    head = _ellipse(u, v, -0.72, 0.12, 0.25, 0.27)
    rgb = _over(WHITE, pal[ACCENT], 0.2 + 0.5 * _inside(_wave(u + 0.4 * v, 0.15) - 0.12, 0.2))
    bars = _inside(_wave(u + 0.25 * v * v + t[4], band) - 0.23, 0.1)
    coat = _over(_over(pal[BASE], pal[LIGHT], np.clip(-v, 0, 0.4)), BLACK, bars)
    rgb = _over(_over(rgb, coat, _inside(torso)), pal[DARK], _inside(head))
    rgb = _over(rgb, WHITE, _inside(_ellipse(u, v, -0.8, 0.06, 0.07, 0.09)))
    return np.minimum.reduce([wings, torso, head]), rgb


# Painter, main and accent hue (near those of other classes), how far it may turn (radians).
_FAMILIES: dict[str, tuple[Painter, tuple[float, float], float]] = {
    "fish": (_fish, (0.54, 0.62), 0.6),
    "mushroom": (_mushroom, (0.0, 0.97), 0.4),
    "kite": (_kite, (0.21, 0.83), math.pi),
    "house": (_house, (0.06, 0.58), 0.15),
    "starfish": (_starfish, (0.91, 0.05), math.pi),
    "planet": (_planet, (0.75, 0.13), 0.8),
    "leaf": (_leaf, (0.33, 0.25), math.pi),
    "gear": (_gear, (0.63, 0.12), math.pi),
    "snail": (_snail, (0.44, 0.08), 0.3),
    "bee": (_bee, (0.13, 0.1), 0.6),
}
CLASSES: tuple[str, ...] = ("background", *_FAMILIES)


def _generator(seed: int, index: int, stream: int) -> Rng:
    key = np.array([seed % 2**64, stream], np.uint64)
    # The low counter words advance with the draws, so the index sits in the highest one.
    counter = np.array([0, 0, 0, index % 2**64], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    return colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))


def _object_palette(rng: Rng, hues: tuple[float, float]) -> Array:
    base, accent = np.array(hues) + rng.normal(0, 0.025, 2)
    vivid, bright = rng.uniform(0.55, 0.95), rng.uniform(0.55, 0.9)
    other = _hsv(accent, rng.uniform(0.5, 0.95), rng.uniform(0.5, 0.95))
    light, dark = _hsv(base, 0.3 * vivid, rng.uniform(0.88, 1)), _hsv(base, vivid, 0.38 * bright)
    return np.array([_hsv(base, vivid, bright), other, light, dark], np.float32)


def _turned(angle: float) -> Array:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _noise(rng: Rng, cells: int, height: int, width: int) -> Array:
    """Smooth noise in [0, 1] with about `cells` bumps along each side."""
    grid = Image.fromarray(rng.random((cells, cells), np.float32))
    return np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC), np.float32)


def _background(rng: Rng, height: int, width: int) -> Array:
    """Clutter, [H, W, 3] float RGB in about [0, 1]."""
    # Muted grounds look much alike, as they do in photographs of one world: otherwise a picture
    # could be told from all others by its ground alone, and objects need not be looked at.
    mean = rng.uniform(0.4, 0.7)
    tints = [(rng.random(), rng.uniform(0.02, 0.25), rng.normal(mean, 0.12)) for _ in range(4)]
    inks = [_hsv(*tint) for tint in tints]
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    slope = rng.uniform(-1, 1) * columns / width + rng.uniform(-1, 1) * rows / height
    rgb = _over(inks[0], inks[1], np.clip(slope + _noise(rng, 4, height, width), 0, 1))
    rgb = _over(rgb, inks[2], _inside(0.62 - _noise(rng, int(rng.integers(4, 9)), height, width)))
    angle, pitch = rng.uniform(0, math.pi), max(height, width) / rng.uniform(8, 30)
    grating = _wave(columns * math.cos(angle) + rows * math.sin(angle), float(pitch)) - 0.25
    patch = _inside(0.6 - _noise(rng, 4, height, width), 0.3)
    rgb = _over(rgb, inks[3], rng.uniform(0.2, 0.8) * patch * _inside(grating, 0.3))
    sheet = Image.fromarray(np.clip(rgb * 255, 0, 255).astype(np.uint8))
    sheet = sheet.resize((2 * width, 2 * height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(sheet)
    for _ in range(int(rng.integers(5, 14))):
        reach = 2 * min(height, width) * rng.uniform(0.03, 0.13)
        a, b = (5 * reach, 0.06 * reach + 0.5) if rng.random() < 0.35 else (reach, 0.7 * reach)
        around = np.linspace(0, math.tau, int(rng.choice((3, 4, 5, 16))), endpoint=False)
        corners = _turned(rng.uniform(0, math.tau)) @ [a * np.cos(around), b * np.sin(around)]
        corners += rng.random((2, 1)) * [[2 * width], [2 * height]]
        # Any hue, like the objects', so that colour alone is no sign of one.
        ink = _hsv(rng.random(), rng.uniform(0.2, 0.95), rng.uniform(0.35, 0.95))
        fill = tuple(int(255 * level) for level in ink)
        draw.polygon([(x, y) for x, y in corners.T.tolist()], fill)
    rgb = np.asarray(sheet.reduce(2), np.float32) / 255
    for cells, most in ((12, 0.12), (32, 0.12), (80, 0.08)):
        rgb = rgb + rng.uniform(0.02, most) * (2 * _noise(rng, cells, height, width)[..., None] - 1)
    blur = rng.uniform(0.0, 0.008) * min(height, width)
    return np.asarray(ndimage.gaussian_filter(rgb, (blur, blur, 0), truncate=2.5))


def _object(rng: Rng, name: str, share: float, half: int | None, height: int, width: int) -> Layer:
    """Coverage [H, W] and paint [H, W, 3] of one object over about `share` of the picture.

    half: 0 or 1 keeps it to the start or end of the longer side, to leave room for another.
    """
    painter, hues, turn = _FAMILIES[name]
    traits, palette = rng.uniform(-1, 1, 5).tolist(), _object_palette(rng, hues)
    stretch = math.exp(rng.normal(0, 0.13))
    to_pixels = _turned(rng.uniform(-turn, turn)) * [stretch * rng.choice((-1, 1)), 1 / stretch]
    u, v = np.meshgrid(*[np.linspace(-1.3, 1.3, 48, dtype=np.float32)] * 2)
    hit = painter(u, v, traits, palette)[0] < 0
    reach = to_pixels @ [u[hit], v[hit]]
    low, high, sides = reach.min(1), reach.max(1), np.array([width, height])
    wanted = math.sqrt(share * width * height / (float(hit.mean()) * 2.6**2))
    scale = min(wanted, float((sides / (high - low)).min()))
    low, high, where = low * scale, high * scale, rng.random(2)
    axis = int(rng.integers(2)) if half is None else int(height > width)
    if half is not None:
        where[axis] = half + (0.2 - 0.4 * half) * where[axis]
    centre = where * (sides - high + low) - low
    if rng.random() < TRUNCATED:
        push = rng.uniform(0.08, 0.25) * (high - low)[axis]
        centre[axis] = (sides - high)[axis] + push if where[axis] > 0.5 else -low[axis] - push
    x0, y0 = np.clip(np.floor(centre + low).astype(int) - 2, 0, sides - 1).tolist()
    x1, y1 = np.clip(np.ceil(centre + high).astype(int) + 2, 1, sides).tolist()
    # Two samples a pixel and side, averaged below.
    x, y = np.meshgrid(np.arange(x0, x1, 0.5), np.arange(y0, y1, 0.5))
    offset = np.stack([x + 0.25 - centre[0], y + 0.25 - centre[1]]) / scale
    u, v = np.tensordot(np.linalg.inv(to_pixels), offset, 1).astype(np.float32)
    sdf, paint = painter(u, v, traits, palette)
    # A darker rim and a lit upper left give volume and set the object off from its surroundings.
    light = 1 - 0.35 * np.clip(1 + sdf / 0.1, 0, 1) - 0.12 * offset.sum(0)
    colours, window = np.zeros((height, width, 4), np.float32), (y1 - y0, 2, x1 - x0, 2, 4)
    fine = np.dstack([paint * light[..., None], _inside(sdf, 0.5 / scale)])
    colours[y0:y1, x0:x1] = fine.reshape(window).mean((1, 3))
    return colours[..., 3], colours[..., :3]


def _annotate(rng: Rng, coverages: list[Array], classes: list[int]) -> tuple[Bytes, Bytes]:
    """Mask and label of objects listed from back to front."""
    height, width = coverages[0].shape
    thin = min(height, width) < THIN_RING_BELOW
    mask, label, void = np.zeros((3, height, width), np.uint8)
    for number, (coverage, kind) in enumerate(zip(coverages, classes, strict=True), 1):
        visible = coverage > 0.5
        for nearer in coverages[number:]:
            visible &= nearer <= 0.5
        grown = ndimage.binary_dilation(visible)
        core = visible if thin else ndimage.binary_erosion(visible, border_value=1)
        void[grown & ~core] = True
        label[visible] = kind
        wobble = _noise(rng, 12, height, width) - 0.5
        guess = ndimage.gaussian_filter(visible.astype(np.float32), 0.8) + 0.7 * wobble > 0.5
        mask[visible if thin else guess & grown] = number
    label[void > 0] = VOID
    return mask, label


def _composite(rng: Rng, rgb: Array, coverage: Array, colours: Array) -> Array:
    """Lay an object over the picture with a cast shadow and at least a little contrast."""
    side = min(coverage.shape)
    shadow = ndimage.gaussian_filter(coverage, 0.025 * side, truncate=2.5)
    shadow = ndimage.shift(shadow, rng.uniform(0.01, 0.035, 2) * side, order=1)
    rgb = rgb * (1 - rng.uniform(0.25, 0.55) * shadow[..., None])
    gap = float(np.average((colours - rgb).mean(2), weights=coverage))
    lift = math.copysign(max(0.0, 0.12 - abs(gap)), gap)
    return _over(rgb, colours + lift, coverage)


def _develop(rng: Rng, rgb: Array) -> Bytes:
    """Occluding twig, uneven light, blur and sensor noise; [H, W, 3] uint8."""
    height, width = rgb.shape[:2]
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, width), np.linspace(-0.5, 0.5, height))
    along, across = np.tensordot(_turned(rng.uniform(0, math.tau)), [x, y], 1).astype(np.float32)
    if rng.random() < OCCLUDED:
        # Annotators look through thin things, so the twig is in neither mask nor label.
        away = across + rng.uniform(-0.5, 0.5) * along**2 + rng.uniform(-0.2, 0.2)
        twig = _hsv(rng.random(), 0.4, rng.uniform(0.1, 0.9))
        rgb = _over(rgb, twig, _inside(np.abs(away) - 0.008, 0.01))
    rgb = rgb * (1 + rng.uniform(0, 0.35) * across)[..., None]
    if rng.random() < 0.25:
        rgb = ndimage.gaussian_filter(rgb, (0.6, 0.6, 0), truncate=2.5)
    rgb = rgb + rng.uniform(0.003, 0.025) * rng.standard_normal(rgb.shape, np.float32)
    return np.asarray(np.clip(rgb * 255 + 0.5, 0, 255), np.uint8)


def scene_size(seed: int, index: int, base: int) -> tuple[int, int]:
    """Height and width in pixels of a picture with an area of about `base` squared."""
    rng = _generator(seed, index, 1)
    aspect = (1.0, 4 / 3, 3 / 2, 3 / 4, 2 / 3)[int(rng.choice(5, p=(0.25, 0.25, 0.2, 0.2, 0.1)))]
    width = base * rng.uniform(0.88, 1.12) * math.sqrt(aspect)
    return max(MIN_SIDE, round(width / aspect)), max(MIN_SIDE, round(width))


def render_scene(seed: int, index: int, height: int, width: int) -> Scene:
    """Render scene `index` of the series `seed` at height x width pixels.

    Every object covers at least `MIN_OBJECT_AREA` of the mask and all together at most
    `MAX_TOTAL_AREA`, as long as the sides are within about 1:2.5.
    """
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"scene sides must be at least {MIN_SIDE} pixels, got {height}x{width}")
    rng = _generator(seed, index, 0)
    rgb = _background(rng, height, width)
    chosen = [int(kind) for kind in rng.integers(1, len(CLASSES), 1 + (rng.random() < TWO_OBJECTS))]
    for attempt in range(PLACEMENT_ATTEMPTS):
        # Two objects do not fit into every frame: the second half of the attempts drops one.
        pair = len(chosen) == 2 and 2 * attempt < PLACEMENT_ATTEMPTS
        low, high = (0.07, 0.2) if pair else (0.08, 0.4)
        objects = []
        for end, kind in enumerate(chosen[: 1 + pair]):
            share = low * (high / low) ** rng.random()
            half = end if pair else None
            objects.append(_object(rng, CLASSES[kind], share, half, height, width))
        mask, label = _annotate(rng, [coverage for coverage, _ in objects], chosen[: 1 + pair])
        areas = np.bincount(mask.ravel(), minlength=2 + pair)[1:] / mask.size
        if areas.min() >= MIN_OBJECT_AREA and areas.sum() <= MAX_TOTAL_AREA:
            break
    for coverage, colours in objects:
        rgb = _composite(rng, rgb, coverage, colours)
    return Scene(_develop(rng, rgb), mask, label)
