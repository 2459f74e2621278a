"""Ranks and the collectives that the trainer uses; each is the identity on one rank."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import InputError
from trainer.rendezvous import fresh_store

T = TypeVar("T")
_SECONDS_FOR_RANK_0 = 30
_RECORDED_COLLECTIVES = "2000"  # last ones that torch's flight recorder keeps


@dataclass(frozen=True)
class Ranks:
    """This process among all: its number, how many there are, its device, and their patience."""

    rank: int
    world_size: int
    device: torch.device
    timeout_seconds: float = 600.0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_ranks(device: str, timeout_seconds: float, hangs: Path | None = None) -> Ranks:
    """Joins the process group that torchrun's environment describes; one rank without it.

    Args:
        device: cpu (gloo), cuda (nccl), or auto.
        timeout_seconds: after which a collective that some rank does not reach is an error.
        hangs: where nccl leaves what it recorded when that happens.

    Raises:
        InputError: cuda was asked for and there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"the device is {device!r}; it can be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("the device is cuda, but torch sees no GPU here; take cpu or auto")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank} has no GPU: there are {torch.cuda.device_count()}; "
            "start at most that many ranks a node"
        )
    chosen = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    if world_size == 1:
        return Ranks(0, 1, chosen, timeout_seconds)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _RECORDED_COLLECTIVES)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if hangs is not None:
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(hangs / "nccl-rank-"))
    rank = int(os.environ["RANK"])
    store = fresh_store(rank, world_size, timeout_seconds)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        store=store,
        rank=rank if store is not None else -1,
        world_size=world_size if store is not None else -1,
        device_id=chosen if on_gpu else None,
    )
    return Ranks(rank, world_size, chosen, timeout_seconds)


def cores_per_rank() -> int:
    """This rank's share of the node's cores."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // local_ranks)


def end_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(values: Tensor, ranks: Ranks) -> Tensor:
    """Sum over the ranks, in place."""
    if ranks.world_size > 1:
        dist.all_reduce(values)
    return values


@contextmanager
def same_on_all_ranks() -> Iterator[None]:
    """What is wrong in here is wrong on every rank as a rule: rank 0 says so and ends the others.

    They wait for that, since torchrun ends all ranks with the first that leaves.
    """
    try:
        yield
    except (InputError, OSError):
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_SECONDS_FOR_RANK_0)
        raise


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """Whether `flag` is set on any rank."""
    votes = torch.tensor(float(flag), device=ranks.device)
    return bool(all_reduce_sum(votes, ranks) > 0)


@dataclass(frozen=True)
class Agreed:
    """What all ranks know after a step, the same on each.

    Attributes:
        stop: some rank was asked to stop.
        bad: what is no number on some rank: "loss", "gradient", or "" for nothing.
        bad_rank: the lowest rank of which that is so; a bad loss spoils others' gradients.
        saving: some rank is still writing a checkpoint.
        save_failed: some rank could not write it.
    """

    stop: bool
    bad: str
    bad_rank: int
    saving: bool
    save_failed: bool


def agree(ranks: Ranks, stop: bool, bad: str, saving: bool, save_failed: bool) -> Agreed:
    """What holds for any rank, on every rank; one small collective."""
    world = ranks.world_size
    place = world - ranks.rank + (world if bad == "loss" else 0) if bad else 0
    votes = torch.tensor([stop, place, saving, save_failed], device=ranks.device)
    if world > 1:
        dist.all_reduce(votes, dist.ReduceOp.MAX)
    stops, worst, still_saving, failed = (int(vote) for vote in votes.tolist())
    what = "" if not worst else "loss" if worst > world else "gradient"
    return Agreed(bool(stops), what, -worst % world, bool(still_saving), bool(failed))


def gather_counts(count: int, ranks: Ranks) -> list[int]:
    """Every rank's count."""
    return [row[0] for row in gather_integers(torch.tensor([count], device=ranks.device), ranks)]


def gather_integers(values: Tensor, ranks: Ranks) -> list[list[int]]:
    """Every rank's integers [n], by rank."""
    rows: list[list[int]] = all_gather_equal(values[None], ranks).tolist()
    return rows


def all_gather_equal(rows: Tensor, ranks: Ranks) -> Tensor:
    """Rows [n, …] of all ranks, in the order of the ranks: [W·n, …]; n is the same on each."""
    if ranks.world_size == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(ranks.world_size)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def all_gather_rows(rows: Tensor, counts: list[int], ranks: Ranks) -> Tensor:
    """Rows [counts[rank], …] of all ranks, in the order of the ranks: [sum(counts), …]."""
    if ranks.world_size == 1 or sum(counts) == 0:
        return rows
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = torch.split(all_gather_equal(padded, ranks), max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def broadcast_object(value: T, ranks: Ranks) -> T:
    """Rank 0's value on every rank. Between ranks of one job only: it pickles."""
    if ranks.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=ranks.device)
    return box[0]


def broadcast_values(tensors: Sequence[Tensor], ranks: Ranks) -> None:
    """Rank 0's values into tensors of one kind, in place; one collective."""
    if ranks.world_size == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.broadcast(flat, src=0)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def new_group(ranks: Ranks) -> dist.ProcessGroup | None:
    """All ranks on connections of their own: what runs there waits for nothing else; a collective.

    None where there is one rank.
    """
    if ranks.world_size == 1:
        return None
    group = dist.new_group(timeout=timedelta(seconds=ranks.timeout_seconds))
    assert isinstance(group, dist.ProcessGroup)
    return group


def barrier(ranks: Ranks) -> None:
    any_rank(False, ranks)
