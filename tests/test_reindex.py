"""Tars of others are indexed in place: what fits is read, what does not is listed, none changes."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from data_pipeline.errors import InputError
from data_pipeline.index import DatasetIndex
from data_pipeline.inspect_cli import add_commands
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.quarantine import quarantine_samples
from data_pipeline.reader import SampleReader
from data_pipeline.reindex import FAILURES, Reindexed, reindex_tars
from data_pipeline.sample import decode_grey
from data_pipeline.tar_samples import MemberNames
from data_pipeline.verify import verify_shards
from tests.sample_data import (
    HEIGHT,
    WIDTH,
    build_scene_shards,
    checksums,
    encode,
    object_mask,
    picture,
)

CLASSES = ("background", "one", "two")


def write_tar(
    path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(
    name: str, number: int = 0, mask: str = "mask.png", label: str | None = None
) -> list[tuple[str, bytes]]:
    """Members of one sample."""
    members = [
        (f"{name}.jpg", encode(picture(number), "JPEG", quality=90)),
        (f"{name}.{mask}", encode(object_mask(number))),
    ]
    return [*members, (f"{name}.{label}", encode(object_mask(number)))] if label else members


def failures(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / FAILURES).read_bytes().splitlines()]


def keys(manifest: Manifest) -> list[str]:
    index = DatasetIndex(manifest)
    return [key for number in range(len(index.counts)) for key in index.shard(number).keys]


def assert_read_in_place(root: Path, done: Reindexed) -> None:
    """Checks say that all is well, and the bytes read are those that tarfile reads."""
    assert verify_shards(root, "decode") == []
    assert read_manifest(root) == done.manifest
    reader = SampleReader(DatasetIndex(done.manifest))
    for number, entry in enumerate(done.manifest.shards):
        with tarfile.open(root / entry.name) as tar:
            held = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
        with tarfile.open(root / entry.name) as tar:
            value = json.loads((root / entry.index).read_text())
            for place, described in enumerate(value["samples"]):
                raw = reader.read(number, place, label=True)
                found = {"mask.png": raw.mask, "label.png": raw.label}
                for slot in described["components"]:
                    name = described.get("members", {}).get(slot, f"{described['key']}.{slot}")
                    assert name in held
                    member = tar.extractfile(name)
                    assert member is not None
                    if slot != "json":
                        assert found.get(slot, raw.image) == member.read()


def test_indexes_that_were_lost_are_made_again(tmp_path: Path) -> None:
    """The tars that were built here give the samples that were built."""
    before = build_scene_shards(tmp_path, 9, size=24, samples_per_shard=4)
    indexes = [json.loads((tmp_path / entry.index).read_text()) for entry in before.shards]
    sums = checksums(tmp_path)
    for path in tmp_path.iterdir():
        if path.suffix in (".json", ".idx"):
            path.unlink()
    done = reindex_tars(tmp_path, classes=before.classes)
    assert_read_in_place(tmp_path, done)
    assert (done.failures, done.dropped_labels) == (0, 0)
    assert (done.manifest.samples, done.manifest.classes) == (9, before.classes)
    for entry, index in zip(done.manifest.shards, indexes, strict=True):
        again = json.loads((tmp_path / entry.index).read_text())
        assert (again["sha256"], again["bytes"]) == (index["sha256"], index["bytes"])
        for ours, theirs in zip(again["samples"], index["samples"], strict=True):
            assert ours == {name: theirs[name] for name in ours}
    for name, value in checksums(tmp_path).items():
        if name.endswith((".tar", ".idx")):
            assert value == sums[name]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_others(tmp_path: Path, form: int) -> None:
    """Long, foreign and dotted names, folders, links, other files, every image format."""
    long = "a" * 70 + "/" + "b" * 85 if form != tarfile.USTAR_FORMAT else "a" * 70 + "/" + "b" * 20
    other = [("./train/0001.jpeg", encode(picture(3), "JPEG"))]
    other += [("./train/0001.Seg.PNG", encode(object_mask(3))), ("./train/0001.cls", b"7")]
    webp = [("größe 1.webp", encode(picture(4), "WEBP", lossless=True))]
    png = [
        ("x.png", encode(picture(5))),
        ("x.json", b"no json"),
        ("x.Seg.PNG", encode(object_mask())),
    ]
    members = [*sample(long, 1, "Seg.PNG"), *other, *webp, *png, ("README", b"text")]
    write_tar(tmp_path / "part-0.tar", members, form)
    before = checksums(tmp_path)
    done = reindex_tars(tmp_path, MemberNames(mask="Seg.PNG"))
    assert_read_in_place(tmp_path, done)
    assert checksums(tmp_path)["part-0.tar"] == before["part-0.tar"]
    assert done.failures == 0
    found = keys(done.manifest)
    assert found[1] == "train/0001"
    assert found[3] == "x"
    assert all(len(key) <= 90 and key.isascii() for key in found)
    index = DatasetIndex(done.manifest).shard(0)
    assert index.image_names == ["jpg", "jpg", "webp", "png"]
    assert index.sizes.tolist() == [[HEIGHT, WIDTH]] * 4
    assert index.proposals.tolist() == [2, 2, 0, 2]
    lines = (tmp_path / "part-0.idx").read_text().splitlines()
    assert lines[0] == "v1.2 4"
    assert [part.split(" ")[0] for part in lines[2].split("  ")] == ["jpeg"]
    assert lines[2].split(" ")[4] == "Seg.PNG"
    assert lines[2].split(" ")[7] == "./train/0001.Seg.PNG"
    assert done.manifest.shards[0].masks == 3


def test_dalis_own_reader_takes_the_index(tmp_path: Path) -> None:
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def

    members = [*sample("a/0", 0, "seg.png"), *sample("a/1", 1, "seg.png")]
    write_tar(tmp_path / "t.tar", members, tarfile.PAX_FORMAT)
    reindex_tars(tmp_path, MemberNames(mask="seg.png"))

    @pipeline_def(batch_size=2, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        paths = {"paths": str(tmp_path / "t.tar"), "index_paths": str(tmp_path / "t.idx")}
        image, mask = fn.readers.webdataset(ext=["jpg", "seg.png"], **paths)
        return image, mask

    built = pipeline()
    built.build()
    images, masks = built.run()
    for number in range(2):
        assert images.at(number).tobytes() == members[2 * number][1]
        assert masks.at(number).tobytes() == members[2 * number + 1][1]


def test_what_is_not_in_our_form_is_listed_with_the_remedy(tmp_path: Path) -> None:
    turned = Image.fromarray(picture())
    exif = turned.getexif()
    exif[0x0112] = 6
    jpeg, palette = encode(picture(), "JPEG"), encode(object_mask(), mode="P")
    binary = encode((255 * (object_mask() > 0)).astype(np.uint8))
    wrong = {
        "binary": [("jpg", jpeg), ("mask.png", binary)],
        "turned": [("jpg", encode(turned, "JPEG", exif=exif))],
        "deep": [("png", encode(Image.fromarray(np.zeros((4, 4), np.uint16))))],
        "clear": [("png", encode(picture(), mode="RGBA"))],
        "broken": [("jpg", jpeg[:99])],
        "colours": [("jpg", jpeg), ("mask.png", encode(picture()))],
        "palette": [("jpg", jpeg), ("mask.png", palette)],
        "small": [("jpg", jpeg), ("mask.png", encode(object_mask(0, 9, 9)))],
        "label": [("jpg", jpeg), ("label.png", encode(object_mask() * 9))],
        "gif": [("png", encode(picture(), "GIF"))],
        "two": [("jpg", jpeg), ("png", encode(picture()))],
        "none": [("mask.png", encode(object_mask()))],
        "bomb": [("png", encode(picture())[:16] + b"\x7f" * 8 + encode(picture())[24:])],
    }
    members = [(f"{key}.{name}", data) for key, parts in wrong.items() for name, data in parts]
    members = [*sample("good0"), *members, *sample("good1"), *sample("good0")]
    write_tar(tmp_path / "t.tar", members)
    done = reindex_tars(tmp_path, classes=CLASSES)
    assert_read_in_place(tmp_path, done)
    assert keys(done.manifest) == ["good0", "good1"]
    told = {line["key"]: (line["stage"], line["reason"]) for line in failures(tmp_path)}
    assert {key: stage for key, (stage, _) in told.items()} == {
        "binary": "mask",
        "colours": "mask",
        "palette": "mask",
        "small": "mask",
        "turned": "image",
        "deep": "image",
        "clear": "image",
        "broken": "image",
        "gif": "image",
        "bomb": "image",
        "label": "label",
        "two": "match",
        "none": "match",
        "good0": "match",
    }
    assert told["binary"][1] == "has 0 and 255 only, and 255 is read as ignore"
    assert told["good0"][1] == "the archive has two of this name"
    assert done.failures == done.manifest.failures == len(wrong) + 1
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    write_tar(tmp_path / "t.tar", [(f"k.{name}", data) for name, data in wrong["binary"]])
    with pytest.raises(InputError) as caught:
        reindex_tars(tmp_path)
    assert "t.tar:k: mask: has 0 and 255 only" in str(caught.value)
    assert "`maskbank shards build webdataset` writes them again" in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()


def test_a_tar_that_was_cut_keeps_the_samples_before(tmp_path: Path) -> None:
    """Cut at every block, and at some bytes between: never a crash, never half a sample."""
    members = [part for number in range(3) for part in sample(f"k{number}", number)]
    whole = write_tar(tmp_path / "whole", members).read_bytes()
    with tarfile.open(tmp_path / "whole") as tar:
        infos = tar.getmembers()
    ends = [infos[number].offset_data + infos[number].size for number in (1, 3, 5)]
    path = tmp_path / "t" / "t.tar"
    path.parent.mkdir()
    mark = -(-ends[2] // 512) * 512
    for cut in sorted({*range(512, mark + 1, 512), *ends, *(end - 1 for end in ends), 700, 1}):
        path.write_bytes(whole[:cut])
        expected = sum(end <= cut for end in ends)
        if not expected:
            with pytest.raises(InputError, match=r"not one sample|hold no image"):
                reindex_tars(path.parent, force=True)
            continue
        done = reindex_tars(path.parent, force=True)
        assert keys(done.manifest) == [f"k{number}" for number in range(expected)], cut
        assert verify_shards(path.parent, "decode") == []
        assert any("archive" in failure["reason"] for failure in failures(path.parent)), cut


def test_a_header_that_is_damaged_is_told(tmp_path: Path) -> None:
    members = [part for number in range(3) for part in sample(f"k{number}", number)]
    path = write_tar(tmp_path / "t.tar", members)
    with tarfile.open(path) as tar:
        place = tar.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    data[place + 3] ^= 0xFF
    path.write_bytes(data)
    done = reindex_tars(tmp_path)
    assert keys(done.manifest) == ["k0"]
    assert failures(tmp_path)[-1]["source"] == "t.tar"
    assert f"has no readable header at byte {place:,}" in failures(tmp_path)[-1]["reason"]


def test_labels_need_the_names_of_their_classes(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", [*sample("a", 0, label="cls.png"), *sample("b", 1)])
    done = reindex_tars(tmp_path, MemberNames(label="cls.png"))
    assert (done.dropped_labels, done.manifest.shards[0].labels) == (1, 0)
    assert_read_in_place(tmp_path, done)
    done = reindex_tars(tmp_path, MemberNames(label="cls.png"), CLASSES, force=True)
    assert (done.dropped_labels, done.manifest.shards[0].labels) == (0, 1)
    assert_read_in_place(tmp_path, done)
    label = SampleReader(DatasetIndex(done.manifest)).read(0, 0, label=True).label
    np.testing.assert_array_equal(decode_grey(label or b"", "label"), object_mask(0))
    # classes of the manifest that was there hold, unless others are given
    assert (
        reindex_tars(tmp_path, MemberNames(label="cls.png"), force=True).manifest == done.manifest
    )


def test_any_number_of_processes_writes_the_same(tmp_path: Path) -> None:
    for number in range(3):
        members = [*sample(f"k{number}", number), ("bad.jpg", b"")]
        write_tar(tmp_path / f"t-{number}.tar", members)
    write_tar(tmp_path / "u.tar", [("bad.jpg", b"")])
    reindex_tars(tmp_path)
    before = checksums(tmp_path)
    reindex_tars(tmp_path, force=True, processes=2)
    assert checksums(tmp_path) == before
    assert len(failures(tmp_path)) == 4
    assert verify_shards(tmp_path) == []  # a tar without a sample is known


def test_a_lost_index_of_a_foreign_tar_is_made_anew(tmp_path: Path) -> None:
    """Quarantine knows from the manifest what the tars call masks."""
    write_tar(tmp_path / "t.tar", sample("a", 0, "seg.png"))
    done = reindex_tars(tmp_path, MemberNames(mask="seg.png"))
    (tmp_path / "t.json").unlink()
    outcome = quarantine_samples(tmp_path, verify_shards(tmp_path))
    assert (outcome.indexes, outcome.manifest.samples) == (1, 1)
    assert outcome.manifest.shards[0].masks == done.manifest.shards[0].masks == 1


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        reindex_tars(tmp_path / "none")
    with pytest.raises(InputError, match="holds no tar"):
        reindex_tars(tmp_path)
    write_tar(tmp_path / "a b.tar", sample("a"))
    with pytest.raises(InputError, match=r"a b\.tar: a shard's name has"):
        reindex_tars(tmp_path)
    os.rename(tmp_path / "a b.tar", tmp_path / "a_b.tar")
    reindex_tars(tmp_path)
    with pytest.raises(InputError, match=r"has a manifest\.json; check it with .*--force"):
        reindex_tars(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"damaged")
    assert reindex_tars(tmp_path, force=True).manifest.samples == 1


def test_the_command(tmp_path: Path) -> None:
    app = typer.Typer()
    add_commands(app)
    write_tar(tmp_path / "t.tar", [*sample("a", 0, "seg.png", "label.png"), ("b.jpg", b"")])
    arguments = ["reindex", str(tmp_path), "--mask-ext", ".seg.png", "-p", "1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[0] == f"{tmp_path / 'manifest.json'}: 1 samples in 1 tars"
    assert "1 labels left out: name their classes with --classes FILE" in done.output
    assert "1 cannot be read in place" in done.output
    assert "  t.tar:b: image: the file is empty" in done.output
    assert verify_shards(tmp_path) == []
