"""A linear classifier of pixels: what it says of features, and what it is learned from."""

from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.errors import InputError
from data_pipeline.sample import IGNORED
from trainer.encoder import Encoder
from trainer.model import upsample


@dataclass(frozen=True)
class LinearClassifier:
    """A 1×1 convolution: weight [C, F] and bias [C]."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def drawn(cls, classes: int, width: int, seed: int) -> "LinearClassifier":
        """Weights normal(0, .01), bias 0: the same on every rank."""
        draw = torch.Generator().manual_seed(seed)
        weight = torch.zeros(classes, width, 1, 1).normal_(0, 0.01, generator=draw)
        return cls(weight[..., 0, 0], torch.zeros(classes))

    @classmethod
    def of(cls, encoder: Encoder) -> "LinearClassifier":
        """The classifier that a network's file holds.

        Raises:
            InputError: it holds none.
        """
        if encoder.classifier is None:
            raise InputError(
                f"{encoder.origin} holds no classifier; leave --own-classifier out, so that one is "
                "learned, or give the file of a linear probe"
            )
        weight, bias = encoder.classifier
        return cls(weight.float().flatten(1), bias.float())

    def to(self, device: torch.device) -> "LinearClassifier":
        return LinearClassifier(self.weight.to(device), self.bias.to(device))

    def copy(self) -> "LinearClassifier":
        """Values of now, on the CPU."""
        return LinearClassifier(
            self.weight.detach().cpu().clone(), self.bias.detach().cpu().clone()
        )

    def learnable(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Copies of weight and bias with gradients; `LinearClassifier(*…)` sees them change."""
        return nn.Parameter(self.weight.clone()), nn.Parameter(self.bias.clone())

    def logits(self, features: Tensor) -> Tensor:
        """[b, F, h, w] to [b, C, h, w]."""
        return F.conv2d(features, self.weight[:, :, None, None], self.bias)

    def logits_at(self, features: Tensor, size: int) -> Tensor:
        """Features [F, h, w] of one image to logits [C, S, S], S the size of the images."""
        return upsample(self.logits(features[None].float()), (size, size))[0]


def image_gradients(
    classifier: LinearClassifier, features: Tensor, labels: Tensor, pool: Executor | None = None
) -> Tensor:
    """Each image's gradient on its own: rows [b, C·F + C + 1] of weight, bias, labelled pixels.

    Of the cross entropy summed over an image's labelled pixels. On CPUs one image at a time, since
    the last bits of a product of matrices may depend on how many are multiplied together.

    Args:
        classifier: on the device of the features.
        features: [b, F, h, w].
        labels: int64 [b, S, S], negative where they are ignored.
        pool: whose threads take an image each, with one thread of torch; for CPUs. An image is too
            little for several to share.
    """
    if features.device.type != "cpu":
        return _gradients(classifier, features, labels)
    parts = torch.split(features, 1), torch.split(labels, 1)
    work = partial(_gradients, classifier)
    return torch.cat(list(map(work, *parts) if pool is None else pool.map(work, *parts)))


def _gradients(classifier: LinearClassifier, features: Tensor, labels: Tensor) -> Tensor:
    features = features.float()
    with torch.no_grad():
        logits = classifier.logits(features)
    with torch.enable_grad():
        logits.requires_grad_()
        full = upsample(logits, (labels.shape[1], labels.shape[2]))
        loss = F.cross_entropy(full, labels, ignore_index=IGNORED, reduction="sum")
        (by_logits,) = torch.autograd.grad(loss, logits)
    flat = by_logits.flatten(2)
    by_weight = torch.bmm(flat, features.flatten(2).transpose(1, 2))  # [b, C, F]
    pixels = (labels >= 0).sum((1, 2)).float()
    return torch.cat([by_weight.flatten(1), flat.sum(2), pixels[:, None]], 1)
