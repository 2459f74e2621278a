"""Frozen features of images in a file, so that memory does not grow with the data set."""

import errno
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.sample import Label

_GIB = 2**30


class FeatureCache:
    """Features bf16 [C, h, w] and labels int16 of this rank's images, by number, read by mmap.

    The file has no name: it goes with the process, however that ends.

    Args:
        folder: where; of the system's temporary files for None.
        images: that will be added; decides the space that is asked for.
        size: side that the images have, pixels; labels are counted with about its square.
        advice: what else a user can do where space is short.
    """

    def __init__(self, folder: Path | None, images: int, size: int, advice: str) -> None:
        self.folder = Path(tempfile.gettempdir()) if folder is None else folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.images, self.size, self.advice = images, size, advice
        self._features, self._labels = self._file(), self._file()
        self._shape: tuple[int, ...] = ()
        self._label_shapes: list[tuple[int, int]] = []
        self._label_starts = [0]
        self._mapped: tuple[NDArray[np.int16], NDArray[np.int16]] | None = None

    def __enter__(self) -> "FeatureCache":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._mapped = None
        self._features.close()
        self._labels.close()

    def __len__(self) -> int:
        return len(self._label_shapes)

    def add(self, features: Tensor, labels: list[Label]) -> None:
        """Appends features [b, C, h, w] and the labels of the same images.

        Raises:
            InputError: there is no space for so many images; before the first is written, as far
                as can be known.
        """
        if not self._label_shapes:
            self._shape = tuple(features.shape[1:])
            self._require_space(2 * self._shape[0] * self._shape[1] * self._shape[2])
        assert features.shape[1:] == self._shape
        assert self._mapped is None
        kept = features.to(torch.bfloat16).cpu().contiguous()
        try:
            self._features.write(kept.view(torch.int16).numpy().data)
            for label in labels:
                self._labels.write(np.ascontiguousarray(label, np.int16).data)
                self._label_shapes.append((label.shape[0], label.shape[1]))
                self._label_starts.append(self._label_starts[-1] + label.size)
            self._features.flush()
            self._labels.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"the disk of {self.folder} is full after the features of {len(self):,} of "
                f"{self.images:,} images; {self._remedy()}"
            ) from None

    def read(self, number: int) -> tuple[Tensor, Label]:
        """Features bf16 [C, h, w] and label of the image that was added as this number."""
        if self._mapped is None:
            shape = (len(self), *self._shape)
            self._mapped = (
                np.memmap(self._features, np.int16, "r", shape=shape),
                np.memmap(self._labels, np.int16, "r"),
            )
        features, labels = self._mapped
        first, last = self._label_starts[number : number + 2]
        label: Label = np.array(labels[first:last]).reshape(self._label_shapes[number])
        return torch.from_numpy(np.array(features[number])).view(torch.bfloat16), label

    def _file(self) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=self.folder, prefix="features-")

    def _require_space(self, of_features: int) -> None:
        """Raises InputError where so many images do not fit, with those of the node's other ranks.

        Args:
            of_features: bytes of one image.
        """
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed = ranks * self.images * (of_features + 2 * self.size**2)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"the features of {ranks * self.images:,} images at {self.size} pixels take "
                f"{needed:,} bytes ({needed / _GIB:.1f} GiB), and {self.folder} has {free:,} "
                f"({free / _GIB:.1f} GiB) free; {self._remedy()}"
            )

    def _remedy(self) -> str:
        return f"give --cache FOLDER on a larger disk, or make --size smaller{self.advice}"
