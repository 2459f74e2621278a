"""Small pictures with segments over them, as a file: what contact sheets are made of."""

import io
import itertools
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.files import atomic_write

MAX_SIDE = 160  # pixels
MAX_IMAGES = 512
_MAX_BYTES = 256 << 20  # of one array, unpacked: more is no file of ours
_QUALITY = 85


@dataclass(frozen=True)
class Belonging:
    """What pictures belong to: the names of their classes, background first, protocol, network."""

    names: Sequence[str]
    protocol: str
    network: str


@dataclass(frozen=True)
class Gallery:
    """n pictures, T pixels wide and high, T ≤ MAX_SIDE.

    Attributes:
        keys: of the samples.
        images: uint8 [n, T, T, 3].
        segments: int16 [n, T, T] predicted class, -1 where a cluster has none.
        names: of the classes, background first.
        protocol, network: what they belong to.
        arrays: what the sheet says about them, by name.
    """

    keys: Sequence[str]
    images: NDArray[np.uint8]
    segments: NDArray[np.int16]
    names: Sequence[str]
    protocol: str
    network: str
    arrays: dict[str, NDArray[Any]]

    def write(self, path: Path) -> None:
        """Writes it as npz, photographs as JPEG."""
        encoded = [_jpeg(image) for image in self.images]
        arrays = {
            "key": np.array(self.keys, np.str_),
            "jpeg": np.frombuffer(b"".join(encoded), np.uint8),
            "jpeg_end": np.cumsum([len(one) for one in encoded], dtype=np.int64),
            "segments": self.segments.astype(np.int16),
            "names": np.array(self.names, np.str_),
            "protocol": np.array(self.protocol, np.str_),
            "network": np.array(self.network, np.str_),
        }
        with atomic_write(path) as file:
            np.savez_compressed(file, **(arrays | self.arrays))


def read_gallery(path: Path, wanted: dict[str, tuple[str, int]]) -> Gallery:
    """Reads what `Gallery.write` wrote, checked.

    Args:
        path: the file.
        wanted: kind (of NumPy's dtype) and number of axes of the sheet's own arrays.

    Raises:
        InputError: the file is something else.
    """
    kinds = {
        "key": ("U", 1), "jpeg": ("u", 1), "jpeg_end": ("i", 1), "segments": ("i", 3),
        "names": ("U", 1), "protocol": ("U", 0), "network": ("U", 0),
    }  # fmt: skip
    try:
        arrays = load_arrays(path, [*kinds, *wanted])
        for name, (kind, axes) in (kinds | wanted).items():
            if arrays[name].dtype.kind != kind or arrays[name].ndim != axes:
                raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
        count, height, width = arrays["segments"].shape
        if count > MAX_IMAGES or height > MAX_SIDE or width > MAX_SIDE:
            raise ValueError(f"{count} pictures of {height} × {width} pixels")
        if not len(arrays["key"]) == len(arrays["jpeg_end"]) == count:
            raise ValueError(f"{len(arrays['key'])} keys for {count} pictures")
        starts = [0, *arrays["jpeg_end"].tolist()]
        data = arrays["jpeg"].tobytes()
        images = [
            _decoded(data[first:last], (width, height))
            for first, last in itertools.pairwise(starts)
        ]
    except (OSError, LookupError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: {error}; evaluate again to write the pictures") from error
    return Gallery(
        arrays["key"].tolist(),
        np.array(images, np.uint8).reshape(count, height, width, 3),
        arrays["segments"].astype(np.int16),
        arrays["names"].tolist(),
        str(arrays["protocol"]),
        str(arrays["network"]),
        {name: arrays[name] for name in wanted},
    )


def load_arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Arrays of an npz by name; nothing is unpickled, and none may unpack to more than a bound.

    Raises:
        ValueError, LookupError, OSError, BadZipFile: it cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    for name in names:
        if sizes.get(f"{name}.npy", 0) > _MAX_BYTES:
            raise ValueError(f"{name} is too large")
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in names}


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _decoded(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        if image.size != size:  # said by the header, before anything is decoded
            raise ValueError(f"a picture of {image.size} pixels instead of {size}")
        return np.asarray(image.convert("RGB"))
