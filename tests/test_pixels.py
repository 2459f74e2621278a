"""Embeddings at chosen pixels: what the whole upsampled map holds there, gradients included."""

import pytest
import torch

from trainer.model import upsample
from trainer.pixels import upsample_at
from trainer.proposals import matched_proposals, on_grid, query_pixels


@pytest.mark.parametrize("size", [(96, 96), (45, 33), (12, 9), (7, 9), (100, 5)])
def test_values_and_gradients_equal_those_of_the_whole_map(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 5, 12, 9, dtype=torch.float64)
    features = features.contiguous(memory_format=torch.channels_last)
    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    index = torch.randperm(3 * size[0] * size[1])[:40]
    at = upsample_at(ours, size, index)
    everywhere = upsample(theirs, size).movedim(1, -1).flatten(0, 2)[index]
    torch.testing.assert_close(at, everywhere)
    weights = torch.randn_like(at)
    (at * weights).sum().backward()
    (everywhere * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert upsample_at(features, size, index[:0]).shape == (0, 5)
    assert upsample_at(features.bfloat16(), size, index).dtype == torch.float32


def test_a_grid_keeps_one_pixel_of_each_square() -> None:
    masks = torch.full((2, 24, 17), 3, dtype=torch.uint8)
    masks[1, :, :9] = 0
    sparse = on_grid(masks, 8)
    assert (sparse[0] == 3).nonzero().tolist() == [[y, x] for y in (4, 12, 20) for x in (4, 12)]
    assert (sparse[1] == 0).nonzero().tolist() == [[y, 4] for y in (4, 12, 20)]
    assert (sparse == 255).sum() == masks.numel() - 12
    pixels = query_pixels(sparse, matched_proposals(masks, masks, 0.01))
    assert pixels.counts.tolist() == [6, 3]
    assert on_grid(masks, 1) is masks
