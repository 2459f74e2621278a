"""The sharded bank against one replicated first-in-first-out queue, on real ranks."""

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.errors import InputError
from tests.ranks import run_on_ranks
from trainer.distributed import Ranks
from trainer.memory_bank import ShardedMemoryBank

ONE_RANK = Ranks(0, 1, torch.device("cpu"))


def made_in_step(step: int, rank: int, world_size: int) -> tuple[Tensor, Tensor, list[int]]:
    """Uneven prototypes: some ranks have none in some steps, all have none in step 2."""
    counts = [0 if step == 2 else (step * 7 + r * 3) % 5 for r in range(world_size)]
    first = 1000 * step + 100 * rank
    ids = torch.arange(first, first + counts[rank])
    return ids[:, None].float().expand(-1, 3), ids, counts


def replicated(capacity: int, steps: int, world_size: int) -> list[int]:
    queue: list[int] = []
    for step in range(steps):
        for rank in range(world_size):
            queue += made_in_step(step, rank, world_size)[1].tolist()
    return queue[len(queue) - min(capacity, len(queue)) :]


def content(bank: ShardedMemoryBank, chunk: int) -> list[int]:
    parts = list(bank.chunks(chunk))
    for keys, ids in parts:
        assert keys[:, 0].long().tolist() == ids.tolist()
        assert len(ids) <= chunk
    return [int(i) for _, ids in parts for i in ids]


def follow_queue(ranks: Ranks, capacity: int) -> list[list[int]]:
    bank = ShardedMemoryBank(capacity, 3, ranks)
    seen = []
    for step in range(9):
        if step % 2:
            bank.prefetch()
        seen.append(content(bank, chunk=4))
        bank.enqueue(*made_in_step(step, ranks.rank, ranks.world_size))
        assert len(bank) <= capacity
        assert len(bank.keys) == bank._held()[ranks.rank]
    return [*seen, content(bank, chunk=1000)]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_content_equals_a_replicated_queue_on_every_rank(world_size: int) -> None:
    for capacity in (0, 1, 7, 100):
        for seen in run_on_ranks(follow_queue, world_size, capacity):
            for step, found in enumerate(seen):
                assert found == replicated(capacity, step, world_size), (capacity, step)


def save_half_way(ranks: Ranks) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    bank = ShardedMemoryBank(10, 3, ranks)
    for step in range(5):
        bank.enqueue(*made_in_step(step, ranks.rank, ranks.world_size))
    return {name: value.numpy() for name, value in bank.state().items()}


def go_on(ranks: Ranks, saved: dict[str, np.ndarray], capacity: int) -> tuple[list[int], list[int]]:  # type: ignore[type-arg]
    bank = ShardedMemoryBank(capacity, 3, ranks)
    bank.load_state({name: torch.from_numpy(np.array(v)) for name, v in saved.items()})
    before = content(bank, 1000)
    mine = torch.full((1,), 9000 + ranks.rank)
    bank.enqueue(mine[:, None].float().expand(-1, 3), mine, [1] * ranks.world_size)
    return before, content(bank, 1000)


@pytest.mark.slow
def test_content_after_resume_on_other_ranks_equals_that_before() -> None:
    saved = run_on_ranks(save_half_way, 3)
    for state in saved[1:]:
        for name, value in state.items():
            assert np.array_equal(value, saved[0][name])
    expected = replicated(10, 5, 3)
    assert saved[0]["sample_id"].tolist() == expected
    assert np.diff(saved[0]["sequence"]).tolist() == [1] * (len(expected) - 1)
    for world_size in (1, 2, 4):
        new = [9000 + rank for rank in range(world_size)]
        for before, after in run_on_ranks(go_on, world_size, saved[0], 10):
            assert before == expected
            assert after == [*expected, *new][-10:]
    for before, after in run_on_ranks(go_on, 2, saved[0], 4):  # a smaller bank keeps the newest
        assert before == expected[-4:]
        assert after == [*expected, 9000, 9001][-4:]


def test_a_bank_of_other_width_is_refused() -> None:
    state = ShardedMemoryBank(4, 8, ONE_RANK).state()
    with pytest.raises(InputError, match=r"8 numbers.*embedding_dim is 16"):
        ShardedMemoryBank(4, 16, ONE_RANK).load_state(state)


def test_negative_capacity_is_refused() -> None:
    with pytest.raises(InputError, match=r"bank.capacity is -1"):
        ShardedMemoryBank(-1, 8, ONE_RANK)
