"""Bad samples leave the index and come back; a run killed anywhere in between can be repeated."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from data_pipeline import quarantine
from data_pipeline.errors import InputError
from data_pipeline.index import DatasetIndex, dali_index
from data_pipeline.inspect_cli import add_commands
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.quarantine import Outcome, quarantine_samples, read_log
from data_pipeline.reader import SampleReader
from data_pipeline.restore import restore_samples
from data_pipeline.verify import Problem, verify_shards, write_problems
from tests.sample_data import build_scene_shards, checksums, flip_byte

COUNT, SHARD = 16, 4


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


def damage(manifest: Manifest, shard: int, sample: int, component: str = "image") -> str:
    """Flips a byte of a component (twice: it is whole again); returns the key."""
    index = DatasetIndex(manifest).shard(shard)
    found = index.extent(sample, component)
    assert found is not None
    flip_byte(manifest.root / manifest.shards[shard].name, found[0] + found[1] // 2)
    return index.keys[sample]


def clean(root: Path) -> Outcome:
    done = quarantine_samples(root, verify_shards(root))
    assert verify_shards(root) == []
    assert_readable(root)
    return done


def assert_readable(root: Path) -> None:
    """Every sample that the manifest counts can be read, and DALI's index says the same."""
    manifest = read_manifest(root)
    reader = SampleReader(DatasetIndex(manifest))
    for number, entry in enumerate(manifest.shards):
        for sample in range(entry.samples):
            reader.read(number, sample, label=True)
        value = json.loads((root / entry.index).read_text())
        assert (root / f"{entry.stem}.idx").read_bytes() == dali_index(value["samples"])


def keys(root: Path) -> list[str]:
    index = DatasetIndex(read_manifest(root))
    return [key for number in range(len(index.counts)) for key in index.shard(number).keys]


def tars(root: Path) -> dict[str, str]:
    return {name: sha for name, sha in checksums(root).items() if name.endswith(".tar")}


def test_nothing_wrong_nothing_done(manifest: Manifest) -> None:
    before = checksums(manifest.root)
    done = clean(manifest.root)
    assert (done.samples, done.dropped, done.indexes, done.left) == (0, 0, 0, ())
    assert restore_samples(manifest.root).samples == 0
    assert checksums(manifest.root) == before


def test_bad_samples_leave_and_come_back(manifest: Manifest, pristine: Path) -> None:
    every = keys(manifest.root)
    bad = {damage(manifest, 1, 0), damage(manifest, 1, 3, "mask.png"), damage(manifest, 3, 2)}
    before = tars(manifest.root)
    done = clean(manifest.root)
    assert (done.samples, done.dropped, done.indexes) == (3, 0, 0)
    assert tars(manifest.root) == before
    now = read_manifest(manifest.root)
    assert [entry.samples for entry in now.shards] == [4, 2, 4, 3]
    assert [entry.masks for entry in now.shards] == [4, 2, 4, 3]
    assert [entry.labels for entry in now.shards] == [4, 2, 4, 3]
    assert [entry.quarantined for entry in now.shards] == [0, 2, 0, 1]
    assert now.shards[1].index == "shard-000001.quarantine-1.json"
    assert keys(manifest.root) == [key for key in every if key not in bad]
    assert {line["key"] for line in read_log(manifest.root)} == bad
    assert {line["what"] for line in read_log(manifest.root)} == {
        "jpg: the checksum differs",
        "mask.png: the checksum differs",
    }
    # not restored as long as the tars are damaged
    assert restore_samples(manifest.root).samples == 0
    assert read_manifest(manifest.root) == now
    shutil.copy(pristine / "shard-000001.tar", manifest.root)
    partly = restore_samples(manifest.root)
    assert partly.samples == 2
    assert partly.left == ("shard-000003.tar: its bytes are not again those that were written",)
    shutil.copy(pristine / "shard-000003.tar", manifest.root)
    assert restore_samples(manifest.root).samples == 1
    assert read_manifest(manifest.root) == manifest
    assert keys(manifest.root) == every
    assert verify_shards(manifest.root) == []
    for name, checksum in checksums(pristine).items():
        assert checksums(manifest.root)[name] == checksum, name


