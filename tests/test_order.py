"""Order: every epoch holds every sample once, for any number of ranks."""

import numpy as np
import pytest

from data_pipeline.order import SampleOrder, batch_positions


def located(order: SampleOrder, start: int, stop: int) -> list[tuple[int, int]]:
    shards, samples = order.locate(np.arange(start, stop))
    return list(zip(shards.tolist(), samples.tolist(), strict=True))


@pytest.mark.parametrize("counts", [[5, 3, 7, 1, 4], [1], [3], [0, 2, 0, 5], [10] * 100])
@pytest.mark.parametrize("window", [1, 2, 8])
def test_every_epoch_is_a_permutation_of_all_samples(counts: list[int], window: int) -> None:
    order, total = SampleOrder(counts, seed=3, window=window), sum(counts)
    everything = {(shard, i) for shard, count in enumerate(counts) for i in range(count)}
    for epoch in range(3):
        assert set(located(order, epoch * total, (epoch + 1) * total)) == everything


def test_epochs_and_seeds_differ_and_equal_seeds_agree() -> None:
    counts = [20, 20, 20]
    first = located(SampleOrder(counts, 0, 2), 0, 60)
    assert located(SampleOrder(counts, 0, 2), 0, 60) == first
    assert located(SampleOrder(counts, 1, 2), 0, 60) != first
    assert located(SampleOrder(counts, 0, 2), 60, 120) != first


def test_any_slice_in_any_sequence_is_the_same() -> None:
    counts = [4, 9, 2, 6]
    whole = located(SampleOrder(counts, 5, 2), 0, 84)
    order = SampleOrder(counts, 5, 2)
    for start in np.random.default_rng(0).permutation(80):
        assert located(order, start, start + 4) == whole[start : start + 4]


def test_a_window_bounds_the_shards_that_are_open() -> None:
    shards, _ = SampleOrder([10] * 12, 0, window=3).locate(np.arange(120))
    for start in range(0, 120, 30):
        assert len(set(shards[start : start + 30].tolist())) == 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_global_batches_do_not_depend_on_the_ranks(world_size: int) -> None:
    for step in (0, 1, 17):
        parts = [batch_positions(step, 12, rank, world_size) for rank in range(world_size)]
        assert np.concatenate(parts).tolist() == list(range(12 * step, 12 * step + 12))


def test_a_batch_larger_than_the_data_set_runs_over_several_epochs() -> None:
    counts = np.bincount([i for _, i in located(SampleOrder([3], 0, 1), 0, 12)])
    assert counts.tolist() == [4, 4, 4]


@pytest.mark.parametrize("world_size", [3, 4, 7, 10])
def test_ranks_that_do_not_divide_the_batch_share_it_almost_evenly(world_size: int) -> None:
    parts = [batch_positions(2, 10, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(parts).tolist() == list(range(20, 30))
    assert {len(part) for part in parts} <= {10 // world_size, -(-10 // world_size)}


def test_more_ranks_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 10 cannot be shared by 11 ranks"):
        batch_positions(0, 10, 0, 11)


def test_substitutes_are_spread_and_repeatable() -> None:
    order = SampleOrder([50, 50], 7, 2)
    drawn = [order.substitute(position, 0) for position in range(200)]
    assert drawn == [SampleOrder([50, 50], 7, 2).substitute(p, 0) for p in range(200)]
    assert len(set(drawn)) > 60
    assert order.substitute(3, 1) != order.substitute(3, 0)


def test_the_order_is_pinned() -> None:
    """A change here changes what every resumed run sees: raise the checkpoint's version with it."""
    assert located(SampleOrder([4, 3, 5], seed=11, window=2), 0, 6) == [
        (2, 4),
        (2, 0),
        (1, 1),
        (2, 1),
        (1, 2),
        (1, 0),
    ]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_next_window_is_what_comes_after_this_one(window: int) -> None:
    counts = [3, 2, 5, 2, 4, 1, 6]
    order = SampleOrder(counts, seed=4, window=window)
    shards = order.locate(np.arange(3 * order.samples))[0].tolist()
    position = 0
    while position < 2 * order.samples:
        ahead = order.next_window(position)
        left = order.samples - position % order.samples  # a window ends with its epoch
        here = list(dict.fromkeys(shards[position : position + left]))[:window]
        end = position + sum(counts[shard] for shard in here)
        assert {order.next_window(place)[0] for place in range(position, end)} == {ahead[0]}
        following = sum(counts[shard] for shard in ahead)
        assert set(shards[end : end + following]) == set(ahead)
        position = end
