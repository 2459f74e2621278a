"""Pictures that show what scores mean: best and worst images, clusters, retrieved neighbours.

Which images is decided from what the evaluation has counted already; only those are read and
embedded again, a batch at a time.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from data_pipeline.labelled import LabelledSet
from data_pipeline.resize import resize_nearest
from data_pipeline.whole_images import WholeImage, WholeImages, normalise
from evaluation.examples import cluster_maps
from evaluation.features import forward
from evaluation.gallery import MAX_SIDE, Belonging, Gallery
from evaluation.image_scores import ImageScores
from evaluation.kmeans import Clustering
from evaluation.kmeans_config import KMeansConfig
from evaluation.prototypes import foreground_of, saliency_masks
from evaluation.retrieval import Neighbours, RetrievalConfig
from trainer.encoder import Encoder
from trainer.model import upsample

EXTREMES = 8  # best and worst images
MEMBERS = 8  # of a cluster
MAX_CLUSTERS = 40  # the largest
QUERIES = 12

Config = KMeansConfig | RetrievalConfig


def write_cluster_sheet(
    encoder: Encoder,
    samples: LabelledSet,
    config: KMeansConfig,
    clustering: Clustering,
    belonging: Belonging,
    path: Path,
) -> None:
    """Writes the best and worst images, and of each cluster those nearest to its centre.

    Arrays besides the pictures': miou and object_class [n] of each picture's image; best, worst
    [≤ EXTREMES], pictures, the best and the worst first; clusters [k], the largest, with their
    cluster_class, cluster_iou, cluster_images (how many it has) and member [k, MEMBERS], pictures,
    -1 for none; cluster_count, all that have an image.
    """
    scores = clustering.scores
    assert scores is not None
    best, worst = extremes(scores, EXTREMES)
    sizes = np.bincount(scores.cluster, minlength=len(clustering.class_of_cluster))
    sizes[0] = 0  # where nothing was predicted
    largest = np.argsort(-sizes, kind="stable")[: min(MAX_CLUSTERS, int((sizes > 0).sum()))]
    member = np.stack(
        [nearest_members(scores, int(cluster), MEMBERS) for cluster in largest]
        or [np.zeros(MEMBERS, np.int64)]
    )[: len(largest)]
    chosen = np.unique(np.concatenate([best, worst, member[member >= 0]]))
    place = np.full(len(scores.sample_ids) + 1, -1, np.int64)  # the last is that of -1
    place[chosen] = np.arange(len(chosen))
    keys, images, segments = _pictures(
        *(encoder, samples, config, scores.sample_ids[chosen]),
        lambda batch, foreground: cluster_maps(batch, foreground, clustering),
    )
    arrays = {
        "miou": scores.miou[chosen],
        "object_class": scores.object_class[chosen],
        "best": place[best],
        "worst": place[worst],
        "clusters": largest,
        "cluster_class": clustering.class_of_cluster[largest],
        "cluster_iou": scores.cluster_iou[largest],
        "cluster_images": sizes[largest],
        "member": place[member],
        "cluster_count": np.array((sizes > 0).sum()),
    }
    said = (belonging.names, belonging.protocol, belonging.network)
    Gallery(keys, images, segments, *said, arrays).write(path)


def extremes(scores: ImageScores, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of the images of highest (first) and lowest mIoU among those with an object.

    No image is in both, so fewer than `count` where there are few.
    """
    usable = np.flatnonzero((scores.object_class > 0) & ~np.isnan(scores.miou))
    order = usable[np.argsort(-scores.miou[usable], kind="stable")]
    count = min(count, (len(order) + 1) // 2)
    return order[:count], order[count:][::-1][:count]


def nearest_members(scores: ImageScores, cluster: int, count: int) -> NDArray[np.int64]:
    """Places of the `count` images nearest to a cluster's centre, -1 where it has fewer: [count]"""
    inside = np.flatnonzero(scores.cluster == cluster)
    nearest = inside[np.argsort(scores.distance[inside], kind="stable")[:count]]
    padded = np.full(count, -1, np.int64)
    padded[: len(nearest)] = nearest
    return padded


def write_neighbour_sheet(
    encoder: Encoder,
    bank: LabelledSet,
    samples: LabelledSet,
    config: RetrievalConfig,
    neighbours: Neighbours,
    belonging: Belonging,
    path: Path,
) -> None:
    """Writes QUERIES queries, evenly spread, with their nearest images of the bank.

    Arrays besides the pictures': query [q] and neighbour [q, k], pictures; query_class (0: no
    object in its mask) and bank_class [q, k]; similarity [q, k], cosines.
    """
    queries = len(neighbours.queries)
    spread = np.linspace(0, queries - 1, min(QUERIES, queries)).astype(np.int64)
    rows = np.unique(spread)
    query_class, bank_class = neighbours.query_class[rows], neighbours.bank_class[rows]
    of_query = neighbours.queries[rows]
    of_bank, place = np.unique(neighbours.bank[rows], return_inverse=True)
    taken = dict(zip(of_query.tolist(), bank_class[:, 0].tolist(), strict=True))
    known = dict(zip(neighbours.bank[rows].ravel().tolist(), bank_class.ravel(), strict=True))
    parts = [
        _pictures(encoder, samples, config, of_query, _painted(taken)),
        _pictures(encoder, bank, config, of_bank, _painted(known)),
    ]
    arrays: dict[str, NDArray[Any]] = {
        "query": np.arange(len(rows)),
        "neighbour": len(rows) + place.reshape(bank_class.shape),
        "query_class": query_class,
        "bank_class": bank_class,
        "similarity": neighbours.similarity[rows],
    }
    Gallery(
        [*parts[0][0], *parts[1][0]],
        np.concatenate([part[1] for part in parts]),
        np.concatenate([part[2] for part in parts]),
        belonging.names,
        belonging.protocol,
        belonging.network,
        arrays,
    ).write(path)


def _painted(classes: dict[int, Any]) -> Any:
    """Gives each image's foreground the class of its sample id."""

    def painted(batch: list[WholeImage], foreground: NDArray[np.bool_]) -> NDArray[np.int16]:
        values = np.array([classes[image.sample_id] for image in batch], np.int16)
        return np.where(foreground, values[:, None, None], 0).astype(np.int16)

    return painted


def _pictures(
    encoder: Encoder,
    samples: LabelledSet,
    config: Config,
    sample_ids: NDArray[np.int64],
    segments_of: Any,
) -> tuple[list[str], NDArray[np.uint8], NDArray[np.int16]]:
    """Keys, thumbnails [n, T, T, 3] and segments [n, T, T], of these images, in that order."""
    side = min(MAX_SIDE, config.size)
    keys: list[str] = []
    images, segments = [np.zeros((0, side, side, 3), np.uint8)], [np.zeros((0, side, side))]
    for batch in WholeImages(samples, config.size, 1, config.resize).batches(
        sample_ids, config.batch_size
    ):
        pixels = torch.stack([image.pixels for image in batch])
        maps = segments_of(batch, _foreground(encoder, batch, pixels, config))
        keys += [image.key for image in batch]
        small = F.resize(pixels, [side, side], antialias=True).permute(0, 2, 3, 1)
        images.append(small.numpy())
        segments.append(resize_nearest(torch.from_numpy(maps), (side, side)).numpy())
    return keys, np.concatenate(images), np.concatenate(segments).astype(np.int16)


@torch.inference_mode()
def _foreground(
    encoder: Encoder, batch: Sequence[WholeImage], pixels: Tensor, config: Config
) -> NDArray[np.bool_]:
    """Predicted objects [b, S, S], computed as for scoring."""
    if config.prototype.foreground == "mask":
        saliency = saliency_masks(list(batch), config.size)
    else:
        device = next(encoder.parameters()).device
        images = normalise(pixels.to(device)).contiguous(memory_format=torch.channels_last)
        logits = forward(encoder.network, images, config.precision).saliency
        saliency = upsample(logits, (config.size, config.size))[:, 0].cpu()
    foreground: NDArray[np.bool_] = foreground_of(saliency, config.prototype).numpy()
    return foreground
