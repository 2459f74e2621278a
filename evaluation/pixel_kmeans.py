"""K-means of all pixels, for data sets without background (COCO-Stuff-27, as PiCIE and later work).

Centres are fitted on an even sample of pixels, bounded whatever the number of images; a second pass
assigns every pixel.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.labelled import LabelledSet
from data_pipeline.whole_images import WholeImages
from evaluation.cluster import Clusters, fit_clusters
from evaluation.features import forward, own_batches, own_samples, require_pixels
from evaluation.kmeans_config import KMeansConfig
from evaluation.miou import Counts, confusion
from evaluation.resolution import at_resolution
from trainer.distributed import (
    Ranks,
    all_gather_rows,
    all_reduce_sum,
    broadcast_object,
    gather_counts,
)
from trainer.encoder import Encoder

FITTED_PIXELS = 200_000  # of all images together, at most, and at least one an image


def cluster_pixels(
    encoder: Encoder,
    images: WholeImages,
    config: KMeansConfig,
    clusters: int,
    ranks: Ranks,
    fit_samples: LabelledSet | None = None,
) -> tuple[list[Clusters], list[Counts]]:
    """One clustering a seed, and pixels of each true class in each of its clusters, [C, K].

    The centres are those of `fit_samples`, by default of the images themselves; a collective.
    """
    fitted_on = images
    if fit_samples is not None:
        fitted_on = WholeImages(fit_samples, images.size, images.threads, images.resize)
    encoder.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    vectors = _sample(encoder, fitted_on, config, ranks)
    fitted = None
    if ranks.is_main:
        fitted = [fit_clusters(vectors, clusters, config.cluster, s) for s in config.cluster.seeds]
    found = broadcast_object(fitted, ranks) or []
    matrices = _count(encoder, images, config, found, clusters, ranks)
    require_pixels(matrices[0], images.samples)
    return found, matrices


@torch.inference_mode()
def _sample(
    encoder: Encoder, images: WholeImages, config: KMeansConfig, ranks: Ranks
) -> NDArray[np.float32]:
    """Normalised embeddings of evenly spread pixels [n, D], in the order of the images."""
    each = max(1, FITTED_PIXELS // len(images))
    parts: list[Tensor] = []
    for _, pixels in own_batches(images, config.batch_size, ranks, "pixels to cluster"):
        embeddings = pixel_embeddings(encoder, pixels, config, ranks)
        flat = embeddings.flatten(2).transpose(1, 2)  # [b, S², D]
        count = min(each, flat.shape[1])
        chosen = torch.linspace(0, flat.shape[1] - 1, count).round().long()
        parts.append(flat[:, chosen.to(flat.device)])
    dim, count = encoder.network.config.embedding_dim, min(each, config.size**2)
    mine = torch.cat(parts) if parts else torch.zeros((0, count, dim), device=ranks.device)
    held = gather_counts(len(mine), ranks)
    rows = all_gather_rows(mine, held, ranks).cpu()
    numbers = np.concatenate(
        [
            own_samples(len(images), Ranks(r, ranks.world_size, ranks.device))
            for r in range(len(held))
        ]
    )
    ordered: NDArray[np.float32] = rows[torch.from_numpy(numbers.argsort())].flatten(0, 1).numpy()
    return ordered


@torch.inference_mode()
def _count(
    encoder: Encoder,
    images: WholeImages,
    config: KMeansConfig,
    found: list[Clusters],
    columns: int,
    ranks: Ranks,
) -> list[Counts]:
    classes = len(images.classes)
    matrices = np.zeros((len(found), classes, columns), np.int64)
    for batch, pixels in own_batches(images, config.batch_size, ranks, "assigning pixels"):
        embeddings = pixel_embeddings(encoder, pixels, config, ranks)
        for one, clusters in enumerate(found):
            maps = nearest_centres(embeddings, clusters).to(torch.int16).cpu()
            for image, assigned in zip(batch, maps, strict=True):
                label, prediction = at_resolution(image.label, assigned, config.resolution)
                matrices[one] += confusion(label, prediction, classes, columns)
    total = all_reduce_sum(torch.from_numpy(matrices).to(ranks.device), ranks).cpu().numpy()
    return list(total)


def nearest_centres(embeddings: Tensor, clusters: Clusters) -> Tensor:
    """Cluster of each pixel, int64 [B, H, W], of normalised embeddings [B, D, H, W]."""
    # (x − mean) · directions · centres, as one product with the pixels; the mean first, since what
    # is whitened may be far smaller than it, and what float32 cuts off the mean with the rest
    exact = clusters.directions @ clusters.centres.T  # [D, K]
    mean = embeddings.new_tensor(clusters.mean)
    cut_off = clusters.mean - mean.double().cpu().numpy()
    offset = embeddings.new_tensor(-0.5 * (clusters.centres**2).sum(1) - cut_off @ exact)
    centred = embeddings - mean[:, None, None]
    scores = torch.einsum("bdhw,dk->bkhw", centred, embeddings.new_tensor(exact))
    scores += offset[:, None, None]
    return scores.argmax(1)


def pixel_embeddings(
    encoder: Encoder, pixels: Tensor, config: KMeansConfig, ranks: Ranks
) -> Tensor:
    """L2-normalised embeddings [b, D, S, S], float32."""
    embeddings = forward(encoder.embeddings, pixels, config.precision)
    return F.normalize(embeddings.float(), dim=1)
