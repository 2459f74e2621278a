"""The fully connected CRF: against a dense one in float64, by hand, at the edges of its input."""

import tracemalloc
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

import evaluation.crf
from data_pipeline.errors import InputError
from evaluation.crf import CrfConfig, refine
from evaluation.permutohedral import Permutohedral, _simplices

NOTHING = CrfConfig(gaussian_weight=0, bilateral_weight=0)
GAUSSIAN = CrfConfig(bilateral_weight=0)
BILATERAL = CrfConfig(gaussian_weight=0)


def _probabilities(classes: int, height: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    """Blobs and noise: [C, H, W]."""
    generator = np.random.default_rng(seed)
    coarse = generator.normal(size=(classes, height // 4 + 1, width // 4 + 1))
    logits = 2 * coarse.repeat(4, 1).repeat(4, 2)[:, :height, :width]
    scores = np.exp(logits + generator.normal(size=(classes, height, width)))
    return (scores / scores.sum(0)).astype(np.float32)


def _photo(height: int, width: int, seed: int = 0, noise: float = 3.0) -> NDArray[np.uint8]:
    """Slopes of colour with an edge between two objects, and noise: uint8 [H, W, 3]."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([60 + x, 90 + y, 120 + (x + y) / 2], 2) + 70 * (x > 0.6 * width)[..., None]
    return (slopes + generator.normal(0, noise, slopes.shape)).clip(0, 255).astype(np.uint8)


def _features(image: NDArray[np.uint8], sigma: float, colour: float | None) -> NDArray[np.float64]:
    """Points [d, H·W] in standard deviations: position, and colour unless it is None."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float64) / sigma
    colours = [] if colour is None else list(image.reshape(-1, 3).T / colour)
    return np.stack([x.ravel(), y.ravel(), *colours])


def _dense_gaussian(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The kernel matrix [n, n] of points [d, n]."""
    kernel: NDArray[np.float64] = np.exp(-0.5 * cdist(points.T, points.T, "sqeuclidean"))
    return kernel


def _lattice_gaussian(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The kernel matrix that the lattice stands for, [n, n]."""
    return Permutohedral(points).filter(np.eye(points.shape[1], dtype=np.float32)).astype(float)


def _dense_refine(
    image: NDArray[np.uint8],
    probabilities: NDArray[np.float32],
    config: CrfConfig,
    bilateral: Any = _dense_gaussian,
) -> NDArray[np.float64]:
    """Mean field with matrices of pixels × pixels, float64 (algorithm 1, with Potts)."""
    kernel: Any = 0
    for weight, points, gaussian in (
        (config.gaussian_weight, _features(image, config.gaussian_sigma, None), _dense_gaussian),
        (
            config.bilateral_weight,
            _features(image, config.bilateral_sigma, config.colour_sigma),
            bilateral,
        ),
    ):
        matrix = gaussian(points)
        norm = matrix.sum(1) ** -0.5
        kernel = kernel + weight * norm[:, None] * matrix * norm
    unary = np.log(np.clip(probabilities.reshape(len(probabilities), -1), 1e-5, 1, dtype=float))
    beliefs = np.exp(unary) / np.exp(unary).sum(0)
    for _ in range(config.iterations):
        # Potts: whatever others say for another class counts against this one
        against = (beliefs.sum(0) - beliefs) @ kernel.T
        scores = np.exp(unary - against + against.min(0))
        beliefs = scores / scores.sum(0)
    return beliefs.reshape(probabilities.shape)


def test_the_gaussian_kernel_is_that_of_a_dense_mean_field() -> None:
    image, given = _photo(23, 31), _probabilities(4, 23, 31)
    for config in (GAUSSIAN, CrfConfig(bilateral_weight=0, gaussian_sigma=2.5, gaussian_weight=1)):
        np.testing.assert_allclose(
            refine(image, given, config), _dense_refine(image, given, config), atol=1e-5
        )


def test_mean_field_with_both_kernels_is_dense_mean_field_over_the_lattices_kernel() -> None:
    image, given = _photo(20, 26), _probabilities(5, 20, 26)
    expected = _dense_refine(image, given, CrfConfig(), _lattice_gaussian)
    np.testing.assert_allclose(refine(image, given), expected, atol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 3.0, 12.0])
def test_the_lattices_approximation_changes_little(noise: float) -> None:
    image, given = _photo(40, 30, noise=noise), _probabilities(3, 40, 30)
    refined, exact = refine(image, given), _dense_refine(image, given, CrfConfig())
    # measured: 97.3% to 97.5%, and 0.016 to 0.019
    assert (refined.argmax(0) == exact.argmax(0)).mean() > 0.965
    assert np.abs(refined - exact).mean() < 0.022
    assert (given.argmax(0) != exact.argmax(0)).mean() > 0.1  # there was something to change


def test_bilateral_mean_field_gives_what_the_published_implementation_gives() -> None:
    y, x = np.mgrid[:4, :5]
    image = np.stack([40 * (x > 2) + y * x, 3 * x + 2 * y, 7 * y], 2).astype(np.uint8)
    second = ((7 * y + 3 * x) % 11 + 0.5) / 12
    given = np.stack([1 - second, second]).astype(np.float32)
    config = CrfConfig(4, 0, 1, bilateral_weight=2.5, bilateral_sigma=3, colour_sigma=5)
    # pydensecrf2 1.1: addPairwiseBilateral(sxy=3, srgb=5, compat=2.5), inference(4), class 1
    expected = [
        [0.00786, 0.09407, 0.28600, 0.79921, 0.08096],
        [0.50874, 0.83399, 0.16151, 0.38830, 0.66855],
        [0.32321, 0.61005, 0.85482, 0.02916, 0.09892],
        [0.91960, 0.21388, 0.44445, 0.39523, 0.00730],
    ]
    np.testing.assert_allclose(refine(image, given, config)[1], expected, atol=2e-5)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 5])
def test_a_point_is_the_weighted_mean_of_its_simplexs_vertices(dimensions: int) -> None:
    points = np.random.default_rng(0).normal(0, 3, (dimensions, 500))
    nearest, rank, weights = _simplices(points)
    size = dimensions + 1
    assert (nearest.sum(0) == 0).all()
    assert (np.sort(rank, 0) == np.arange(size)[:, None]).all()
    assert weights.min() > -1e-6
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    k = np.arange(size)[:, None, None]
    vertices = nearest * size + k - size * (rank >= size - k)  # [vertex, coordinate, point]
    elevated = (weights.T[:, None] * vertices).sum(0)
    assert np.abs(elevated.sum(0)).max() < 1e-4
    # elevation turns and scales: distances are those of the points, times that of one deviation
    distance = np.linalg.norm(elevated[:, 1:] - elevated[:, :-1], axis=0)
    steps = np.linalg.norm(points[:, 1:] - points[:, :-1], axis=0)
    np.testing.assert_allclose(distance, steps * size * np.sqrt(2 / 3), rtol=1e-3)


@pytest.mark.parametrize("line", [0.0, 1.0])
@pytest.mark.parametrize("dimensions", [1, 2, 3, 5])
def test_the_lattice_filters_as_one_that_looks_its_neighbours_up(
    dimensions: int, line: float
) -> None:
    generator = np.random.default_rng(1)
    points = generator.normal(0, 1 - 0.9 * line, (dimensions, 60))
    # along this line a vertex's first coordinate stays; its ends must not become neighbours
    points[:2] += line * generator.uniform(-3, 3, 60) * np.array([[1], [-(3**0.5)]])[:dimensions]
    values = generator.random((60, 2), np.float32)
    nearest, rank, weights = _simplices(points)
    size = dimensions + 1
    corners = {
        (i, k): tuple(nearest[:, i] * size + k - size * (rank[:, i] >= size - k))
        for i in range(60)
        for k in range(size)
    }
    lattice = {vertex: np.zeros(2) for vertex in corners.values()}
    for (i, k), vertex in corners.items():
        lattice[vertex] += weights[i, k] * values[i]
    for direction in np.eye(size, dtype=int):
        step = 1 - size * direction
        lattice = {
            vertex: value / 2
            + sum(lattice.get(tuple(np.add(vertex, s)), np.zeros(2)) for s in (step, -step)) / 4
            for vertex, value in lattice.items()
        }
    expected = [sum(weights[i, k] * lattice[corners[i, k]] for k in range(size)) for i in range(60)]
    found = Permutohedral(points)
    assert found.vertices == len(lattice)
    np.testing.assert_allclose(found.filter(values), expected, rtol=1e-5, atol=1e-7)


def test_without_pairwise_weight_the_input_comes_back() -> None:
    given = _probabilities(4, 7, 9)
    np.testing.assert_allclose(refine(_photo(7, 9), given, NOTHING), given, atol=1e-5)


@pytest.mark.parametrize("config", [GAUSSIAN, BILATERAL, CrfConfig()])
def test_a_lone_wrong_pixel_of_an_even_region_is_corrected(config: CrfConfig) -> None:
    given = np.full((2, 15, 21), 0.1, np.float32)
    given[0] = 0.9
    given[:, 7, 10] = 0.2, 0.8
    refined = refine(np.full((15, 21, 3), 128, np.uint8), given, config)
    assert (refined.argmax(0) == 0).all()
    assert refined[0, 7, 10] > 0.75


def test_an_edge_of_the_image_stops_the_smoothing() -> None:
    image = np.full((16, 24, 3), 60, np.uint8)
    image[:, 12:] = 200
    given = np.full((2, 16, 24), 0.5, np.float32)
    given[0, :, :15], given[1, :, :15] = 0.7, 0.3  # three columns over the edge
    given[0, :, 15:], given[1, :, 15:] = 0.1, 0.9
    refined = refine(image, given).argmax(0)
    assert (refined == (np.arange(24) >= 12)).all()
    without_edge = refine(np.full_like(image, 60), given).argmax(0)
    assert (without_edge[:, 12:15] == without_edge[:, :1]).all()


def test_far_pixels_of_equal_colour_speak_to_each_other_and_of_other_colours_do_not() -> None:
    image = np.full((3, 40, 3), 20, np.uint8)
    image[:, 10:30] = 220
    given = np.full((2, 3, 40), 0.5, np.float32)
    given[:, :, :5] = np.array([0.95, 0.05], np.float32)[:, None, None]
    refined = refine(image, given, BILATERAL)
    assert (refined[0, :, 30:] > 0.9).all()
    np.testing.assert_allclose(refined[0, :, 10:30], 0.5, atol=1e-3)


def test_every_run_gives_the_same_bits_and_leaves_its_arguments() -> None:
    image, given = _photo(33, 47), _probabilities(6, 33, 47)
    kept = image.copy(), given.copy()
    first = refine(image, given)
    assert first.dtype == np.float32
    assert first.tobytes() == refine(image.copy(), given.copy()).tobytes()
    assert (image == kept[0]).all()
    assert (given == kept[1]).all()


def test_classes_in_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    image, given = _photo(17, 29), _probabilities(7, 17, 29)
    whole = refine(image, given)
    monkeypatch.setattr(evaluation.crf, "_BLOCK_BYTES", 1)
    np.testing.assert_allclose(refine(image, given), whole, atol=1e-6)


def test_memory_does_not_grow_with_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    image = _photo(24, 32)
    monkeypatch.setattr(evaluation.crf, "_BLOCK_BYTES", 2**16)
    beyond = []
    for classes in (46, 920):
        given = _probabilities(classes, 24, 32)
        tracemalloc.start()
        result = refine(image, given, CrfConfig(iterations=1))
        beyond.append(tracemalloc.get_traced_memory()[1] - result.nbytes)
        tracemalloc.stop()
    assert beyond[1] < 1.1 * beyond[0] + 2**16


@pytest.mark.parametrize(
    ("classes", "height", "width"), [(1, 5, 7), (3, 1, 1), (1, 1, 1), (2, 1, 30), (3, 30, 1)]
)
def test_small_inputs(classes: int, height: int, width: int) -> None:
    image, given = _photo(height, width), _probabilities(classes, height, width)
    refined = refine(image, given)
    np.testing.assert_allclose(refined.sum(0), 1, atol=1e-5)
    if classes == 1:
        np.testing.assert_array_equal(refined, 1)
    expected = _dense_refine(image, given, CrfConfig(), _lattice_gaussian)
    np.testing.assert_allclose(refined, expected, atol=1e-4)


def test_one_pixel_strengthens_itself() -> None:
    given = np.array([0.6, 0.4], np.float32).reshape(2, 1, 1)
    image = np.zeros((1, 1, 3), np.uint8)
    # one iteration: log-odds log(.6/.4) + (3 + 4)·(.6 − .4)
    odds = 1.5 * np.exp(7 * 0.2)
    once = refine(image, given, CrfConfig(iterations=1))
    np.testing.assert_allclose(once[:, 0, 0], [odds / (1 + odds), 1 / (1 + odds)], atol=1e-5)


def test_zeros_and_ones_stay_finite_and_can_be_corrected() -> None:
    given = np.zeros((3, 12, 12), np.float32)
    given[0] = 1
    given[:, 6, 6] = 0, 1, 0
    refined = refine(np.full((12, 12, 3), 255, np.uint8), given, CrfConfig(gaussian_weight=30))
    assert np.isfinite(refined).all()
    np.testing.assert_allclose(refined.sum(0), 1, atol=1e-5)
    assert (refined.argmax(0) == 0).all()


def test_a_constant_image_and_the_largest_weights() -> None:
    given = _probabilities(4, 9, 20)
    image = np.zeros((9, 20, 3), np.uint8)
    for config in (CrfConfig(), CrfConfig(gaussian_weight=1e6, bilateral_weight=1e6)):
        refined = refine(image, given, config)
        assert np.isfinite(refined).all()
        np.testing.assert_allclose(refined.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize("name", [field.name for field in fields(CrfConfig)])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_wrong_settings_are_refused_by_their_option(name: str, value: float) -> None:
    if name == "iterations" and value != -1:
        return
    with pytest.raises(InputError, match=f"{name} of the CRF is "):
        CrfConfig(**{name: value})  # type: ignore[arg-type]


def test_wrong_arguments_are_refused() -> None:
    image, given = _photo(6, 8), _probabilities(2, 6, 8)
    with pytest.raises(InputError, match=r"probabilities are \[2, 6, 8\] for an image of \[8, 6\]"):
        refine(image.transpose(1, 0, 2), given)
    with pytest.raises(InputError, match="float64"):
        refine(image / 255, given)  # type: ignore[arg-type]
    for wrong in (np.log(given), given * 5, np.where(given > 0.5, np.nan, given)):
        with pytest.raises(InputError, match="not probabilities"):
            refine(image, wrong)


def test_sigmas_that_the_lattice_cannot_number_are_refused() -> None:
    image = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    with pytest.raises(InputError, match=r"colour_sigma 0\.01 of the CRF are too small"):
        refine(
            image,
            np.ones((1, 300, 300), np.float32),
            CrfConfig(bilateral_sigma=0.01, colour_sigma=0.01),
        )
