"""maskbank's ResNet-18 at output stride 8 for peers, of torchvision alone: `trainer.backbones`."""

from collections import OrderedDict

import torchvision
from torch import nn

_LAYERS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def dilated_resnet18() -> nn.Sequential:
    """Images [B, 3, H, W] to features [B, 512, H/8, W/8]; random weights, torchvision's names.

    Where torchvision refuses to dilate basic blocks: the strided 3×3 of a stage gets half of the
    stage's dilation, all others the whole.
    """
    resnet = torchvision.models.resnet18(weights=None)
    for stage, dilation in ((resnet.layer3, 2), (resnet.layer4, 4)):
        stage[0].downsample[0].stride = (1, 1)
        for number, block in enumerate(stage):
            for convolution in (block.conv1, block.conv2):
                first = number == 0 and convolution is block.conv1
                rate = dilation // 2 if first else dilation
                convolution.stride = (1, 1)
                convolution.dilation = convolution.padding = (rate, rate)
    return nn.Sequential(OrderedDict((name, getattr(resnet, name)) for name in _LAYERS))
