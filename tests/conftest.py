"""What holds for all tests: one thread of torch, Ctrl-C as a terminal sends it, and their order."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # several processes run at a time, and would wait for each other
# started in the background a shell lets it be ignored, and so do all processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)

# Longest first, so that with `--dist loadfile` the processes end at about the same time.
LONGEST = (
    *("test_failures", "test_pipeline", "test_faults", "test_cli", "test_train"),
    *("test_doctor_ranks", "test_engines", "test_memory_bank", "test_elastic"),
    *("test_activation_checkpointing", "test_masks_make", "test_backbones"),
)


@pytest.fixture(autouse=True)
def threads_stay_one() -> Iterator[None]:
    """No test leaves its threads to the next one: sums over two round in another order."""
    yield
    torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist else starts with the file of the most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(Path(item.path).stem, len(place)))
