"""K-means evaluation (MaskContrast, section 4.2): one vector an image, clusters matched to classes.

A pixel's prediction is its image's cluster inside the predicted foreground and 0 outside. So an
image adds its class counts inside to its cluster's column and those outside to column 0: beside
its vector, two rows of counts are all that is kept of it, for any number of clusterings.
"""

import logging
import time
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.errors import InputError
from data_pipeline.manifest import Manifest
from data_pipeline.whole_images import WholeImage, resize_nearest
from evaluation.cluster import ClusterConfig, cluster_vectors
from evaluation.features import (
    open_labelled,
    own_batches,
    precision,
    require_pixels,
    require_precision,
)
from evaluation.matching import Criterion, match_clusters, merge_columns
from evaluation.miou import Counts, confusion, foreground_iou, score
from evaluation.prototypes import PrototypeConfig, image_prototypes
from evaluation.result import Result
from trainer.distributed import Ranks, all_gather_rows, broadcast_object, gather_counts
from trainer.encoder import Encoder

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KMeansConfig:
    """The protocol; the defaults are the published ones.

    Attributes:
        size: side that images are resized to, pixels.
        prototype: how an image's vector is taken.
        cluster: how vectors are clustered.
        criterion: of the matching.
        many_to_one: every cluster takes its best class (over-clustering), instead of one cluster
            a class.
        batch_size: images a forward pass.
        precision: float32 or bf16.
    """

    size: int = 512
    prototype: PrototypeConfig = field(default_factory=PrototypeConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    criterion: Criterion = "iou"
    many_to_one: bool = False
    batch_size: int = 16
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.criterion not in ("iou", "count"):
            raise InputError(f"--criterion is {self.criterion!r}; it can be iou or count")
        if min(self.size, self.batch_size) < 1:
            raise InputError("--size and --batch-size must be at least 1")
        require_precision(self.precision)


@dataclass(frozen=True)
class ImageStatistics:
    """What K-means needs of every image.

    Attributes:
        vectors: float32 [n, D], unit length; zero where nothing was predicted.
        inside, outside: int64 [n, C], pixels of each true class in and out of the foreground.
        sample_ids: int64 [n].
    """

    vectors: NDArray[np.float32]
    inside: Counts
    outside: Counts
    sample_ids: NDArray[np.int64]


@dataclass(frozen=True)
class Clustering:
    """The first seed's clusters: cluster of each sample id, and class of each cluster."""

    cluster_of_sample: dict[int, int]
    class_of_cluster: NDArray[np.int64]


def evaluate_kmeans(
    encoder: Encoder,
    manifest: Manifest,
    config: KMeansConfig,
    ranks: Ranks,
    network: str = "trained",
    threads: int = 2,
) -> tuple[Result, Clustering]:
    """K-means mIoU on labelled shards; the same on every rank.

    And for any number of ranks, but for the network's rounding, where that depends on the batch.
    """
    start = time.monotonic()
    statistics = collect_statistics(encoder, manifest, config, ranks, threads)
    require_pixels(_binary(statistics), manifest)
    clusters = config.cluster.clusters or len(manifest.classes) - 1
    # one rank clusters, so that threads and library versions cannot make ranks disagree
    assignments = None
    if ranks.is_main:
        _warn_if_few(statistics, clusters, config.cluster.pca)
        assignments = [_assign(statistics, clusters, config, s) for s in config.cluster.seeds]
    scores, matrices, clustering = [], [], None
    for assignment in broadcast_object(assignments, ranks) or []:
        by_cluster = _cluster_confusion(statistics, assignment, clusters)
        match = match_clusters(by_cluster, config.criterion, config.many_to_one)
        matrices.append(merge_columns(by_cluster, match))
        scores.append(score(matrices[-1]))
        if clustering is None:
            found = dict(zip(statistics.sample_ids.tolist(), assignment.tolist(), strict=True))
            clustering = Clustering(found, match)
    assert clustering is not None
    empty = int((np.abs(statistics.vectors).sum(1) == 0).sum())
    result = Result(
        "kmeans",
        network,
        encoder.step,
        tuple(one.miou for one in scores),
        scores[0].iou,
        matrices[0],
        foreground_iou(_binary(statistics)),
        scores[0].pixel_accuracy,
        manifest.classes,
        len(statistics.vectors),
        time.monotonic() - start,
        {**asdict(config), "images_without_foreground": empty},
    )
    return result, clustering


@torch.inference_mode()
def collect_statistics(
    encoder: Encoder, manifest: Manifest, config: KMeansConfig, ranks: Ranks, threads: int
) -> ImageStatistics:
    """Vectors and counts of all images, on every rank, by sample id; a collective."""
    images = open_labelled(manifest, config.size, threads)
    encoder.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    vectors, counts, numbers = [], [], []
    for batch, pixels in own_batches(images, config.batch_size, ranks, "embedding"):
        with precision(config.precision, ranks.device):
            embeddings, saliency = encoder.embed(pixels)
        prototypes, foreground = image_prototypes(embeddings, saliency, config.prototype)
        for image, one in zip(batch, foreground.cpu(), strict=True):
            counts.append(_class_counts(image, one, len(manifest.classes)))
            numbers.append(image.sample_id)
        vectors.append(prototypes.cpu())
    dim = encoder.network.config.embedding_dim
    mine = torch.cat(vectors) if vectors else torch.zeros(0, dim)
    tables = torch.from_numpy(np.array(counts, np.int64).reshape(-1, 2, len(manifest.classes)))
    held = gather_counts(len(numbers), ranks)
    on_device = (mine, tables, torch.tensor(numbers, dtype=torch.int64))
    gathered = [all_gather_rows(part.to(ranks.device), held, ranks).cpu() for part in on_device]
    order = gathered[2].argsort()
    all_vectors, all_tables, all_numbers = (part[order].numpy() for part in gathered)
    return ImageStatistics(all_vectors, all_tables[:, 1], all_tables[:, 0], all_numbers)


def _class_counts(image: WholeImage, foreground: torch.Tensor, classes: int) -> Counts:
    """int64 [2, C]: pixels of each true class outside and inside, at original resolution."""
    height, width = image.label.shape
    prediction = resize_nearest(foreground.to(torch.uint8), (height, width)).numpy()
    return np.ascontiguousarray(confusion(image.label, prediction, classes, 2).T)


def _warn_if_few(statistics: ImageStatistics, clusters: int, pca: int) -> None:
    found = int(np.abs(statistics.vectors).sum(1).astype(bool).sum())
    directions = min(pca, statistics.vectors.shape[1])
    if clusters < found <= 2 * directions:
        _log.warning(
            "%d images with foreground are few for %d whitened directions, in which they are all "
            "about equally far apart: clusters are near to chance; use fewer (--pca) or none "
            "(--pca 0)",
            found,
            directions,
        )


def _assign(
    statistics: ImageStatistics, clusters: int, config: KMeansConfig, seed: int
) -> NDArray[np.int64]:
    """Cluster 1…K of each image, 0 where nothing was predicted: int64 [n]."""
    assignment = np.zeros(len(statistics.vectors), np.int64)
    found = np.abs(statistics.vectors).sum(1) > 0
    if found.any():
        vectors = statistics.vectors[found]
        assignment[found] = 1 + cluster_vectors(vectors, clusters, config.cluster, seed)
    return assignment


def _cluster_confusion(
    statistics: ImageStatistics, assignment: NDArray[np.int64], clusters: int
) -> Counts:
    """int64 [C, K + 1]: pixels of each true class in each cluster; column 0 is background."""
    matrix = np.zeros((clusters + 1, statistics.inside.shape[1]), np.int64)
    np.add.at(matrix, assignment, statistics.inside)
    matrix[0] += statistics.outside.sum(0)
    return np.ascontiguousarray(matrix.T)


def _binary(statistics: ImageStatistics) -> Counts:
    return np.stack([statistics.outside.sum(0), statistics.inside.sum(0)], 1)
