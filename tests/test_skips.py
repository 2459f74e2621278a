"""What a skipped step must not leave behind, and when skipping ends."""

import pytest
import torch
from torch import nn

from tests.ranks import run_on_ranks
from trainer.distributed import Agreed, Ranks, agree
from trainer.skips import SkipCounter, StatisticsKeeper

ONE_RANK = Ranks(0, 1, torch.device("cpu"))


def test_statistics_come_back_as_they_were_after_the_last_good_step() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    keeper = StatisticsKeeper((network,))
    network(torch.randn(2, 3, 4, 4))
    keeper.keep()
    good = {name: value.clone() for name, value in network.named_buffers()}
    network(torch.full((2, 3, 4, 4), torch.nan))
    assert network[1].running_mean.isnan().all()
    keeper.restore()
    for name, value in network.named_buffers():
        assert torch.equal(value, good[name]), name
    assert network[1].num_batches_tracked == 1


def test_skips_in_a_row_end_the_run_and_good_steps_forgive(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counter = SkipCounter(3)
    for step in (1, 2):
        counter.bad(step, 1, "loss", ONE_RANK)
    counter.good()
    for step in (4, 5):
        counter.bad(step, 0, "gradient", ONE_RANK)
    with pytest.raises(
        FloatingPointError, match=r"rank 2: the loss is not finite, for 3 steps in a row"
    ):
        counter.bad(6, 2, "loss", ONE_RANK)
    assert counter.total == 5
    assert "step 5 skipped: the gradient of rank 0 is not finite; 3 so far" in caplog.text
    for step in range(100):
        SkipCounter(0).bad(step, 0, "loss", ONE_RANK)


def agreements(ranks: Ranks) -> list[Agreed]:
    last = ranks.world_size - 1
    return [
        agree(ranks, False, "", False, False),
        agree(ranks, ranks.rank == last, "", ranks.is_main, False),
        agree(ranks, False, "gradient", False, ranks.rank == last),
        agree(ranks, False, "loss" if ranks.rank == last else "gradient", False, False),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_agree_and_a_bad_loss_comes_before_the_gradients_that_it_spoilt(
    world_size: int,
) -> None:
    last = world_size - 1
    for found in run_on_ranks(agreements, world_size):
        assert found[0] == Agreed(False, "", 0, False, False)
        assert found[1] == Agreed(True, "", 0, True, False)
        assert found[2] == Agreed(False, "gradient", 0, False, True)
        assert found[3] == Agreed(False, "loss", last, False, False)
