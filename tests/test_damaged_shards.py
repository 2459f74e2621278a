"""A thousand shards damaged at random: each is named, training goes on, no wrong byte is read."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build_config import BuildConfig
from data_pipeline.errors import InputError
from data_pipeline.fetch import FetchedSample, Fetcher
from data_pipeline.index import DatasetIndex
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.order import SampleOrder, batch_positions
from data_pipeline.quarantine import quarantine_samples
from data_pipeline.reader import SampleReader
from data_pipeline.sample import decode_grey
from data_pipeline.sources.item import Listing
from data_pipeline.verify import verify_shards
from data_pipeline.views import ViewConfig
from data_pipeline.write_shards import build_shards
from tests.sample_data import BytesItem, encode
from tests.test_train import command, finish
from trainer.metrics import read_metrics

SHARDS, DAMAGED, SEED = 1200, 1000, 7
VIEWS = ViewConfig(image_size=32, candidates=4)
ORDER = {"seed": 3, "window": 8}
KINDS = (
    *("flip", "cut", "swap", "delete"),
    *("edit index", "lose index", "lose indexes", "edit idx", "edit records"),
)
COSTS_NOTHING = {"edit index", "lose index", "edit idx", "edit records"}  # in training


def build(root: Path, shards: int) -> Manifest:
    """Shards of two small samples each, no two alike."""
    draw = np.random.default_rng(SEED)
    items = []
    for number in range(2 * shards):
        height, width = draw.integers(16, 33, 2)
        image = draw.integers(0, 256, (height, width, 3), np.uint8)
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : -height // 4, width // 4 : -width // 4] = 1 + number % 3
        items.append(BytesItem(f"s{number:05d}", encode(image, "JPEG"), encode(mask)))
    with pytest.MonkeyPatch.context() as patched:  # thousands of files: no power cut is tested
        patched.setattr(os, "fsync", lambda descriptor: None)
        manifest = build_shards(Listing(items), root, BuildConfig(2, "ids"))
    assert manifest is not None
    assert len(manifest.shards) == shards
    return manifest


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return build(tmp_path_factory.mktemp("pristine"), SHARDS)


@pytest.fixture(scope="module")
def damaged(
    pristine: Manifest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """The same shards, a thousand of them damaged: folder, and stem -> kind of damage."""
    root = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(pristine.root, root)
    draw = np.random.default_rng(SEED)
    stems = [entry.stem for entry in pristine.shards]
    chosen = [stems[number] for number in draw.permutation(SHARDS)[:DAMAGED]]
    done = {}
    while chosen:
        kind = KINDS[draw.integers(len(KINDS))]
        stem = chosen.pop()
        if kind == "swap" and chosen:
            other = chosen.pop()
            swap(root / f"{stem}.tar", root / f"{other}.tar")
            done[other] = kind
        else:
            kind = "flip" if kind == "swap" else kind
            damage(root / stem, kind, draw)
        done[stem] = kind
    assert len(done) == DAMAGED
    return root, done


def swap(first: Path, second: Path) -> None:
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def damage(stem: Path, kind: str, draw: np.random.Generator) -> None:
    tar, index, idx, records = (
        stem.with_name(stem.name + suffix) for suffix in (".tar", ".json", ".idx", ".records")
    )
    if kind == "delete":
        tar.unlink()
    elif kind == "lose index":
        index.unlink()
    elif kind == "lose indexes":
        index.unlink()
        records.unlink()
    elif kind == "cut":
        os.truncate(tar, int(draw.integers(tar.stat().st_size)))
    elif kind == "edit index" and draw.integers(2):
        value = json.loads(index.read_text())  # well-formed, and wrong
        extent = next(iter(value["samples"][0]["components"].values()))
        extent[draw.integers(3)] += 1
        index.write_text(json.dumps(value))
    else:
        files = {"flip": tar, "edit index": index, "edit idx": idx, "edit records": records}
        flip_bit(files[kind], draw)


def flip_bit(path: Path, draw: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[draw.integers(len(data))] ^= 1 << int(draw.integers(8))
    path.write_bytes(data)


def fetch(
    manifest: Manifest, batches: int, size: int, world: int
) -> tuple[list[FetchedSample], int]:
    """All samples of the first global batches, as `world` ranks get them; and bad ones met."""
    fetched, bad = [], 0
    parts: dict[tuple[int, int], list[FetchedSample]] = {}
    for rank in range(world):
        index = DatasetIndex(manifest)
        fetcher = Fetcher(SampleReader(index), SampleOrder(index.counts, **ORDER), VIEWS, threads=2)
        for step in range(batches):
            parts[step, rank] = fetcher.fetch(batch_positions(step, size, rank, world))
        bad += fetcher.bad_samples
        fetcher.close()
    for place in sorted(parts):
        fetched += parts[place]
    return fetched, bad


def assert_pristine(fetched: list[FetchedSample], pristine: Manifest) -> None:
    """What was delivered is, byte by byte, what was packed under that number."""
    reader = SampleReader(DatasetIndex(pristine))
    for sample in fetched:
        raw = reader.read(*reader.index.locate(sample.sample_id))
        assert sample.image.tobytes() == raw.image
        np.testing.assert_array_equal(sample.mask, decode_grey(raw.mask or b"", "mask"))


# ---------------------------------------------------------------- finding them


@pytest.mark.slow
def test_every_damaged_shard_is_named_and_no_other(
    damaged: tuple[Path, dict[str, str]],
) -> None:
    root, kinds = damaged
    assert set(kinds.values()) == set(KINDS)
    problems = verify_shards(root, "hash", processes=2)
    assert {problem.file.rpartition(".")[0] for problem in problems} == set(kinds)
    for problem in problems:  # and the right file of it
        kind = kinds[problem.file.rpartition(".")[0]]
        suffix = {"edit idx": ".idx", "edit records": ".records"}
        whole = ".json" if "index" in kind else ".tar"
        assert problem.file.endswith(suffix.get(kind, whole))


@pytest.mark.slow
def test_quarantine_leaves_what_is_whole(
    damaged: tuple[Path, dict[str, str]], pristine: Manifest, tmp_path: Path
) -> None:
    root = tmp_path / "shards"
    shutil.copytree(damaged[0], root)
    done = quarantine_samples(root, verify_shards(root), processes=2)
    assert verify_shards(root) == []
    kinds = Counter(damaged[1].values())
    # a flipped bit costs one sample of two or none; indexes cost nothing
    indexes = kinds["edit index"] + kinds["lose index"] + kinds["lose indexes"]
    least = 2 * (SHARDS - DAMAGED + indexes + kinds["edit idx"] + kinds["edit records"])
    assert (
        least + kinds["flip"] <= done.manifest.samples <= least + 2 * kinds["flip"] + kinds["cut"]
    )
    assert done.indexes == indexes
    assert done.dropped >= kinds["delete"] + kinds["swap"]
    manifest = read_manifest(root)
    reader, index = SampleReader(DatasetIndex(manifest)), DatasetIndex(pristine)
    before = {
        key: (shard, place)
        for shard in range(SHARDS)
        for place, key in enumerate(index.shard(shard).keys)
    }
    whole = SampleReader(index)
    for shard, entry in enumerate(manifest.shards):
        for place in range(entry.samples):
            key = reader.index.shard(shard).keys[place]
            assert reader.read(shard, place) == whole.read(*before[key])


# ---------------------------------------------------------------- training over them


@pytest.mark.slow
def test_an_epoch_over_them_delivers_whole_samples_only(
    damaged: tuple[Path, dict[str, str]], pristine: Manifest
) -> None:
    """The same order, the same samples where they are whole, the same substitutes on any ranks."""
    root, kinds = damaged
    manifest = read_manifest(root, check_files=False)
    fetched, bad = fetch(manifest, batches=8, size=300, world=2)
    assert_pristine(fetched, pristine)
    again, same = fetch(manifest, batches=8, size=300, world=1)
    ids = [sample.sample_id for sample in fetched]
    assert ids == [sample.sample_id for sample in again]
    assert bad == same > 2 * sum(kind in ("delete", "lose indexes") for kind in kinds.values())
    undisturbed, _ = fetch(pristine, batches=8, size=300, world=1)
    for ours, theirs in zip(ids, undisturbed, strict=True):
        stem = pristine.shards[theirs.sample_id // 2].stem
        if kinds.get(stem, "edit idx") in COSTS_NOTHING:
            assert ours == theirs.sample_id
        elif kinds[stem] not in ("flip", "cut"):
            assert ours != theirs.sample_id


@pytest.mark.slow
def test_two_ranks_train_over_them(damaged: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    root, _ = damaged
    settings = ("run.steps=6", "run.log_every=6", "data.batch_size=32", "bank.capacity=64")
    output = finish(command(root, tmp_path / "run", 2, *settings))
    row = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert row["step"] == 6
    assert row["bad_samples"] > 60  # of 192 positions, and of what was tried in their place
    assert np.isfinite(row["loss"])
    assert f"run `maskbank shards verify {root}`" in output
    assert "bad sample replaced" in output


@pytest.mark.parametrize("share", [0.75, 0.9])
def test_where_most_shards_are_gone_the_rest_is_trained_on(tmp_path: Path, share: float) -> None:
    pristine = build(tmp_path, 40)
    keep = round(40 * (1 - share))
    for entry in pristine.shards[keep:]:
        (tmp_path / entry.name).unlink()
    fetched, bad = fetch(read_manifest(tmp_path, check_files=False), batches=5, size=80, world=2)
    assert {sample.sample_id // 2 for sample in fetched} == set(range(keep))
    assert bad >= 5 * 80 * share


def test_where_nothing_can_be_read_it_ends_with_the_remedy(tmp_path: Path) -> None:
    pristine = build(tmp_path, 10)
    for entry in pristine.shards:
        (tmp_path / entry.index).unlink()
        (tmp_path / entry.records).unlink()
    with pytest.raises(InputError) as caught:
        fetch(read_manifest(tmp_path), batches=1, size=4, world=1)
    assert "shard index" in str(caught.value)
    assert f"maskbank shards verify {tmp_path}" in str(caught.value)


@pytest.mark.slow
def test_a_folder_without_any_shard_is_refused_before_a_rank_starts(tmp_path: Path) -> None:
    pristine = build(tmp_path / "shards", 10)
    for entry in pristine.shards:
        (tmp_path / "shards" / entry.name).unlink()
    output = finish(command(tmp_path / "shards", tmp_path / "run", 1), status=2)
    assert "not one of the 10 shards that the manifest lists is in" in output
