"""Convolutions without taps that see only padding, and dropout: equal to torch's."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from trainer.atrous import trim_dilated
from trainer.dropout import Dropout


@pytest.mark.parametrize("size", [(12, 12), (13, 12), (12, 40), (24, 25), (37, 5), (1, 1)])
def test_trimmed_convolutions_equal_torchs_with_all_gradients(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = ASPP(6, [12, 24, 36], 4).double().eval()
    trimmed = copy.deepcopy(plain)
    trim_dilated(trimmed)
    assert trimmed.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(2, 6, *size, dtype=torch.float64)
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    weights = torch.randn(2, 4, *size, dtype=torch.float64)
    outputs = trimmed(ours), plain(theirs)
    for output in outputs:
        (output * weights).sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(ours.grad, theirs.grad)
    for mine, other in zip(trimmed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert outputs[0].std() > 0.01


@pytest.mark.parametrize(("size", "rate"), [((12, 12), 4), ((13, 9), 2), ((5, 20), 4)])
def test_16_bit_gradients_by_taps_equal_torchs(size: tuple[int, int], rate: int) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(32, 48, 3, padding=rate, dilation=rate, bias=False)
    trimmed = nn.Sequential(copy.deepcopy(plain))
    trim_dilated(trimmed)
    images = torch.randn(3, 32, *size).contiguous(memory_format=torch.channels_last)
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    weights = torch.randn(3, 48, *size)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = trimmed(ours), plain(theirs)
    assert type(outputs[0].grad_fn).__name__ == "_ByTapsBackward"
    for output in outputs:
        (output.float() * weights).sum().backward()
    assert (outputs[0] == outputs[1]).all()
    torch.testing.assert_close(ours.grad, theirs.grad)
    gradient = trimmed[0].weight.grad
    scale = plain.weight.grad.abs().max()
    assert (gradient - plain.weight.grad).abs().max() < 0.01 * scale
    exact = torch.nn.grad.conv2d_weight(
        images.bfloat16().double(), plain.weight.shape, weights.bfloat16().double(), 1, rate, rate
    )
    assert (gradient - exact).abs().max() < 0.005 * scale


def test_trimming_takes_the_work_away() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    work = {}
    for name in ("plain", "trimmed"):
        pyramid = ASPP(8, [12, 24, 36], 8).eval()
        if name == "trimmed":
            trim_dilated(pyramid)
        with FlopCounterMode(display=False) as counter:
            pyramid(torch.randn(1, 8, 28, 28))
        work[name] = counter.get_total_flops()
    one = 2 * 28 * 28 * 8 * 8  # of a 1×1; rate 36 of three 3×3 becomes one
    assert work["plain"] - work["trimmed"] == 8 * one


def test_dropout_keeps_the_share_that_it_should_and_scales_it() -> None:
    torch.manual_seed(3)
    values = torch.ones(2, 8, 100, 100).contiguous(memory_format=torch.channels_last)
    values.requires_grad_()
    dropout = Dropout(0.3)
    output = dropout(values)
    kept = output > 0
    assert abs(kept.float().mean() - 0.7) < 0.005
    torch.testing.assert_close(output[kept], torch.full_like(output[kept], 1 / 0.7))
    output.sum().backward()
    torch.testing.assert_close(values.grad, output.detach())
    torch.manual_seed(3)
    assert (dropout(values) == output).all()
    assert (dropout(values) != output).any()
    for unchanged in (dropout.eval(), Dropout(0.0)):
        assert (unchanged(values) == values).all()
    assert isinstance(dropout, nn.Dropout)
