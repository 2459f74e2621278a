"""Clustering of image vectors."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning

from data_pipeline.errors import InputError

_NO_VARIANCE = 1e-12  # of float32 vectors of unit length: rounding gives 1e-15


@dataclass(frozen=True)
class ClusterConfig:
    """How vectors are clustered.

    Attributes:
        clusters: K; 0 takes the number of classes without background.
        method: minibatch (as published) or full K-means.
        starts: K-means runs of which the best is kept.
        batch_size: of mini-batch K-means.
        pca: dimensions after whitened PCA; 0 does none.
        seeds: one clustering each.
    """

    clusters: int = 0
    method: Literal["minibatch", "full"] = "minibatch"
    starts: int = 3
    batch_size: int = 1000
    pca: int = 32
    seeds: tuple[int, ...] = (1234, 1235, 1236, 1237, 1238)

    def __post_init__(self) -> None:
        if self.method not in ("minibatch", "full"):
            raise InputError(f"--method is {self.method!r}; it can be minibatch or full")
        if min(self.clusters, self.pca) < 0:
            raise InputError("--clusters and --pca must not be negative")
        if min(self.starts, self.batch_size, len(self.seeds)) < 1:
            raise InputError("--starts, --seeds and the batch of K-means must be at least 1")


def cluster_vectors(
    vectors: NDArray[np.float32], clusters: int, config: ClusterConfig, seed: int
) -> NDArray[np.int64]:
    """Cluster of each of n vectors [n, D] of unit length: int64 [n] in 0…clusters − 1.

    With fewer vectors than clusters each is a cluster of its own.
    """
    if len(vectors) <= clusters:
        return np.arange(len(vectors), dtype=np.int64)
    # float64: in float32 the PCA gives directions without variance one of 1e-8, in a random order
    points = vectors.astype(np.float64)
    if config.pca:
        points = whiten(points, config.pca, seed)
    if points.shape[1] == 0:
        return np.zeros(len(vectors), np.int64)
    model: Any
    if config.method == "full":
        model = KMeans(clusters, n_init=config.starts, random_state=seed)
    else:
        model = MiniBatchKMeans(
            clusters, batch_size=config.batch_size, n_init=config.starts, random_state=seed
        )
    with warnings.catch_warnings():
        # fewer distinct vectors than clusters, as of a network that gives all images one vector
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels: NDArray[np.int64] = model.fit_predict(points).astype(np.int64)
    return labels


def whiten(points: NDArray[np.float64], dimensions: int, seed: int = 0) -> NDArray[np.float64]:
    """Whitened PCA of points [n, D]: [n, ≤ dimensions], each column of variance 1.

    Directions without variance are left out: whitening would blow their rounding errors up to the
    size of what was learned. So n points give n − 1 columns at most, and equal points none.
    """
    dimensions = min(dimensions, *points.shape)
    with np.errstate(invalid="ignore"):  # its share of no variance at all, where points are equal
        model = PCA(dimensions, random_state=seed).fit(points)
    kept = model.explained_variance_ > _NO_VARIANCE
    projected = model.transform(points)[:, kept]
    white: NDArray[np.float64] = projected / np.sqrt(model.explained_variance_[kept])
    return white
