"""Shards as files: their bytes, what becomes of bad samples, and going on after interruptions."""

import errno
import io
import json
import os
import re
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import shard_file
from data_pipeline.build_config import BuildConfig, BuildOptions
from data_pipeline.errors import InputError
from data_pipeline.files import only_writer
from data_pipeline.index import DatasetIndex
from data_pipeline.manifest import read_manifest, require_component
from data_pipeline.reader import SampleReader
from data_pipeline.sample import INFO, LABEL, MASK
from data_pipeline.sources.folder import list_folder
from data_pipeline.sources.generated import list_scenes
from data_pipeline.sources.item import Listing
from data_pipeline.write_shards import build_shards, failure_counts
from tests.sample_data import (
    BytesItem,
    build_scene_shards,
    checksums,
    encode,
    folder_pair,
    object_mask,
    palette_png,
    picture,
    write,
)

SCENES, SHARD = 24, 4


def jpeg(number: int) -> bytes:
    return encode(picture(number), "JPEG", quality=90)


def good(number: int) -> BytesItem:
    return BytesItem(f"good_{number:02d}", jpeg(number), encode(object_mask(number)))


def bad(number: int) -> BytesItem:
    return BytesItem(f"bad_{number:02d}", jpeg(number)[:200], encode(object_mask(number)))


def in_order(samples_per_shard: int) -> BuildConfig:
    return BuildConfig(samples_per_shard, shuffle_seed=-1)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    build_scene_shards(root, SCENES, samples_per_shard=SHARD)
    return root


# ---------------------------------------------------------------- the files


SUFFIXES = (".tar", ".idx", ".records", ".json")


