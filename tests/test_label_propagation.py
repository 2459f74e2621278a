"""Label propagation: against a dense form in float64, and on squares that move."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.errors import InputError
from evaluation.label_propagation import PropagationConfig, _top_k, propagate, propagate_shares

SIZE = (13, 27)  # more than one tile each way


def dense_shares(
    queries: Tensor, features: Tensor, shares: Tensor, config: PropagationConfig
) -> Tensor:
    """All similarities at once, float64, of unit vectors [h, w, C] and [n, h, w, C]."""
    height, width, channels = queries.shape
    similarity = queries.reshape(-1, channels).double() @ features.reshape(-1, channels).double().T
    similarity = similarity.view(height * width, len(features), height * width)
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    squared = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2
    if config.radius:
        far = (squared >= config.radius**2)[:, None].expand(-1, len(features), -1).clone()
        far[:, 0] &= not config.whole_first_frame
        similarity[far] = -math.inf
    similarity = similarity.flatten(1)
    order = similarity.argsort(1, descending=True)[:, : config.top_k]
    weights = (similarity.gather(1, order) / config.temperature).exp()
    weights = weights / weights.sum(1, keepdim=True)
    taken = shares.double().flatten(0, 2)[order]
    return (weights[..., None] * taken).sum(1).view(height, width, -1)


def random_video(frames: int, channels: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(frames, channels, *SIZE, generator=torch.Generator().manual_seed(seed))


def unit(frames: Tensor) -> Tensor:
    return F.normalize(frames.movedim(1, -1), dim=-1)


CONFIGS = [
    PropagationConfig(),
    PropagationConfig(top_k=3, radius=4, temperature=0.2),
    PropagationConfig(radius=5, whole_first_frame=False),
    PropagationConfig(radius=0, top_k=25),
    PropagationConfig(radius=1, top_k=7, whole_first_frame=False),  # fewer keys than the top k
    PropagationConfig(radius=100, top_k=1, whole_first_frame=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("at_once", [1 << 23, 1 << 12])
def test_shares_equal_the_dense_form(
    config: PropagationConfig, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.label_propagation._SIMILARITIES", at_once)
    video = unit(random_video(5))
    shares = torch.rand(4, *SIZE, 3, generator=torch.Generator().manual_seed(1))
    found = propagate_shares(video[4], video[:4], shares, config)
    expected = dense_shares(video[4], video[:4], shares, config)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def dense_propagation(video: Tensor, mask: Tensor, config: PropagationConfig) -> list[Tensor]:
    """Whole videos: the first frame and the latest ones are the context."""
    ids = sorted({int(value) for value in mask.unique()} - {-1})
    height, width = mask.shape[0] // SIZE[0], mask.shape[1] // SIZE[1]
    one_hot = torch.stack([(mask == value).float() for value in ids], -1)
    cells = one_hot.view(SIZE[0], height, SIZE[1], width, -1).mean((1, 3))
    features, shares, found = unit(video), [cells], [mask]
    for t in range(1, len(video)):
        context = [0, *range(max(1, t - config.context), t)]
        chosen = torch.stack([shares[i] for i in context])
        shares.append(dense_shares(features[t], features[context], chosen, config).float())
        maps = F.interpolate(shares[-1].movedim(-1, 0)[None], mask.shape, mode="bilinear")[0]
        found.append(torch.tensor(ids)[maps.argmax(0)])
    return found


@pytest.mark.parametrize("context", [0, 1, 2, 20])
def test_a_video_equals_the_dense_form(context: int) -> None:
    config = PropagationConfig(context=context, radius=4, temperature=0.3)
    video = random_video(6, seed=2)
    mask = torch.zeros(2 * SIZE[0], 3 * SIZE[1], dtype=torch.int16)
    mask[4:15, 10:40], mask[16:, 50:], mask[:3] = 3, 7, -1
    found = list(propagate(iter(video * 5), mask, config))
    expected = dense_propagation(video, mask, config)
    assert found[0].tolist() == mask.tolist()
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.dtype == torch.int16
        assert set(one.unique().tolist()) <= {0, 3, 7}
        assert (one == other).float().mean() > 0.998  # shares that are equal but for rounding


def moving_square(frames: int, hidden: set[int] = frozenset()) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and masks: a textured square goes right over a textured ground."""
    generator = torch.Generator().manual_seed(3)
    ground = torch.randn(16, 20, 30, generator=generator)
    texture = torch.randn(16, 6, 6, generator=generator)
    for t in range(frames):
        features = ground + 0.1 * torch.randn(16, 20, 30, generator=generator)
        mask = torch.zeros(160, 240, dtype=torch.int64)
        if t not in hidden:
            features[:, 7:13, 2 + t : 8 + t] = texture
            mask[56:104, 16 + 8 * t : 64 + 8 * t] = 1
        yield features, mask


