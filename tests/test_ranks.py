"""The helper that every distributed test stands on."""

import os
import time

import pytest
import torch

from data_pipeline.errors import InputError
from tests.ranks import RankError, run_on_ranks
from trainer.distributed import Ranks, all_reduce_sum


def _sum_of_ranks(ranks: Ranks, tensor: torch.Tensor) -> tuple[int, torch.Tensor, int]:
    return ranks.rank, all_reduce_sum(tensor * (ranks.rank + 1), ranks), torch.get_num_threads()


def _pid(ranks: Ranks) -> int:
    return os.getpid()


def _fail_on(ranks: Ranks, rank: int) -> None:
    if ranks.rank == rank:
        raise InputError(f"no luck on {rank}")
    all_reduce_sum(torch.ones(1), ranks)


def _die_on(ranks: Ranks, rank: int) -> None:
    if ranks.rank == rank:
        os._exit(7)
    all_reduce_sum(torch.ones(1), ranks)


def _hang_on(ranks: Ranks, rank: int) -> None:
    if ranks.rank == rank:
        time.sleep(600)


def test_one_rank_runs_here_and_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    assert run_on_ranks(_pid, 1) == [os.getpid()]
    assert torch.get_num_threads() == threads
    with pytest.raises(RankError, match="rank 0: InputError: no luck on 0") as caught:
        run_on_ranks(_fail_on, 1, 0)
    assert isinstance(caught.value.__cause__, InputError)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_results_come_by_rank_and_collectives_work(world_size: int) -> None:
    results = run_on_ranks(_sum_of_ranks, world_size, torch.tensor([1.0, 2.0]))
    total = world_size * (world_size + 1) / 2
    assert [rank for rank, _, _ in results] == list(range(world_size))
    for _, value, threads in results:
        assert value.tolist() == [total, 2 * total]
        assert threads == 1
    assert len(set(run_on_ranks(_pid, world_size)) | {os.getpid()}) == world_size + 1


@pytest.mark.slow
def test_the_failing_rank_is_named_and_ends_the_others() -> None:
    with pytest.raises(RankError, match="rank 1: InputError: no luck on 1") as caught:
        run_on_ranks(_fail_on, 3, 1)
    assert caught.value.rank == 1
    assert "_fail_on" in str(caught.value), "the traceback names the function"
    assert isinstance(caught.value.__cause__, InputError)
    with pytest.raises(RankError, match="rank 2: died with exit code 7"):
        run_on_ranks(_die_on, 3, 2)


@pytest.mark.slow
def test_a_hang_ends_with_the_stack_of_the_rank_that_hangs() -> None:
    with pytest.raises(TimeoutError, match="had not ended") as caught:
        run_on_ranks(_hang_on, 2, 0, timeout=4)
    assert "_hang_on" in str(caught.value)
