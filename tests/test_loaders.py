"""Both loaders: the same crops, the same pixels within a grey level, for any ranks and threads."""

import dataclasses
import importlib.util
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from data_pipeline.batch import Batch
from data_pipeline.build_config import BuildConfig
from data_pipeline.errors import InputError
from data_pipeline.fetch import FetchedSample, Fetcher
from data_pipeline.index import DatasetIndex
from data_pipeline.loader import BatchStream, make_loader
from data_pipeline.manifest import Manifest
from data_pipeline.order import SampleOrder
from data_pipeline.reader import SampleReader
from data_pipeline.sample import decode_rgb
from data_pipeline.sources.generated import list_scenes
from data_pipeline.torch_loader import Scratch, augment_image, crop_mask
from data_pipeline.views import (
    GREY_WEIGHTS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    View,
    ViewConfig,
    colour_matrix,
)
from data_pipeline.write_shards import build_shards

CPU = torch.device("cpu")
VIEWS = ViewConfig(image_size=64)
BACKENDS = ["torch"]
if importlib.util.find_spec("nvidia.dali"):
    BACKENDS.append("dali")
needs_dali = pytest.mark.skipif(len(BACKENDS) < 2, reason="DALI is not installed")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    config = BuildConfig(samples_per_shard=10, mask_mode="ids")
    return build_shards(list_scenes(30, 0, 96), tmp_path_factory.mktemp("shards"), config)


def fetched(manifest: Manifest, count: int, config: ViewConfig = VIEWS) -> list[FetchedSample]:
    index = DatasetIndex(manifest)
    fetcher = Fetcher(SampleReader(index), SampleOrder(index.counts, 0, 2), config, 2)
    samples = fetcher.fetch(np.arange(count))
    fetcher.close()
    return samples


def grey_levels(a: Batch, b: Batch) -> list[float]:
    """Mean difference of both views' images, in levels of 0…255."""
    scale = 255 * torch.tensor(IMAGENET_STD)[None, :, None, None]
    pairs = ((a.query_image, b.query_image), (a.key_image, b.key_image))
    return [float(((x - y) * scale).abs().mean()) for x, y in pairs]


