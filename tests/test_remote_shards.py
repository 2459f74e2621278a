"""Shards and pictures at s3:// addresses: written, read through a cache, trained on."""

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build_config import BuildConfig, BuildOptions
from data_pipeline.cache import ShardCache
from data_pipeline.errors import InputError, SampleError
from data_pipeline.fetch import Fetcher
from data_pipeline.index import DatasetIndex
from data_pipeline.manifest import read_manifest
from data_pipeline.order import SampleOrder
from data_pipeline.reader import SampleReader
from data_pipeline.sources.folder import list_folder
from data_pipeline.sources.generated import list_scenes
from data_pipeline.storage import file_system
from data_pipeline.views import ViewConfig
from data_pipeline.write_shards import build_shards
from tests.forked import run_program
from tests.s3_server import s3_server, why_not
from tests.sample_data import build_scene_shards, checksums, folder_pair, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=f"no S3 server: {why_not()}"),
]
SCENES, SHARD = 20, 5


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("local")
    build_scene_shards(root, SCENES, samples_per_shard=SHARD)
    return root


@pytest.fixture(scope="module")
def remote(bucket: str) -> str:
    address = f"{bucket}/sets/scenes"
    listing, config = list_scenes(SCENES, 0, 48), BuildConfig(SHARD, "ids")
    manifest = build_shards(listing, address, config, BuildOptions(processes=2))
    assert manifest is not None
    assert manifest.samples == SCENES
    return address


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where the cache is


def remote_checksums(address: str) -> dict[str, str]:
    system, path = file_system(address)
    system.invalidate_cache()
    names = [name.rpartition("/")[2] for name in system.ls(path)]
    return {
        name: hashlib.sha256(system.cat_file(f"{path}/{name}")).hexdigest()
        for name in sorted(names)
    }


def test_a_build_to_an_address_has_the_same_bytes(local: Path, remote: str) -> None:
    assert remote_checksums(remote) == checksums(local)


def test_a_build_goes_on_at_an_address(local: Path, remote: str) -> None:
    system, path = file_system(remote)
    for name in ("manifest.json", "shard-000001.json", "shard-000002.tar"):
        system.rm_file(f"{path}/{name}")
    listing, config = list_scenes(SCENES, 0, 48), BuildConfig(SHARD, "ids")
    build_shards(listing, remote, config)
    assert remote_checksums(remote) == checksums(local)
    with pytest.raises(InputError, match="samples_per_shard is 7, was 5"):
        build_shards(listing, remote, BuildConfig(7, "ids"))


def test_samples_are_read_through_the_cache(local: Path, remote: str, tmp_path: Path) -> None:
    manifest = read_manifest(remote, cache_folder=tmp_path / "cache")
    assert str(manifest) == remote
    reader = SampleReader(DatasetIndex(manifest))
    expected = SampleReader(DatasetIndex(read_manifest(local)))
    for number in range(SCENES):
        place = reader.index.locate(number)
        assert reader.read(*place, label=True) == expected.read(*place, label=True)
    entry = manifest.shards[0]
    copy = tmp_path / "cache" / f"{entry.sha256[:32]}-{entry.name}"
    assert copy.read_bytes() == (local / entry.name).read_bytes()
    names = os.listdir(tmp_path / "cache")
    assert not [name for name in names if name.startswith(".")]
    assert {name.rpartition(".")[2] for name in names} == {"tar", "records"}  # no whole index


