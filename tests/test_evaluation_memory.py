"""The look at memory before a cache is filled."""

import os

import pytest

from data_pipeline.errors import InputError
from evaluation.memory import available_memory, require_memory


def test_available_memory_is_some_of_what_there_is() -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 16 * 2**20 < available_memory() <= physical


def test_what_does_not_fit_is_refused_with_both_figures() -> None:
    require_memory(9 * 2**30, 10 * 2**30, "features", "do less")
    with pytest.raises(InputError) as caught:
        require_memory(19 * 2**29, 10 * 2**30, "features of 7 images", "do less")
    said = "features of 7 images take 9.5 GiB of memory, and 10.0 GiB are available; do less"
    assert str(caught.value) == said
