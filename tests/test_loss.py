"""The losses against published values, and against dense float64 forms written out here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import Batch
from trainer.distributed import Ranks
from trainer.loss import class_weights, pixel_contrastive_loss, saliency_counts, saliency_loss
from trainer.memory_bank import BankConfig, ShardedMemoryBank
from trainer.model import PixelOutput
from trainer.objective import LossConfig, choose_pixels, contrast_views

ONE_RANK = Ranks(0, 1, torch.device("cpu"))
PUBLISHED = Path(__file__).parent / "data/maskcontrast_step.npz"


def test_losses_and_gradients_equal_the_published_implementation() -> None:
    values = {name: torch.from_numpy(np.array(a)) for name, a in np.load(PUBLISHED).items()}
    bank = ShardedMemoryBank(BankConfig(32), 16, ONE_RANK)
    old = F.normalize(values["bank"].T, dim=1)
    torch.testing.assert_close(old, values["bank"].T)
    bank.enqueue(old, torch.arange(100, 132))
    query = PixelOutput(
        values["query_embedding"].requires_grad_(),
        values["query_saliency_logit"][:, None].requires_grad_(),
    )
    key = PixelOutput(values["key_embedding"], torch.zeros(4, 1, 24, 24))
    images = torch.zeros(4, 3, 24, 24)
    query_mask = (values["query_mask"] > 0).to(torch.uint8)
    key_mask = (values["key_mask"] > 0).to(torch.uint8)
    batch = Batch(images, images, query_mask, key_mask, torch.arange(4))
    config = LossConfig(temperature=0.5)
    chosen = choose_pixels(batch, ONE_RANK, config)
    losses = contrast_views(query, key, batch, chosen, bank, ONE_RANK, config)
    assert abs(losses.contrastive - values["contrastive_loss"]) < 1e-5
    assert abs(losses.saliency - values["saliency_loss"]) < 1e-5
    losses.total.backward()  # type: ignore[no-untyped-call]
    for mine, theirs in (
        (query.embedding.grad, values["grad_query_embedding"]),
        (query.saliency.grad, values["grad_query_saliency_logit"][:, None]),
    ):
        assert mine is not None
        assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()
    # both queues are rings, but theirs starts elsewhere
    assert {tuple(k) for k in values["bank_after"].T.numpy().round(4).tolist()} == {
        tuple(k) for k in bank.keys.numpy().round(4).tolist()
    }


def dense_loss(
    queries: Tensor, targets: Tensor, keys: Tensor, temperature: float, weights: Tensor
) -> Tensor:
    """−Σ w log softmax at the target, all logits at once."""
    logits = queries.double() @ keys.double().T / temperature
    return (weights.double() * F.cross_entropy(logits, targets, reduction="none")).sum()


@pytest.mark.parametrize("chunk", [1, 3, 64, 1000])
@pytest.mark.parametrize("temperature", [0.05, 0.07, 0.5])
def test_one_pass_equals_dense_for_any_chunks(chunk: int, temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    unit = lambda n: F.normalize(torch.randn(n, 16, generator=draw), dim=1)  # noqa: E731
    queries, prototypes, bank = unit(200), unit(7), unit(150)
    queries[:50] = prototypes[3] + 0.01 * queries[:50]  # positives near probability one
    queries.requires_grad_()
    targets = torch.randint(7, (200,), generator=draw)
    targets[:50] = 3
    weights = torch.rand(200, generator=draw)
    loss = pixel_contrastive_loss(
        queries, targets, prototypes, bank.split(chunk), temperature, weights
    )
    (3 * loss).backward()  # type: ignore[no-untyped-call]
    wide = queries.detach().double().requires_grad_()
    reference = dense_loss(wide, targets, torch.cat([prototypes, bank]), temperature, weights)
    (3 * reference).backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    assert queries.grad is not None
    assert wide.grad is not None
    assert (queries.grad - wide.grad).abs().max() < 1e-5 * wide.grad.abs().max()


def test_no_pixels_give_a_zero_that_is_attached() -> None:
    queries = torch.zeros(0, 8, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    loss = pixel_contrastive_loss(
        queries, none, torch.zeros(0, 8), [torch.zeros(3, 8)], 0.5, torch.zeros(0)
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert queries.grad is not None
    assert queries.grad.shape == (0, 8)


def test_class_weights_are_those_of_the_share_of_pixels() -> None:
    weights = class_weights(torch.tensor([10.0, 30.0, 0.0]))
    expected = [1 / np.log(1.02 + 0.25), 1 / np.log(1.02 + 0.75), 1 / np.log(1.02)]
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)


def test_saliency_loss_is_balanced_and_leaves_out_ignored_pixels() -> None:
    logits = torch.tensor([[[2.0, -1.0, 0.5, 3.0]]])
    masks = torch.tensor([[[1, 0, 0, 255]]], dtype=torch.uint8)
    counts = saliency_counts(masks)
    assert counts.tolist() == [2, 1]
    softplus = lambda x: np.log1p(np.exp(x))  # noqa: E731
    expected = (2 / 3 * softplus(-2.0) + 1 / 3 * (softplus(-1.0) + softplus(0.5))) / 3
    assert saliency_loss(logits, masks, counts).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("fill", [0, 255])
def test_saliency_loss_of_views_without_object_is_finite(fill: int) -> None:
    masks = torch.full((1, 2, 2), fill, dtype=torch.uint8)
    assert saliency_loss(torch.ones(1, 2, 2), masks, saliency_counts(masks)).item() == 0
