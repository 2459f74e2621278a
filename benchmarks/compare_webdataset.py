"""webdataset, PIL and torch's DataLoader in the place of maskbank's loader, on the same shards.

    python -m benchmarks.compare_webdataset [--shards FOLDER] [--rounds 5] [--steps 10]

maskbank's shards are WebDataset tars. Here webdataset (https://webdataset.github.io, BSD) reads
them, shuffles and batches in DataLoader's workers, and PIL and torchvision make the two views of
the method: random resized crop, drawn again where the mask covers outside 1%–99%, colour jitter,
grayscale, flip, normalisation. The training is `trainer.train` with everything else as it is, so
that only the loading differs; with --loading nothing is trained.
"""

import argparse
import io
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from benchmarks.contender import claim_protocol, serve
from benchmarks.side_by_side import script

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.batch import Batch

_PREFETCH = 2  # batches a worker, torch's default
_SHUFFLED = 1000  # samples in webdataset's buffer, its documentation's figure
_TRIES = 16  # crops, as maskbank


class TwoViews:
    """One sample of a tar to two views.

    From (key, image bytes, mask bytes) to (query image float32 [3, S, S], key image, query mask
    uint8 [S, S], key mask, id).
    """

    def __init__(self, size: int) -> None:
        from torchvision.transforms import v2

        self.size = size
        self.colour = v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
            ]
        )

    def __call__(self, sample: tuple[str, bytes, bytes]) -> "tuple[Tensor | int, ...]":
        from PIL import Image

        key, image_bytes, mask_bytes = sample
        image = Image.open(io.BytesIO(image_bytes)).convert("RGB")
        mask = Image.open(io.BytesIO(mask_bytes)).convert("L")
        (query, query_mask), (other, other_mask) = (self._view(image, mask) for _ in range(2))
        return query, other, query_mask, other_mask, zlib.crc32(key.encode())

    def _view(self, image: Any, mask: Any) -> "tuple[Tensor, Tensor]":
        import numpy as np
        import torch
        from torchvision.transforms import InterpolationMode, RandomResizedCrop
        from torchvision.transforms.v2 import functional as F

        values = np.asarray(mask)
        for _ in range(_TRIES):
            window = RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])
            top, left, height, width = window
            crop = values[top : top + height, left : left + width]
            valid = 0.01 <= np.mean((crop > 0) & (crop < 255)) <= 0.99
            if valid:
                break
        size = [self.size, self.size]
        view = self.colour(F.resized_crop(image, *window, size, InterpolationMode.BILINEAR))
        view_mask = F.resized_crop(mask, *window, size, InterpolationMode.NEAREST)
        if torch.rand(()) < 0.5:
            view, view_mask = F.horizontal_flip(view), F.horizontal_flip(view_mask)
        pixels = F.to_dtype(F.pil_to_tensor(view), torch.float32, scale=True)
        pixels = F.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        marked = F.pil_to_tensor(view_mask)[0]
        return pixels, marked if valid else torch.full_like(marked, 255)


class WebStream:
    """Batches without end, with what the training loop asks of a `BatchStream`."""

    def __init__(self, shards: Path, size: int, batch: int, workers: int) -> None:
        import webdataset

        tars = [str(path) for path in sorted(shards.glob("*.tar"))]
        dataset = (
            webdataset.WebDataset(tars, resampled=True, shardshuffle=False)
            .shuffle(_SHUFFLED)
            .to_tuple("__key__", "jpg;png;webp", "mask.png")
            .map(TwoViews(size))
            .batched(batch, partial=False)
        )
        self.fetcher = SimpleNamespace(bad_samples=0, invalid_views=0)  # nothing is counted here
        self.wait_seconds = 0.0
        self._loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)
        self._batches: Iterator[Any] = iter(self._loader)

    def __iter__(self) -> "WebStream":
        return self

    def __next__(self) -> "Batch":
        import torch

        from data_pipeline.batch import Batch

        images, others, masks, other_masks, sample_ids = next(self._batches)
        return Batch(
            images.contiguous(memory_format=torch.channels_last),
            others.contiguous(memory_format=torch.channels_last),
            masks,
            other_masks,
            torch.as_tensor(sample_ids),
        )

    def close(self) -> None:
        self._batches = iter(())


def contend(options: argparse.Namespace) -> None:
    claim_protocol()
    import torch

    from benchmarks.maskbank_contender import PacedState, describe, paced_settings, train_paced
    from trainer.config import load_config

    sizes = (f"views.image_size={options.size}", f"data.batch_size={options.batch}")
    steps = f"run.steps={options.total_steps}"
    name, prefetched = "webdataset", _PREFETCH * options.workers
    loader = f"webdataset, PIL, DataLoader, {options.workers} workers"

    def make_stream() -> WebStream:
        return WebStream(options.shards, options.size, options.batch, options.workers)

    class WebState(PacedState):
        def prefetched(self) -> int:
            return prefetched

        def stream(self) -> WebStream:  # type: ignore[override]
            return make_stream()

    WebState.name, WebState.loader = name, loader
    with tempfile.TemporaryDirectory(prefix="side_by_side-") as folder:
        settings = paced_settings(options.shards, Path(folder) / "run", (*sizes, steps))
        if not options.loading:
            train_paced(WebState, settings)
            return
        torch.manual_seed(0)
        stream = make_stream()
        described = describe(load_config("demo_cpu", overrides=settings), loader, prefetched)
        serve(lambda: (len(next(stream).sample_id), None), f"{name}, loading alone", described)
        stream.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--total-steps", type=int, default=1500, help="of the schedule")
    parser.add_argument("--loading", action="store_true", help="train nothing")


if __name__ == "__main__":
    script(__doc__, ["maskbank", "webdataset", "*-loading"], contend, add_arguments)
