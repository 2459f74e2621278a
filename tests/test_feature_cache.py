"""Features in a file: exact, without a trace, and refused where there is no space."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import InputError
from evaluation.feature_cache import FeatureCache


def test_what_is_kept_comes_back_by_number(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    features = torch.randn(5, 3, 4, 6)
    labels = [np.full((i + 2, 7), i, np.int16) for i in range(5)]
    labels[3] = np.arange(-1, 34, dtype=np.int16).reshape(7, 5).T
    with FeatureCache(folder, 5, 8, "") as cache:
        cache.add(features[:2].to(memory_format=torch.channels_last), labels[:2])
        cache.add(features[2:], labels[2:])
        assert len(cache) == 5
        for i in (4, 0, 3, 1, 2):
            kept, label = cache.read(i)
            assert torch.equal(kept, features[i].to(torch.bfloat16))
            assert label.dtype == np.int16
            assert label.tolist() == labels[i].tolist()
        assert list(folder.iterdir()) == [], "the file has no name that could stay behind"


def test_space_is_asked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * 10 * (2 * 3 * 4 * 6 + 2 * 8 * 8)  # two ranks of ten images
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    features, labels = torch.zeros(1, 3, 4, 6), [np.zeros((8, 8), np.int16)]
    with FeatureCache(tmp_path, 10, 8, ", or so") as cache:
        with pytest.raises(InputError) as caught:
            cache.add(features, labels)
        said = f"{tmp_path} has {needed - 1:,} (0.0 GiB) free; give --cache FOLDER on a larger disk"
        assert f"the features of 20 images at 8 pixels take {needed:,} bytes" in str(caught.value)
        assert said in str(caught.value)
        assert str(caught.value).endswith("make --size smaller, or so")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
        cache.add(features, labels)


def test_a_disk_that_fills_up_is_named() -> None:
    with FeatureCache(None, 3, 8, "") as cache:
        cache._features.close()
        with Path("/dev/full").open("wb", buffering=0) as full:
            cache._features = full
            with pytest.raises(InputError, match="is full after the features of 0 of 3 images"):
                cache.add(torch.zeros(1, 3, 4, 6), [np.zeros((8, 8), np.int16)])
