"""The losses against published values, and against dense float64 forms written out here."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import Batch
from trainer.attention import KeyChunk, probed_rows
from trainer.distributed import Ranks
from trainer.loss import (
    class_weights,
    contrast_pixels,
    pixel_contrastive_loss,
    saliency_counts,
    saliency_loss,
)
from trainer.memory_bank import BankConfig, ShardedMemoryBank
from trainer.model import PixelOutput
from trainer.objective import LossConfig, choose_pixels, contrast_views

ONE_RANK = Ranks(0, 1, torch.device("cpu"))
ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "tests/data/maskcontrast_step.npz"


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


DIM = 32


def unit(draw: torch.Generator, count: int) -> Tensor:
    return F.normalize(torch.randn(count, DIM, generator=draw), dim=1)


def drawn(kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries [600, D], targets, prototypes [9, D] and bank [1500, D] of some stage."""
    draw = torch.Generator().manual_seed(0)
    queries, prototypes, bank = unit(draw, 600), unit(draw, 9), unit(draw, 1500)
    targets = torch.randint(9, (600,), generator=draw)
    if kind == "certain":  # the right prototype's probability is above 0.99
        queries = F.normalize(prototypes[targets] + 0.05 * unit(draw, 600), dim=1)
    if kind == "hard":  # a bank entry is nearer than the right prototype
        bank[:600] = F.normalize(queries + 0.3 * unit(draw, 600), dim=1)
    if kind == "trained":  # bank entries are of the prototypes' classes
        queries = F.normalize(prototypes[targets] + 0.6 * unit(draw, 600), dim=1)
        classes = prototypes[torch.randint(9, (1500,), generator=draw)]
        bank = F.normalize(classes + 0.5 * unit(draw, 1500), dim=1)
    return queries, targets, prototypes, bank


def dense_loss(
    queries: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    bank: Tensor,
    temperature: float,
    weights: Tensor,
    same_image: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """−Σ w log softmax at the target and its gradient, in float64, all logits at once.

    As log(1 + Σ exp(other logits − right logit)), which float64 keeps exact near probability one.
    """
    queries = queries.detach().double().requires_grad_()
    logits = queries @ torch.cat([prototypes, bank]).double().T / temperature
    if same_image is not None:
        logits[:, len(prototypes) :].masked_fill_(same_image, -torch.inf)
    right = logits.gather(1, targets[:, None])
    others = (logits - right).scatter(1, targets[:, None], -torch.inf)
    loss = (weights.double() * F.softplus(others.logsumexp(1), threshold=200)).sum()
    (gradient,) = torch.autograd.grad(loss, queries)
    return loss.detach(), gradient


def assert_equals_dense(
    kind: str,
    temperature: float,
    chunk: int,
    limit: float,
    narrow: torch.dtype | None = None,
    stored: torch.dtype = torch.float32,
) -> None:
    queries, targets, prototypes, bank = drawn(kind)
    bank = bank.to(stored)
    weights = 0.5 + torch.rand(len(queries), generator=torch.Generator().manual_seed(1))
    reference, expected = dense_loss(queries, targets, prototypes, bank, temperature, weights)
    queries.requires_grad_()
    chunks = torch.split(bank, chunk)
    loss = pixel_contrastive_loss(
        queries, targets, prototypes, chunks, temperature, weights, precision=narrow
    )
    (3 * loss).backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(reference.item(), rel=max(1e-6, limit / 10))
    assert queries.grad is not None
    assert (queries.grad - 3 * expected).abs().max() < limit * (3 * expected).abs().max()


KINDS = ("early", "certain", "hard", "trained")


@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.07, 0.1, 0.5])  # e^(1/0.01) overflows
@pytest.mark.parametrize("kind", KINDS)
def test_float32_equals_dense_float64(kind: str, temperature: float) -> None:
    assert_equals_dense(kind, temperature, 400, 1e-5)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.05, 0.07, 0.1, 0.5])  # e^(1/0.05) overflows float16
@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_keys_equal_dense_float64(
    kind: str, temperature: float, stored: torch.dtype
) -> None:
    """What a GPU does, whose kernels take 16 bits: float16 products of keys kept in 16 bits."""
    assert_equals_dense(kind, temperature, 400, 5e-3, torch.float16, stored)


@pytest.mark.parametrize("chunk", [1, 3, 64, 10_000])
def test_the_loss_does_not_depend_on_the_chunks(chunk: int) -> None:
    assert_equals_dense("trained", 0.1, chunk, 1e-5)


