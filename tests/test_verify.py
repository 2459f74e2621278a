"""Every damage is named: which file, which sample, which component; and nothing else is."""

import json
import os
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from data_pipeline.errors import InputError
from data_pipeline.index import DatasetIndex
from data_pipeline.inspect_cli import add_commands
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.sample import RawSample, encode_png
from data_pipeline.verify import LEVELS, Level, Problem, read_problems, verify_shards
from tests.sample_data import build_scene_shards, flip_byte, object_mask

COUNT, SHARD = 12, 4


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    build_scene_shards(root, COUNT, size=24, samples_per_shard=SHARD)
    return root


@pytest.fixture
def manifest(pristine: Path, tmp_path: Path) -> Manifest:
    """Shards of a test's own, free to be damaged."""
    shutil.copytree(pristine, tmp_path / "shards")
    return read_manifest(tmp_path / "shards")


def extent(manifest: Manifest, shard: int, sample: int, component: str) -> tuple[int, int, int]:
    found = DatasetIndex(manifest).shard(shard).extent(sample, component)
    assert found is not None
    return found


def key_of(manifest: Manifest, shard: int, sample: int) -> str:
    return DatasetIndex(manifest).shard(shard).keys[sample]


def files(problems: list[Problem]) -> set[str]:
    return {problem.file for problem in problems}


@pytest.mark.parametrize("level", LEVELS)
def test_shards_as_they_were_built_are_well(manifest: Manifest, level: Level) -> None:
    seen = []
    assert verify_shards(manifest.root, level, progress=lambda check: seen.append(check)) == []
    assert [check.entry for check in seen] == list(manifest.shards)
    if level != "fast":
        assert [check.sha256 for check in seen] == [entry.sha256 for entry in manifest.shards]


