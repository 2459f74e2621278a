"""Loss and every gradient of one global batch do not depend on the number of ranks."""

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import Batch
from tests.ranks import run_on_ranks
from trainer.distributed import Ranks, all_reduce_sum
from trainer.engine import DdpEngine
from trainer.memory_bank import ShardedMemoryBank
from trainer.model import ModelConfig, PixelEncoder, upsample
from trainer.momentum import make_momentum_encoder
from trainer.objective import LossConfig, contrast_views
from trainer.schedule import OptimConfig

MODEL = ModelConfig(
    backbone="small",
    embedding_dim=8,
    decoder_channels=16,
    atrous_rates=(1, 2, 3),
    dropout=0.0,
    batch_norm="frozen",
)
BATCH, SIDE = 12, 16


def global_batch() -> Batch:
    """Uneven proposals; images 0–3 (rank 0 of 3 and of 4, half of rank 0 of 2) hold no object."""
    draw = torch.Generator().manual_seed(5)
    masks = torch.zeros(2, BATCH, SIDE, SIDE, dtype=torch.uint8)
    for view in range(2):
        for image in range(4, BATCH):
            for proposal in range(1, 2 + image % 3):
                top = int(torch.randint(0, 8, (), generator=draw))
                masks[view, image, top : top + 6, 3 * proposal : 3 * proposal + 5] = proposal
    masks[0, 5, :2] = 255
    images = torch.randn(2, BATCH, 3, SIDE, SIDE, generator=draw).double()
    return Batch(images[0], images[1], masks[0], masks[1], torch.arange(BATCH))


def old_keys() -> Tensor:
    draw = torch.Generator().manual_seed(6)
    return F.normalize(torch.randn(13, 8, generator=draw).double(), dim=1)


def encoders() -> tuple[PixelEncoder, PixelEncoder]:
    torch.manual_seed(0)
    encoder = PixelEncoder(MODEL).double().train()
    momentum_encoder = make_momentum_encoder(encoder)
    with torch.no_grad():
        for parameter in momentum_encoder.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return encoder, momentum_encoder.train()


def part_of(batch: Batch, rank: int, world_size: int) -> Batch:
    local = BATCH // world_size
    fields = dataclasses.astuple(batch)
    return Batch(*(field[rank * local : (rank + 1) * local] for field in fields))


def one_step(ranks: Ranks, accumulate: int = 1) -> dict[str, NDArray[np.float64]]:
    encoder, momentum_encoder = encoders()
    engine = DdpEngine(encoder, OptimConfig(accumulate=accumulate), ranks, "float32")
    bank = ShardedMemoryBank(13, 8, ranks, torch.float64)
    per_rank = [len(old_keys()[rank :: ranks.world_size]) for rank in range(ranks.world_size)]
    first = sum(per_rank[: ranks.rank])
    mine = old_keys()[first : first + per_rank[ranks.rank]]
    bank.enqueue(mine, torch.zeros(len(mine), dtype=torch.int64), per_rank)
    batch = part_of(global_batch(), ranks.rank, ranks.world_size)
    bank.prefetch()
    query = engine.forward(batch.query_image)
    with torch.no_grad():
        key = momentum_encoder(batch.key_image)
    losses = contrast_views(query, key, batch, bank, ranks, LossConfig())
    engine.backward(losses.total)
    parts = torch.stack([losses.contrastive, losses.saliency])
    found = {"loss": all_reduce_sum(parts, ranks).numpy()}
    found["bank"] = bank.state()["key"].numpy()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.numpy().copy()
    return found


def dense_reference() -> dict[str, NDArray[np.float64]]:
    """The same step in plain float64: every logit at once, loops over masks, autograd."""
    encoder, momentum_encoder = encoders()
    batch, config = global_batch(), LossConfig()
    query = encoder(batch.query_image)
    with torch.no_grad():
        key = momentum_encoder(batch.key_image)
    embeddings = F.normalize(upsample(query.embedding, (SIDE, SIDE)), dim=1)
    keys = F.normalize(upsample(key.embedding, (SIDE, SIDE)), dim=1)
    prototypes, pixels, targets = [], [], []
    for image in range(BATCH):
        for proposal in range(1, 255):
            inside = batch.query_mask[image] == proposal
            other = batch.key_mask[image] == proposal
            if inside.any() and other.any():
                targets += [len(prototypes)] * int(inside.sum())
                prototypes.append(F.normalize(keys[image][:, other].sum(1), dim=0))
                pixels.append(embeddings[image][:, inside].T)
    logits = torch.cat(pixels) @ torch.cat([torch.stack(prototypes), old_keys()]).T
    target = torch.tensor(targets)
    share = torch.bincount(target) / len(target)
    weights = torch.ones(logits.shape[1]).double()
    weights[: len(share)] = 1 / torch.log(1.02 + share)
    contrastive = F.cross_entropy(logits / config.temperature, target, weights)
    kept = batch.query_mask != 255
    logit = upsample(query.saliency, (SIDE, SIDE))[:, 0][kept]
    truth = (batch.query_mask > 0)[kept].double()
    negative = 1 - truth.mean()
    balance = torch.where(truth > 0, negative, 1 - negative)
    saliency = F.binary_cross_entropy_with_logits(logit, truth, balance)
    (contrastive + saliency).backward()  # type: ignore[no-untyped-call]
    found = {"loss": torch.stack([contrastive, saliency]).detach().numpy()}
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.numpy().copy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_loss_and_gradients_equal_the_dense_form_on_any_number_of_ranks(world_size: int) -> None:
    reference = dense_reference()
    for found in run_on_ranks(one_step, world_size):
        for name, expected in reference.items():
            error = np.abs(found[name] - expected).max() / max(np.abs(expected).max(), 1e-12)
            assert error < 1e-6, (name, error)


@pytest.mark.slow
def test_the_bank_holds_the_same_after_a_step_on_any_number_of_ranks() -> None:
    (one,) = run_on_ranks(one_step, 1)
    for found in run_on_ranks(one_step, 3):
        np.testing.assert_allclose(found["bank"], one["bank"], rtol=0, atol=1e-12)
    assert len(one["bank"]) == 13


def without_object(ranks: Ranks) -> list[float]:
    encoder, momentum_encoder = encoders()
    engine = DdpEngine(encoder, OptimConfig(), ranks, "float32")
    bank = ShardedMemoryBank(4, 8, ranks, torch.float64)
    batch = part_of(global_batch(), ranks.rank, ranks.world_size)
    empty = torch.zeros_like(batch.query_mask)
    batch = dataclasses.replace(batch, query_mask=empty, key_mask=empty)
    query = engine.forward(batch.query_image)
    with torch.no_grad():
        key = momentum_encoder(batch.key_image)
    losses = contrast_views(query, key, batch, bank, ranks, LossConfig())
    engine.backward(losses.total)
    gradient = sum(float(p.grad.abs().sum()) for p in encoder.parameters() if p.grad is not None)
    return [losses.total.item(), gradient, float(len(bank))]


@pytest.mark.slow
def test_a_batch_without_any_object_gives_zero_and_hangs_no_rank() -> None:
    assert run_on_ranks(without_object, 2) == [[0.0, 0.0, 0.0]] * 2
