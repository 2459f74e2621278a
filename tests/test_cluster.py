"""Clustering of image vectors: groups that are there, and those that are not."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score

from data_pipeline.errors import InputError
from evaluation.cluster import ClusterConfig, fit_clusters, whitening


def groups(count: int, each: int, dim: int, noise: float) -> tuple[NDArray[np.float32], list[int]]:
    """Unit vectors around `count` axes, interleaved, and the group of each."""
    rng = np.random.default_rng(0)
    truth = [i % count for i in range(count * each)]
    vectors = np.eye(dim)[truth] + noise * rng.normal(size=(len(truth), dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), truth


def cluster_vectors(
    vectors: NDArray[np.float32], clusters: int, config: ClusterConfig, seed: int
) -> NDArray[np.int64]:
    return fit_clusters(vectors, clusters, config, seed).assign(vectors)


def whiten(points: NDArray[np.float64], dimensions: int) -> NDArray[np.float64]:
    mean, directions = whitening(points, dimensions)
    white: NDArray[np.float64] = (points - mean) @ directions
    return white


@pytest.mark.parametrize("method", ["minibatch", "full"])
@pytest.mark.parametrize("pca", [0, 4, 32])
def test_finds_the_groups(method: str, pca: int) -> None:
    vectors, truth = groups(5, 40, 8, 0.03)
    config = ClusterConfig(method=method, pca=pca, starts=5)  # type: ignore[arg-type]
    found = cluster_vectors(vectors, 5, config, 1234)
    assert found.dtype == np.int64
    assert set(found.tolist()) == set(range(5))
    assert adjusted_rand_score(truth, found) == 1 or pca == 32  # noise directions count there too
    assert adjusted_rand_score(truth, found) > 0.5


def test_same_seed_same_clusters() -> None:
    vectors = np.random.default_rng(1).normal(size=(300, 6)).astype(np.float32)
    first = cluster_vectors(vectors, 7, ClusterConfig(), 1234)
    assert first.tolist() == cluster_vectors(vectors, 7, ClusterConfig(), 1234).tolist()
    assert first.tolist() != cluster_vectors(vectors, 7, ClusterConfig(), 1235).tolist()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_no_more_vectors_than_clusters_each_its_own(count: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    assert cluster_vectors(vectors, 5, ClusterConfig(), 0).tolist() == list(range(count))


def test_whitening_is_that_of_scikit_learn() -> None:
    points = np.random.default_rng(0).normal(size=(60, 10)) * np.arange(1, 11)
    white = whiten(points, 4)
    expected = PCA(4, whiten=True).fit_transform(points)
    np.testing.assert_allclose(np.abs(white), np.abs(expected), atol=1e-10)
    np.testing.assert_allclose(white.std(0, ddof=1), 1, atol=1e-10)


def test_directions_without_variance_are_left_out() -> None:
    # 12 points in 20 dimensions span 11; one-hot vectors of 4 classes span 3
    points = np.random.default_rng(0).normal(size=(12, 20))
    assert whiten(points, 32).shape == (12, 11)
    vectors, truth = groups(4, 10, 16, 0.0)
    assert whiten(vectors.astype(np.float64), 32).shape == (40, 3)
    found = cluster_vectors(vectors, 4, ClusterConfig(), 1234)
    assert adjusted_rand_score(truth, found) == 1


@pytest.mark.parametrize("pca", [0, 32])
def test_equal_vectors_are_one_cluster(pca: int, recwarn: pytest.WarningsRecorder) -> None:
    vectors = np.full((30, 8), 8**-0.5, np.float32)
    assert len(set(cluster_vectors(vectors, 4, ClusterConfig(pca=pca), 0).tolist())) == 1
    assert not len(recwarn)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "mean"}, "--method is 'mean'"),
        ({"clusters": -1}, "--clusters"),
        ({"pca": -1}, "--pca"),
        ({"starts": 0}, "--starts"),
        ({"seeds": ()}, "--seeds"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ClusterConfig(**options)  # type: ignore[arg-type]
