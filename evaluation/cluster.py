"""Clustering of vectors."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning

from data_pipeline.errors import InputError

Floats = NDArray[np.float64]
WithoutForeground = Literal["zero", "leave-out"]
_NO_VARIANCE = 1e-12  # of float32 vectors of unit length: rounding gives 1e-15
_ROWS = 1 << 16  # vectors whose distances are held at a time


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
        without_foreground: images in which nothing was predicted are zero vectors among the others
            (as published), and so can take a cluster, or they are left out. They are background
            either way.
    """

    clusters: int = 0
    method: Literal["minibatch", "full"] = "minibatch"
    starts: int = 3
    batch_size: int = 1000
    pca: int = 32
    seeds: tuple[int, ...] = (1234, 1235, 1236, 1237, 1238)
    without_foreground: WithoutForeground = "zero"

    def __post_init__(self) -> None:
        if self.method not in ("minibatch", "full"):
            raise InputError(f"--method is {self.method!r}; it can be minibatch or full")
        if self.without_foreground not in ("zero", "leave-out"):
            raise InputError(
                f"--without-foreground is {self.without_foreground!r}; it can be zero or leave-out"
            )
        if min(self.clusters, self.pca) < 0:
            raise InputError("--clusters and --pca must not be negative")
        if min(self.starts, self.batch_size, len(self.seeds)) < 1:
            raise InputError("--starts, --seeds and the batch of K-means must be at least 1")


@dataclass(frozen=True)
class Clusters:
    """Centres, in the space that vectors are moved to before they are compared.

    Attributes:
        mean: float64 [D].
        directions: float64 [D, d], d ≤ D, of the whitened PCA.
        centres: float64 [K, d].
    """

    mean: Floats
    directions: Floats
    centres: Floats

    def assign(self, vectors: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """The nearest centre of each vector [n, D]: int64 [n], the first of equally near ones."""
        nearest = np.empty(len(vectors), np.int64)
        lengths = (self.centres**2).sum(1)
        for first in range(0, len(vectors), _ROWS):
            part = vectors[first : first + _ROWS].astype(np.float64)
            points = (part - self.mean) @ self.directions
            nearest[first : first + _ROWS] = (lengths - 2 * points @ self.centres.T).argmin(1)
        return nearest


def fit_clusters(
    vectors: NDArray[np.float32], clusters: int, config: ClusterConfig, seed: int
) -> Clusters:
    """K-means centres of n vectors [n, D] of unit length, or zero.

    With fewer vectors than clusters each is a centre of its own.
    """
    # float64: in float32 the PCA gives directions without variance one of 1e-8, in a random order
    points = vectors.astype(np.float64)
    dim = points.shape[1]
    if len(points) <= clusters:
        return Clusters(np.zeros(dim), np.eye(dim), points)
    mean, directions = np.zeros(dim), np.eye(dim)
    if config.pca:
        mean, directions = whitening(points, config.pca, seed)
        points = (points - mean) @ directions
    if points.shape[1] == 0:
        return Clusters(mean, directions, np.zeros((1, 0)))
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
        model.fit(points)
    return Clusters(mean, directions, model.cluster_centers_.astype(np.float64))


def whitening(points: Floats, dimensions: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Whitened PCA of points [n, D]: mean [D] and directions [D, ≤ dimensions].

    `(points - mean) @ directions` has columns of variance 1. Directions without variance are left
    out: whitening would blow their rounding errors up to the size of what was learned. So n points
    give n − 1 directions at most, and equal points none.
    """
    dimensions = min(dimensions, *points.shape)
    with np.errstate(invalid="ignore"):  # its share of no variance at all, where points are equal
        model = PCA(dimensions, random_state=seed).fit(points)
    kept = model.explained_variance_ > _NO_VARIANCE
    deviations = np.sqrt(model.explained_variance_[kept])
    return model.mean_, (model.components_[kept] / deviations[:, None]).T
