"""Reading shards back: the same bytes or an error that names the place, never a crash or a leak."""

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build_config import BuildConfig
from data_pipeline.errors import InputError, SampleError
from data_pipeline.fetch import MAX_SUBSTITUTES, FetchedSample, Fetcher
from data_pipeline.index import DatasetIndex
from data_pipeline.labelled import ShardSet
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.order import SampleOrder
from data_pipeline.reader import SampleReader
from data_pipeline.sample import decode_grey, decode_rgb
from data_pipeline.sources.generated import list_scenes
from data_pipeline.sources.item import Listing
from data_pipeline.views import ViewConfig
from data_pipeline.whole_images import WholeImages
from data_pipeline.write_shards import build_shards
from tests.sample_data import BytesItem, build_scene_shards, encode, flip_byte, object_mask, picture

COUNT, SHARD = 24, 6
VIEWS = ViewConfig(image_size=32, candidates=4)


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


def open_reader(manifest: Manifest) -> SampleReader:
    return SampleReader(DatasetIndex(manifest))


def extent(manifest: Manifest, shard: int, sample: int, component: str) -> tuple[int, int, int]:
    found = DatasetIndex(manifest).shard(shard).extent(sample, component)
    assert found is not None
    return found


def damage(manifest: Manifest, shard: int, sample: int, component: str = "image") -> str:
    """Flips a byte in the middle of a component; returns what messages call the place."""
    offset, size, _ = extent(manifest, shard, sample, component)
    flip_byte(manifest.root / manifest.shards[shard].name, offset + size // 2)
    key = DatasetIndex(manifest).shard(shard).keys[sample]
    return f"{manifest.shards[shard].name}:{key}.{component}"


# ---------------------------------------------------------------- the reader


def test_bytes_equal_the_source(manifest: Manifest) -> None:
    reader = open_reader(manifest)
    source = {item.key: item.read() for item in list_scenes(COUNT, 0, 48).entries}
    for shard in range(len(manifest.shards)):
        index = reader.index.shard(shard)
        for sample, key in enumerate(index.keys):
            raw = reader.read(shard, sample, label=True)
            expected = source.pop(key)
            assert raw.image == expected.image
            assert (raw.mask, raw.label) == (expected.mask, expected.label)  # by our own encoder
            assert reader.read(shard, sample).label is None
            assert decode_rgb(raw.image).shape[:2] == tuple(index.sizes[sample])
            assert decode_grey(raw.mask or b"", "mask").shape == tuple(index.sizes[sample])
            assert reader.describe(shard, sample) == f"shard-{shard:06d}.tar:{key}"
    assert source == {}


def test_sample_ids_run_over_all_shards(manifest: Manifest) -> None:
    index = DatasetIndex(manifest)
    assert index.samples == COUNT
    found = [index.locate(number) for number in range(COUNT)]
    assert found == [divmod(number, SHARD) for number in range(COUNT)]


@pytest.mark.parametrize("component", ["image", "mask.png", "label.png"])
def test_a_flipped_byte_is_named(manifest: Manifest, component: str) -> None:
    place = damage(manifest, 1, 3, component)
    reader = open_reader(read_manifest(manifest.root))
    with pytest.raises(SampleError) as caught:
        reader.read(1, 3, label=True)
    assert str(caught.value) == f"read: {place}: the checksum differs"
    assert reader.read(1, 2, label=True).image  # its neighbours are as they were


def test_a_damaged_label_does_not_matter_to_who_does_not_ask(manifest: Manifest) -> None:
    damage(manifest, 0, 0, "label.png")
    assert open_reader(manifest).read(0, 0).image


def test_a_shard_cut_short_or_gone_while_reading_is_an_error(manifest: Manifest) -> None:
    reader = open_reader(manifest)
    path = manifest.root / manifest.shards[2].name
    offset, size, _ = extent(manifest, 2, 4, "image")
    assert len(reader.read(2, 4).image) == size
    os.truncate(path, offset + size // 2)  # under an open descriptor
    with pytest.raises(SampleError, match=r"shard-000002\.tar:.*\.image: the shard is cut short"):
        reader.read(2, 4)
    assert reader.read(2, 0).image
    (manifest.root / manifest.shards[3].name).unlink()
    with pytest.raises(SampleError, match=r"shard-000003\.tar:.*\.image: No such file"):
        reader.read(3, 0)


def open_shards(root: Path) -> int:
    """Files below `root` that this process has open."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(root))
        except FileNotFoundError:  # the one that listed the folder
            continue
    return count


def test_no_descriptors_leak(manifest: Manifest) -> None:
    assert open_shards(manifest.root) == 0
    for _ in range(20):
        reader = open_reader(manifest)
        for sample_id in range(0, COUNT, 3):
            reader.read(*reader.index.locate(sample_id))
        threads = [threading.Thread(target=reader.read, args=(n % 4, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # tars of this thread, others have ended; and records, which threads share
        assert open_shards(manifest.root) == 2 * len(manifest.shards)
        del reader
    assert open_shards(manifest.root) == 0
    fetcher = Fetcher(open_reader(manifest), SampleOrder([SHARD] * 4, 0, 2), VIEWS, threads=3)
    fetcher.fetch(np.arange(COUNT))
    fetcher.close()
    images = WholeImages(ShardSet(manifest), 16, threads=2)
    assert sum(len(batch) for batch in images.batches(np.arange(COUNT), 5)) == COUNT
    next(images.batches(np.arange(COUNT), 5))  # left in the middle
    del fetcher, images
    assert open_shards(manifest.root) == 0


def test_many_shards_keep_few_files_open(tmp_path: Path) -> None:
    items = [BytesItem(f"s{n:03d}", encode(picture(n, 8, 8))) for n in range(40)]
    manifest = build_shards(Listing(items), tmp_path, BuildConfig(1, shuffle_seed=-1))
    reader = open_reader(manifest)
    for _ in range(2):
        for number, item in enumerate(items):
            assert reader.read(number, 0).image == item.raw.image
    assert open_shards(tmp_path) == 32 + 40  # tars and records


# ---------------------------------------------------------------- bad samples in training


def fetch_all(
    manifest: Manifest, threads: int, batch: int, epochs: int = 2
) -> tuple[list[FetchedSample], Fetcher]:
    order = SampleOrder([entry.samples for entry in manifest.shards], seed=5, window=2)
    fetcher = Fetcher(open_reader(manifest), order, VIEWS, threads)
    positions = np.arange(epochs * manifest.samples)
    fetched = [
        sample
        for start in range(0, len(positions), batch)
        for sample in fetcher.fetch(positions[start : start + batch])
    ]
    fetcher.close()
    return fetched, fetcher


def test_every_epoch_holds_every_sample_once(manifest: Manifest) -> None:
    fetched, fetcher = fetch_all(manifest, threads=2, batch=7)
    ids = [sample.sample_id for sample in fetched]
    assert sorted(ids[:COUNT]) == sorted(ids[COUNT:]) == list(range(COUNT))
    assert ids[:COUNT] != ids[COUNT:]
    assert fetcher.bad_samples == 0
    reader = open_reader(manifest)
    for sample in fetched[:5]:
        raw = reader.read(*reader.index.locate(sample.sample_id))
        assert sample.image.tobytes() == raw.image
        np.testing.assert_array_equal(sample.mask, decode_grey(raw.mask or b"", "mask"))


def test_bad_samples_get_the_same_substitutes_however_they_are_fetched(
    manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = fetch_all(manifest, threads=1, batch=COUNT)
    bad = {(0, 0), (1, 3), (1, 4), (3, 5)}
    places = [
        damage(manifest, *place, component="mask.png" if place == (1, 4) else "image")
        for place in sorted(bad)
    ]
    bad_ids = {shard * SHARD + sample for shard, sample in bad}
    results, counts = [], set()
    for threads, batch in ((1, 1), (1, COUNT), (4, 5), (3, 2 * COUNT)):
        fetched, fetcher = fetch_all(manifest, threads, batch)
        results.append([sample.sample_id for sample in fetched])
        counts.add(fetcher.bad_samples)
    assert all(ids == results[0] for ids in results)
    for ours, theirs in zip(results[0], whole, strict=True):
        if theirs.sample_id in bad_ids:
            assert ours not in bad_ids
        else:
            assert ours == theirs.sample_id
    # each bad sample turns up once an epoch, and substitutes that are bad themselves count too
    order = SampleOrder([SHARD] * 4, seed=5, window=2)
    expected = 0
    for position, sample in enumerate(whole):
        attempt, place = 0, divmod(sample.sample_id, SHARD)
        while place in bad:
            expected += 1
            place = order.substitute(position, attempt)
            attempt += 1
    assert expected >= 2 * len(bad)
    assert counts == {expected}
    for place in places:
        assert f"bad sample replaced: read: {place}: the checksum differs" in caplog.text


def test_each_bad_sample_is_logged_once(
    manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    damage(manifest, 0, 0)
    fetch_all(manifest, threads=2, batch=8, epochs=3)
    assert len(caplog.records) == 1


def test_samples_without_a_mask_are_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = [
        BytesItem(f"k{n}", encode(picture(n)), encode(object_mask(n)) if n else None)
        for n in range(8)
    ]
    manifest = build_shards(Listing(items), tmp_path, BuildConfig(4, shuffle_seed=-1))
    fetched, fetcher = fetch_all(manifest, threads=2, batch=4, epochs=1)
    assert 0 not in {sample.sample_id for sample in fetched}
    assert fetcher.bad_samples >= 1
    assert "shard-000000.tar:k0 has no mask" in caplog.text


def test_where_all_substitutes_fail_training_ends_with_the_place(manifest: Manifest) -> None:
    for shard in range(4):
        for sample in range(SHARD):
            place = damage(manifest, shard, sample)
    order = SampleOrder([SHARD] * 4, 0, 2)
    fetcher = Fetcher(open_reader(manifest), order, VIEWS, threads=2)
    first = order.locate(np.array([3]))
    place = open_reader(manifest).describe(int(first[0][0]), int(first[1][0]))
    with pytest.raises(InputError) as caught:
        fetcher.fetch(np.array([3]))
    fetcher.close()
    assert f"position 3: read: {place}.image: the checksum differs" in str(caught.value)
    assert f"maskbank shards verify {manifest.root}" in str(caught.value)
    assert fetcher.bad_samples == 1 + MAX_SUBSTITUTES


def test_a_shard_without_its_index_is_replaced_sample_by_sample(
    manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    """The order stays what the manifest says; only the shard's own positions get substitutes."""
    whole, _ = fetch_all(manifest, threads=1, batch=COUNT)
    (manifest.root / "shard-000000.json").write_bytes(b"{}")
    assert fetch_all(manifest, threads=1, batch=COUNT)[1].bad_samples == 0  # by its records
    (manifest.root / "shard-000000.records").unlink()
    fetched, fetcher = fetch_all(manifest, threads=2, batch=4)
    assert fetcher.bad_samples >= 2 * SHARD
    for ours, theirs in zip(fetched, whole, strict=True):
        if theirs.sample_id < SHARD:
            assert ours.sample_id >= SHARD
        else:
            assert ours.sample_id == theirs.sample_id
            assert ours.image.tobytes() == theirs.image.tobytes()
    first, second = caplog.records
    assert "shard-000000.records is missing; a shard's whole .json is read" in first.getMessage()
    assert second.levelname == "WARNING"
    assert "shard-000000.json is not the index that the manifest describes" in caplog.text


def test_evaluation_ends_at_a_shard_without_its_index(manifest: Manifest) -> None:
    for suffix in (".json", ".records"):
        (manifest.root / f"shard-000000{suffix}").unlink()
    with pytest.raises(InputError, match=r"shard index .*shard-000000\.json cannot be read"):
        WholeImages(ShardSet(manifest), 16, threads=2).read(0)


def test_a_pipe_in_the_place_of_a_shard_is_an_error(manifest: Manifest) -> None:
    path = manifest.root / "shard-000001.tar"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SampleError, match=r"shard-000001\.tar:.*\.image: "):
        open_reader(manifest).read(1, 0)


def test_the_log_of_bad_samples_ends_at_some_point(
    manifest: Manifest, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.fetch.MAX_REPORTED", 3)
    for sample in range(SHARD):
        damage(manifest, 2, sample)
    fetch_all(manifest, threads=1, batch=8, epochs=2)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.startswith("bad sample replaced") for line in lines] == [True] * 3 + [False]
    assert lines[-1] == "more than 3 kinds of bad samples: no more are named"


# ---------------------------------------------------------------- whole images


@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (2, 7), (3, COUNT), (2, 100)])
def test_whole_images_come_in_the_order_asked_for(
    manifest: Manifest, threads: int, batch: int
) -> None:
    images = WholeImages(ShardSet(manifest), 16, threads)
    wanted = np.array([5, 3, 3, 23, 0, 11, 7, 20])
    parts = list(images.batches(wanted, batch))
    assert [len(part) for part in parts[:-1]] == [batch] * (len(parts) - 1)
    found = [image for part in parts for image in part]
    assert [image.sample_id for image in found] == wanted.tolist()
    reader = open_reader(manifest)
    for image in found:
        shard, sample = reader.index.locate(image.sample_id)
        raw = reader.read(shard, sample, label=True)
        assert image.key == reader.index.shard(shard).keys[sample]
        assert image.pixels.shape == (3, 16, 16)
        label = decode_grey(raw.label or b"", "label").astype(int)
        np.testing.assert_array_equal(image.label, np.where(label == 255, -1, label))
        assert image.mask is not None
        np.testing.assert_array_equal(image.mask, decode_grey(raw.mask or b"", "mask"))
    assert list(images.batches(wanted[:0], batch)) == []
    assert len(images) == COUNT


@pytest.mark.parametrize("component", ["image", "mask.png", "label.png"])
def test_evaluation_ends_at_a_bad_sample_and_names_it(manifest: Manifest, component: str) -> None:
    place = damage(manifest, 2, 1, component)
    images = WholeImages(ShardSet(manifest), 16, threads=2)
    with pytest.raises(InputError) as caught:
        list(images.batches(np.arange(COUNT), 4))
    assert str(caught.value) == (
        f"{manifest.root}/{place}: the checksum differs; evaluation needs every sample: copy the "
        "shard here again or build the shards again"
    )


def test_evaluation_ends_at_a_sample_without_a_label(tmp_path: Path) -> None:
    items = [BytesItem("k", encode(picture()), encode(object_mask()))]
    manifest = build_shards(Listing(items), tmp_path, BuildConfig())
    with pytest.raises(InputError, match=r"shard-000000\.tar:k has no label"):
        WholeImages(ShardSet(manifest), 16, 1).read(0)
