"""K-means evaluation (MaskContrast, section 4.2): clusters matched to classes."""

import logging
import time
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.labelled import LabelledSet
from data_pipeline.whole_images import WholeImages
from evaluation.cluster import ClusterConfig, Clusters, fit_clusters
from evaluation.features import require_pixels
from evaluation.image_scores import ImageScores, score_images
from evaluation.kmeans_config import KMeansConfig
from evaluation.matching import match_clusters, merge_columns
from evaluation.miou import foreground_iou, score
from evaluation.pixel_kmeans import cluster_pixels
from evaluation.result import Result
from evaluation.statistics import ImageStatistics, collect_statistics
from trainer.distributed import Ranks, broadcast_object
from trainer.encoder import Encoder

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clustering:
    """The first seed's clusters.

    Attributes:
        cluster_of_sample: of foregrounds, the cluster 1…K of each sample id, 0 where nothing was
            predicted; of pixels empty.
        class_of_cluster: int64, -1 for none. Of foregrounds [K + 1], where 0 is everything outside
            and centre i belongs to i + 1; of pixels [K].
        clusters: the centres.
        scores: of each image, for pictures; None of pixels.
    """

    cluster_of_sample: dict[int, int]
    class_of_cluster: NDArray[np.int64]
    clusters: Clusters
    scores: ImageScores | None = None


def evaluate_kmeans(
    encoder: Encoder,
    samples: LabelledSet,
    config: KMeansConfig,
    ranks: Ranks,
    network: str = "trained",
    threads: int = 2,
    statistics: ImageStatistics | None = None,
    fit_samples: LabelledSet | None = None,
) -> tuple[Result, Clustering]:
    """K-means mIoU on labelled images; the same on every rank.

    And for any number of ranks, but for the network's rounding, where that depends on the batch.

    Args:
        encoder: the network.
        samples: to score on.
        config: the protocol.
        ranks: that share the work.
        network: its name in the result.
        threads: that read images.
        statistics: of these images (`image_statistics`), where they are known already.
        fit_samples: that centres of pixels are fitted on, where `config.fit_on` says so.
    """
    start = time.monotonic()
    config.require(encoder)
    images = WholeImages(samples, config.size, threads, config.resize)
    clusters = config.cluster.clusters or len(samples.classes) - 1
    cluster_of_sample: dict[int, int] = {}
    image_scores = None
    if config.unit == "pixel":
        found, matrices = cluster_pixels(encoder, images, config, clusters, ranks, fit_samples)
        matches = [match_clusters(m, config.criterion, config.many_to_one) for m in matrices]
        binary, empty = None, 0
    else:
        statistics = statistics or image_statistics(encoder, images, config, ranks)
        require_pixels(statistics.binary(), samples)
        found = cluster_images(statistics, clusters, config.cluster, ranks)
        if config.many_to_one and ranks.is_main:
            _warn_of_own_clusters(statistics, clusters)
        assignments = [assign_images(statistics, one) for one in found]
        matrices = [statistics.confusion(one, clusters + 1) for one in assignments]
        matches = [
            match_clusters(
                *(matrix, config.criterion, config.many_to_one),
                statistics.images_together(assignment, clusters + 1),
            )
            for matrix, assignment in zip(matrices, assignments, strict=True)
        ]
        numbers = zip(statistics.sample_ids.tolist(), assignments[0].tolist(), strict=True)
        cluster_of_sample = dict(numbers)
        image_scores = score_images(statistics, assignments[0], found[0], matches[0], matrices[0])
        binary, empty = statistics.binary(), int((~statistics.found).sum())
    merged = [merge_columns(one, match) for one, match in zip(matrices, matches, strict=True)]
    scores = [score(one, config.mean) for one in merged]
    result = Result(
        protocol="kmeans",
        network=network,
        step=encoder.step,
        values=tuple(one.miou for one in scores),
        iou=scores[0].iou,
        confusion=merged[0],
        foreground_iou=foreground_iou(merged[0] if binary is None else binary),
        pixel_accuracy=scores[0].pixel_accuracy,
        classes=samples.classes,
        images=len(samples),
        seconds=time.monotonic() - start,
        options={**asdict(config), "images_without_foreground": empty},
        metrics={"pixel accuracy": tuple(one.pixel_accuracy for one in scores)},
    )
    return result, Clustering(cluster_of_sample, matches[0], found[0], image_scores)


def image_statistics(
    encoder: Encoder, images: WholeImages, config: KMeansConfig, ranks: Ranks
) -> ImageStatistics:
    """What all clusterings of these images need; a collective."""
    return collect_statistics(
        *(encoder, images, config.prototype, ranks, config.batch_size, config.precision),
        resolution=config.resolution,
    )


def cluster_images(
    statistics: ImageStatistics, clusters: int, config: ClusterConfig, ranks: Ranks
) -> list[Clusters]:
    """One clustering a seed, the same on every rank; a collective.

    `config.without_foreground` says whether images without a foreground take part.
    """
    found = None
    # one rank clusters, so that threads and library versions cannot make ranks disagree
    if ranks.is_main:
        vectors = statistics.vectors
        if config.without_foreground == "leave-out":
            vectors = vectors[statistics.found]
        _warn_if_few(vectors, clusters, config.pca)
        found = [fit_clusters(vectors, clusters, config, seed) for seed in config.seeds]
    return broadcast_object(found, ranks) or []


def assign_images(statistics: ImageStatistics, clusters: Clusters) -> NDArray[np.int64]:
    """Cluster 1…K of each image, 0 where nothing was predicted: int64 [n]."""
    assignment = np.zeros(len(statistics.vectors), np.int64)
    if statistics.found.any():
        assignment[statistics.found] = 1 + clusters.assign(statistics.vectors[statistics.found])
    return assignment


def _warn_if_few(vectors: NDArray[np.float32], clusters: int, pca: int) -> None:
    directions = min(pca, vectors.shape[1])
    if clusters < len(vectors) <= 2 * directions:
        _log.warning(
            "%d images are few for %d whitened directions, in which they are all about equally far "
            "apart: clusters are near to chance; use fewer (--pca) or none (--pca 0)",
            *(len(vectors), directions),
        )


def _warn_of_own_clusters(statistics: ImageStatistics, clusters: int) -> None:
    count = int(statistics.found.sum())
    if clusters >= count:
        _log.warning(
            "%d clusters are enough for each of %d images to be one of its own, which the labels "
            "then name: the figure is that of the foreground, not of the embeddings",
            *(clusters, count),
        )