def test_without_usable_records_the_index_is_downloaded(
    bucket: str, local: Path, remote: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    system, path = file_system(remote)
    _, other = file_system(f"{bucket}/older")
    for name in system.ls(path):
        if not name.endswith("0.records"):
            system.copy(name, f"{other}/{name.rpartition('/')[2]}")
    system.pipe_file(f"{other}/shard-000001.records", b"x")
    manifest = read_manifest(f"{bucket}/older", cache_folder=tmp_path)
    reader, expected = (
        SampleReader(DatasetIndex(each)) for each in (manifest, read_manifest(local))
    )
    for shard in (0, 1):
        reader.read_ahead(shard)
        assert reader.read(shard, 0) == expected.read(shard, 0)
    assert "older/shard-000000.records is missing" in caplog.text
    assert "older/shard-000001.records is cut short" in caplog.text
    here = {path.name.partition("-")[2] for path in tmp_path.iterdir()}
    assert here == {f"shard-00000{n}.{kind}" for n in (0, 1) for kind in ("tar", "json")}


def test_the_next_window_is_downloaded_ahead(remote: str, tmp_path: Path) -> None:
    manifest = read_manifest(remote, cache_folder=tmp_path)
    order = SampleOrder([entry.samples for entry in manifest.shards], 3, 1)
    fetcher = Fetcher(
        SampleReader(DatasetIndex(manifest)), order, ViewConfig(image_size=32), threads=1
    )
    fetcher.fetch(np.arange(SHARD - 1))  # of the first shard in order
    fetcher._ahead.shutdown(wait=True)
    here = {path.name.partition("-")[2] for path in tmp_path.glob("*.tar")}
    first, second = int(order.locate(np.arange(1))[0][0]), order.next_window(0)[0]
    assert here == {manifest.shards[first].name, manifest.shards[second].name}


def test_the_cache_makes_room_for_what_is_new(local: Path, remote: str, tmp_path: Path) -> None:
    size = max(path.stat().st_size for path in local.glob("*.tar"))
    manifest = read_manifest(remote, cache_folder=tmp_path)
    small = ShardCache(remote, tmp_path, 2 * size)
    for theirs in ("thesis.tar", "a" * 32 + ".tar", "notes.json"):  # older than all copies
        write(tmp_path / theirs, bytes(size))
        os.utime(tmp_path / theirs, (0, 0))
    for number, entry in enumerate(manifest.shards):
        path = small.local(entry.name, entry.sha256)
        os.utime(path, (number, number))  # the order of use, in seconds since 1970
        assert path.stat().st_size == entry.bytes
    left = sorted(path.name.partition("-")[2] for path in tmp_path.iterdir() if "-" in path.name)
    assert left == [entry.name for entry in manifest.shards[-2:]]
    assert len(list(tmp_path.iterdir())) == 2 + 3  # what others keep there is never removed


def test_what_is_damaged_at_the_address_is_no_wrong_byte(
    bucket: str, remote: str, tmp_path: Path
) -> None:
    system, path = file_system(remote)
    _, other = file_system(f"{bucket}/damaged")
    for name in system.ls(path):
        system.copy(name, f"{other}/{name.rpartition('/')[2]}")
    tar = bytearray(system.cat_file(f"{path}/shard-000000.tar"))
    extent = DatasetIndex(read_manifest(remote)).shard(0).extent(2, "image")
    assert extent is not None
    tar[extent[0] + 30] ^= 1
    system.pipe_file(f"{other}/shard-000000.tar", bytes(tar))
    system.rm_file(f"{other}/shard-000001.tar")
    manifest = read_manifest(f"{bucket}/damaged", cache_folder=tmp_path)
    reader = SampleReader(DatasetIndex(manifest))
    assert reader.read(0, 1).image
    with pytest.raises(SampleError, match="the checksum differs"):
        reader.read(0, 2)
    with pytest.raises(SampleError, match=r"shard-000001\.tar"):
        reader.read(1, 0)


def test_an_address_without_shards_is_told(bucket: str) -> None:
    with pytest.raises(InputError, match=r"nothing holds no manifest.json"):
        read_manifest(f"{bucket}/nothing")
    with pytest.raises(InputError, match="cannot be opened"):
        read_manifest("nosuchprotocol://bucket/shards")


def test_pictures_at_an_address_are_a_source(bucket: str, tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path / "source", ["a", "sub/b", "c"])
    system, path = file_system(f"{bucket}/pictures")
    system.put(f"{tmp_path}/source/", path, recursive=True)
    here = build_shards(list_folder(images, masks), tmp_path / "here", BuildConfig())
    address = f"{bucket}/pictures"
    listing = list_folder(f"{address}/images", f"{address}/masks")
    there = build_shards(listing, tmp_path / "there", BuildConfig())
    assert here is not None
    assert there is not None
    assert here.samples == there.samples == 3
    found, expected = (
        [SampleReader(DatasetIndex(each)).read(0, number) for number in range(3)]
        for each in (here, there)
    )
    assert found == expected


def test_training_from_an_address_is_training_from_a_folder(
    local: Path, remote: str, tmp_path: Path
) -> None:
    from trainer.checkpoint import newest_checkpoint

    states = []
    for name, shards in (("local", str(local)), ("remote", remote)):
        settings = [
            *("--recipe", "demo_cpu", f"data.shards={shards}", "data.batch_size=4"),
            *(f"run.directory={tmp_path / name}", "run.steps=3", "views.image_size=32"),
            *("run.precision=float32", "data.loader=torch", f"data.cache={tmp_path / 'cache'}"),
        ]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [sys.executable, *torchrun, "-m", "trainer.train", *settings]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = run_program(command, environment)
        assert done.returncode == 0, done.stderr
        checkpoint = newest_checkpoint(tmp_path / name)
        assert checkpoint is not None
        states.append(checkpoint.load("model"))
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert np.array_equal(value.numpy(), states[1][name].numpy()), name
    shutil.rmtree(tmp_path / "cache")
