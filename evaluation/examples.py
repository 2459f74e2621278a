"""Pictures for the report: a few images with everything that was predicted on them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.files import atomic_write
from data_pipeline.labelled import LabelledSet
from data_pipeline.resize import resize_nearest
from data_pipeline.sample import Label, UInt8
from data_pipeline.whole_images import WholeImage, WholeImages, normalise
from evaluation.features import forward
from evaluation.kmeans import Clustering
from evaluation.kmeans_config import KMeansConfig
from evaluation.prototypes import foreground_of, saliency_masks
from trainer.encoder import Encoder
from trainer.model import upsample


@torch.inference_mode()
def write_examples(
    encoder: Encoder,
    samples: LabelledSet,
    config: KMeansConfig,
    clustering: Clustering,
    path: Path,
    count: int = 12,
    among: NDArray[np.int64] | None = None,
) -> None:
    """Writes `count` images, evenly spaced over the data set, as arrays (see `report.py`).

    Args:
        encoder, samples, config, clustering: what was evaluated, and what came of it.
        path: of the file.
        count: images, at most.
        among: ids of the samples that may be taken; None takes any.
    """
    images = WholeImages(samples, config.size, 1, config.resize)
    numbers = np.arange(len(images)) if among is None else among
    places = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(np.int64)
    chosen = [images.read(int(numbers[place])) for place in dict.fromkeys(places.tolist())]
    pixels = torch.stack([image.pixels for image in chosen])
    embeddings, saliency = _embedded(encoder, chosen, config)
    foreground = foreground_of(saliency, config.prototype).numpy()
    given = config.prototype.foreground == "mask"
    arrays = {
        "key": np.array([image.key for image in chosen]),
        "image": pixels.permute(0, 2, 3, 1).numpy(),
        "mask": np.stack([_resized(image.mask, config.size) for image in chosen]),
        "label": np.stack([_resized(image.label, config.size) for image in chosen]),
        "saliency": (saliency if given else saliency.sigmoid()).numpy(),
        "clusters": cluster_maps(chosen, foreground, clustering),
        "embedding_rgb": principal_colours(embeddings),
    }
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def principal_colours(embeddings: Tensor) -> UInt8:
    """The three main directions of pixel embeddings [B, D, H, W] as colours, uint8 [B, H, W, 3].

    Each is stretched from its 2nd to its 98th percentile; fewer than three dimensions repeat.
    """
    dim = embeddings.shape[1]
    # an image at a time: all pixels in float64 would be gigabytes
    images = [image.reshape(dim, -1).T for image in embeddings]
    mean = torch.stack([image.double().mean(0) for image in images]).mean(0)
    centred = (image.double() - mean for image in images)
    scatter = torch.stack([image.T @ image for image in centred]).sum(0)
    _, directions = torch.linalg.eigh(scatter)
    directions = directions.flip(1)[:, [0, min(1, dim - 1), min(2, dim - 1)]]
    # the sign of an eigenvector is arbitrary: fix it, so that equal networks give equal pictures
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * largest.sign()
    colours = torch.stack([(image.double() - mean) @ directions for image in images]).numpy()
    low, high = np.percentile(colours.reshape(-1, 3), [2, 98], axis=0)
    scaled = (colours - low) / np.maximum(high - low, 1e-12)
    shape = (len(images), *embeddings.shape[2:], 3)
    stretched: UInt8 = (255 * scaled.clip(0, 1)).astype(np.uint8).reshape(shape)
    return stretched


def _embedded(
    encoder: Encoder, images: list[WholeImage], config: KMeansConfig
) -> tuple[Tensor, Tensor]:
    """Embeddings [B, D, S, S] and saliency [B, S, S] on the CPU, computed as for scoring.

    Saliency is logits, or the data set's masks where these are the foreground.
    """
    device = next(encoder.parameters()).device
    masks = config.prototype.foreground == "mask"
    parts = []
    for first in range(0, len(images), config.batch_size):
        batch = images[first : first + config.batch_size]
        pixels = torch.stack([image.pixels for image in batch]).to(device)
        normalised = normalise(pixels).contiguous(memory_format=torch.channels_last)
        output = forward(encoder.network, normalised, config.precision)
        size = (config.size, config.size)
        embeddings = upsample(output.embedding, size)
        if masks:
            saliency = saliency_masks(batch, config.size)
        else:
            saliency = upsample(output.saliency, size)[:, 0]
        parts.append((embeddings.cpu(), saliency.cpu()))
    return torch.cat([one for one, _ in parts]), torch.cat([one for _, one in parts])


def cluster_maps(
    images: list[WholeImage], foreground: NDArray[np.bool_], clustering: Clustering
) -> Label:
    """Predicted class of each pixel, int16 [B, S, S], -1 where a cluster has no class."""
    classes = [
        clustering.class_of_cluster[clustering.cluster_of_sample[image.sample_id]]
        for image in images
    ]
    background = clustering.class_of_cluster[0]
    values = np.where(foreground, np.array(classes)[:, None, None], background)
    return values.astype(np.int16)


def _resized(values: NDArray[Any] | None, size: int) -> NDArray[Any]:
    if values is None:
        return np.zeros((size, size), np.uint8)
    resized: NDArray[Any] = resize_nearest(torch.tensor(values), (size, size)).numpy()
    return resized