def test_more_damage_in_a_shard_that_lost_samples_before(
    manifest: Manifest, pristine: Path
) -> None:
    original = (manifest.root / "shard-000001.json").read_bytes()
    damage(manifest, 1, 2)
    clean(manifest.root)
    damage(manifest, 1, 0)
    assert len(verify_shards(manifest.root)) == 2  # what is known is no problem, what is new is one
    clean(manifest.root)
    entry = read_manifest(manifest.root).shards[1]
    assert (entry.samples, entry.quarantined) == (2, 2)
    assert entry.index == "shard-000001.quarantine-2.json"
    value = json.loads((manifest.root / entry.index).read_text())
    assert [(out["place"], out["what"]) for out in value["quarantined"]] == [
        (2, "jpg: the checksum differs"),
        (0, "jpg: the checksum differs"),
    ]
    # the first index is put together again from the last one, were it lost
    (manifest.root / "shard-000001.json").unlink()
    shutil.copy(pristine / "shard-000001.tar", manifest.root)
    assert restore_samples(manifest.root).samples == 2
    assert (manifest.root / "shard-000001.json").read_bytes() == original
    assert read_manifest(manifest.root) == manifest


@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_shard_that_is_gone_is_dropped_and_comes_back_in_its_place(
    manifest: Manifest, pristine: Path, number: int
) -> None:
    name = f"shard-{number:06d}.tar"
    for gone in (1, number):
        (manifest.root / f"shard-{gone:06d}.tar").unlink()
        done = clean(manifest.root)
        assert (done.samples, done.dropped) == (SHARD, 1)
    now = read_manifest(manifest.root)
    assert (len(now.shards), now.samples) == (2, COUNT - 2 * SHARD)
    assert {line["key"] for line in read_log(manifest.root) if line["shard"] == name} == set(
        DatasetIndex(manifest).shard(number).keys
    )
    shutil.copy(pristine / "shard-000001.tar", manifest.root)
    assert (restore_samples(manifest.root).dropped, len(keys(manifest.root))) == (1, COUNT - SHARD)
    assert verify_shards(manifest.root) == []
    shutil.copy(pristine / name, manifest.root)
    assert restore_samples(manifest.root).samples == SHARD
    assert read_manifest(manifest.root) == manifest
    assert verify_shards(manifest.root) == []


def test_a_shard_that_was_cut_keeps_what_lies_before(manifest: Manifest) -> None:
    found = DatasetIndex(manifest).shard(2).extent(2, "mask.png")
    assert found is not None
    os.truncate(manifest.root / "shard-000002.tar", found[0] + 5)
    done = clean(manifest.root)
    assert done.samples == 2
    assert read_manifest(manifest.root).shards[2].bytes == found[0] + 5


def test_damage_outside_of_samples_costs_none(manifest: Manifest, pristine: Path) -> None:
    path = manifest.root / "shard-000000.tar"
    flip_byte(path, path.stat().st_size - 1)
    assert len(verify_shards(manifest.root)) == 1
    done = clean(manifest.root)
    assert (done.samples, done.manifest.samples) == (0, COUNT)
    shutil.copy(pristine / path.name, path)
    assert len(verify_shards(manifest.root)) == 1  # it is another file again
    restore_samples(manifest.root)
    assert read_manifest(manifest.root) == manifest


