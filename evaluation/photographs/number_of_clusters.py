"""How many clusters there are, where nobody knows: the silhouette of every number up to a limit."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import pairwise_distances, silhouette_samples

MOST_CLUSTERS = 30
_SAMPLE = 4000  # vectors that speak for all: their distances are a matrix
_STARTS = 3


@dataclass(frozen=True)
class Silhouette:
    """How well separated K clusters are (Rousseeuw 1987).

    Attributes:
        clusters: K.
        mean: of all vectors, −1 to 1: how much nearer a vector is to its own cluster than to the
            next one.
        error: standard error of the mean.
    """

    clusters: int
    mean: float
    error: float


def silhouette_curve(
    vectors: NDArray[np.floating[Any]], most: int = MOST_CLUSTERS, seed: int = 0
) -> list[Silhouette]:
    """The silhouette of 2 to `most` clusters of vectors [n, D]; empty below three vectors.

    Numbers that the vectors cannot fill, as where many are equal, are left out.
    """
    points = _sample(vectors, seed).astype(np.float64)
    if len(points) < 3:
        return []
    distances = pairwise_distances(points)
    curve = []
    for clusters in range(2, min(most, len(points) - 1) + 1):
        model = KMeans(clusters, n_init=_STARTS, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct vectors than K
            labels = model.fit_predict(points)
        if len(np.unique(labels)) == clusters:
            values = silhouette_samples(distances, labels, metric="precomputed")
            error = values.std(ddof=1) / np.sqrt(len(values))
            curve.append(Silhouette(clusters, float(values.mean()), float(error)))
    return curve


def best_number(curve: list[Silhouette]) -> int:
    """The smallest K whose silhouette is within one standard error of the best; 1 of no curve."""
    if not curve:
        return 1
    best = max(curve, key=lambda one: one.mean)
    return next(one.clusters for one in curve if one.mean >= best.mean - best.error)


def _sample(vectors: NDArray[np.floating[Any]], seed: int) -> NDArray[np.floating[Any]]:
    if len(vectors) <= _SAMPLE:
        return vectors
    chosen = np.random.default_rng(seed).choice(len(vectors), _SAMPLE, replace=False)
    return vectors[np.sort(chosen)]
