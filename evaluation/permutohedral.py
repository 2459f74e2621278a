"""Gaussian filtering of values at points of a few dimensions (Adams, Baek and Davis, Fast
High-Dimensional Filtering Using the Permutohedral Lattice, Eurographics 2010)."""

from itertools import combinations
from math import prod

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix, csr_matrix

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


class Permutohedral:
    """The lattice around n points of d dimensions: two sparse matrices and d + 1 blurs.

    Each point lies in a simplex of d + 1 vertices. A point's value is spread over them with its
    barycentric weights (splat), the vertices are blurred with (1, 2, 1) / 4 along each of the d + 1
    directions, and each point gathers from its simplex again (slice). Vertices exist only around
    points; a blur passes over those that do not, as in the published implementation.
    In five dimensions, building it takes up to 1.2 kB a point (noise; photographs half of that).

    Raises:
        OverflowError: the points lie too far apart for vertices to be numbered.
    """

    def __init__(self, points: Float64) -> None:
        """points: [d, n], in standard deviations of the Gaussian."""
        dimensions, count = points.shape
        vertices, places, weights, steps = _vertices(points)
        starts = np.arange(0, places.size + 1, dimensions + 1)
        self._slice = csr_matrix(
            (weights.ravel(), places.ravel(), starts), shape=(count, len(vertices))
        )
        self._splat = self._slice.T.tocsr()
        self._blurs = [_blur(vertices, step) for step in steps]

    @property
    def vertices(self) -> int:
        """Number of vertices; filtering holds two values of each for each column."""
        return int(self._slice.shape[1])

    def scale(self, factors: Float32) -> None:
        """From now on multiply points' values by factors [n] before and after filtering."""
        self._splat.data *= factors[self._splat.indices]
        self._slice.data *= np.repeat(factors, np.diff(self._slice.indptr))

    def filter(self, values: Float32) -> Float32:
        """Values [n, k] filtered: up to a factor, the sums over j of exp(−|pᵢ − pⱼ|² / 2) vⱼ."""
        lattice = self._splat @ values
        for blur in self._blurs:
            lattice = blur @ lattice
        filtered: Float32 = self._slice @ lattice
        return filtered


def _vertices(points: Float64) -> tuple[Int64, Int64, Float32, list[int]]:
    """The lattice's vertices.

    Returns:
        int64 [m]: sorted, a number for each; int64 and float32 [n, d + 1]: which of them each
        point's simplex has, and their weights; what a step along each direction adds to a number.
    """
    nearest, rank, weights = _simplices(points)
    codes, steps = _vertex_codes(nearest, rank)
    del nearest, rank  # sorting the codes is where memory is highest
    vertices, places = np.unique(codes, return_inverse=True)
    return vertices, places, weights, steps


def _simplices(points: Float64) -> tuple[Int64, Int64, Float32]:
    """The simplex that each of n points is in (section 3.1 and appendix).

    Returns:
        nearest: int64 [d + 1, n]; times d + 1 it is the vertex of remainder 0.
        rank: int64 [d + 1, n]; how many coordinates are further above that vertex.
        weights: float32 [n, d + 1], barycentric, of the vertices of remainder 0…d.
    """
    elevated = _elevate(points)
    size, count = elevated.shape
    nearest = np.rint(elevated / size).astype(np.int64)
    rest = elevated - nearest * size
    rank = np.zeros((size, count), np.int64)
    for one, other in combinations(range(size), 2):
        behind = rest[one] < rest[other]
        rank[one] += behind
        rank[other] += ~behind
    # rounding may have left the plane of sum 0: those that were rounded furthest go back
    rank += nearest.sum(0)
    low, high = rank < 0, rank >= size
    nearest += low.astype(np.int64) - high
    rank += size * (low.astype(np.int64) - high)
    ordered = np.empty((size, count))
    np.put_along_axis(ordered, rank, elevated / size - nearest, 0)
    weights = np.empty((count, size), np.float32)
    weights[:, 0] = 1 + ordered[-1] - ordered[0]
    weights[:, 1:] = (ordered[:-1] - ordered[1:])[::-1].T
    return nearest, rank, weights


def _elevate(points: Float64) -> Float64:
    """Points [d, n] on the plane of sum 0 in d + 1 dimensions, so that blurring has variance 1."""
    dimensions, count = points.shape
    deviation = np.sqrt(2 / 3) * (dimensions + 1)
    elevated = np.zeros((dimensions + 1, count))
    for i in range(dimensions, 0, -1):
        scaled = points[i - 1] * (deviation / np.sqrt(i * (i + 1)))
        elevated[:i] += scaled
        elevated[i] -= i * scaled
    return elevated


def _vertex_codes(nearest: Int64, rank: Int64) -> tuple[Int64, list[int]]:
    """A number for each simplex's vertices, and what one step along each direction adds to it.

    A vertex has d + 1 coordinates of sum 0 that are equal modulo d + 1. So the first, and how many
    times d + 1 each but the last is above it, are a vertex; a step changes each by a constant.

    Returns:
        int64 [n, d + 1]; d + 1 steps.
    """
    size, count = nearest.shape
    above = nearest[1:-1] - nearest[0]
    # a margin of what the other vertices and one step add, so that no step wraps around
    lowest = [int(nearest[0].min()) * size - 2 * size, *(above.min(1) - 2).tolist()]
    highest = [int(nearest[0].max()) * size + 2 * size, *(above.max(1) + 2).tolist()]
    ranges = [high - low + 1 for low, high in zip(lowest, highest, strict=True)]
    if prod(ranges) >= 2**63:
        raise OverflowError("the points lie too far apart for the lattice")
    strides = [prod(ranges[i + 1 :]) for i in range(len(ranges))]
    codes = np.empty((count, size), np.int64)
    for k in range(size):
        back = (rank >= size - k).astype(np.int64)
        code = (nearest[0] * size + k - size * back[0] - lowest[0]) * strides[0]
        for i in range(1, size - 1):
            code += (above[i - 1] - back[i] + back[0] - lowest[i]) * strides[i]
        codes[:, k] = code
    first = sum(strides[1:]) - (size - 1) * strides[0]
    return codes, [first, *(strides[0] - stride for stride in strides[1:]), strides[0]]


def _blur(vertices: Int64, step: int) -> csr_matrix:
    """(1, 2, 1) / 4 along one direction, float32 [vertices, vertices]; vertices are sorted."""
    count = len(vertices)
    after = np.minimum(np.searchsorted(vertices, vertices + step), count - 1)
    before = np.flatnonzero(vertices[after] == vertices + step)
    after = after[before]
    here = np.arange(count)
    weights = np.full(count + 2 * len(before), 0.25, np.float32)
    weights[:count] = 0.5
    rows, columns = np.concatenate([here, before, after]), np.concatenate([here, after, before])
    return coo_matrix((weights, (rows, columns)), shape=(count, count)).tocsr()
