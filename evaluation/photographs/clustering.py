"""Groups unlabelled photographs by the embeddings of their objects."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.errors import InputError
from evaluation.cluster import ClusterConfig, Clusters, fit_clusters
from evaluation.image_scores import ImageScores, centre_distances
from evaluation.kmeans import Clustering, assign_images, image_statistics
from evaluation.kmeans_config import KMeansConfig
from evaluation.photographs.images import Photographs
from evaluation.photographs.number_of_clusters import (
    MOST_CLUSTERS,
    Silhouette,
    best_number,
    silhouette_curve,
)
from evaluation.retrieval import Neighbours
from evaluation.statistics import ImageStatistics
from trainer.distributed import Ranks, all_reduce_sum, broadcast_object
from trainer.encoder import Encoder

_log = logging.getLogger(__name__)
_FITTED = 100_000  # vectors that K-means sees; the others take the nearest centre
_NEIGHBOURS = 5
_ROWS = 1024  # images whose similarities to a query are held at a time

# Where no published figure stands beside the result: full K-means and no whitening, which spreads
# what the network learned over directions of noise.
FULL_KMEANS = ClusterConfig(
    method="full", starts=10, pca=0, seeds=(1234,), without_foreground="leave-out"
)


@dataclass(frozen=True)
class PhotographClusters:
    """Clusters of n photographs, the largest first.

    Attributes:
        statistics: of the photographs that could be read; their one class is all pixels.
        assignment: int64 [n], cluster 1…K of each, 0 where no object was found.
        clusters: the K centres.
        curve: silhouettes of the numbers that K was chosen from; empty where it was given.
        unreadable: photographs that were left out.
    """

    statistics: ImageStatistics
    assignment: NDArray[np.int64]
    clusters: Clusters
    curve: tuple[Silhouette, ...]
    unreadable: int

    @property
    def count(self) -> int:
        """K."""
        return len(self.clusters.centres)

    @property
    def images(self) -> NDArray[np.int64]:
        """Photographs of each cluster, [K]."""
        return np.bincount(self.assignment, minlength=self.count + 1)[1:]


def cluster_photographs(
    encoder: Encoder,
    photographs: Photographs,
    config: KMeansConfig,
    ranks: Ranks,
    most: int = MOST_CLUSTERS,
) -> PhotographClusters:
    """Clusters the photographs' objects, the same on every rank; a collective.

    Args:
        encoder: the network.
        photographs: to group.
        config: how; K = 0 takes the number that the silhouettes speak for.
        ranks: that share the work.
        most: clusters that are tried where K is 0.

    Raises:
        InputError: no photograph can be read, or the network finds no object in any.
    """
    config.require(encoder)
    statistics = image_statistics(encoder, photographs, config, ranks)
    lost = torch.tensor(len(photographs.unreadable), device=ranks.device)
    unreadable = int(all_reduce_sum(lost, ranks))
    _require_objects(statistics, photographs, config)
    found: tuple[Clusters, list[Silhouette]] | None = None
    if ranks.is_main:  # one rank clusters, so that libraries cannot make ranks disagree
        found = _fit(statistics.vectors[statistics.found], config.cluster, most)
    agreed = broadcast_object(found, ranks)
    assert agreed is not None
    clusters, curve = agreed
    assignment = assign_images(statistics, clusters)
    return PhotographClusters(statistics, assignment, clusters, tuple(curve), unreadable)


def as_clustering(found: PhotographClusters) -> Clustering:
    """The clusters as the report's pictures take them: each is a class of its own, and right."""
    statistics, clusters = found.statistics, found.clusters
    unknown = np.full(len(found.assignment), np.nan)
    scores = ImageScores(
        statistics.sample_ids,
        found.assignment,
        unknown,
        found.assignment,
        centre_distances(statistics, found.assignment, clusters),
        np.full(found.count + 1, np.nan),
    )
    of_sample = dict(zip(statistics.sample_ids.tolist(), found.assignment.tolist(), strict=True))
    return Clustering(of_sample, np.arange(found.count + 1), clusters, scores)


def nearest_photographs(found: PhotographClusters, queries: int) -> Neighbours | None:
    """Some photographs, evenly spread, with those nearest to them; None of a single one."""
    rows = np.flatnonzero(found.assignment)
    count = min(_NEIGHBOURS, len(rows) - 1)
    if count < 1:
        return None
    asked = rows[np.unique(np.linspace(0, len(rows) - 1, min(queries, len(rows))).astype(int))]
    vectors, numbers = found.statistics.vectors, found.statistics.sample_ids
    near, cosines = [], []
    for query in asked:
        similarity = np.concatenate(
            [vectors[rows[i : i + _ROWS]] @ vectors[query] for i in range(0, len(rows), _ROWS)]
        )
        similarity[rows == query] = -np.inf
        order = np.argsort(-similarity, kind="stable")[:count]
        near.append(rows[order])
        cosines.append(similarity[order])
    return Neighbours(
        queries=numbers[asked],
        bank=numbers[np.array(near)],
        similarity=np.array(cosines, np.float32),
        query_class=found.assignment[asked],
        bank_class=found.assignment[np.array(near)],
    )


def _require_objects(
    statistics: ImageStatistics, photographs: Photographs, config: KMeansConfig
) -> None:
    total, read = len(photographs), len(statistics.vectors)
    if not read:
        raise InputError(
            f"none of the {total:,} photographs of {photographs.samples} can be read; "
            f"{photographs.samples.remedy()}"
        )
    if not statistics.found.any():
        advice = (
            "build the shards with masks that have objects"
            if config.prototype.foreground == "mask"
            else "look at the masks it learned from (`maskbank shards stats SHARDS --html "
            "stats.html`), train longer, or lower --threshold"
        )
        raise InputError(f"no object is found in any of the {read:,} photographs; {advice}")


def _fit(
    vectors: NDArray[np.float32], config: ClusterConfig, most: int
) -> tuple[Clusters, list[Silhouette]]:
    """Centres, that of the most vectors first, and the curve that K was chosen from."""
    seed = config.seeds[0]
    curve = [] if config.clusters else silhouette_curve(vectors, most, seed)
    count = config.clusters or best_number(curve)
    if count > len(vectors):
        _log.warning(
            "only %d photographs have an object: as many clusters instead of %d",
            *(len(vectors), count),
        )
    fitted = vectors
    if len(vectors) > _FITTED:
        chosen = np.random.default_rng(seed).choice(len(vectors), _FITTED, replace=False)
        fitted = vectors[np.sort(chosen)]
    clusters = fit_clusters(fitted, count, config, seed)
    sizes = np.bincount(clusters.assign(vectors), minlength=len(clusters.centres))
    order = np.argsort(-sizes, kind="stable")[: int((sizes > 0).sum())]
    return Clusters(clusters.mean, clusters.directions, clusters.centres[order]), curve
