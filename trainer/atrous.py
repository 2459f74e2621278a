"""Dilated convolutions without work on padding.

A tap of a dilated kernel looks past the edge for many of its positions, and on a map that is no
larger than the dilation the outer taps see nothing but padding: a DeepLabV3 head at stride 8 on 224
pixels has maps of 28, where its convolution at rate 36 is one of 1×1, with a ninth of the work. The
gradient of taps that see nothing is zero, as it is without trimming.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import ASPPPooling

from trainer.specialise import specialise


class _Dilated(nn.Conv2d):
    """A 3×3 convolution whose padding is its dilation; the same result up to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        rate = self.dilation[0]
        if torch.compiler.is_compiling():  # an exported network takes images of any size
            return super().forward(input)
        live = [rate < side for side in input.shape[2:]]
        if all(live):
            if _narrow_on_cpu(input) and self.weight.requires_grad and torch.is_grad_enabled():
                narrow = input.bfloat16(), self.weight.bfloat16()
                output: Tensor = _ByTaps.apply(*narrow, rate)
                return output
            return super().forward(input)
        weight = self.weight
        for axis in (0, 1):
            weight = weight if live[axis] else weight.narrow(2 + axis, 1, 1)
        padding = [rate * taps for taps in live]
        return F.conv2d(input, weight, self.bias, 1, padding, self.dilation)


class _ByTaps(torch.autograd.Function):
    """A convolution whose weights' gradient is one product a tap, over what the tap sees.

    In oneDNN's bfloat16 on CPUs that gradient takes as long as both other products together.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, rate: int) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.rate = rate
        return F.conv2d(images, weight, None, 1, rate, rate)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:
        images, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        of_images = None
        if ctx.needs_input_grad[0]:
            rate = [ctx.rate, ctx.rate]
            of_images = torch.ops.aten.convolution_backward(
                *(gradient, images, weight, None, [1, 1], rate, rate, False, [0, 0], 1),
                [True, False, False],
            )[0]
        return of_images, _weight_gradient(gradient, images, ctx.rate), None


def _weight_gradient(gradient: Tensor, images: Tensor, rate: int) -> Tensor:
    """From the output's gradient [B, O, H, W] and the input [B, C, H, W] to [O, C, 3, 3]."""
    height, width = images.shape[2:]
    outputs, inputs = gradient.permute(0, 2, 3, 1), images.permute(0, 2, 3, 1)
    taps = outputs.new_empty((3, 3, outputs.shape[-1], inputs.shape[-1]))
    for i in range(3):
        for j in range(3):
            down, across = (i - 1) * rate, (j - 1) * rate
            # where both a pixel and the one that the tap sees are inside
            rows, columns = _inside(-down, height), _inside(-across, width)
            seen_rows, seen_columns = _inside(down, height), _inside(across, width)
            seen = inputs[:, seen_rows, seen_columns].reshape(-1, inputs.shape[-1])
            given = outputs[:, rows, columns].reshape(-1, outputs.shape[-1])
            torch.mm(given.T, seen, out=taps[i, j])
    return taps.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


def _inside(shift: int, side: int) -> slice:
    return slice(max(0, shift), side + min(0, shift))


def _narrow_on_cpu(input: Tensor) -> bool:
    if input.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    return torch.get_autocast_dtype("cpu") == torch.bfloat16


class _Pooling(ASPPPooling):  # type: ignore[misc]
    """The pyramid's image pooling, channels-last in both directions.

    torch's average pooling hands its gradient back the other way round; the other branches' ones
    are added to it, and everything behind them then works on the slow layout. Of one feature,
    bilinear upsampling is a copy.
    """

    def forward(self, input: Tensor) -> Tensor:
        # sums of float16 may overflow; and an export keeps to torch's own modules
        if input.dtype == torch.float16 or torch.compiler.is_compiling():
            plain: Tensor = super().forward(input)
            return plain
        height, width = input.shape[2:]
        with torch.autocast(input.device.type, enabled=False):  # it would copy the input to float32
            pooled = input.sum((2, 3), keepdim=True) / (height * width)
        for part in list(self)[1:]:
            pooled = part(pooled)
        everywhere = pooled.expand(-1, -1, height, width)
        return everywhere.contiguous(memory_format=torch.channels_last)


def trim_dilated(module: nn.Module) -> None:
    """Makes every dilated 3×3 convolution in `module` pass over padding; names stay.

    A DeepLabV3 pyramid's pooling is kept channels-last, too.
    """
    for part in module.modules():
        if type(part) is ASPPPooling:
            specialise(part, _Pooling)
        if type(part) is nn.Conv2d and part.kernel_size == (3, 3) and min(part.dilation) > 1:
            assert part.padding == part.dilation
            assert (*part.stride, part.groups, part.bias) == (1, 1, 1, None)
            specialise(part, _Dilated)
