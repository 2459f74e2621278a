"""Dilated convolutions without the taps that see nothing but padding."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.specialise import specialise


class _Trimmed(nn.Conv2d):
    """On maps no larger than the dilation only the middle of a 3-wide kernel meets any feature.

    A DeepLabV3 head at stride 8 on 224 pixels has maps of 28: its convolution at rate 36 is one of
    1×1, with nine times less work. The outer taps' gradient is zero, as it is without trimming.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # an exported network takes images of any size
            return super().forward(input)
        weight, padding = self.weight, [self.dilation[0], self.dilation[1]]
        for axis in (0, 1):
            if input.shape[2 + axis] <= self.dilation[axis]:
                weight, padding[axis] = weight.narrow(2 + axis, 1, 1), 0
        return F.conv2d(input, weight, self.bias, self.stride, padding, self.dilation)


def trim_dilated(module: nn.Module) -> None:
    """Makes every dilated 3×3 convolution in `module` skip the taps that only see padding.

    The result is the same up to rounding; names and parameters stay.
    """
    for part in module.modules():
        if type(part) is nn.Conv2d and part.kernel_size == (3, 3) and min(part.dilation) > 1:
            assert part.padding == part.dilation
            assert (*part.stride, part.groups) == (1, 1, 1)
            specialise(part, _Trimmed)
