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
from trainer.memory_bank import BankConfig, ShardedMemoryBank
from trainer.model import ModelConfig, PixelEncoder, upsample
from trainer.momentum import make_momentum_encoder
from trainer.objective import LossConfig, choose_pixels, contrast_views
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
PLAIN = LossConfig()
BANKS = [
    BankConfig(13),
    BankConfig(13, move="pixels"),
    BankConfig(13, chunk_size=2, mask_same_image=True),
    BankConfig(13, chunk_size=5, mask_same_image=True, move="pixels"),
    BankConfig(7, chunk_size=4),
    BankConfig(7, move="pixels", mask_same_image=True),
    BankConfig(100, mask_same_image=True),
    BankConfig(0),
]


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


def old_ids() -> Tensor:
    """Some entries are of images of the batch: 5 (twice), 7 and 11; the others of none."""
    return torch.tensor([90, 5, 91, 5, 7, 92, 93, 11, 94, 95, 96, 97, 98])


def wide_bank(config: BankConfig, ranks: Ranks) -> ShardedMemoryBank:
    bank = ShardedMemoryBank(config, 8, ranks)
    bank.keys = bank.keys.double()
    return bank


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


def one_step(
    ranks: Ranks, bank_config: BankConfig = BANKS[0], loss: LossConfig = PLAIN
) -> dict[str, NDArray[np.float64]]:
    encoder, momentum_encoder = encoders()
    engine = DdpEngine(encoder, momentum_encoder, OptimConfig(), ranks, "float32")
    bank = wide_bank(bank_config, ranks)
    bank.enqueue(old_keys(), old_ids())
    batch = part_of(global_batch(), ranks.rank, ranks.world_size)
    first = ranks.rank * len(batch.sample_id)
    chosen = choose_pixels(batch, ranks, loss, seed=3, first_position=5 * BATCH + first)
    bank.prefetch(chosen.pixels_of_ranks)
    query = engine.forward(batch.query_image)
    with torch.no_grad():
        key = momentum_encoder(batch.key_image)
    losses = contrast_views(query, key, batch, chosen, bank, ranks, loss)
    engine.backward(losses.total)
    sums = torch.stack([losses.contrastive, losses.saliency, losses.same_image])
    found = {"loss": all_reduce_sum(sums, ranks).numpy()}
    found["pixels"] = np.array(sum(chosen.pixels_of_ranks))
    found["bank"] = bank.state()["key"].numpy()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.numpy().copy()
    return found


def dense_reference(
    capacity: int = 13, mask_same_image: bool = False
) -> dict[str, NDArray[np.float64]]:
    """The same step in plain float64: every logit at once, loops over masks, autograd."""
    encoder, momentum_encoder = encoders()
    batch, config = global_batch(), LossConfig()
    kept_keys, kept_ids = (
        column[len(column) - min(capacity, 13) :] for column in (old_keys(), old_ids())
    )
    query = encoder(batch.query_image)
    with torch.no_grad():
        key = momentum_encoder(batch.key_image)
    embeddings = F.normalize(upsample(query.embedding, (SIDE, SIDE)), dim=1)
    keys = F.normalize(upsample(key.embedding, (SIDE, SIDE)), dim=1)
    prototypes, pixels, targets, images = [], [], [], []
    for image in range(BATCH):
        for proposal in range(1, 255):
            inside = batch.query_mask[image] == proposal
            other = batch.key_mask[image] == proposal
            if inside.any() and other.any():
                targets += [len(prototypes)] * int(inside.sum())
                images += [image] * int(inside.sum())
                prototypes.append(F.normalize(keys[image][:, other].sum(1), dim=0))
                pixels.append(embeddings[image][:, inside].T)
    logits = torch.cat(pixels) @ torch.cat([torch.stack(prototypes), kept_keys]).T
    target = torch.tensor(targets)
    same_image = torch.tensor(images)[:, None] == kept_ids
    if mask_same_image:
        logits[:, len(prototypes) :].masked_fill_(same_image, -torch.inf)
    share = torch.bincount(target).double() / len(target)
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
    share = same_image.double().mean() if capacity else torch.zeros(()).double()
    found = {"loss": torch.stack([contrastive, saliency, share]).detach().numpy()}
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.numpy().copy()
    return found