@pytest.mark.parametrize("normalise", [False, True])
def test_a_moving_square_is_followed(normalise: bool) -> None:
    config = PropagationConfig(context=3, radius=4, normalise_channels=normalise)
    pairs = list(moving_square(14))
    found = propagate((features for features, _ in pairs), pairs[0][1], config)
    for number, (prediction, (_, truth)) in enumerate(zip(found, pairs, strict=True)):
        both, either = ((prediction & truth) > 0).sum(), ((prediction | truth) > 0).sum()
        assert both / either > 0.8, number  # 13 cells, far beyond the radius, in the end


def test_a_hidden_square_is_found_again_in_the_whole_first_frame_only() -> None:
    pairs = list(moving_square(12, hidden=set(range(1, 8))))
    features, last = [frame for frame, _ in pairs], pairs[-1][1] > 0
    for whole in (True, False):
        config = PropagationConfig(context=2, radius=3, whole_first_frame=whole)
        *_, found = propagate(iter(features), pairs[0][1], config)
        assert bool((found[last] == 1).float().mean() > 0.8) is whole


def test_features_are_taken_one_by_one_and_the_first_mask_is_given_back() -> None:
    taken = []

    def features() -> Iterator[Tensor]:
        for number, frame in enumerate(random_video(3)):
            taken.append(number)
            yield frame.bfloat16().requires_grad_()

    mask = torch.zeros(26, 54, dtype=torch.uint8)
    mask[5:9, 5:9] = 200
    frames = propagate(features(), mask)
    assert taken == []
    assert next(frames).tolist() == mask.tolist()
    assert taken == [0]
    second = next(frames)
    assert (second.dtype, second.requires_grad, taken) == (torch.uint8, False, [0, 1])
    assert list(propagate(iter([]), mask)) == []


def test_small_objects_gain_from_normalised_channels() -> None:
    features = random_video(1, channels=32)[0]
    mask = torch.zeros(104, 216, dtype=torch.int64)
    mask[40:44, 80:85] = 1  # a third of one cell of 8 × 8
    for normalise in (False, True):
        config = PropagationConfig(normalise_channels=normalise)
        _, found = propagate(iter([features, features]), mask, config)
        assert bool((found == 1).any()) is normalise
        assert found[:30].max() == 0


def test_shares_that_are_the_same_everywhere_are_not_stretched() -> None:
    mask = torch.ones(26, 54, dtype=torch.int64)
    mask[::2, ::2] = 0  # one of the four pixels of each cell
    config = PropagationConfig(normalise_channels=True)
    _, found = propagate(iter(random_video(2)), mask, config)
    assert found.unique().tolist() == [1]


def test_only_one_id_and_ignored_pixels() -> None:
    mask = torch.full((26, 54), -1)
    mask[:, :20] = 4
    _, found = propagate(iter(random_video(2)), mask)
    assert found.unique().tolist() == [4]


def test_the_largest_of_long_rows() -> None:
    values = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    values[:, 4999], values[1, 300:] = 9, -math.inf
    largest, at = _top_k(values, 10)
    assert largest.equal(values.topk(10).values)
    assert values.gather(1, at).equal(largest)


def test_wrong_input_is_refused() -> None:
    mask = torch.zeros(26, 54, dtype=torch.int64)
    for name, value in (("top_k", 0), ("context", -1), ("radius", -1), ("temperature", 0.0)):
        with pytest.raises(InputError, match=f"{name} is {value}"):
            PropagationConfig(**{name: value})
    for wrong in (mask - 1, mask.float(), mask[0]):
        with pytest.raises(InputError, match="no id of 0 or more"):
            propagate(iter([]), wrong)
    video = random_video(3)
    with pytest.raises(InputError, match=r"frame 1 are \[13, 26, 5\].*\[13, 27, 5\]"):
        list(propagate(iter([video[0], video[1, :, :, 1:]]), mask))
    video[2, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match=r"frame 2, .* not finite"):
        list(propagate(iter(video), mask))
