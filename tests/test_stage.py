"""Copies of shards on a node's own disk."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.build_config import BuildConfig
from data_pipeline.errors import InputError
from data_pipeline.index import DatasetIndex
from data_pipeline.manifest import read_manifest
from data_pipeline.sources.generated import list_scenes
from data_pipeline.stage import stage_shards
from data_pipeline.verify import verify_shards
from data_pipeline.write_shards import build_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shards"
    build_shards(list_scenes(6, 0, 32), root, BuildConfig(2, "ids"))
    return root


def problems(folder: Path) -> list[str]:
    """What `verify` finds, but for the .idx files of other readers, which are not copied."""
    return [str(one) for one in verify_shards(folder, "hash", 1) if not one.file.endswith(".idx")]


def test_a_copy_is_a_set_of_shards(shards: Path, tmp_path: Path) -> None:
    copied = []
    staged = stage_shards(shards, tmp_path / "copy", copied.append)
    assert [shard.sha256 for shard in staged.shards] == [
        shard.sha256 for shard in read_manifest(shards).shards
    ]
    assert not problems(tmp_path / "copy")
    assert DatasetIndex(staged).counts == DatasetIndex(read_manifest(shards)).counts
    assert len(copied) == 9  # three shards and both their indexes
    assert stage_shards(shards, tmp_path / "copy", copied.append) == staged
    assert len(copied) == 9  # nothing twice


def test_what_is_damaged_in_the_copy_is_copied_again(shards: Path, tmp_path: Path) -> None:
    stage_shards(shards, tmp_path / "copy")
    damaged = tmp_path / "copy/shard-000001.tar"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:700] + b"x" + data[701:])
    copied: list[int] = []
    stage_shards(shards, tmp_path / "copy", copied.append)
    assert copied == [len(data)]
    assert damaged.read_bytes() == data


def test_damaged_shards_are_not_taken(shards: Path, tmp_path: Path) -> None:
    source = shutil.copytree(shards, tmp_path / "source")
    tar = source / "shard-000002.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:700] + b"x" + data[701:])
    with pytest.raises(InputError, match=r"shard-000002.tar is not what the manifest describes"):
        stage_shards(source, tmp_path / "copy")
    assert not (tmp_path / "copy/shard-000002.tar").exists()
    assert not (tmp_path / "copy/manifest.json").exists()  # so nobody takes it for whole


def test_a_disk_that_is_too_small_is_said_before(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.stage._SPARE_BYTES", 1 << 60)
    with pytest.raises(InputError, match="choose a larger disk"):
        stage_shards(shards, tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())


def test_two_that_share_a_folder_wait_for_each_other(shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_pipeline.stage", str(shards), str(tmp_path / "copy")]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [one.communicate(timeout=120) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert all(f"3 shards, 0.00 GB, in {tmp_path}/copy" in out for out, _ in said)
    assert not problems(tmp_path / "copy")


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_pipeline.stage", str(tmp_path / "none"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("maskbank: ")
    assert "none" in done.stderr
