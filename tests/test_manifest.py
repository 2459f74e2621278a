"""What is said about a manifest or an index that does not fit its shards: file and remedy."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import InputError
from data_pipeline.index import DatasetIndex
from data_pipeline.manifest import (
    DroppedShard,
    Manifest,
    missing_shards,
    read_manifest,
    require_a_shard,
)
from tests.sample_data import build_scene_shards
from trainer.config import load_config
from trainer.preflight import plan_run

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


def write_without_checksum(path: Path, value: dict[str, Any]) -> None:
    """As a manifest without one, so that what was changed is looked at."""
    value.pop("sha256", None)
    path.write_text(json.dumps(value))


def edit(path: Path, **changes: Any) -> None:
    write_without_checksum(path, json.loads(path.read_text()) | changes)


def edit_shard(manifest: Manifest, number: int, **changes: Any) -> None:
    value = json.loads((manifest.root / "manifest.json").read_text())
    value["shards"][number] |= changes
    write_without_checksum(manifest.root / "manifest.json", value)


def refused(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_manifest(root)
    return str(caught.value)


def test_the_manifest_is_read_back_whole(manifest: Manifest) -> None:
    again = read_manifest(str(manifest.root))
    assert again == manifest
    assert (again.samples, len(again.classes)) == (COUNT, 11)


def test_a_manifest_of_before_checksums_and_quarantine_is_read(manifest: Manifest) -> None:
    path = manifest.root / "manifest.json"
    value = json.loads(path.read_text())
    for shard in value["shards"]:
        assert shard.pop("index") == shard["name"].replace(".tar", ".json")
        assert shard.pop("quarantined") == 0
    write_without_checksum(path, value)
    assert read_manifest(manifest.root) == manifest


@pytest.mark.parametrize("changed", [("samples", 25), ("classes", ["background"]), ("extra", 1)])
def test_an_edited_manifest_fails_its_checksum(
    manifest: Manifest, changed: tuple[str, Any]
) -> None:
    path = manifest.root / "manifest.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value))  # another layout of the same is no matter
    assert read_manifest(manifest.root) == manifest
    path.write_text(json.dumps(value | dict([changed])))
    told = refused(manifest.root)
    assert told.startswith(f"{path} is damaged or was edited: its checksum differs")


def test_what_is_written_is_read_back(manifest: Manifest) -> None:
    first, second, *others = manifest.shards
    first = replace(first, index="shard-000000.quarantine-1.json", quarantined=2, samples=4)
    changed = replace(
        manifest,
        shards=(first, *others),
        dropped=(DroppedShard(1, second),),
        configuration={"source": "caf\udce9", "root": "Größe"},
    )
    changed.write()
    again = read_manifest(manifest.root)
    assert again == changed
    assert again.samples == COUNT - SHARD - 2
    assert again.shards[0].index == "shard-000000.quarantine-1.json"


def test_shards_that_are_not_there_are_counted_for_training(manifest: Manifest) -> None:
    assert missing_shards(manifest) is None
    (manifest.root / "shard-000001.tar").unlink()
    (manifest.root / "shard-000003.tar").unlink()
    os.truncate(manifest.root / "shard-000002.tar", 512)
    assert read_manifest(manifest.root, check_files=False) == manifest
    told = missing_shards(manifest)
    assert told is not None
    assert "of 4 shards" in told
    assert "2 are missing and 1 have another size" in told
    assert f"maskbank shards verify {manifest.root}" in told
    (manifest.root / "shard-000000.tar").unlink()
    require_a_shard(manifest)  # one is left, though cut
    (manifest.root / "shard-000002.tar").unlink()
    for check in (missing_shards, require_a_shard):
        with pytest.raises(InputError, match="not one of the 4 shards that the manifest lists is"):
            check(manifest)


def test_only_rank_0_counts_what_is_missing(manifest: Manifest, tmp_path: Path) -> None:
    (manifest.root / "shard-000001.tar").unlink()
    settings = [f"data.shards={manifest.root}", f"run.directory={tmp_path / 'run'}"]
    config = load_config("demo_cpu", None, [*settings, "data.batch_size=4", "run.steps=1"])
    plans = [plan_run(config, 2, rank) for rank in (0, 1)]
    told = ["1 are missing" in " ".join(plan.warnings) for plan in plans]
    assert told == [True, False]
    assert plans[0].data_fingerprint == plans[1].data_fingerprint


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
    write_without_checksum(path, value)
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
        {"index": "../shard-000000.json"},
        {"index": "manifest.json"},
        {"index": "shard-000001.json"},
        {"quarantined": -1},
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
        *(
            b'{"samples": [{"key": "a", "height": %d, "width": 1, "components": {"jpg": %s}}]}'
            % (height, extent)
            for height, extent in [
                (1, b"[0, 1000000000000000, 0]"),
                (1, b"[9223372036854775807, 1, 0]"),
                (1, b"[99999999999999999999, 1, 0]"),
                (1, b"[-5, 1, 0]"),
                (1, b"[0, 1, 4294967296]"),
                (0, b"[0, 1, 0]"),
                (-1, b"[0, 1, 0]"),
                (10**9, b"[0, 1, 0]"),
                (10**12, b"[0, 1, 0]"),
            ]
        ),
        b'{"samples": [{"key": "a", "height": 1, "width": 1, "components":'
        b' {"jpg": [0, 1, 0], "png": [0, 1, 0]}}, {"key": "b", "height": 1, "width": 1,'
        b' "components": {}}]}',
    ],
)
def test_an_index_that_says_something_else(manifest: Manifest, data: bytes) -> None:
    path = manifest.root / "shard-000000.json"
    path.write_bytes(data)
    samples = data.count(b'"key"') or SHARD
    edit_shard(manifest, 0, index_sha256=hashlib.sha256(data).hexdigest(), samples=samples)
    index = DatasetIndex(read_manifest(manifest.root))
    with pytest.raises(InputError) as caught:
        index.shard(0)
    assert str(path) in str(caught.value)
    assert "build the shards again" in str(caught.value)


def test_an_index_that_cannot_be_used_is_not_read_again(manifest: Manifest) -> None:
    path = manifest.root / "shard-000001.json"
    whole = path.read_bytes()
    path.write_bytes(b"{}")
    index = DatasetIndex(manifest)
    messages = set()
    for _ in range(3):
        with pytest.raises(InputError) as caught:
            index.shard(1)
        messages.add(str(caught.value))
        path.write_bytes(whole)  # too late for this reader: what it does must not change by chance
    assert len(messages) == 1
    assert DatasetIndex(manifest).shard(1).keys


@pytest.mark.parametrize("field", ["sha256", "index_sha256"])
@pytest.mark.parametrize("checksum", ["", "../../../../etc/x", "a" * 63, "A" * 64, "a" * 65])
def test_checksums_are_checksums_and_no_paths(tmp_path: Path, field: str, checksum: str) -> None:
    manifest = build_scene_shards(tmp_path, 2)
    entry = replace(manifest.shards[0], **{field: checksum})
    replace(manifest, shards=(entry,)).write()
    with pytest.raises(InputError, match=r"is damaged: shard .* has the checksum"):
        read_manifest(tmp_path)