@pytest.mark.parametrize("data", [None, b"", b"{}", b'{"samples": []}'])
def test_a_lost_index_is_made_anew_from_its_tar(manifest: Manifest, data: bytes | None) -> None:
    every = keys(manifest.root)
    path = manifest.root / "shard-000001.json"
    before = json.loads(path.read_text())["samples"]
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    (manifest.root / "shard-000001.idx").unlink()
    done = clean(manifest.root)
    assert (done.samples, done.dropped, done.indexes) == (0, 0, 1)
    assert keys(manifest.root) == every
    entry = read_manifest(manifest.root).shards[1]
    assert (entry.index, entry.quarantined) == ("shard-000001.quarantine-1.json", 0)
    after = json.loads((manifest.root / entry.index).read_text())["samples"]
    for ours, theirs in zip(after, before, strict=True):
        for name in ("key", "source", "height", "width", "proposals", "components"):
            assert ours[name] == theirs[name]
    assert restore_samples(manifest.root).left == ()  # there is nothing to restore
    assert read_manifest(manifest.root).shards[1] == entry


def test_without_an_index_a_damaged_tar_cannot_be_trusted(
    manifest: Manifest, pristine: Path
) -> None:
    (manifest.root / "shard-000001.json").unlink()
    damage_at = DatasetIndex(manifest).shard(2).extent(1, "image")
    assert damage_at is not None
    flip_byte(manifest.root / "shard-000001.tar", damage_at[0])
    done = clean(manifest.root)
    assert (done.samples, done.dropped, done.indexes) == (SHARD, 1, 0)
    shutil.copy(pristine / "shard-000001.tar", manifest.root)
    done = restore_samples(manifest.root)  # now its index can be made anew
    assert (done.samples, done.dropped) == (SHARD, 1)
    assert verify_shards(manifest.root) == []
    assert keys(manifest.root) == keys(pristine)


def test_what_was_bad_once_does_not_come_back_with_a_new_index(manifest: Manifest) -> None:
    """Without the index that leaves it out, nothing tells a bad sample that decodes from others."""
    damage(manifest, 1, 2, "mask.png")
    clean(manifest.root)
    (manifest.root / "shard-000001.quarantine-1.json").unlink()
    done = clean(manifest.root)
    assert (done.samples, done.dropped, done.indexes) == (SHARD - 1, 1, 0)
    assert restore_samples(manifest.root).samples == 0


def test_an_idx_is_written_again(manifest: Manifest, pristine: Path) -> None:
    for number, data in enumerate((None, b"", b"v1.2 0\n")):
        path = manifest.root / f"shard-{number:06d}.idx"
        path.unlink() if data is None else path.write_bytes(data)
    clean(manifest.root)
    assert checksums(manifest.root) == checksums(pristine)


def test_samples_that_a_list_names_leave_too(manifest: Manifest, tmp_path: Path) -> None:
    """As those that only decoding finds, or that someone does not want."""
    unwanted = DatasetIndex(manifest).shard(2).keys[1]
    path = tmp_path / "problems.jsonl"
    write_problems(path, [Problem("shard-000002.tar", unwanted, "jpg", "shows a test card")])
    app = typer.Typer()
    add_commands(app)
    done = CliRunner().invoke(
        app, ["quarantine", str(manifest.root), "--problems", str(path), "-p", "1"]
    )
    assert done.exit_code == 0, done.output
    assert "took 1 samples out" in done.output
    assert f"{COUNT - 1} samples in 4 shards now" in done.output
    assert unwanted not in keys(manifest.root)
    assert read_log(manifest.root)[0]["what"] == "jpg: shows a test card"
    assert verify_shards(manifest.root) == []
    done = CliRunner().invoke(app, ["quarantine", str(manifest.root), "--restore", "-p", "1"])
    assert "put back 1 samples" in done.output
    assert read_manifest(manifest.root) == manifest


def test_what_no_shard_owns_is_left(manifest: Manifest) -> None:
    (manifest.root / "stray.tar").write_bytes(b"")
    done = quarantine_samples(manifest.root, verify_shards(manifest.root))
    assert done.samples == 0
    assert [left.partition(":")[0] for left in done.left] == ["stray.tar"]


