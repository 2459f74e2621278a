"""Batch norm over all ranks, and key images shuffled over the ranks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.distributed import Ranks, all_gather_equal, all_gather_rows


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
        output, mean, variance, count = _SyncedNorm.apply(
            input, self.weight, self.bias, self.eps, self.ranks
        )
        self._update_running(mean, variance * count / (count - 1).clamp_min(1))
        normalised: Tensor = output
        return normalised

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)


class _SyncedNorm(torch.autograd.Function):
    """Images [B, C, H, W] of each rank, B ≥ 0, normalised by the moments of all; one collective.

    Nothing is computed from sums of squares of the values themselves: E[x²] − E[x]² loses all
    digits where the mean is far from 0. Each rank takes its moments around a guess of its mean,
    and Chan's formula (Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for
    computing sample variances, 1979) puts the ranks' together, in their order on every rank.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, and mean, variance [C] and pixels of all ranks, float64."""
        wide = _wide(input)
        guess = wide[:1].mean((0, 2, 3)) if len(wide) else wide.new_zeros(wide.shape[1])
        apart = wide - guess[:, None, None]
        mean, variance, count = _moments_of_all(apart, guess, ranks)
        offset = (mean - guess).to(wide.dtype)
        inverse = torch.rsqrt(variance + eps).to(wide.dtype)
        scale = weight * inverse
        shift = bias - offset * scale
        ctx.save_for_backward(apart, weight, offset, inverse, count)
        ctx.ranks = ranks
        ctx.mark_non_differentiable(mean, variance, count)
        output = torch.addcmul(shift[:, None, None], apart, scale[:, None, None])
        return output.to(input.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The other ranks' losses depend on this rank's images through the moments."""
        apart, weight, offset, inverse, count = ctx.saved_tensors
        wide = _wide(gradient)
        along, total = wide.new_zeros(2, len(weight))
        if len(wide):
            _, along, total = torch.ops.aten.native_batch_norm_backward(
                wide, apart, None, None, None, offset, inverse, True, 0.0, [False, True, True]
            )
        mine = torch.cat([along, total]).double()
        mean_along, mean = all_gather_equal(mine[None], ctx.ranks).sum(0).div(count).chunk(2)
        scale = weight * inverse
        slope = -(scale * inverse * mean_along).to(wide.dtype)
        constant = -(scale * mean).to(wide.dtype) - slope * offset
        back = torch.addcmul(constant[:, None, None], apart, slope[:, None, None])
        back.addcmul_(wide, scale[:, None, None])
        return (
            *(back.to(gradient.dtype), along.to(weight.dtype), total.to(weight.dtype)),
            *(None, None),
        )


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _moments_of_all(apart: Tensor, guess: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance [C], without Bessel's correction, and pixels over all ranks; float64.

    Args:
        apart: this rank's values less `guess`, [B, C, H, W].
        guess: [C], near this rank's mean.
        ranks: that have values, or none; all ranks together have some.
    """
    mean = variance = torch.zeros_like(guess)
    if len(apart):
        mean, variance = torch.batch_norm_update_stats(apart, None, None, 0.0)
    pixels = apart.new_tensor([len(apart) * apart.shape[2] * apart.shape[3]], dtype=torch.float64)
    mine = torch.cat([guess.double() + mean.double(), variance.double(), pixels])
    rows = all_gather_equal(mine[None], ranks)  # [W, 2 C + 1]
    means, variances = rows[:, :-1].chunk(2, 1)
    counts = rows[:, -1:]
    count = counts.sum()
    share = counts / count
    whole_mean = (share * means).sum(0)
    whole_variance = (share * (variances + (means - whole_mean).square())).sum(0)
    return whole_mean, whole_variance, count


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
