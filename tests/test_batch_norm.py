"""Batch norm over all ranks equals batch norm of the whole batch; shuffling is undone exactly."""

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_on_ranks
from trainer.batch_norm import convert_batch_norm, shuffle_rows, unshuffle_rows
from trainer.distributed import Ranks


def whole_batch() -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return 3 + 2 * torch.randn(12, 4, 5, 3, generator=draw, dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU()).double()


def forward_backward(ranks: Ranks) -> list[list[float]]:
    model = convert_batch_norm(network(), ranks).train()
    local = 12 // ranks.world_size
    mine = whole_batch()[ranks.rank * local : (ranks.rank + 1) * local].requires_grad_()
    output = model(mine)
    weight = torch.arange(12.0, dtype=torch.float64)[ranks.rank * local :][:local]
    (output.square() * weight[:, None, None, None]).sum().backward()  # type: ignore[no-untyped-call]
    assert mine.grad is not None
    bn = model[1]  # type: ignore[index]
    model.eval()
    return [
        output.flatten().tolist(),
        mine.grad.flatten().tolist(),
        bn.running_mean.tolist(),
        bn.running_var.tolist(),
        model(mine).flatten().tolist(),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_statistics_outputs_and_gradients_equal_the_whole_batch(world_size: int) -> None:
    (whole,) = run_on_ranks(forward_backward, 1)
    parts = run_on_ranks(forward_backward, world_size)
    for number in (0, 1, 4):
        joined = [value for part in parts for value in part[number]]
        assert joined == pytest.approx(whole[number], rel=1e-9, abs=1e-9)
    for part in parts:
        assert part[2] == pytest.approx(whole[2], rel=1e-9)
        assert part[3] == pytest.approx(whole[3], rel=1e-9)


def shuffled(ranks: Ranks) -> tuple[list[int], list[int]]:
    mine = torch.arange(4) + 4 * ranks.rank
    there = shuffle_rows(mine, 9, [4, 4, 4], ranks)
    return there.tolist(), unshuffle_rows(there * 10, 9, [4, 4, 4], ranks).tolist()


@pytest.mark.slow
def test_shuffled_rows_come_back_to_their_rank() -> None:
    found = run_on_ranks(shuffled, 3)
    assert sorted(row for there, _ in found for row in there) == list(range(12))
    assert found[0][0] != [0, 1, 2, 3]
    for rank, (_, back) in enumerate(found):
        assert back == [10 * (4 * rank + i) for i in range(4)]


def shuffled_unevenly(ranks: Ranks) -> tuple[list[int], list[int]]:
    counts = [3, 2, 3]
    first = sum(counts[: ranks.rank])
    mine = torch.arange(first, first + counts[ranks.rank])
    there = shuffle_rows(mine, 4, counts, ranks)
    return there.tolist(), unshuffle_rows(there * 10, 4, counts, ranks).tolist()


@pytest.mark.slow
def test_uneven_parts_are_shuffled_and_come_back_too() -> None:
    found = run_on_ranks(shuffled_unevenly, 3)
    assert [len(there) for there, _ in found] == [3, 2, 3]
    assert sorted(row for there, _ in found for row in there) == list(range(8))
    assert [row for _, back in found for row in back] == [10 * i for i in range(8)]
