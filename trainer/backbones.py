"""Backbones with dense features: torchvision's ResNets, timm's networks, and one for CPUs."""

from collections.abc import Callable

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from trainer.atrous import trim_dilated
from trainer.settings import BACKBONES, RESNETS, TIMM
from trainer.timm_backbones import build_timm_backbone


def build_backbone(
    name: str, output_stride: int = 8, timm_images: bool = False
) -> tuple[nn.Module, int]:
    """A backbone from images [B, 3, H, W] to features [B, C, H/stride, W/stride], and C.

    ResNets keep torchvision's parameter names; at stride 8 layer3 and layer4 are dilated, at 16
    layer4 (Chen et al., DeepLabV3, 2017). `small` has stride 4, whatever was asked for, and 0.8 M
    parameters. `timm/NAME` is a network of timm (`build_timm_backbone`).

    Raises:
        ValueError: an unknown name.
        InputError: timm is missing or has no such network with dense features.
    """
    if name.startswith(TIMM):
        return build_timm_backbone(name.removeprefix(TIMM), output_stride, timm_images)
    if name == "small":
        return SmallBackbone(), SmallBackbone.channels
    if name not in RESNETS:
        raise ValueError(f"unknown backbone {name!r}; it can be {', '.join(BACKBONES)}")
    make: Callable[..., ResNet] = getattr(torchvision.models, name)
    dilated = [False, output_stride == 8, True]
    if name not in ("resnet18", "resnet34"):
        return DenseResNet(make(weights=None, replace_stride_with_dilation=dilated)), 2048
    resnet = make(weights=None)
    # torchvision refuses to dilate basic blocks, so it is done after the fact
    if output_stride == 8:
        dilate_stage(resnet.layer3, 2)
        dilate_stage(resnet.layer4, 4)
    else:
        dilate_stage(resnet.layer4, 2)
    return DenseResNet(resnet), 512


class DenseResNet(nn.Module):
    """A ResNet without pooling and classifier, parameters named as torchvision names them."""

    def __init__(self, resnet: ResNet) -> None:
        super().__init__()
        self.conv1, self.bn1 = resnet.conv1, resnet.bn1
        self.relu, self.maxpool = resnet.relu, resnet.maxpool
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.layer3, self.layer4 = resnet.layer3, resnet.layer4
        trim_dilated(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return features


class SmallBackbone(nn.Module):
    """Four basic blocks at stride 4, dilated 1, 2, 2, 4; runs on a laptop."""

    channels = 128

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.layer1 = nn.Sequential(_basic_block(32, 64, stride=2))
        self.layer2 = nn.Sequential(_basic_block(64, 128), _basic_block(128, 128))
        self.layer3 = nn.Sequential(_basic_block(128, 128))
        dilate_stage(self.layer2, 2)
        dilate_stage(self.layer3, 4)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layer3(self.layer2(self.layer1(self.stem(images))))
        return features


def dilate_stage(stage: nn.Sequential, dilation: int) -> None:
    """Trades a stage's stride for dilation, as torchvision does for bottlenecks.

    The first 3×3 of the stage gets half the dilation, all others the whole.
    """
    for number, block in enumerate(stage):
        assert isinstance(block, BasicBlock | Bottleneck)
        if block.downsample is not None:
            block.downsample[0].stride = (1, 1)
        for name, module in block.named_modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                first = number == 0 and name == "conv1"
                rate = dilation // 2 if first else dilation
                module.stride, module.dilation, module.padding = (1, 1), (rate, rate), (rate, rate)


def _basic_block(in_channels: int, channels: int, stride: int = 1) -> BasicBlock:
    downsample = None
    if stride != 1 or in_channels != channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
            nn.BatchNorm2d(channels),
        )
    return BasicBlock(in_channels, channels, stride, downsample)