def steps(ranks: Ranks) -> list[dict[str, NDArray[np.float64]]]:
    return [one_step(ranks, config) for config in BANKS]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_loss_and_gradients_equal_the_dense_form_on_any_number_of_ranks(world_size: int) -> None:
    references = [dense_reference(bank.capacity, bank.mask_same_image) for bank in BANKS]
    for by_config in run_on_ranks(steps, world_size):
        for bank, found, reference in zip(BANKS, by_config, references, strict=True):
            for name, expected in reference.items():
                error = np.abs(found[name] - expected).max() / max(np.abs(expected).max(), 1e-12)
                assert error < 1e-6, (bank, name, error)


def capped(ranks: Ranks) -> list[dict[str, NDArray[np.float64]]]:
    return [one_step(ranks, BankConfig(13), LossConfig(pixels_per_mask=n)) for n in (3, 1000)]


@pytest.mark.slow
def test_a_cap_of_pixels_takes_the_same_ones_on_any_number_of_ranks() -> None:
    (few, all_of_them), (uncapped,) = run_on_ranks(capped, 1)[0], run_on_ranks(one_step, 1)
    assert all_of_them["pixels"] == uncapped["pixels"] > few["pixels"] == 3 * 17
    for name, expected in uncapped.items():
        np.testing.assert_allclose(all_of_them[name], expected, rtol=0, atol=1e-6, err_msg=name)
    for world_size in (2, 3):
        for by_cap in run_on_ranks(capped, world_size):
            for name, value in by_cap[0].items():
                if name == "bank":  # each rank holds its own part
                    continue
                scale = np.abs(few[name]).max()
                assert np.abs(value - few[name]).max() < 1e-6 * scale, name


@pytest.mark.slow
def test_the_bank_holds_the_same_after_a_step_on_any_number_of_ranks() -> None:
    (one,) = run_on_ranks(one_step, 1)
    shards = [found["bank"] for found in run_on_ranks(one_step, 3)]
    joined, whole = np.concatenate(shards), one["bank"]
    by_first_number = [rows[rows[:, 0].argsort()] for rows in (joined, whole)]
    np.testing.assert_allclose(*by_first_number, rtol=0, atol=1e-12)
    assert len(one["bank"]) == 13


def without_object(ranks: Ranks) -> list[float]:
    encoder, momentum_encoder = encoders()
    engine = DdpEngine(encoder, momentum_encoder, OptimConfig(), ranks, "float32")
    bank = wide_bank(BankConfig(4, move="pixels"), ranks)
    bank.enqueue(old_keys(), old_ids())
    batch = part_of(global_batch(), ranks.rank, ranks.world_size)
    empty = torch.zeros_like(batch.query_mask)
    batch = dataclasses.replace(batch, query_mask=empty, key_mask=empty)
    chosen = choose_pixels(batch, ranks, LossConfig())
    bank.prefetch(chosen.pixels_of_ranks)
    query = engine.forward(batch.query_image)
    with torch.no_grad():
        key = momentum_encoder(batch.key_image)
    losses = contrast_views(query, key, batch, chosen, bank, ranks, LossConfig())
    engine.backward(losses.total)
    gradient = sum(float(p.grad.abs().sum()) for p in encoder.parameters() if p.grad is not None)
    return [losses.total.item(), gradient, float(len(bank))]


@pytest.mark.slow
def test_a_batch_without_any_object_gives_zero_and_hangs_no_rank() -> None:
    assert run_on_ranks(without_object, 2) == [[0.0, 0.0, 4.0]] * 2
