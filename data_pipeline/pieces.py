"""Work for a pool of threads, handed over a few items at a time."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_PIECES = 4  # for each thread: uneven ones still end at about the same time
Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_pieces(
    pool: ThreadPoolExecutor,
    threads: int,
    function: Callable[[Item], Result],
    items: Sequence[Item],
) -> list[Result]:
    """`function` of every item, in their order.

    Handing over a single one wakes two threads, which shows where items are small images.

    Args:
        pool: of so many `threads`.

    Raises:
        Exception: the first one, by the order of items, that `function` raises.
    """
    size = max(1, len(items) // (_PIECES * threads))
    pieces = [items[start : start + size] for start in range(0, len(items), size)]
    done = pool.map(lambda piece: [function(item) for item in piece], pieces)
    return [result for piece in done for result in piece]


def single_threaded_pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch works alone: each of them would else bring a team of its own."""
    everybody = threading.Barrier(threads + 1)
    others = torch.get_num_threads()

    def begin() -> None:
        torch.get_num_threads()  # the first call in a thread sets the number, so it must be before
        torch.set_num_threads(1)
        everybody.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="alone")
    for _ in range(threads):
        pool.submit(begin)
    everybody.wait()
    torch.set_num_threads(others)  # what threads that come later begin with
    return pool
