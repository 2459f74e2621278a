"""Batch norm over all ranks, and key images shuffled over the ranks."""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.distributed import Ranks, all_gather_rows, all_reduce_sum


def convert_batch_norm(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Every BatchNorm2d of `model` with statistics over all ranks.

    On a GPU torch's own; it has none for CPUs, where `CpuSyncBatchNorm` does the same.
    """
    if ranks.world_size == 1:
        return model
    if ranks.device.type == "cuda":
        synced: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return synced
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, CpuSyncBatchNorm.of(child, ranks))
    return model


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm [B, C, H, W] whose mean and variance are those of all ranks' batches together."""

    ranks: Ranks

    @classmethod
    def of(cls, plain: nn.BatchNorm2d, ranks: Ranks) -> "CpuSyncBatchNorm":
        """With the parameters and running statistics of `plain`."""
        synced = cls(plain.num_features, plain.eps, plain.momentum)
        synced.to(plain.weight)
        synced.load_state_dict(plain.state_dict())
        for mine, theirs in zip(synced.parameters(), plain.parameters(), strict=True):
            mine.requires_grad_(theirs.requires_grad)
        synced.ranks = ranks
        synced.train(plain.training)
        return synced

    def __deepcopy__(self, memo: dict[int, Any]) -> "CpuSyncBatchNorm":
        return CpuSyncBatchNorm.of(self, self.ranks)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        wide = input if input.dtype == torch.float64 else input.float()
        count = wide.new_tensor([wide.numel() / wide.shape[1]])
        sums = torch.cat([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3)), count])
        total: Tensor = _SumOverRanks.apply(sums, self.ranks)
        n = total[-1]
        mean, mean_square = total[:-1].chunk(2)
        mean, mean_square = mean / n, mean_square / n
        variance = (mean_square - mean.square()).clamp_min(0)
        self._update_running(mean.detach(), (variance * n / (n - 1).clamp_min(1)).detach())
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (wide * scale[:, None, None] + shift[:, None, None]).to(input.dtype)

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)


class _SumOverRanks(torch.autograd.Function):
    """Sum over the ranks; so is its gradient, since every rank's loss depends on every part."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return all_reduce_sum(values.clone(), ranks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(gradients[0].clone(), ctx.ranks), None


def shuffle_rows(rows: Tensor, seed: int, counts: list[int], ranks: Ranks) -> Tensor:
    """This rank's part of all ranks' rows [B, …] in an order drawn from `seed` (MoCo, 3.3).

    Args:
        rows: counts[rank] of them.
        seed: the same on every rank.
        counts: rows of every rank.
        ranks: that shuffle.
    """
    everything = all_gather_rows(rows, counts, ranks)
    order = _permutation(len(everything), seed).to(rows.device)
    return everything[order[_own(counts, ranks)]]


def unshuffle_rows(rows: Tensor, seed: int, counts: list[int], ranks: Ranks) -> Tensor:
    """Undoes `shuffle_rows` on rows [B, …] computed from the shuffled ones."""
    everything = all_gather_rows(rows, counts, ranks)
    order = _permutation(len(everything), seed).to(rows.device)
    return everything[order.argsort()[_own(counts, ranks)]]


def _own(counts: list[int], ranks: Ranks) -> slice:
    first = sum(counts[: ranks.rank])
    return slice(first, first + counts[ranks.rank])


def _permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
