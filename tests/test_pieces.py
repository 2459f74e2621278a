"""Work in pieces is the work item by item."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from data_pipeline.pieces import map_in_pieces, single_threaded_pool


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(count: int, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        found = map_in_pieces(pool, threads, lambda item: item * item, range(count))
    assert found == [item * item for item in range(count)]


def test_all_threads_work_at_a_time() -> None:
    together = threading.Barrier(3, timeout=60)
    with ThreadPoolExecutor(3) as pool:
        map_in_pieces(pool, 3, lambda item: together.wait() if item < 3 else None, range(3))


def test_the_first_error_by_order_is_raised() -> None:
    def fail(item: int) -> None:
        if item >= 5:
            raise ValueError(f"item {item}")

    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="item 5"):
        map_in_pieces(pool, 2, fail, range(40))


def test_threads_that_work_alone_leave_the_others_theirs() -> None:
    torch.set_num_threads(2)
    pool = single_threaded_pool(3)
    assert set(pool.map(lambda _: torch.get_num_threads(), range(9))) == {1}
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 2
    pool.shutdown()
