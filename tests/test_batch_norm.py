"""Batch norm over all ranks equals batch norm of the whole batch; shuffling is undone exactly."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_on_ranks
from trainer.batch_norm import convert_batch_norm, shuffle_rows, unshuffle_rows
from trainer.distributed import Ranks, all_reduce_sum


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


PARTS = ((7, 5, 0), (4, 1, 7))  # images of each rank
FAR = (100.0, 1000.0, 3000.0)  # means, in deviations


def passed(norm: nn.Module, images: Tensor, seen: Tensor) -> dict[str, Tensor]:
    """What a training step through a batch norm gives."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, norm.num_features))
    images = images.clone().requires_grad_()
    output = norm(images)
    output.backward(seen)
    found = {"mean": norm.running_mean, "variance": norm.running_var, "output": output.detach()}
    for name, tensor in (("gradient", images), ("weight", norm.weight), ("bias", norm.bias)):
        assert tensor.grad is not None
        found[name] = tensor.grad
    return {name: value.double() for name, value in found.items()}


def far_from_zero(ranks: Ranks, dtype: torch.dtype) -> list[tuple[dict[str, float], list[float]]]:
    """Errors against float64 batch norm of the whole batch, relative to the largest value; and
    running statistics."""
    found = []
    for far, parts in itertools.product(FAR, PARTS):
        draw = torch.Generator().manual_seed(0)
        noise, seen = torch.randn(2, 12, 6, 9, 8, generator=draw, dtype=torch.float64)
        whole = (far + noise * torch.linspace(0.5, 2, 6)[:, None, None]).to(dtype)
        mine = slice(first := sum(parts[: ranks.rank]), first + parts[ranks.rank])
        expected = passed(nn.BatchNorm2d(6).double(), whole.double(), seen)
        synced = convert_batch_norm(nn.Sequential(nn.BatchNorm2d(6).to(dtype)), ranks)
        got = passed(next(synced.children()), whole[mine], seen.to(dtype)[mine])
        for name in ("weight", "bias"):
            all_reduce_sum(got[name], ranks)
        errors = {}
        for name, value in expected.items():
            target = value[mine] if name in ("output", "gradient") else value
            largest = (got[name] - target).abs().max() if target.numel() else 0.0
            errors[name] = float(largest / value.abs().max())
        found.append((errors, [*got["mean"].tolist(), *got["variance"].tolist()]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.float64, 1e-11)])
def test_values_far_from_zero_lose_no_digits_on_uneven_and_empty_ranks(
    dtype: torch.dtype, most: float
) -> None:
    for of_ranks in zip(*run_on_ranks(far_from_zero, 3, dtype), strict=True):
        statistics = [values for _, values in of_ranks]
        assert statistics[0] == statistics[1] == statistics[2]  # bit for bit
        for errors, _ in of_ranks:
            assert max(errors.values()) < most, errors


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
