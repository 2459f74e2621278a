"""What a GPU makes of the contrasted pixels and of the head, against float64 on the CPU."""

import copy

import torch
from torch import Tensor
from torchvision.models.segmentation.deeplabv3 import ASPP

from benchmarks.gpu_loss import DEVICE, Row, relative_error, verdict
from trainer.atrous import trim_dilated
from trainer.model import upsample
from trainer.pixels import upsample_at

_LIMIT = 1e-5


def pixels() -> list[Row]:
    """Embeddings upsampled where they are needed, and the head without work on padding."""
    return [_upsampling(), _head()]


def _upsampling() -> Row:
    torch.manual_seed(0)
    size = (224, 224)
    index = torch.randperm(4 * size[0] * size[1])[:100_000].sort().values
    features, weights = torch.randn(4, 32, 28, 28), torch.randn(len(index), 32)

    def gradient(at: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        (found,) = torch.autograd.grad((at * weight).sum(), values)
        return found

    wide = features.double().requires_grad_()
    expected = upsample(wide, size).movedim(1, -1).flatten(0, 2)[index]
    narrow = features.to(DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = upsample_at(narrow, size, index.to(DEVICE))
    errors = (
        relative_error(found.detach().cpu(), expected.detach()),
        relative_error(
            gradient(found, narrow, weights.to(DEVICE)).cpu(),
            gradient(expected, wide, weights.double()),
        ),
    )
    worst = max(errors)
    what = "100,000 of 200,704 upsampled pixels, and their features' gradient"
    return Row(what, f"error {worst:.1e}", verdict(worst < _LIMIT))


def _head() -> Row:
    """The pyramid on 28 features a side: rate 36 is trimmed to 1×1, in float32 without TF32."""
    torch.manual_seed(0)
    plain = ASPP(64, [12, 24, 36], 32).double().eval()
    trimmed = copy.deepcopy(plain).float().to(DEVICE, memory_format=torch.channels_last)
    trim_dilated(trimmed)
    images = torch.randn(4, 64, 28, 28)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        found = trimmed(images.to(DEVICE).contiguous(memory_format=torch.channels_last))
        found.square().mean().backward()
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    expected = plain(images.double())
    expected.square().mean().backward()
    pairs = zip(trimmed.parameters(), plain.parameters(), strict=True)
    errors = [relative_error(mine.grad.cpu(), theirs.grad) for mine, theirs in pairs]
    worst = max(relative_error(found.detach().cpu(), expected.detach()), *errors)
    what = "DeepLabV3 pyramid without work on padding, and its weights' gradients"
    return Row(what, f"error {worst:.1e}", verdict(worst < _LIMIT))