@pytest.mark.parametrize("component", ["image", "mask.png", "label.png", "json"])
def test_a_flipped_byte_names_its_sample_and_component(manifest: Manifest, component: str) -> None:
    offset, size, _ = extent(manifest, 1, 2, component)
    for place in (0, size // 2, size - 1):
        flip_byte(manifest.root / "shard-000001.tar", offset + place)
        name = "jpg" if component == "image" else component
        expected = [
            Problem("shard-000001.tar", "", "", "its SHA-256 differs"),
            Problem("shard-000001.tar", key_of(manifest, 1, 2), name, "the checksum differs"),
        ]
        assert verify_shards(manifest.root, "hash") == expected
        assert verify_shards(manifest.root, "decode") == expected
        assert verify_shards(manifest.root, "fast") == []
        flip_byte(manifest.root / "shard-000001.tar", offset + place)
    assert verify_shards(manifest.root) == []


def test_every_byte_of_an_archive_counts(manifest: Manifest) -> None:
    """Headers, padding and the end mark, too; a damaged header names its sample."""
    path = manifest.root / "shard-000002.tar"
    first, size, _ = extent(manifest, 2, 0, "image")
    header = first - 512
    places = {
        header: True,  # its name
        header + 130: True,  # its size
        header + 150: True,  # its checksum
        first + size: False,  # padding, or the next header
        path.stat().st_size - 1: False,
    }
    for place, named in places.items():
        flip_byte(path, place)
        found = verify_shards(manifest.root)
        assert found[0] == Problem(path.name, "", "", "its SHA-256 differs")
        if named:
            assert (found[1].key, found[1].component) == (key_of(manifest, 2, 0), "jpg")
            assert "header" in found[1].what or "calls it" in found[1].what
        flip_byte(path, place)


def test_the_archive_holds_what_the_index_says_under_its_name(manifest: Manifest) -> None:
    """A header that is whole, but another file's."""
    path = manifest.root / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    first, second = (extent(manifest, 0, number, "image")[0] - 512 for number in (0, 1))
    data[first : first + 512] = data[second : second + 512]
    path.write_bytes(data)
    found = verify_shards(manifest.root)[1]
    ours, theirs = key_of(manifest, 0, 0), key_of(manifest, 0, 1)
    assert found.key == ours
    assert found.what == f"the archive calls it '{theirs}.jpg', not '{ours}.jpg'"


def test_a_shard_that_was_cut_names_the_samples_behind_the_cut(manifest: Manifest) -> None:
    path = manifest.root / "shard-000001.tar"
    size = path.stat().st_size
    offset, length, _ = extent(manifest, 1, 2, "image")
    os.truncate(path, offset + length // 2)
    expected = Problem(
        path.name, "", "", f"has {offset + length // 2:,} bytes, the manifest says {size:,}"
    )
    assert verify_shards(manifest.root, "fast") == [expected]
    found = verify_shards(manifest.root)
    assert found[0] == expected
    assert {problem.key for problem in found[1:]} == {
        key_of(manifest, 1, 2),
        key_of(manifest, 1, 3),
    }
    assert {problem.what for problem in found[1:]} == {"the shard is cut short"}


def test_swapped_shards_are_called_by_their_names(manifest: Manifest) -> None:
    first, second = (manifest.root / f"shard-{number:06d}.tar" for number in (0, 2))
    first.rename(manifest.root / "aside")
    second.rename(first)
    (manifest.root / "aside").rename(second)
    found = verify_shards(manifest.root)
    assert files(found) == {first.name, second.name}
    told = {problem.file: problem.what for problem in found if "holds the bytes" in problem.what}
    assert told == {
        first.name: f"it holds the bytes of {second.name}: rename it back",
        second.name: f"it holds the bytes of {first.name}: rename it back",
    }
    assert len({problem.key for problem in found if problem.key}) == 2 * SHARD


@pytest.mark.parametrize("suffix", [".tar", ".idx", ".records", ".json"])
def test_a_missing_file(manifest: Manifest, suffix: str) -> None:
    name = f"shard-000001{suffix}"
    (manifest.root / name).unlink()
    for level in LEVELS:
        found = verify_shards(manifest.root, level)
        assert files(found) == {name}
        assert "No such file" in found[0].what


@pytest.mark.parametrize("suffix", [".idx", ".records", ".json"])
def test_an_edited_index(manifest: Manifest, suffix: str) -> None:
    name = f"shard-000001{suffix}"
    data = (manifest.root / name).read_bytes()
    for changed in (data.replace(b"1", b"2", 1), data + b"\n", data[:-1], b""):
        (manifest.root / name).write_bytes(changed)
        assert files(verify_shards(manifest.root, "fast")) == {name}
        assert files(verify_shards(manifest.root)) == {name}


def test_an_edited_manifest(manifest: Manifest) -> None:
    path = manifest.root / "manifest.json"
    data = path.read_bytes()
    value = json.loads(data)
    fields = ("samples", "failures", "shards")
    edits = [json.dumps(value | {field: value[field] * 2}).encode() for field in fields]
    edits += [data.replace(b' "sha256"', b' "sha257"'), data[:-40], b"", data + b" "]
    edits += [json.dumps(value, indent=3).encode()]
    for changed in edits:
        assert changed != data
        path.write_bytes(changed)
        assert files(verify_shards(manifest.root, "fast")) == {"manifest.json"}
    path.unlink()
    with pytest.raises(InputError, match=r"holds no manifest\.json"):
        verify_shards(manifest.root)


def test_an_older_manifest_is_well(manifest: Manifest) -> None:
    path = manifest.root / "manifest.json"
    value = json.loads(path.read_text())
    del value["sha256"]
    for shard in value["shards"]:
        del shard["index"], shard["quarantined"]
    path.write_text(json.dumps(value, indent=1) + "\n")
    assert verify_shards(manifest.root) == []


def test_stray_files_are_named_and_empty_shards_are_none(manifest: Manifest) -> None:
    (manifest.root / "shard-000009.tar").write_bytes(b"")
    (manifest.root / "shard-000009.idx").write_bytes(b"")
    (manifest.root / "notes.txt").write_bytes(b"")
    (manifest.root / "shard-000008.json").write_text('{"samples": []}')
    (manifest.root / "shard-000001.quarantine-1.json").write_text("{}")  # of a killed run
    found = verify_shards(manifest.root, "fast")
    assert files(found) == {"shard-000009.tar", "shard-000009.idx"}
    assert {problem.what for problem in found} == {
        "is not in the manifest: remove it, or reindex the folder"
    }


def test_decoding_finds_what_checksums_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that goes wrong after its checks: bytes and checksums agree, pictures do not."""
    root = tmp_path / "shards"
    import data_pipeline.write_shards as writer

    pack = writer.pack_sample

    def wrong(key: str, source: str, raw: RawSample, *args: object) -> object:
        packed = pack(key, source, raw, *args)  # type: ignore[arg-type]
        if key.endswith("3"):
            packed.components["mask.png"] = encode_png(object_mask(0, 5, 5))
        if key.endswith("5"):
            packed.components["jpg"] = packed.components["jpg"][:200]
        return packed

    monkeypatch.setattr(writer, "pack_sample", wrong)
    build_scene_shards(root, 8, size=24, samples_per_shard=4)
    assert verify_shards(root, "hash") == []
    found = {problem.key[-1]: problem for problem in verify_shards(root, "decode")}
    assert set(found) == {"3", "5"}
    assert (found["3"].component, found["3"].what[:17]) == ("mask.png", "is 5×5 pixels, it")
    assert (found["5"].component, found["5"].what[:17]) == ("jpg", "cannot be decoded")


def test_any_number_of_processes_says_the_same(manifest: Manifest) -> None:
    for shard in (0, 2):
        flip_byte(manifest.root / f"shard-{shard:06d}.tar", extent(manifest, shard, 1, "image")[0])
    assert verify_shards(manifest.root, processes=2) == verify_shards(manifest.root)
    assert len(verify_shards(manifest.root)) == 4


# ---------------------------------------------------------------- the command


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    add_commands(app)
    return app


def test_the_command_lists_problems_and_says_so_with_its_status(
    manifest: Manifest, tmp_path: Path, app: typer.Typer
) -> None:
    arguments = ["verify", str(manifest.root), "-p", "1", "--output", str(tmp_path / "out.jsonl")]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.output) == (0, "all is well\n")
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    flip_byte(manifest.root / "shard-000001.tar", extent(manifest, 1, 2, "image")[0])
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    key = key_of(manifest, 1, 2)
    assert f"  shard-000001.tar: {key}.jpg: the checksum differs\n" in done.output
    assert done.output.startswith("2 problems:\n")
    assert read_problems(tmp_path / "out.jsonl") == verify_shards(manifest.root)


@pytest.mark.parametrize("command", ["verify", "quarantine", "reindex", "records", "stats"])
def test_an_address_is_refused(app: typer.Typer, command: str) -> None:
    done = CliRunner().invoke(app, [command, "s3://bucket/shards"])
    assert isinstance(done.exception, InputError)
    assert str(done.exception).startswith("s3://bucket/shards is elsewhere; copy it to a folder")


@pytest.mark.parametrize("line", ["{", "[]", '{"file": "a"}', '{"file": 1, "key": "", "x": 1}'])
def test_a_list_of_something_else_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=r"problems\.jsonl, line 1, is no problem of"):
        read_problems(path)


def test_an_unknown_level_is_refused(manifest: Manifest) -> None:
    with pytest.raises(InputError, match=r"the level is 'deep'; it can be fast, hash, decode"):
        verify_shards(manifest.root, "deep")  # type: ignore[arg-type]