def test_the_right_prototype_may_be_as_good_as_certain() -> None:
    queries, targets, prototypes, bank = drawn("certain")
    logits = queries @ torch.cat([prototypes, bank]).T / 0.05
    probability = logits.softmax(1).gather(1, targets[:, None])
    assert probability.mean() > 0.99
    assert_equals_dense("certain", 0.05, 400, 1e-5)


def test_entries_of_the_querys_own_image_do_not_count() -> None:
    queries, targets, prototypes, bank = drawn("trained")
    images = torch.arange(600) // 100  # six images of a hundred pixels
    ids = torch.randint(0, 40, (1500,), generator=torch.Generator().manual_seed(2))
    same = images[:, None] == ids
    assert 30 < int(same.sum()) / 600 < 60  # entries of its own image, for each pixel
    weights = torch.ones(600)
    for masked in (True, False):
        reference, expected = dense_loss(
            queries, targets, prototypes, bank, 0.1, weights, same if masked else None
        )
        mine = queries.clone().requires_grad_()
        chunks = [KeyChunk(*part) for part in zip(bank.split(700), ids.split(700), strict=True)]
        found = contrast_pixels(
            mine, targets, prototypes, chunks, 0.1, weights, images if masked else None
        )
        found.loss.backward()  # type: ignore[no-untyped-call]
        assert found.loss.item() == pytest.approx(reference.item(), rel=1e-6)
        assert mine.grad is not None
        assert (mine.grad - expected).abs().max() < 1e-5 * expected.abs().max()
        similarity = queries @ torch.cat([prototypes, bank]).T
        similarity.scatter_(1, targets[:, None], -9)
        if masked:
            similarity[:, 9:].masked_fill_(same, -9)
        rows = probed_rows(600)
        torch.testing.assert_close(found.hardest, similarity.amax(1)[rows])
        torch.testing.assert_close(
            found.positive, (queries * prototypes[targets]).sum(1)[rows], rtol=1e-5, atol=1e-6
        )


def test_a_query_without_any_other_key_learns_nothing() -> None:
    queries = unit(torch.Generator().manual_seed(0), 3).requires_grad_()
    targets = torch.zeros(3, dtype=torch.int64)
    own_image = KeyChunk(queries.detach()[:2], torch.tensor([4, 4]))
    found = contrast_pixels(
        queries, targets, queries.detach()[:1], [own_image], 0.1, torch.ones(3), targets + 4
    )
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert found.loss.item() == 0
    assert queries.grad is not None
    assert queries.grad.abs().max() == 0
    assert len(found.hardest) == len(found.positive) == 0


def test_queries_in_16_bits_get_a_gradient_in_16_bits() -> None:
    queries, targets, prototypes, bank = drawn("trained")
    narrow = queries.bfloat16()
    _, expected = dense_loss(narrow, targets, prototypes, bank, 0.5, torch.ones(600))
    narrow.requires_grad_()
    pixel_contrastive_loss(narrow, targets, prototypes, [bank], 0.5, torch.ones(600)).backward()  # type: ignore[no-untyped-call]
    assert narrow.grad is not None
    assert narrow.grad.dtype == torch.bfloat16
    assert (narrow.grad.double() - expected).abs().max() < 5e-3 * expected.abs().max()


def test_every_chunk_is_taken_even_without_pixels() -> None:
    """A chunk may be a collective: a rank that leaves one out makes the others wait."""
    taken = []

    def chunks() -> Iterator[Tensor]:
        for number in range(3):
            taken.append(number)
            yield torch.zeros(5, 8)

    queries, none = torch.zeros(0, 8, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    pixel_contrastive_loss(queries, none, torch.zeros(0, 8), chunks(), 0.5, torch.zeros(0))
    assert taken == [0, 1, 2]


def test_memory_is_that_of_the_queries_and_of_no_logits() -> None:
    """Of 20,000 × 20,000 logits, 1.6 GB, next to nothing may be there at any time."""
    code = """
import resource, torch
from torch.nn import functional as F
from trainer.loss import pixel_contrastive_loss
draw = torch.Generator().manual_seed(0)
unit = lambda n: F.normalize(torch.randn(n, 32, generator=draw), dim=1)
def once(n):
    queries = unit(n).requires_grad_()
    targets = torch.arange(n) % 8
    keys = unit(n)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss = pixel_contrastive_loss(queries, targets, unit(8), keys.split(8192), .1, torch.ones(n))
    loss.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
once(5000)
print(once(20_000))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) * 1024 < 20 * 20_000 * 32 * 4  # N·D twenty times, 51 MB


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