@needs_dali
@pytest.mark.parametrize("colour", [False, True])
def test_dali_agrees_with_the_reference(manifest: Manifest, colour: bool) -> None:
    config = VIEWS
    if not colour:
        config = dataclasses.replace(VIEWS, jitter_probability=0.0, grayscale_probability=0.0)
    samples = fetched(manifest, 30, config)
    ours = make_loader("dali", 30, 64, 2, CPU).load(samples)
    reference = make_loader("torch", 30, 64, 2, CPU).load(samples)
    assert max(grey_levels(ours, reference)) < 1
    for name in ("query_mask", "key_mask"):
        agreement = (getattr(ours, name) == getattr(reference, name)).float().mean()
        assert agreement > 0.999
    assert ours.sample_id.tolist() == reference.sample_id.tolist()
    # a flip of one of them would be far off
    flipped = dataclasses.replace(reference, query_image=reference.query_image.flip(-1))
    assert grey_levels(ours, flipped)[0] > 5


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("height", "width"), [(70, 50), (1, 50), (70, 1), (1, 1)])
def test_a_view_is_what_torchvision_makes_of_it(
    manifest: Manifest, height: int, width: int, flip: bool
) -> None:
    sample = fetched(manifest, 1)[0]
    pixels = decode_rgb(sample.image.tobytes())
    window = np.array([10, 20, height, width], np.int32)
    view = View(window[None], 1.3, 1.2, 0.6, 20.0, flip)
    output = torch.empty(64, 64, 3)
    scratch = Scratch(64)
    # whatever a view before it left there
    augment_image(pixels, View(window[None] // 2 + 1, 1, 1, 1, 0, not flip), scratch, output)
    augment_image(pixels, view, scratch, output)

    inside = slice(10, 10 + height), slice(20, 20 + width)
    image = torch.tensor(pixels).permute(2, 0, 1)[(slice(None), *inside)]
    crop = resize(image, [64, 64], antialias=True).double()
    matrix, grey_gain = colour_matrix(view)
    grey = torch.tensor(GREY_WEIGHTS, dtype=torch.float64) @ crop.mean((1, 2))
    coloured = (torch.tensordot(torch.tensor(matrix), crop, 1) + grey_gain * grey).clamp(0, 255)
    coloured = coloured.flip(-1) if flip else coloured
    mean, std = (torch.tensor(v).double()[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (coloured / 255 - mean) / std
    assert (coloured.max() == 255) == (width > 1)  # it was clamped somewhere
    torch.testing.assert_close(output.permute(2, 0, 1).double(), expected, atol=2e-5, rtol=0)

    mask = torch.tensor(sample.mask)[inside][None]
    expected_mask = resize(mask, [64, 64], InterpolationMode.NEAREST_EXACT)[0]
    expected_mask = expected_mask.flip(-1) if flip else expected_mask
    assert (crop_mask(sample.mask, view, 64) == expected_mask.numpy()).all()
    assert (len(expected_mask.unique()) > 1) == ((height, width) == (70, 50))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_are_normalised_channels_last_and_typed(manifest: Manifest, backend: str) -> None:
    batch = make_loader(backend, 30, 64, 1, CPU).load(fetched(manifest, 30))
    for image in (batch.query_image, batch.key_image):
        assert image.shape == (30, 3, 64, 64)
        assert image.dtype == torch.float32
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert -2.2 < float(image.min()) < 0 < float(image.max()) < 2.7
    for mask in (batch.query_mask, batch.key_mask):
        assert mask.shape == (30, 64, 64)
        assert mask.dtype == torch.uint8
        share = (mask > 0).float().mean((1, 2))
        assert float(share.min()) > 0.005
    assert sorted(batch.sample_id.tolist()) == list(range(30))


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_is_bit_equal_for_any_threads_and_batch_split(
    manifest: Manifest, backend: str
) -> None:
    samples = fetched(manifest, 12)
    whole = make_loader(backend, 12, 64, 1, CPU).load(samples)
    loader = make_loader(backend, 12, 64, 3, CPU)
    for part in (slice(0, 5), slice(5, 12)):
        split = loader.load(samples[part])
        for field in dataclasses.fields(Batch):
            assert torch.equal(getattr(split, field.name), getattr(whole, field.name)[part])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_without_valid_crop_is_ignored_as_a_whole(manifest: Manifest, backend: str) -> None:
    strict = dataclasses.replace(VIEWS, min_coverage=0.98, max_coverage=0.99)
    samples = fetched(manifest, 6, strict)
    batch = make_loader(backend, 6, 64, 1, CPU).load(samples)
    for number, sample in enumerate(samples):
        for view, mask in enumerate((batch.query_mask[number], batch.key_mask[number])):
            assert bool((mask == 255).all()) != sample.valid[view]
    assert not all(sample.valid[0] for sample in samples)


def batches(
    manifest: Manifest, world_size: int, start: int, steps: int, backend: str = "torch"
) -> list[list[torch.Tensor]]:
    """Global batches, put together from the ranks' parts."""
    streams = [
        BatchStream(
            manifest,
            VIEWS,
            loader=backend,
            batch_size=12,
            seed=4,
            window=2,
            rank=rank,
            world_size=world_size,
            start=start,
            threads=1,
            prefetch=2,
            device=CPU,
        )
        for rank in range(world_size)
    ]
    found = []
    for _ in range(steps):
        parts: Sequence[Batch] = [next(stream) for stream in streams]
        names = [field.name for field in dataclasses.fields(Batch)]
        found.append([torch.cat([getattr(part, name) for part in parts]) for name in names])
    for stream in streams:
        assert stream.wait_seconds > 0
        stream.close()
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_global_batches_are_equal_pixel_for_pixel_on_any_ranks_and_after_any_start(
    manifest: Manifest, backend: str
) -> None:
    whole = batches(manifest, 1, 0, 5, backend)  # crosses the end of the epoch of 30
    for world_size, start in ((2, 0), (3, 2), (4, 4)):
        parts = batches(manifest, world_size, start, 5 - start, backend)
        for mine, expected in zip(parts, whole[start:], strict=True):
            for a, b in zip(mine, expected, strict=True):
                assert torch.equal(a, b)


def test_an_error_in_the_background_reaches_the_trainer(manifest: Manifest) -> None:
    for shard in manifest.shards:
        path = manifest.root / shard.name
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError, match="substitutes failed too"):
        batches(manifest, 1, 0, 1)


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(InputError, match=r"data.loader is 'ffcv'"):
        make_loader("ffcv", 1, 64, 1, CPU)
