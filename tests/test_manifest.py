"""What is said about a manifest or an index that does not fit its shards: file and remedy."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import InputError
from data_pipeline.index import DatasetIndex
from data_pipeline.manifest import Manifest, read_manifest
from tests.sample_data import build_scene_shards

COUNT, SHARD = 24, 6


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    build_scene_shards(root, COUNT, samples_per_shard=SHARD)
    return root


@pytest.fixture
def manifest(pristine: Path, tmp_path: Path) -> Manifest:
    """Shards of a test's own, free to be damaged."""
    shutil.copytree(pristine, tmp_path / "shards")
    return read_manifest(tmp_path / "shards")


# ---------------------------------------------------------------- the manifest


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_shard(manifest: Manifest, number: int, **changes: Any) -> None:
    value = json.loads((manifest.root / "manifest.json").read_text())
    value["shards"][number] |= changes
    (manifest.root / "manifest.json").write_text(json.dumps(value))


def refused(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_manifest(root)
    return str(caught.value)


def test_the_manifest_is_read_back_whole(manifest: Manifest) -> None:
    again = read_manifest(str(manifest.root))
    assert again == manifest
    assert (again.samples, len(again.classes)) == (COUNT, 11)


def test_no_manifest(tmp_path: Path, manifest: Manifest) -> None:
    (manifest.root / "manifest.json").unlink()
    for root in (manifest.root, tmp_path / "nowhere", manifest.root / "shard-000000.tar"):
        told = refused(root)
        assert told.startswith(f"{root} holds no manifest.json")
        assert "maskbank shards build" in told


@pytest.mark.parametrize(
    "changes", [{"version": 2}, {"version": None}, {"format": "wids"}, {"format": None}]
)
def test_another_format_or_version(manifest: Manifest, changes: dict[str, Any]) -> None:
    edit(manifest.root / "manifest.json", **changes)
    told = refused(manifest.root)
    assert str(manifest.root / "manifest.json") in told
    assert str(next(iter(changes.values()))) in told
    assert told.endswith("this maskbank reads 'maskbank-shards' version 1: build the shards again")


@pytest.mark.parametrize("data", [b"", b"{", b"\x00" * 99, b"\xff\xfe{}", b"[" * 100_000, b"[1]"])
def test_a_damaged_manifest(manifest: Manifest, data: bytes) -> None:
    path = manifest.root / "manifest.json"
    path.write_bytes(data)
    told = refused(manifest.root)
    assert told.startswith(f"manifest {path} is damaged")
    assert told.endswith(": copy it here again or build the shards again")


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": None},
        {"shards": [1]},
        {"shards": [{"name": "shard-000000.tar"}]},
        {"failures": "many"},
        {"classes": 5},
        {"configuration": [1, 2]},
        {"configuration": None},
    ],
)
def test_a_manifest_of_other_kinds_of_values(manifest: Manifest, changes: dict[str, Any]) -> None:
    edit(manifest.root / "manifest.json", **changes)
    assert refused(manifest.root).startswith(f"{manifest.root / 'manifest.json'} is damaged: ")


@pytest.mark.parametrize("key", ["shards", "classes", "failures", "configuration"])
def test_a_manifest_that_lacks_something(manifest: Manifest, key: str) -> None:
    path = manifest.root / "manifest.json"
    value = json.loads(path.read_text())
    del value[key]
    path.write_text(json.dumps(value))
    assert refused(manifest.root).startswith(f"{path} is damaged: it lacks '{key}'; ")


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": "6"},
        {"samples": -1},
        {"samples": True},
        {"sha256": None},
        {"more": 1},
        {"name": "../secret.tar"},
        {"name": "/etc/passwd.tar"},
        {"name": "sub/shard-000000.tar"},
        {"name": "..tar"},
        {"name": "shard-000000.tar\0"},
        {"name": "shard-000000.zip"},
        {"name": "shard-000001.tar"},
    ],
)
def test_a_shard_entry_that_cannot_be(manifest: Manifest, changes: dict[str, Any]) -> None:
    edit_shard(manifest, 0, **changes)
    told = refused(manifest.root)
    assert told.startswith(f"{manifest.root / 'manifest.json'} is damaged: ")
    assert told.endswith("; copy it here again or build the shards again")


def test_a_shard_that_is_missing_or_of_another_size(manifest: Manifest) -> None:
    path = manifest.root / "shard-000002.tar"
    size = path.stat().st_size
    os.truncate(path, size - 512)
    told = refused(manifest.root)
    assert told.startswith(f"{path} has {size - 512:,} bytes, the manifest says {size:,}")
    assert told.endswith("copy it here again or build the shards again")
    path.unlink()
    told = refused(manifest.root)
    assert told.startswith(f"{path} cannot be read (No such file or directory)")
    assert told.endswith("copy it here again or build the shards again")


def test_no_shard_at_all(manifest: Manifest) -> None:
    edit(manifest.root / "manifest.json", shards=[])
    assert refused(manifest.root).endswith("lists no sample; build the shards again")


# ---------------------------------------------------------------- the index of a shard


def test_an_index_that_was_changed_damaged_or_lost(manifest: Manifest) -> None:
    path = manifest.root / "shard-000001.json"
    remedy = "copy the whole folder here again or build the shards again"
    whole = path.read_bytes()
    for data in (whole.replace(b'"height": 4', b'"height": 5', 1), whole[:-9], b"{}", b""):
        assert data != whole
        path.write_bytes(data)
        index = DatasetIndex(read_manifest(manifest.root))
        assert index.shard(0).keys
        with pytest.raises(InputError) as caught:
            index.shard(1)
        assert str(caught.value).startswith(f"{path} is not the index that the manifest describes")
        assert str(caught.value).endswith(remedy)
    path.unlink()
    with pytest.raises(InputError, match=r"No such file.*" + remedy) as caught:
        DatasetIndex(manifest).shard(1)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b"{}",
        b'{"samples": 5}',
        b'{"samples": []}',
        b'{"samples": [{"key": "a"}]}',
        b'{"samples": [{"key": "a", "height": 1, "width": 1, "components": []}]}',
        b'{"samples": [{"key": "a", "height": 1, "width": 1, "components": {}}]}',
        b'{"samples": [{"key": "a", "height": 1, "width": 1, "components": {"exe": [0, 1, 2]}}]}',
        b'{"samples": [{"key": "a", "height": 1, "width": 1, "components": {"jpg": [0, 1]}}]}',
    ],
)
def test_an_index_that_says_something_else(manifest: Manifest, data: bytes) -> None:
    path = manifest.root / "shard-000000.json"
    path.write_bytes(data)
    edit_shard(manifest, 0, index_sha256=hashlib.sha256(data).hexdigest())
    index = DatasetIndex(read_manifest(manifest.root))
    with pytest.raises(InputError) as caught:
        index.shard(0)
    assert str(path) in str(caught.value)
    assert "build the shards again" in str(caught.value)
