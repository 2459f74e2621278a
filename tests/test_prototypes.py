"""One vector an image: both poolings against a loop over the pixels."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.whole_images import WholeImage
from evaluation.prototypes import (
    PrototypeConfig,
    foreground_of,
    image_prototypes,
    saliency_masks,
)
from trainer.model import upsample


def slow_prototype(embedding: Tensor, saliency: Tensor, config: PrototypeConfig) -> list[float]:
    """[D] for one image [D, H, W], [H, W], pixel by pixel in plain Python."""
    dim, height, width = embedding.shape
    total = [0.0] * dim
    for row in range(height):
        for column in range(width):
            logit = float(saliency[row, column])
            value = logit if config.foreground == "logit" else 1 / (1 + math.exp(-logit))
            if value <= config.threshold:
                continue
            pixel = [float(x) for x in embedding[:, row, column]]
            length = math.sqrt(sum(x * x for x in pixel))
            factor = logit if config.pooling == "weighted" else 1 / length
            total = [t + factor * x for t, x in zip(total, pixel, strict=True)]
    length = math.sqrt(sum(t * t for t in total))
    return [t / length for t in total] if length else total


@pytest.mark.parametrize("foreground", ["logit", "probability"])
@pytest.mark.parametrize("pooling", ["weighted", "normalized"])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_vectors_equal_a_loop(foreground: str, pooling: str, threshold: float) -> None:
    draw = torch.Generator().manual_seed(3)
    embeddings = torch.randn(3, 5, 6, 4, generator=draw) * 3
    saliency = torch.randn(3, 6, 4, generator=draw) * 2
    config = PrototypeConfig(foreground, threshold, pooling)  # type: ignore[arg-type]
    vectors, inside = image_prototypes(embeddings, saliency, config)
    assert vectors.shape == (3, 5)
    assert inside.dtype == torch.bool
    assert inside.shape == (3, 6, 4)
    for i in range(3):
        expected = slow_prototype(embeddings[i], saliency[i], config)
        assert vectors[i].tolist() == pytest.approx(expected, abs=1e-6)
        assert vectors[i].norm() == pytest.approx(1, abs=1e-6)


def test_threshold_is_on_the_logit_or_on_the_probability() -> None:
    logits = torch.tensor([[[-1.0, 0.0, 0.4, 0.5, 0.6, 2.0]]])
    logit = foreground_of(logits, PrototypeConfig())
    assert logit.tolist() == [[[False, False, False, False, True, True]]]
    probability = foreground_of(logits, PrototypeConfig("probability"))
    assert probability.tolist() == [[[False, False, True, True, True, True]]]
    # sigmoid(0.6) = 0.646
    high = foreground_of(logits, PrototypeConfig("probability", 0.65))
    assert high.tolist() == [[[False] * 5 + [True]]]


@pytest.mark.parametrize("pooling", ["weighted", "normalized"])
def test_no_foreground_is_the_zero_vector(pooling: str) -> None:
    embeddings = torch.ones(2, 3, 2, 2)
    saliency = torch.stack([torch.full((2, 2), -3.0), torch.full((2, 2), 3.0)])
    vectors, inside = image_prototypes(embeddings, saliency, PrototypeConfig(pooling=pooling))  # type: ignore[arg-type]
    assert vectors[0].tolist() == [0, 0, 0]
    assert vectors[1].tolist() == pytest.approx([3**-0.5] * 3)
    assert inside.flatten(1).any(1).tolist() == [False, True]


def test_only_the_poolings_weigh_differently() -> None:
    # one long embedding of small logit, two short ones of large logit
    embeddings = torch.tensor([[[[10.0, 0.0, 0.0]], [[0.0, 1.0, 1.0]]]])
    saliency = torch.tensor([[[1.0, 4.0, 4.0]]])
    weighted, _ = image_prototypes(embeddings, saliency, PrototypeConfig())
    normalized, _ = image_prototypes(embeddings, saliency, PrototypeConfig(pooling="normalized"))
    assert weighted[0].tolist() == pytest.approx([10 / 164**0.5, 8 / 164**0.5])
    assert normalized[0].tolist() == pytest.approx([1 / 5**0.5, 2 / 5**0.5])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("foreground", "masks", "--foreground is 'masks'"), ("pooling", "max", "--pooling is 'max'")],
)
def test_other_words_are_refused(name: str, value: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        PrototypeConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("pooling", ["weighted", "normalized"])
def test_embeddings_at_the_stride_stand_for_upsampled_ones(pooling: str) -> None:
    draw = torch.Generator().manual_seed(0)
    embeddings = torch.randn(3, 5, 6, 4, generator=draw, dtype=torch.float64)
    saliency = torch.randn(3, 45, 33, generator=draw, dtype=torch.float64)
    config = PrototypeConfig(pooling=pooling)  # type: ignore[arg-type]
    found, foreground = image_prototypes(embeddings, saliency, config)
    large = upsample(embeddings, (45, 33))
    expected, same = image_prototypes(large, saliency, config)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(foreground, same)
    assert found.norm(dim=1).tolist() == pytest.approx([1, 1, 1])


def test_given_masks_are_the_foreground() -> None:
    mask = np.array([[0, 3], [255, 1]], np.uint8)  # two objects and an ignored pixel
    pixels = np.zeros((2, 2, 3), np.uint8)
    image = WholeImage(0, "a", torch.zeros(3, 2, 2), np.zeros((2, 2), np.int16), mask, pixels)
    masks = saliency_masks([image], 2)
    assert masks.tolist() == [[[0, 1], [0, 1]]]
    embeddings = torch.tensor([[[[9.0, 3], [9, 0]], [[9, 0], [9, 4]]]])
    vectors, foreground = image_prototypes(embeddings, masks, PrototypeConfig("mask"))
    assert foreground.tolist() == [[[False, True], [False, True]]]
    assert vectors[0].tolist() == pytest.approx([3 / 5, 4 / 5])
    with pytest.raises(InputError, match="a has no saliency mask, which --foreground mask takes"):
        saliency_masks([replace(image, mask=None)], 2)