def test_a_set_of_which_nothing_would_be_left_stays_as_it_is(manifest: Manifest) -> None:
    for entry in manifest.shards:
        (manifest.root / entry.name).unlink()
    before = checksums(manifest.root)
    with pytest.raises(InputError, match=r"not one sample of .* would be left; nothing was"):
        quarantine_samples(manifest.root, verify_shards(manifest.root))
    assert checksums(manifest.root) == before


def test_any_number_of_processes_does_the_same(manifest: Manifest, tmp_path: Path) -> None:
    for number in range(3):
        damage(manifest, number, number)
    (manifest.root / "shard-000003.tar").unlink()
    shutil.copytree(manifest.root, tmp_path / "other")
    quarantine_samples(manifest.root, verify_shards(manifest.root), processes=2)
    clean(tmp_path / "other")
    assert checksums(tmp_path / "other") == checksums(manifest.root)


# ---------------------------------------------------------------- killed in between


class _Killed(BaseException):
    pass


def run_killed_at_write(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], limit: int
) -> bool:
    """Calls `run`, dying before its write number `limit`; returns whether it came to that."""
    count, whole = 0, quarantine.atomic_write

    def write(path: Path) -> object:
        nonlocal count
        if count == limit:
            raise _Killed
        count += 1
        return whole(path)

    with monkeypatch.context() as patched:
        for module in ("quarantine", "restore", "manifest", "write_records"):
            patched.setattr(f"data_pipeline.{module}.atomic_write", write)
        try:
            run()
        except _Killed:
            return True
    return False


def test_killed_before_any_write_it_goes_on_where_it_was(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for place in ((0, 1), (1, 0), (1, 3)):
        damage(manifest, *place)
    (manifest.root / "shard-000003.tar").unlink()
    (manifest.root / "shard-000002.json").unlink()
    shutil.copytree(manifest.root, tmp_path / "undisturbed")
    expected = clean(tmp_path / "undisturbed").manifest.shards
    switched = []
    for limit in range(100):
        root = tmp_path / str(limit)
        shutil.copytree(manifest.root, root)
        problems = verify_shards(root)
        if not run_killed_at_write(monkeypatch, lambda: quarantine_samples(root, problems), limit):  # noqa: B023
            break
        now = read_manifest(root, check_files=False)
        assert now.shards in (manifest.shards, expected)
        switched.append(now.shards == expected)
        if switched[-1]:
            assert {problem.file[-4:] for problem in verify_shards(root)} <= {".idx"}
            reader = SampleReader(DatasetIndex(now))
            for sample_id in range(now.samples):
                reader.read(*reader.index.locate(sample_id))
        clean(root)
        assert checksums(root) == checksums(tmp_path / "undisturbed")
    # three indexes and their records, the log and the manifest; then .idx where samples were lost
    assert switched == [False] * 8 + [True] * 2


def test_a_restore_that_was_killed_is_repeated(
    manifest: Manifest, pristine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    damage(manifest, 0, 1)
    damage(manifest, 1, 0)
    (manifest.root / "shard-000003.tar").unlink()
    quarantined = clean(manifest.root).manifest.shards
    for number in (0, 1, 3):
        shutil.copy(pristine / f"shard-{number:06d}.tar", manifest.root)
    (manifest.root / "shard-000000.json").unlink()
    every = read_manifest(pristine).shards
    writes = 0
    for limit in range(100):
        root = tmp_path / str(limit)
        shutil.copytree(manifest.root, root)
        if not run_killed_at_write(monkeypatch, lambda: restore_samples(root), limit):  # noqa: B023
            break
        writes += 1
        assert read_manifest(root).shards in (quarantined, every)
        restore_samples(root)
        clean(root)  # an .idx may have been left as it was
        assert read_manifest(root).shards == every
        assert keys(root) == keys(pristine)
    assert writes == 4
