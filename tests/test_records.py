"""Samples read one by one from `.records`: what the index says, or the index is read instead."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from data_pipeline.build_config import BuildConfig
from data_pipeline.errors import InputError, SampleError
from data_pipeline.fetch import Fetcher
from data_pipeline.index import DatasetIndex, ShardIndex
from data_pipeline.inspect_cli import add_commands
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.order import SampleOrder
from data_pipeline.quarantine import quarantine_samples
from data_pipeline.reader import SampleReader
from data_pipeline.records import RecordFile, RecordsUnusable
from data_pipeline.reindex import reindex_tars
from data_pipeline.restore import restore_samples
from data_pipeline.sources.item import Listing
from data_pipeline.stage import stage_shards
from data_pipeline.verify import verify_shards
from data_pipeline.views import ViewConfig
from data_pipeline.write_records import is_whole, rewrite_records
from data_pipeline.write_shards import build_shards
from tests.sample_data import BytesItem, checksums, encode, flip_byte, object_mask, picture

FORMATS = ("JPEG", "PNG", "WEBP")
COUNT, SHARD = 9, 4
HEADER, RECORD = 100, 116  # bytes


def items(masks: bool = False) -> list[BytesItem]:
    """Samples with and without mask and label, in all formats; no two of one size."""
    return [
        BytesItem(
            f"k{n:02d}",
            encode(picture(n, 20 + n, 30), FORMATS[n % 3]),
            encode(object_mask(n, 20 + n, 30)) if n % 2 or masks else None,
            encode(object_mask(n, 20 + n, 30)) if n % 4 > 1 else None,
        )
        for n in range(COUNT)
    ]


def build(root: Path, masks: bool = False) -> Manifest:
    listing = Listing(items(masks), classes=tuple(map(str, range(9))))
    manifest = build_shards(listing, root, BuildConfig(SHARD, shuffle_seed=-1))
    assert manifest is not None
    return manifest


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine") / "shards"
    build(root)
    return root


@pytest.fixture
def manifest(pristine: Path, tmp_path: Path) -> Manifest:
    shutil.copytree(pristine, tmp_path / "shards")
    return read_manifest(tmp_path / "shards")


def lose_json(manifest: Manifest) -> None:
    for entry in manifest.shards:
        (manifest.root / entry.index).unlink()


def open_records(manifest: Manifest, shard: int) -> RecordFile:
    entry = manifest.shards[shard]
    return RecordFile(manifest.root / entry.records, entry.index_sha256, entry.samples)


def all_whole(root: Path) -> bool:
    return all(is_whole(root / entry.records, entry) for entry in read_manifest(root).shards)


# ---------------------------------------------------------------- what they hold


def test_they_say_what_the_index_says(manifest: Manifest) -> None:
    described = [
        sample
        for entry in manifest.shards
        for sample in json.loads((manifest.root / entry.index).read_bytes())["samples"]
    ]
    columns = [DatasetIndex(manifest).shard(number) for number in range(len(manifest.shards))]
    lose_json(manifest)
    index = DatasetIndex(manifest)
    seen = set()
    for number, sample in enumerate(described):
        shard, place = index.locate(number)
        record = index.record(shard, place)
        parts = sample["components"]
        image, *_ = parts
        names = (image, "mask.png", "label.png", "json")
        assert record.extents == tuple(tuple(parts[n]) if n in parts else None for n in names)
        assert (record.height, record.width) == (sample["height"], sample["width"])
        assert (record.image, record.proposals) == (image, sample["proposals"])
        assert index.key(shard, place) == sample["key"]
        assert record == columns[shard].record(place)
        seen.add((image, "mask.png" in parts, "label.png" in parts))
    assert len(described) == COUNT
    assert {form for form, _, _ in seen} == {"jpg", "png", "webp"}
    assert {kinds[1:] for kinds in seen} == {(m, t) for m in (False, True) for t in (False, True)}
    assert (manifest.root / "shard-000000.records").stat().st_size == HEADER + SHARD * (RECORD + 3)


def test_any_key_and_place_survives(tmp_path: Path) -> None:
    """Tars that others made are larger than 4 GB, and their names need not be text."""
    keys = ["", "ü/名", "\udc80x", "k" * 300]
    extents = np.full((4, 4, 3), -1, np.int64)
    extents[:, 0] = [[2**40 + n, 2**33 + n, 2**32 - 1 - n] for n in range(4)]
    sizes = np.array([[1, 2**31 - 1], [2**31 - 1, 1], [3, 4], [5, 6]], np.int32)
    proposals = np.array([0, 1, 254, 2**31 - 1], np.int32)
    index = ShardIndex(keys, extents, sizes, ["png", "jpg", "webp", "jpg"], proposals)
    (tmp_path / "a.records").write_bytes(index.encode_records("ab" * 32))
    file = RecordFile(tmp_path / "a.records", "ab" * 32, 4)
    file.check()
    for number, key in enumerate(keys):
        assert file.key(number) == key
        assert file.record(number) == index.record(number)
    assert not file.record(0).fits(2**41)  # too many pixels
    assert file.record(2).fits(2**41)
    assert not file.record(2).fits(2**40 + 2**33)


def test_messages_name_the_key_without_the_index(manifest: Manifest, tmp_path: Path) -> None:
    masked = build(tmp_path / "masked", masks=True)
    extent = DatasetIndex(masked).record(1, 2).extents[1]
    assert extent is not None
    lose_json(masked)
    order = SampleOrder([entry.samples for entry in masked.shards], 0, 2)
    reader = SampleReader(DatasetIndex(masked))
    fetcher = Fetcher(reader, order, ViewConfig(image_size=16), 1)
    fetched = fetcher.fetch(np.arange(COUNT))
    fetcher.close()
    assert {sample.name.partition(":")[2] for sample in fetched} == {i.key for i in items()}
    flip_byte(masked.root / "shard-000001.tar", extent[0])
    with pytest.raises(SampleError, match=r"shard-000001\.tar:k06\.mask\.png: the checksum"):
        reader.read(1, 2)
    (masked.root / "shard-000001.records").unlink()
    assert SampleReader(DatasetIndex(masked)).describe(1, 2) == "shard-000001.tar:sample 2"


# ---------------------------------------------------------------- what cannot be used


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def another_version(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8] += 1
    path.write_bytes(data)


def of_another(path: Path) -> None:
    shutil.copy(path.with_name("shard-000001.records"), path)


def to_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def swap_records(path: Path) -> None:
    data = bytearray(path.read_bytes())
    first, second = (slice(HEADER + n * RECORD, HEADER + (n + 1) * RECORD) for n in (0, 1))
    data[first], data[second] = data[second], data[first]
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (Path.unlink, "is missing"),
        (of_another, "was made from another index"),
        (another_version, "is of version 2, not 1"),
        (cut, "is cut short, or lists other samples than its shard has"),
        (lambda path: path.write_bytes(b""), "is cut short"),
        (lambda path: flip_byte(path, 20), "is damaged: its header's checksum differs"),
        (lambda path: flip_byte(path, HEADER + 70), "has a damaged record (0)"),
        (swap_records, "has a damaged record (0)"),
        (to_a_pipe, "cannot be read (Illegal seek)"),
    ],
)
def test_the_index_is_read_instead_and_said_once(
    manifest: Manifest,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], object],
    told: str,
) -> None:
    path = manifest.root / "shard-000000.records"
    expected = [DatasetIndex(manifest).shard(0).record(n) for n in range(SHARD)]
    damage(path)
    assert not is_whole(path, manifest.shards[0])
    index = DatasetIndex(manifest)
    assert [index.record(0, number) for number in range(SHARD)] == expected
    assert index.key(0, 3) == "k03"
    assert index.record(1, 0).height == 20 + SHARD
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{path} {told}; a shard's whole .json is read instead")
    assert said.endswith("run `maskbank shards records` there")
    assert {problem.file for problem in verify_shards(manifest.root, "fast")} == {path.name}


def test_no_flipped_bit_is_believed(manifest: Manifest) -> None:
    path, entry = manifest.root / "shard-000002.records", manifest.shards[2]
    assert entry.samples == 1
    whole = path.read_bytes()
    assert len(whole) == HEADER + RECORD + 3

    def read_sample() -> None:
        file = open_records(manifest, 2)
        file.record(0)
        file.key(0)

    read_sample()
    for place in range(8 * len(whole)):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(RecordsUnusable):
            read_sample()
        if place % 8 == 0:
            with pytest.raises(RecordsUnusable):
                open_records(manifest, 2).check()


def test_a_file_that_is_cut_while_it_is_open_is_no_crash(
    manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    index = DatasetIndex(manifest)
    first, third = index.record(0, 0), index.shard(0).record(3)
    os.truncate(manifest.root / "shard-000000.records", HEADER + 2 * RECORD)
    assert index.record(0, 0) == first
    assert not caplog.records
    assert index.record(0, 3) == third
    assert "shard-000000.records is cut short" in caplog.text


def test_what_no_shard_can_have_is_not_believed(manifest: Manifest) -> None:
    """A reader would ask for absurd memory: whoever wrote it, the index is asked."""
    index = DatasetIndex(manifest)
    columns, entry = index.shard(0), manifest.shards[0]
    expected = columns.record(1)
    columns.extents[1, 0, 1] = 2**40
    data = columns.encode_records(entry.index_sha256)
    (manifest.root / entry.records).write_bytes(data)
    assert open_records(manifest, 0).record(1).extents[0][1] == 2**40  # type: ignore[index]
    assert DatasetIndex(manifest).record(0, 1) == expected
    assert {p.file for p in verify_shards(manifest.root, "fast")} == {entry.records}


def test_a_set_without_any_says_so_once_and_keeps_few_indexes(
    manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    for entry in manifest.shards:
        (manifest.root / entry.records).unlink()
    index, small = DatasetIndex(manifest), DatasetIndex(manifest, cached_bytes=1)
    for each in (index, small):
        caplog.clear()
        for number in range(COUNT):
            assert each.record(*each.locate(number)).height == 20 + number
        assert len(caplog.records) == 1
    assert (len(index._cache), len(small._cache)) == (3, 2)
    assert index.shard(0).nbytes > SHARD * (96 + 8 + 4)


# ---------------------------------------------------------------- who writes them


def test_a_build_that_goes_on_writes_what_was_lost(manifest: Manifest, pristine: Path) -> None:
    (manifest.root / "shard-000001.records").unlink()
    build(manifest.root)
    assert checksums(manifest.root) == checksums(pristine)


def test_everything_that_writes_an_index_writes_them(manifest: Manifest, tmp_path: Path) -> None:
    root = manifest.root
    assert all_whole(root)
    extent = DatasetIndex(manifest).record(0, 1).extents[0]
    assert extent is not None
    flip_byte(root / "shard-000000.tar", extent[0])
    quarantine_samples(root, verify_shards(root))
    assert verify_shards(root) == []
    assert read_manifest(root).shards[0].records == "shard-000000.quarantine-1.records"
    assert all_whole(root)
    index = DatasetIndex(read_manifest(root))
    assert [index.key(0, number) for number in range(3)] == ["k00", "k02", "k03"]
    stage_shards(root, tmp_path / "copy")
    assert all_whole(tmp_path / "copy")
    flip_byte(root / "shard-000000.tar", extent[0])
    (root / "shard-000000.records").unlink()
    restore_samples(root)
    assert read_manifest(root).shards == manifest.shards
    assert verify_shards(root) == []
    reindex_tars(tmp_path / "copy", classes=manifest.classes, force=True)
    assert all_whole(tmp_path / "copy")
    assert verify_shards(tmp_path / "copy", "fast") == []


def test_quarantine_mends_them(manifest: Manifest, pristine: Path) -> None:
    (manifest.root / "shard-000000.records").unlink()
    flip_byte(manifest.root / "shard-000001.records", 150)
    done = quarantine_samples(manifest.root, verify_shards(manifest.root))
    assert (done.samples, done.dropped) == (0, 0)
    assert all_whole(manifest.root)
    assert checksums(manifest.root) == checksums(pristine)


@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_a_copy_has_them_though_the_original_does_not(
    manifest: Manifest, pristine: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    damage(manifest.root / "shard-000001.records")
    stage_shards(manifest.root, tmp_path / "copy")
    name = "shard-000001.records"
    assert (tmp_path / "copy" / name).read_bytes() == (pristine / name).read_bytes()


def test_a_shard_that_lost_all_its_samples_has_none(tmp_path: Path) -> None:
    """As duplicates of what an earlier build has written."""
    image = encode(picture(0))
    listing = Listing([BytesItem("a", image), BytesItem("b", image)])
    build_shards(listing, tmp_path, BuildConfig(1, shuffle_seed=-1, duplicates="drop"))
    names = {path.name for path in tmp_path.glob("shard-*")}
    kept = {f"shard-000000{suffix}" for suffix in (".tar", ".idx", ".records", ".json")}
    assert names == kept | {"shard-000001.json"}


def test_the_command_writes_what_is_missing_and_touches_nothing_else(
    manifest: Manifest, pristine: Path
) -> None:
    app = typer.Typer()
    add_commands(app)
    root = manifest.root
    before = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    (root / "shard-000000.records").unlink()
    flip_byte(root / "shard-000001.records", 150)
    run = ["records", str(root), "-p", "1"]
    done = CliRunner().invoke(app, run)
    assert (done.exit_code, done.output) == (0, "wrote the records of 2 of 3 shards\n")
    assert checksums(root) == checksums(pristine)
    changed = {path.name for path in root.iterdir() if path.stat().st_mtime_ns != before[path]}
    assert changed == {"shard-000000.records", "shard-000001.records"}
    assert rewrite_records(root).written == 0
    for name in ("shard-000002.records", "shard-000002.json"):
        (root / name).write_bytes(b"{}")
    done = CliRunner().invoke(app, run)
    assert done.exit_code == 1
    assert "shard-000002.json is not the index that the manifest describes" in done.output
    with pytest.raises(InputError, match="holds no manifest"):
        rewrite_records(root.parent)


def test_an_entry_that_fits_no_file_uses_the_index(manifest: Manifest) -> None:
    """As where the manifest was switched to another index between two reads."""
    entry = replace(manifest.shards[0], samples=3)
    with pytest.raises(RecordsUnusable, match="lists other samples"):
        open_records(replace(manifest, shards=(entry,)), 0)
