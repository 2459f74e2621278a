"""A thousand damaged files among good ones: each is named with its reason, no good one is lost."""

import csv
import hashlib
import io
import json
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.build_config import BuildConfig, BuildOptions
from data_pipeline.index import DatasetIndex
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.sources.folder import list_folder
from data_pipeline.sources.image_list import list_images
from data_pipeline.sources.item import Listing
from data_pipeline.write_shards import build_shards
from tests.sample_data import encode, object_mask, picture, write

DAMAGED, GOOD = 1000, 300
Rng = np.random.Generator
OTHER_TYPES = (
    b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<< /Type /Catalog >>\nendobj\n",
    b"PK\x03\x04" + bytes(60),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
)


def truncated(data: bytes, rng: Rng) -> bytes:
    return data[: int(rng.integers(1, len(data)))]


def bits_flipped(data: bytes, rng: Rng, count: int) -> bytes:
    bits = bytearray(data)
    for place in rng.choice(8 * len(data), count, replace=False).tolist():
        bits[place // 8] ^= 1 << place % 8
    return bytes(bits)


def other_type(data: bytes, rng: Rng) -> bytes:
    animation = [Image.fromarray(picture(number)) for number in range(2)]
    gif = io.BytesIO()
    animation[0].save(gif, "GIF", save_all=True, append_images=animation[1:])
    return [*OTHER_TYPES, gif.getvalue(), rng.bytes(500)][int(rng.integers(6))]


def huge_header(data: bytes, rng: Rng) -> bytes:
    """The same file, but it says that it has some four thousand million pixels."""
    side = int(rng.integers(60_000, 65_500))
    if data[:4] == b"\x89PNG":
        header = struct.pack(">II", side, side) + data[24:29]
        return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", side, side) + data[frame + 9 :]


def make_good(root: Path, number: int) -> tuple[Path, Path]:
    """One in three is a PNG."""
    kind = "PNG" if number % 3 == 0 else "JPEG"
    suffix = {"PNG": "png", "JPEG": "jpg"}[kind]
    pixels = picture(number, 20 + number % 7, 30)
    pixels[5, 5] = number % 256, number // 256, 0  # no two are duplicates
    image = write(root / "images" / f"s{number:04d}.{suffix}", encode(pixels, kind))
    mask = encode(object_mask(number, 20 + number % 7, 30))
    return image, write(root / "masks" / f"s{number:04d}.png", mask)


def damage(image: Path, mask: Path, number: int, rng: Rng) -> str:
    """Damages image or mask and returns how."""
    kinds = ("truncated", "flipped", "type", "size", "empty", "header")
    kind = kinds[number % len(kinds)]
    target = mask if rng.random() < 0.4 else image
    data = target.read_bytes()
    if kind == "truncated":
        data = truncated(data, rng)
    elif kind == "flipped":
        # in a PNG any bit shows; a JPEG has no checksum, and few flips may leave a valid one
        data = bits_flipped(data, rng, 1 if data[1:4] == b"PNG" else 64)
    elif kind == "type":
        data = other_type(data, rng)
    elif kind == "size":
        target, data = mask, encode(object_mask(0, 20 + number % 7, 31))
    elif kind == "empty":
        data = b""
    else:
        data = huge_header(data, rng)
    target.write_bytes(data)
    return kind


def build(listing: Listing, output: Path) -> tuple[Manifest, dict[str, dict[str, Any]], set[str]]:
    """Manifest, failures by key, and the keys that are in the shards."""
    config = BuildConfig(100, duplicates="keep")
    manifest = build_shards(listing, output, config, BuildOptions(processes=2))
    assert manifest is not None
    lines = (output / "failures.jsonl").read_bytes().splitlines()
    failures = {failure["key"]: failure for failure in map(json.loads, lines)}
    assert len(failures) == len(lines) == manifest.failures
    index = DatasetIndex(read_manifest(output))
    stored = {key for number in range(len(index.counts)) for key in index.shard(number).keys}
    return manifest, failures, stored


@pytest.mark.slow
def test_every_damaged_file_is_named_and_every_good_one_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    places = set(rng.choice(DAMAGED + GOOD, DAMAGED, replace=False).tolist())
    kinds = {}
    for number in range(DAMAGED + GOOD):
        image, mask = make_good(tmp_path, number)
        if number in places:
            kinds[image.stem] = damage(image, mask, number, rng)
    listing = list_folder(tmp_path / "images", tmp_path / "masks")
    manifest, failures, stored = build(listing, tmp_path / "shards")
    unnoticed = Counter(kinds[key] for key in kinds.keys() & stored)
    assert not unnoticed
    assert failures.keys() == kinds.keys()
    assert (manifest.samples, len(stored)) == (GOOD, GOOD)
    for failure in failures.values():
        assert failure["stage"] in ("image", "mask")
        assert failure["reason"]
    reasons = {
        kind: {failures[key]["reason"].split(" (")[0] for key in kinds if kinds[key] == kind}
        for kind in set(kinds.values())
    }
    assert reasons["empty"] == {"the file is empty"}
    assert all(
        "more than the limit of 100,000,000 pixels" in reason for reason in reasons["header"]
    )
    assert all(" pixels, its image " in reason for reason in reasons["size"])


@pytest.mark.slow
def test_a_single_flipped_bit_is_found_where_the_list_has_checksums(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows, bad = [], set()
    for number in range(120):
        image, mask = make_good(tmp_path, number)
        data = image.read_bytes()
        rows.append(
            (f"images/{image.name}", f"masks/{mask.name}", hashlib.sha256(data).hexdigest())
        )
        if number % 2:
            image.write_bytes(bits_flipped(data, rng, 1))
            bad.add(f"images/{image.stem}")
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "mask", "sha256"), *rows])
    _, failures, stored = build(list_images(tmp_path / "list.csv"), tmp_path / "shards")
    assert failures.keys() == bad
    assert len(stored) == 60
