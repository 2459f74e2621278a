"""What runs on a GPU gives what a CPU gives; skipped where there is none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.build_config import BuildConfig, BuildOptions
from data_pipeline.fetch import FetchedSample, Fetcher
from data_pipeline.index import DatasetIndex
from data_pipeline.loader import make_loader
from data_pipeline.order import SampleOrder
from data_pipeline.reader import SampleReader
from data_pipeline.sources.generated import list_scenes
from data_pipeline.views import IMAGENET_STD, ViewConfig
from data_pipeline.write_shards import build_shards
from trainer.attention import KeyChunk
from trainer.distributed import Ranks
from trainer.loss import pixel_contrastive_loss
from trainer.memory_bank import BankConfig, ShardedMemoryBank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)


def unit(count: int, width: int) -> Tensor:
    return F.normalize(torch.randn(count, width), dim=1)


@pytest.mark.parametrize("width", [32, 20])
@pytest.mark.parametrize(("pixels", "entries"), [(0, 70), (1, 70), (5000, 300), (777, 9000)])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 5e-3)]
)
def test_loss_and_gradient_are_those_of_dense_float64(
    pixels: int, entries: int, width: int, dtype: torch.dtype, limit: float
) -> None:
    torch.manual_seed(pixels + entries)
    prototypes, bank = unit(7, width), unit(entries, width).to(dtype)
    targets = torch.randint(7, (pixels,))
    ids, weights = torch.randint(9, (entries,)), torch.rand(pixels)
    queries = F.normalize(prototypes[targets] + 0.3 * unit(pixels, width), dim=1)
    wide = queries.double().requires_grad_()
    logits = wide @ torch.cat([prototypes, bank.float()]).double().T / 0.07
    logits[:, 7:].masked_fill_(targets[:, None] == ids, -torch.inf)
    dense = F.cross_entropy(logits, targets, reduction="none")
    (dense * weights).sum().backward()

    mine = queries.to(GPU).requires_grad_()
    chunks = [KeyChunk(*part) for part in zip(bank.split(4000), ids.split(4000), strict=True)]
    loss = pixel_contrastive_loss(
        mine,
        targets.to(GPU),
        prototypes.to(GPU),
        [KeyChunk(keys.to(GPU), there.to(GPU)) for keys, there in chunks],
        0.07,
        weights.to(GPU),
        sample_ids=targets.to(GPU),
        precision=torch.float16 if dtype.itemsize == 2 else None,
    )
    loss.backward()
    assert mine.grad is not None
    assert wide.grad is not None
    assert float(loss) == pytest.approx(float((dense * weights).sum()), rel=limit, abs=1e-6)
    largest = float(wide.grad.abs().max()) if pixels else 0.0
    torch.testing.assert_close(mine.grad.cpu().double(), wide.grad, rtol=0, atol=limit * largest)


@pytest.mark.parametrize("capacity", [100, 5000])
def test_bank_holds_the_last_prototypes(capacity: int) -> None:
    bank = ShardedMemoryBank(BankConfig(capacity), 32, Ranks(0, 1, GPU))
    assert bank.keys.dtype == (torch.float16 if capacity > 4096 else torch.float32)
    keys, ids = unit(2 * capacity + 3, 32), torch.arange(2 * capacity + 3)
    for some, their in zip(keys.split(777), ids.split(777), strict=True):
        bank.enqueue(some.to(GPU), their.to(GPU))
    state = bank.state()
    assert state["sample_id"].tolist() == ids[-capacity:].tolist()
    torch.testing.assert_close(state["key"].cpu().float(), keys[-capacity:], rtol=0, atol=5e-4)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[FetchedSample]:
    shards = tmp_path_factory.mktemp("gpu") / "shards"
    config = BuildConfig(samples_per_shard=16, mask_mode="ids")
    manifest = build_shards(list_scenes(16, 0, 200), Path(shards), config, BuildOptions(2))
    index = DatasetIndex(manifest)
    order = SampleOrder(index.counts, 0, 8)
    return Fetcher(SampleReader(index), order, ViewConfig(image_size=96), 2).fetch(np.arange(16))


def test_mixed_decoding_gives_what_the_cpu_does(samples: list[FetchedSample]) -> None:
    pytest.importorskip("nvidia.dali")
    expected = make_loader("torch", 16, 96, 2, torch.device("cpu")).load(samples)
    batch = make_loader("dali", 16, 96, 2, GPU).load(samples)
    scale = 255 * torch.tensor(IMAGENET_STD)[None, :, None, None]
    for view in ("query", "key"):
        found, there = getattr(batch, f"{view}_image"), getattr(expected, f"{view}_image")
        assert found.device == GPU
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert float(((found.cpu() - there) * scale).abs().mean()) < 2
        masks = getattr(batch, f"{view}_mask").cpu() == getattr(expected, f"{view}_mask")
        assert float(masks.float().mean()) > 0.999
    assert batch.sample_id.tolist() == expected.sample_id.tolist()


def test_torch_loader_hands_over_the_same_bytes(samples: list[FetchedSample]) -> None:
    expected = make_loader("torch", 16, 96, 2, torch.device("cpu")).load(samples)
    batch = make_loader("torch", 16, 96, 2, GPU).load(samples)
    for name in ("query_image", "key_image", "query_mask", "key_mask", "sample_id"):
        assert torch.equal(getattr(batch, name).cpu(), getattr(expected, name))
    assert batch.query_image.is_contiguous(memory_format=torch.channels_last)
