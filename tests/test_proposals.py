"""Which proposals and pixels count, and their prototypes, against loops."""

import pytest
import torch
from torch.nn import functional as F

from trainer.proposals import (
    mask_prototypes,
    matched_proposals,
    proposal_of_pixel,
    query_pixels,
)


def test_proposals_count_where_both_views_hold_enough() -> None:
    query, key = (
        torch.zeros(2, 10, 10, dtype=torch.uint8),
        torch.zeros(2, 10, 10, dtype=torch.uint8),
    )
    query[0, :2], query[0, 5], query[0, 7], query[0, 9] = 1, 2, 255, 254
    key[0, :1], key[0, 5, :4], key[0, 7], key[0, 9] = 1, 2, 255, 254
    query[1], key[1, 0] = 9, 8
    assert matched_proposals(query, key, 0.05).tolist() == [[0, 1], [0, 254]]
    assert matched_proposals(query, key, 0.04).tolist() == [[0, 1], [0, 2], [0, 254]]
    assert matched_proposals(query[1:], key[1:], 0).tolist() == []


def test_prototypes_equal_a_loop() -> None:
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(3, 5, 6, 7, generator=draw)
    masks = torch.randint(0, 4, (3, 6, 7), generator=draw).to(torch.uint8)
    proposals = matched_proposals(masks, masks, 0)
    prototypes = mask_prototypes(features, masks, proposals)
    row = proposal_of_pixel(masks, proposals)
    for number, (sample, proposal) in enumerate(proposals.tolist()):
        inside = masks[sample] == proposal
        pixels = features[sample][:, inside]
        expected = F.normalize((pixels / pixels.norm(dim=0)).sum(1), dim=0)
        torch.testing.assert_close(prototypes[number], expected)
        assert (row[sample][inside] == number).all()
    assert (row[masks == 0] == -1).all()


def uneven_masks() -> torch.Tensor:
    masks = torch.zeros(3, 8, 9, dtype=torch.uint8)
    masks[0, :5], masks[0, 6, :3] = 1, 2  # 45 and 3 pixels
    masks[2, 1:3, 2:7], masks[2, 5:] = 7, 255  # 10 pixels
    return masks


def test_all_pixels_of_all_proposals_are_taken_without_a_cap() -> None:
    masks = uneven_masks()
    pixels = query_pixels(masks, matched_proposals(masks, masks, 0))
    assert pixels.counts.tolist() == [45, 3, 10]
    ids = masks.flatten()[pixels.index]
    assert ids.tolist() == [[1, 2, 7][row] for row in pixels.target.tolist()]
    assert len(pixels.index.unique()) == len(pixels.index) == 58
    assert (pixels.weight == 1).all()


@pytest.mark.parametrize("most", [1, 3, 4, 10, 44, 45, 1000])
def test_a_cap_takes_distinct_pixels_of_each_proposal_and_keeps_its_weight(most: int) -> None:
    masks = uneven_masks()
    proposals = matched_proposals(masks, masks, 0)
    for offset in (0.0, 0.3, 0.9999999):
        pixels = query_pixels(masks, proposals, most, torch.full((3,), offset).double())
        assert pixels.counts.tolist() == [45, 3, 10]  # full counts, for the class weights
        assert len(pixels.index.unique()) == len(pixels.index)
        for row, count in enumerate([45, 3, 10]):
            mine = pixels.target == row
            assert int(mine.sum()) == min(most, count)
            assert (masks.flatten()[pixels.index[mine]] == [1, 2, 7][row]).all()
            assert float(pixels.weight[mine].sum()) == pytest.approx(count, rel=1e-6)


@pytest.mark.parametrize("most", [1, 7, 40])
def test_every_pixel_counts_once_on_average_over_the_offset(most: int) -> None:
    """Over a fine grid of offsets the weighted sum over sampled pixels is the sum over all."""
    masks = uneven_masks()
    proposals = matched_proposals(masks, masks, 0)
    weight, grid = torch.zeros(masks.numel()).double(), 9 * 5 * 2 * 3
    for i in range(grid):
        offset = torch.full((3,), (i + 0.5) / grid).double()
        pixels = query_pixels(masks, proposals, most, offset)
        weight.index_add_(0, pixels.index, pixels.weight.double() / grid)
    inside = (masks.flatten() > 0) & (masks.flatten() < 255)
    assert (weight[inside] - 1).abs().max() < 1e-3
    assert (weight[~inside] == 0).all()


def test_no_proposal_gives_no_pixel() -> None:
    masks = torch.zeros(2, 4, 4, dtype=torch.uint8)
    proposals = matched_proposals(masks, masks, 0)
    for most in (0, 5):
        pixels = query_pixels(masks, proposals, most, torch.zeros(2).double())
        assert [len(field) for field in vars(pixels).values()] == [0, 0, 0, 0]