def test_the_manifest_says_what_is_there(shards: Path) -> None:
    manifest = read_manifest(shards)
    sums = checksums(shards)
    assert len(manifest.shards) == SCENES // SHARD
    assert manifest.samples == SCENES
    assert manifest.bytes == sum(path.stat().st_size for path in shards.glob("*.tar"))
    for entry in manifest.shards:
        assert (entry.samples, entry.masks, entry.labels) == (SHARD, SHARD, SHARD)
        assert entry.sha256 == sums[entry.name]
        assert entry.index_sha256 == sums[entry.name.replace(".tar", ".json")]
    assert manifest.configuration["samples_per_shard"] == SHARD
    assert manifest.configuration["size"] == "48"
    assert manifest.failures == 0
    assert lines(shards / "failures.jsonl") == []
    stems = [f"shard-{number:06d}" for number in range(SCENES // SHARD)]
    names = {f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES}
    assert set(sums) == names | {"manifest.json", "failures.jsonl", "build.json"}


def test_every_sample_is_in_exactly_one_shard_and_shuffled(shards: Path) -> None:
    found = [
        sample["key"]
        for path in sorted(shards.glob("shard-*.json"))
        for sample in json.loads(path.read_bytes())["samples"]
    ]
    keys = [item.key for item in list_scenes(SCENES, 0, 48).entries]
    assert sorted(found) == keys
    assert found != keys


def test_key_order_and_seeds(tmp_path: Path) -> None:
    orders = []
    for name, seed in (("a", -1), ("b", 1), ("c", 2), ("d", 2)):
        listing = Listing([good(number) for number in range(12)])
        build_shards(listing, tmp_path / name, BuildConfig(12, shuffle_seed=seed))
        index = DatasetIndex(read_manifest(tmp_path / name)).shard(0)
        orders.append(index.keys)
    assert orders[0] == sorted(orders[0])
    assert orders[2] == orders[3]
    assert len({tuple(order) for order in orders}) == 3


def test_archives_are_plain_ustar_without_times_or_owners(shards: Path) -> None:
    for path in shards.glob("*.tar"):
        data = path.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = tar.getmembers()
        assert len(members) == 4 * SHARD
        for member in members:
            header = data[member.offset : member.offset + 512]
            assert header[257:263] == b"ustar\0"
            assert member.offset_data == member.offset + 512  # no PAX or GNU header in between
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
            assert (member.mode, member.isreg()) == (0o644, True)
        assert len(data) % 10240 == 0
        assert not any(data[members[-1].offset_data + members[-1].size :].strip(b"\0"))


def test_offsets_and_checksums_match_the_bytes(shards: Path) -> None:
    for path in sorted(shards.glob("shard-*.json")):
        data = path.with_suffix(".tar").read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = {member.name: member for member in tar.getmembers()}
        samples = json.loads(path.read_bytes())["samples"]
        idx = ["v1.2 4"]
        for sample in samples:
            parts = []
            for name, (offset, size, crc) in sample["components"].items():
                member = members.pop(f"{sample['key']}.{name}")
                assert (member.offset_data, member.size) == (offset, size)
                assert zlib.crc32(data[offset : offset + size]) == crc
                parts.append(f"{name} {offset} {size} {sample['key']}.{name}")
            idx.append(" ".join(parts))
            info = sample["components"][INFO]
            told = json.loads(data[info[0] : info[0] + info[1]])
            assert (told["key"], told["height"]) == (sample["key"], sample["height"])
        assert members == {}
        assert path.with_suffix(".idx").read_text() == "\n".join(idx) + "\n"


def read_all(root: Path) -> list[dict[str, Any]]:
    reader = SampleReader(DatasetIndex(read_manifest(root)))
    samples = []
    for shard, entry in enumerate(reader.index.manifest.shards):
        for number in range(entry.samples):
            raw = reader.read(shard, number, label=True)
            key = reader.index.shard(shard).keys[number]
            samples.append({"key": key, "jpg": raw.image, MASK: raw.mask, LABEL: raw.label})
    return samples


@pytest.mark.slow
def test_webdataset_reads_the_same_samples(shards: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    found = [
        {"key": sample["__key__"], **{name: sample[name] for name in ("jpg", MASK, LABEL)}}
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    ]
    assert found == read_all(shards)


@pytest.mark.slow
def test_dali_reads_the_same_samples(shards: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=SCENES, num_threads=1, device_id=None)
    def graph() -> Any:
        image, mask, label = fn.readers.webdataset(
            paths=[str(path) for path in sorted(shards.glob("*.tar"))],
            index_paths=[str(path) for path in sorted(shards.glob("*.idx"))],
            ext=["jpg", MASK, LABEL],
            missing_component_behavior="error",
        )
        return image, mask, label

    pipeline = graph()
    pipeline.build()
    outputs = pipeline.run()
    ours = read_all(shards)
    for output, name in zip(outputs, ("jpg", MASK, LABEL), strict=True):
        found = [bytes(np.asarray(output.at(number))) for number in range(SCENES)]
        assert found == [sample[name] for sample in ours]


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_number_of_processes(shards: Path, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    build_shards(
        list_scenes(SCENES, 0, 48),
        tmp_path,
        BuildConfig(SHARD, "ids"),
        BuildOptions(processes=4),
        lambda plan: lambda *counts: done.append(counts),
    )
    assert checksums(tmp_path) == checksums(shards)
    assert done == [(0, 0)] + [(SHARD, 0)] * (SCENES // SHARD)


# ---------------------------------------------------------------- what cannot be used


def test_failures_are_counted_and_never_in_a_shard(tmp_path: Path) -> None:
    items = [good(0), bad(1), good(2), good(3), bad(4), BytesItem("small", jpeg(0), jpeg(0)[:9])]
    done: list[tuple[int, int]] = []
    manifest = build_shards(
        Listing(items),
        tmp_path,
        in_order(4),
        progress=lambda plan: lambda *counts: done.append(counts),
    )
    assert [entry.samples for entry in manifest.shards] == [2, 1]
    assert manifest.failures == 3
    assert done == [(0, 0), (4, 2), (2, 1)]
    failures = lines(tmp_path / "failures.jsonl")
    assert [(failure["key"], failure["stage"]) for failure in failures] == [
        ("bad_01", "image"),
        ("bad_04", "image"),
        ("small", "mask"),
    ]
    assert failures[0]["source"] == "memory/bad_01"
    assert failure_counts((tmp_path / "failures.jsonl").open("rb")) == {
        "image: cannot be decoded": 2,
        "mask: cannot be decoded": 1,
    }
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert not [name for name in tar.getnames() if "bad" in name or "small" in name]
    assert [sample["key"] for sample in read_all(tmp_path)] == ["good_00", "good_02", "good_03"]


def test_a_shard_of_which_nothing_is_left_has_no_archive(tmp_path: Path) -> None:
    items = [bad(0), bad(1), good(2), good(3)]
    manifest = build_shards(Listing(items), tmp_path, in_order(2))
    assert [(entry.name, entry.samples) for entry in manifest.shards] == [("shard-000001.tar", 2)]
    assert read_manifest(tmp_path).shards == manifest.shards
    assert not (tmp_path / "shard-000000.tar").exists()
    assert len(read_all(tmp_path)) == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_nothing_to_write_is_an_error(tmp_path: Path, processes: int) -> None:
    with pytest.raises(InputError, match="there is no sample to write"):
        build_shards(Listing([]), tmp_path, in_order(2), BuildOptions(processes))
    images, masks = folder_pair(tmp_path / "source", ["a"])
    (masks / "a.png").unlink()
    output = tmp_path / "shards"
    with pytest.raises(InputError, match=r"not one of 1 samples .* a\.jpg: match: no mask"):
        build_shards(list_folder(images, masks), output, in_order(2), BuildOptions(processes))
    assert lines(output / "failures.jsonl")[0]["reason"] == "no mask of that stem"
    assert not (output / "manifest.json").exists()


def test_after_nothing_could_be_used_the_folder_is_free(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path / "source", ["a", "b"])
    soft = np.arange(600).reshape(20, 30).astype(np.uint8)
    for name in ("a", "b"):
        write(masks / f"{name}.png", encode(soft))
    output = tmp_path / "shards"
    with pytest.raises(
        InputError, match=r"not one of 2 samples.*soft saliency map.*failures\.jsonl"
    ):
        build_shards(list_folder(images, masks), output, BuildConfig(1))
    manifest = build_shards(list_folder(images, masks), output, BuildConfig(1, "binary"))
    assert (manifest.samples, manifest.failures) == (2, 0)


def test_samples_without_a_mask_or_label_are_counted(tmp_path: Path) -> None:
    items = [
        BytesItem("bare", jpeg(0)),
        BytesItem("mask", jpeg(1), encode(object_mask())),
        BytesItem("all", jpeg(2), encode(object_mask()), palette_png(object_mask())),
    ]
    manifest = build_shards(Listing(items), tmp_path, in_order(3))
    assert (manifest.shards[0].masks, manifest.shards[0].labels) == (2, 1)
    by_key = {sample["key"]: sample for sample in read_all(tmp_path)}
    assert (by_key["bare"][MASK], by_key["bare"][LABEL]) == (None, None)
    assert by_key["all"][LABEL] is not None
    with pytest.raises(InputError, match=r"1 of 3 samples have no mask, which training needs"):
        require_component(manifest, "mask", "training")
    with pytest.raises(InputError, match=r"2 of 3 samples have no label, which measuring needs"):
        require_component(manifest, "label", "measuring")


class Unreadable(BytesItem):
    def read(self) -> Any:
        raise OSError(errno.EIO, "Input/output error", self.key)


def test_a_source_that_cannot_be_read_is_a_failed_sample(tmp_path: Path) -> None:
    manifest = build_shards(Listing([good(0), Unreadable("x", b"")]), tmp_path, in_order(2))
    assert (manifest.samples, manifest.failures) == (1, 1)
    assert lines(tmp_path / "failures.jsonl")[0]["stage"] == "read"


def test_odd_file_names_do_not_break_the_list_of_failures(tmp_path: Path) -> None:
    images = tmp_path / "images"
    names = ["line\u2028separator", "next\u0085line", "new\nline", os.fsdecode(b"caf\xe9"), "图片"]
    for name in names:
        write(images / f"{name}.jpg", b"not an image")
    write(images / "good.jpg", jpeg(0))
    manifest = build_shards(list_folder(images, None), tmp_path / "shards", in_order(10))
    assert (manifest.samples, manifest.failures) == (1, 5)
    found = lines(tmp_path / "shards" / "failures.jsonl")
    assert {failure["source"] for failure in found} == {f"{name}.jpg" for name in names}
    assert failure_counts((tmp_path / "shards/failures.jsonl").open("rb")) == {
        "image: cannot be decoded": 5
    }
    assert len(read_all(tmp_path / "shards")) == 1
    # read back by a build that goes on
    assert build_shards(list_folder(images, None), tmp_path / "shards", in_order(10)) == manifest


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="samples per shard is 0"):
        BuildConfig(0)
    with pytest.raises(InputError, match="shuffle seed"):
        BuildConfig(shuffle_seed=2**63)


# ---------------------------------------------------------------- the output folder


def test_a_folder_of_another_build_is_refused_by_name(tmp_path: Path) -> None:
    build_scene_shards(tmp_path / "a", 4, samples_per_shard=2)
    before = checksums(tmp_path / "a")
    other = (
        (list_scenes(4, 1, 48), BuildConfig(2, "ids"), "seed is '1', was '0'. Give"),
        (list_scenes(4, 0, 32), BuildConfig(2, "ids"), "size is '32', was '48'. Give"),
        (list_scenes(4, 0, 48), BuildConfig(2, "binary"), "mask_mode is 'binary', was 'ids'"),
        (
            list_scenes(4, 0, 48),
            BuildConfig(3, "ids", shuffle_seed=5),
            "samples_per_shard is 3, was 2; shuffle_seed is 5, was 0. Give the same",
        ),
        (list_scenes(6, 0, 48), BuildConfig(2, "ids"), "it gives 6 samples instead of 4"),
    )
    for listing, config, difference in other:
        with pytest.raises(InputError, match=re.escape(difference)):
            build_shards(listing, tmp_path / "a", config)
    assert checksums(tmp_path / "a") == before


def test_other_masks_of_the_same_images_are_another_build(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path / "source", ["a", "b"])
    output = tmp_path / "shards"
    build_shards(list_folder(images, masks), output, in_order(1))
    before = checksums(output)
    others = tmp_path / "source" / "others"
    for name in ("a", "b"):
        write(others / f"{name}.png", encode(np.ones((20, 30), np.uint8)))
    for folder in (others, None):
        with pytest.raises(InputError, match=r"configuration: masks is '.*', was '.*/masks'\."):
            build_shards(list_folder(images, folder), output, in_order(1))
    for path in masks.iterdir():
        path.write_bytes((others / path.name).read_bytes())
    with pytest.raises(InputError, match=r"shard-000000, but files of a\.jpg have changed"):
        build_shards(list_folder(images, masks), output, in_order(1))
    assert checksums(output) == before


def test_a_foreign_file_is_never_touched(tmp_path: Path) -> None:
    write(tmp_path / "thesis.tex", b"years of work")
    with pytest.raises(InputError, match=r"already holds 'thesis.tex', .*--output"):
        build_scene_shards(tmp_path, 2)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    stems = ("shard-000001.tar", "manifest.json", "failures.jsonl")
    for name in (f".{stem}.0123456789ab.tmp" for stem in stems):
        write(tmp_path / name, b"half")
    write(tmp_path / ".DS_Store", b"hidden, not ours")
    write(tmp_path / ".thesis.tmp", b"hidden, not ours")
    build_scene_shards(tmp_path, 2)
    hidden = {name for name in os.listdir(tmp_path) if name.startswith(".")}
    assert hidden == {".DS_Store", ".thesis.tmp"}


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "file", b"")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"cannot be used: .*file is not a folder"):
            build_scene_shards(output, 2)


def test_two_builds_into_one_folder_do_not_meet(tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(InputError, match="another process is writing to"):
        build_scene_shards(tmp_path, 2)
    assert build_scene_shards(tmp_path, 2).samples == 2


def test_a_link_to_the_folder_is_as_good(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    build_scene_shards(tmp_path / "link", SCENES, samples_per_shard=SHARD)
    assert checksums(tmp_path / "disk") == checksums(shards)


# ---------------------------------------------------------------- going on


def test_a_finished_build_is_left_as_it_is(tmp_path: Path) -> None:
    first = build_scene_shards(tmp_path, 6, samples_per_shard=2)
    inodes = {path.name: path.stat().st_ino for path in tmp_path.glob("shard-*")}
    assert build_scene_shards(tmp_path, 6, samples_per_shard=2) == first
    assert {path.name: path.stat().st_ino for path in tmp_path.glob("shard-*")} == inodes


@pytest.mark.parametrize("lost", ["shard-000001.tar", "shard-000001.idx", "shard-000001.json"])
def test_a_lost_file_is_written_again(tmp_path: Path, lost: str) -> None:
    build_scene_shards(tmp_path, 6, samples_per_shard=2)
    before = checksums(tmp_path)
    (tmp_path / lost).unlink()
    (tmp_path / "manifest.json").unlink()
    build_scene_shards(tmp_path, 6, samples_per_shard=2)
    assert checksums(tmp_path) == before


def test_a_shard_cut_short_is_written_again(tmp_path: Path) -> None:
    build_scene_shards(tmp_path, 4, samples_per_shard=2)
    before = checksums(tmp_path)
    os.truncate(tmp_path / "shard-000000.tar", 5000)
    build_scene_shards(tmp_path, 4, samples_per_shard=2)
    assert checksums(tmp_path) == before


def test_a_damaged_marker_is_named(tmp_path: Path) -> None:
    build_scene_shards(tmp_path, 4, samples_per_shard=2)
    (tmp_path / "shard-000001.json").write_bytes(b'{"plan": ')
    with pytest.raises(InputError, match=r"shard-000001\.json is damaged.*: delete it and run"):
        build_scene_shards(tmp_path, 4, samples_per_shard=2)


def test_samples_that_failed_are_tried_again(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path / "source", ["a", "b", "c", "d"])
    mended = (images / "c.jpg").read_bytes()
    (images / "c.jpg").write_bytes(b"broken")
    output = tmp_path / "shards"
    assert build_shards(list_folder(images, masks), output, in_order(2)).failures == 1
    inode = (output / "shard-000000.tar").stat().st_ino
    (images / "c.jpg").write_bytes(mended)
    manifest = build_shards(list_folder(images, masks), output, in_order(2))
    assert (manifest.samples, manifest.failures) == (3, 1)  # only where it is asked for
    retry = BuildOptions(retry_failed=True)
    manifest = build_shards(list_folder(images, masks), output, in_order(2), retry)
    assert (manifest.samples, manifest.failures) == (4, 0)
    assert (output / "shard-000000.tar").stat().st_ino == inode  # nothing failed there
    build_shards(list_folder(images, masks), tmp_path / "fresh", in_order(2))
    assert checksums(output) == checksums(tmp_path / "fresh")


# ---------------------------------------------------------------- the tar format


@pytest.mark.parametrize("size", [0, 1, 511, 512, 8**11 - 1])
@pytest.mark.parametrize("name", ["a.jpg", "sub/key-1.mask.png", "k" * 90 + ".label.png"])
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    assert shard_file._ustar_header(name.encode(), size) == info.tobuf(tarfile.USTAR_FORMAT)
