"""What K-means and retrieval keep of every image: one vector, and two rows of counts.

A pixel's prediction is its image's cluster (or class) inside the predicted foreground and 0
outside. So an image adds its class counts inside to one column and those outside to column 0, for
any number of clusterings.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import CannotScore
from data_pipeline.whole_images import WholeImage, WholeImages
from evaluation.features import forward, own_batches, precision
from evaluation.miou import Counts, confusion
from evaluation.prototypes import PrototypeConfig, image_prototypes, saliency_masks
from evaluation.resolution import Resolution, at_resolution
from trainer.distributed import Ranks, all_gather_rows, gather_counts
from trainer.encoder import Encoder
from trainer.model import PixelOutput, upsample
from trainer.partial import PartialOutput


@dataclass(frozen=True)
class ImageStatistics:
    """Of n images, by sample id.

    Attributes:
        vectors: float32 [n, D], unit length; zero where nothing was predicted.
        inside, outside: int64 [n, C], pixels of each true class in and out of the foreground.
        sample_ids: int64 [n].
    """

    vectors: NDArray[np.float32]
    inside: Counts
    outside: Counts
    sample_ids: NDArray[np.int64]

    @property
    def found(self) -> NDArray[np.bool_]:
        """[n], whether anything was predicted."""
        found: NDArray[np.bool_] = np.abs(self.vectors).sum(1) > 0
        return found

    def of_classes(self, kept: NDArray[np.int64]) -> "ImageStatistics":
        """The same with pixels of all but some classes ignored, which are numbered anew."""
        return replace(self, inside=self.inside[:, kept], outside=self.outside[:, kept])

    def confusion(self, assignment: NDArray[np.int64], columns: int) -> Counts:
        """int64 [C, columns]: pixels of each true class in each image's column; 0 is background.

        Args:
            assignment: int64 [n], column of each image's foreground.
            columns: how many.
        """
        matrix = np.zeros((columns, self.inside.shape[1]), np.int64)
        np.add.at(matrix, assignment, self.inside)
        matrix[0] += self.outside.sum(0)
        return np.ascontiguousarray(matrix.T)

    def images_together(self, assignment: NDArray[np.int64], columns: int) -> Counts:
        """int64 [C, columns]: images in which a class and a column occur together."""
        present = ((self.inside + self.outside) > 0).astype(np.int64)
        matrix = np.zeros((columns, present.shape[1]), np.int64)
        np.add.at(matrix, assignment, present)
        matrix[0] = present.sum(0)  # every image has background
        return np.ascontiguousarray(matrix.T)

    def binary(self) -> Counts:
        """int64 [C, 2]: pixels of each true class outside and inside the foreground."""
        return np.stack([self.outside.sum(0), self.inside.sum(0)], 1)


@torch.inference_mode()
def collect_statistics(
    encoder: Encoder,
    images: WholeImages,
    prototype: PrototypeConfig,
    ranks: Ranks,
    batch_size: int = 16,
    precision_name: str = "float32",
    resolution: Resolution = "label",
    title: str = "embedding",
) -> ImageStatistics:
    """Vectors and counts of all images, on every rank, by sample id; a collective.

    Raises:
        CannotScore: a vector is not finite.

    Args:
        encoder: embeds them.
        images: with labels.
        prototype: how an image's vector is taken.
        ranks: that share the work.
        batch_size: images a forward pass.
        precision_name: float32 or bf16.
        resolution: at which pixels are counted: the label's own, or the image's square.
        title: of the progress bar.
    """
    encoder.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    dim = encoder.network.config.embedding_dim

    def network(pixels: Tensor) -> PixelOutput | PartialOutput:
        output: PixelOutput | PartialOutput = forward(encoder.network, pixels, precision_name)
        return output

    own = own_statistics(
        *(network, dim, images, prototype, ranks),
        *(batch_size, precision_name, resolution, title),
    )
    found = gather_statistics(own, ranks)
    broken = int((~np.isfinite(found.vectors)).any(1).sum())
    if broken:
        raise CannotScore(
            f"the embeddings of {broken:,} of {len(found.vectors):,} images are not finite; the "
            "network has diverged, or give --precision float32"
        )
    return found


def own_statistics(
    network: Callable[[Tensor], PixelOutput | PartialOutput],
    dim: int,
    images: WholeImages,
    prototype: PrototypeConfig,
    ranks: Ranks,
    batch_size: int = 16,
    precision_name: str = "float32",
    resolution: Resolution = "label",
    title: str = "embedding",
) -> ImageStatistics:
    """Of this rank's share of the images, without any collective of its own.

    Args:
        network: normalised images [b, 3, S, S] to its output, on the ranks' device; without
            gradients.
        dim: D of its embeddings.
        images, prototype, ranks, batch_size, precision_name, resolution, title: as of
            `collect_statistics`.
    """
    classes = len(images.classes)
    vectors, counts, numbers = [], [], []
    for batch, pixels in own_batches(images, batch_size, ranks, title):
        with precision(precision_name, ranks.device):
            output = network(pixels)
            if prototype.foreground == "mask":
                saliency = saliency_masks(batch, images.size).to(ranks.device)
            else:
                saliency = upsample(output.saliency, (images.size, images.size))[:, 0]
        prototypes, foreground = image_prototypes(output.embedding, saliency, prototype)
        for image, one in zip(batch, foreground.cpu(), strict=True):
            counts.append(_class_counts(image, one, classes, resolution))
            numbers.append(image.sample_id)
        vectors.append(prototypes.cpu())
    mine = torch.cat(vectors) if vectors else torch.zeros(0, dim)
    tables = np.array(counts, np.int64).reshape(-1, 2, classes)
    return ImageStatistics(
        mine.numpy(), tables[:, 1], tables[:, 0], np.array(numbers, dtype=np.int64)
    )


def gather_statistics(own: ImageStatistics, ranks: Ranks) -> ImageStatistics:
    """All ranks' rows on every rank, by sample id; a collective."""
    held = gather_counts(len(own.sample_ids), ranks)
    parts = (own.vectors, own.inside, own.outside, own.sample_ids)
    tensors = [torch.from_numpy(part).to(ranks.device) for part in parts]
    gathered = [all_gather_rows(part, held, ranks).cpu() for part in tensors]
    order = gathered[3].argsort()
    return ImageStatistics(*(part[order].numpy() for part in gathered))


def _class_counts(
    image: WholeImage, foreground: torch.Tensor, classes: int, resolution: Resolution
) -> Counts:
    """int64 [2, C]: pixels of each true class outside and inside."""
    label, prediction = at_resolution(image.label, foreground.to(torch.uint8), resolution)
    return np.ascontiguousarray(confusion(label, prediction, classes, 2).T)
