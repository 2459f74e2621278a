"""Small shards with known answers, and networks that know them."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.build_config import BuildConfig
from data_pipeline.labelled import LabelledSet, ShardSet, labelled_shards
from data_pipeline.resize import Resize, resize_nearest
from data_pipeline.sample import RawSample, UInt8, encode_png
from data_pipeline.sources.generated import list_scenes
from data_pipeline.sources.item import Listing
from data_pipeline.whole_images import WholeImages, normalise
from data_pipeline.write_shards import build_shards
from trainer.encoder import Encoder
from trainer.model import ModelConfig, PixelEncoder, PixelOutput

BLOCK_CLASSES = ("background", "ant", "bee", "cow")


@dataclass(frozen=True)
class BlockItem:
    """Noise with one rectangle of a class (0: none), known to the pixel; a border is ignored.

    Where it is tinted, the rectangle has a colour of its class, so that a classifier can learn it.
    """

    index: int
    label_class: int
    height: int
    width: int
    masked: bool = True
    tinted: bool = False

    @property
    def key(self) -> str:
        return f"block_{self.index:03d}"

    @property
    def source(self) -> str:
        return f"block:{self.index}"

    def sizes(self) -> tuple[int, ...]:
        return ()

    def label(self) -> UInt8:
        label = np.zeros((self.height, self.width), np.uint8)
        top, left = 4 + self.index % 5, 6 + self.index % 7
        label[top : top + 16 + self.index % 4, left : left + 20] = self.label_class
        label[-1] = 255
        return label

    def read(self) -> RawSample:
        noise = np.random.default_rng(self.index).integers(0, 256, (self.height, self.width, 3))
        label = self.label()
        if self.tinted:
            noise = noise // 4 + 60 * np.eye(4)[label % 255][..., 1:].astype(np.int64)
        image = io.BytesIO()
        Image.fromarray(noise.astype(np.uint8)).save(image, "PNG")
        mask = encode_png((label % 255 > 0).astype(np.uint8)) if self.masked else None
        return RawSample(image.getvalue(), mask, encode_png(label))


@dataclass(frozen=True)
class LabelItem:
    """An image of noise with this label, -1 where it is ignored."""

    index: int
    label: NDArray[np.int64]

    @property
    def key(self) -> str:
        return f"image_{self.index:03d}"

    @property
    def source(self) -> str:
        return f"label:{self.index}"

    def sizes(self) -> tuple[int, ...]:
        return ()

    def read(self) -> RawSample:
        noise = np.random.default_rng(self.index).integers(0, 256, (*self.label.shape, 3))
        image = io.BytesIO()
        Image.fromarray(noise.astype(np.uint8)).save(image, "PNG")
        return RawSample(image.getvalue(), None, encode_png(self.label.astype(np.uint8)))


def block_shards(
    folder: Path,
    classes: list[int],
    size: tuple[int, int] = (48, 48),
    masked: bool = True,
    names: tuple[str, ...] = BLOCK_CLASSES,
    first: int = 0,
    tinted: bool = False,
) -> ShardSet:
    """One image for each of `classes`, in that order, 10 a shard."""
    items = [BlockItem(first + i, label, *size, masked, tinted) for i, label in enumerate(classes)]
    return labelled_shards(
        build_shards(Listing(items, names), folder, BuildConfig(10, shuffle_seed=-1))
    )


def scene_shards(folder: Path, count: int = 40, seed: int = 0, size: int = 48) -> ShardSet:
    """Generated scenes of several sizes, 16 a shard."""
    return labelled_shards(build_shards(list_scenes(count, seed, size), folder, BuildConfig(16)))


class OracleNetwork(nn.Module):
    """Looks the labels of an image up: features and embeddings are their one-hot code.

    Saliency logits are 10 on objects, −10 elsewhere and where the label is ignored.
    """

    def __init__(self, sets: list[LabelledSet], size: int, resize: Resize = "opencv") -> None:
        super().__init__()
        self.classes = len(sets[0].classes)
        self.config = ModelConfig(embedding_dim=self.classes, decoder_channels=self.classes)
        self.device_marker = nn.Parameter(torch.zeros(1))
        self.labels: dict[bytes, Tensor] = {}
        for samples in sets:
            images = WholeImages(samples, size, 1, resize)
            for i in range(len(images)):
                image = images.read(i)
                label = resize_nearest(torch.tensor(image.label), (size, size))
                self.labels[_fingerprint(normalise(image.pixels))] = label

    def features(self, images: Tensor) -> Tensor:
        labels = torch.stack([self.labels[_fingerprint(image)] for image in images]).long()
        return F.one_hot(labels.clamp_min(0), self.classes).permute(0, 3, 1, 2).float()

    def forward(self, images: Tensor) -> PixelOutput:
        codes = self.features(images)
        return PixelOutput(codes, 10 - 20 * codes[:, :1])


def _fingerprint(image: Tensor) -> bytes:
    return (image * 1000).round().to(torch.int32).contiguous().numpy().tobytes()


class ConstantNetwork(nn.Module):
    """The same embedding and saliency logit everywhere, as of a network that has collapsed."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = logit
        self.config = ModelConfig(embedding_dim=3, decoder_channels=3)

    def forward(self, images: Tensor) -> PixelOutput:
        flat = torch.ones(len(images), 1, *images.shape[2:])
        return PixelOutput(flat.repeat(1, 3, 1, 1), self.logit * flat)


class ColourNetwork(nn.Module):
    """Features are colours and their squares at stride 4: the same bits in any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.config = ModelConfig(decoder_channels=6)
        self.marker = nn.Parameter(torch.zeros(1))

    def features(self, images: Tensor) -> Tensor:
        pooled = F.avg_pool2d(images, 4)
        return torch.cat([pooled, pooled.square()], 1)


def coloured() -> Encoder:
    return Encoder(ColourNetwork(), step=7)  # type: ignore[arg-type]


def oracle(sets: list[LabelledSet], size: int, resize: Resize = "opencv") -> Encoder:
    return Encoder(OracleNetwork(sets, size, resize), step=7)  # type: ignore[arg-type]


def constant(logit: float) -> Encoder:
    return Encoder(ConstantNetwork(logit), step=7)  # type: ignore[arg-type]


def random_encoder(seed: int = 0) -> Encoder:
    """A small network without training, whose saliency splits every image.

    Its batch norms know noise, so that features are about 1 in size and a classifier can learn.
    """
    config = ModelConfig(
        backbone="small", embedding_dim=6, decoder_channels=16, atrous_rates=(1, 2, 3)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PixelEncoder(config)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the mean over what is seen
        with torch.no_grad():
            network.train()(torch.randn(4, 3, 40, 40))
        return Encoder(network, step=3)
