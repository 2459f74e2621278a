"""A cluster and shards for the tests of a file; they skip, and say why, where there can be none."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.build_config import BuildConfig
from data_pipeline.sources.generated import list_scenes
from data_pipeline.write_shards import build_shards
from tests.slurm_cluster.cluster import Cluster, why_not


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    number = os.getpid()  # several may run at a time
    network = f"10.{64 + number % 64}.{number // 64 % 256}"
    folder = tmp_path_factory.mktemp("cluster")
    with Cluster(folder, 9, network) as cluster:
        yield cluster
        of_tests = f"{folder.parent}/test_"  # every run directory is there
        cluster.until(lambda: not cluster.processes(of_tests), "the jobs' processes to end", (), 30)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shards"
    build_shards(list_scenes(24, 0, 40), root, BuildConfig(8, "ids"))
    return root
