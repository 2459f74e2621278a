"""Clusters of unlabelled photographs: how many, which, their names, and what is left of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import InputError
from data_pipeline.labelled import ShardSet, UnlabelledShards
from data_pipeline.manifest import read_manifest
from evaluation.kmeans_config import KMeansConfig
from evaluation.photographs.cluster_names import (
    NAMES,
    name_classes,
    read_named_head,
    read_names,
    write_names,
)
from evaluation.photographs.clustering import (
    FULL_KMEANS,
    PhotographClusters,
    cluster_photographs,
    nearest_photographs,
)
from evaluation.photographs.images import Photographs
from evaluation.photographs.number_of_clusters import Silhouette, best_number, silhouette_curve
from evaluation.photographs.record import FOLDER, HEAD, read_record
from evaluation.photographs.write_clusters import write_clusters
from evaluation.predict import Predictor
from evaluation.prototypes import PrototypeConfig
from evaluation.report import write_report
from evaluation.saved_head import read_head
from tests.evaluation_command import evaluate, refused, tiny_run
from tests.evaluation_data import block_shards, constant, oracle
from tests.ranks import run_on_ranks
from trainer.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
HOSTILE = '"><script>alert(1)</script>'
SIZE = 48
OBJECTS = [1, 2, 1, 3, 0, 1, 2, 1, 3, 2]  # the classes of the blocks; 0: no object


def config(clusters: int = 0) -> KMeansConfig:
    return KMeansConfig(
        size=SIZE,
        prototype=PrototypeConfig("probability", 0.5, "normalized"),
        cluster=replace(FULL_KMEANS, clusters=clusters),
        batch_size=3,
        resize="antialias",
    )


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return block_shards(tmp_path_factory.mktemp("blocks") / "shards", OBJECTS)


def clustered(blocks: ShardSet, clusters: int = 0, ranks: Ranks = ALONE) -> PhotographClusters:
    encoder = oracle([blocks], SIZE, "antialias")
    photographs = Photographs(UnlabelledShards(blocks.manifest), SIZE, threads=1)
    return cluster_photographs(encoder, photographs, config(clusters), ranks)


def test_silhouettes_speak_for_the_groups_that_there_are() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(5)[[0, 1, 2]]
    vectors = np.repeat(centres, 20, axis=0) + rng.normal(0, 0.02, (60, 5))
    curve = silhouette_curve(vectors, most=8)
    assert [one.clusters for one in curve] == list(range(2, 9))
    assert best_number(curve) == 3
    best = curve[1]
    # by hand: the mean of (b - a) / max(a, b)
    distance = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    group = np.repeat(np.arange(3), 20)
    values = []
    for i in range(60):
        means = [distance[i, group == g].sum() / (20 - (g == group[i])) for g in range(3)]
        own, other = means[group[i]], min(m for g, m in enumerate(means) if g != group[i])
        values.append((other - own) / max(own, other))
    assert best.mean == pytest.approx(np.mean(values))
    assert best.error == pytest.approx(np.std(values, ddof=1) / np.sqrt(60))


def test_fewest_clusters_within_one_standard_error_of_the_best() -> None:
    curve = [Silhouette(k, mean, 0.02) for k, mean in ((2, 0.5), (3, 0.795), (4, 0.7), (5, 0.81))]
    assert best_number(curve) == 3
    assert best_number([replace(one, error=0.01) for one in curve]) == 5


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_photograph_or_two_are_one_cluster(count: int) -> None:
    curve = silhouette_curve(np.eye(3)[:count])
    assert curve == []
    assert best_number(curve) == 1


def test_photographs_that_all_look_alike_are_one_cluster() -> None:
    assert best_number(silhouette_curve(np.ones((9, 4)))) == 1


def test_objects_are_grouped_and_the_largest_group_comes_first(blocks: ShardSet) -> None:
    found = clustered(blocks)
    # four ants, three bees, two cows; the picture without an object is in no cluster
    assert found.assignment.tolist() == OBJECTS
    assert found.images.tolist() == [4, 3, 2]
    assert (found.count, found.unreadable) == (3, 0)
    assert [one.clusters for one in found.curve] == [2, 3]  # of three distinct vectors


def _on_rank(ranks: Ranks, shards: str) -> tuple[list[int], list[list[float]]]:
    found = clustered(ShardSet(read_manifest(shards)), 3, ranks)
    return found.assignment.tolist(), found.clusters.centres.tolist()


@pytest.mark.slow
def test_two_ranks_find_the_same_clusters(blocks: ShardSet) -> None:
    shards = str(blocks.manifest.root)
    (alone,) = run_on_ranks(_on_rank, 1, shards)
    assert alone[0] == OBJECTS
    assert run_on_ranks(_on_rank, 2, shards) == [alone, alone]


def test_more_clusters_than_objects_are_as_many_as_objects(
    blocks: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    found = clustered(blocks, clusters=12)
    assert found.count == 3  # nine objects, three of which differ
    assert "only 9 photographs have an object" in caplog.text
    assert found.curve == ()


def test_one_photograph(tmp_path: Path) -> None:
    one = block_shards(tmp_path / "shards", [2])
    found = clustered(one)
    assert found.assignment.tolist() == [1]
    assert nearest_photographs(found, 12) is None
    encoder = oracle([one], SIZE, "antialias")
    samples = UnlabelledShards(one.manifest)
    write_clusters(encoder, "trained", samples, config(), found, _folder(tmp_path))
    page = write_report(tmp_path).read_text()
    assert "1 cluster" in page or ">1<" in page
    assert "Nearest neighbours" not in page


def test_no_object_anywhere_is_told(blocks: ShardSet) -> None:
    photographs = Photographs(UnlabelledShards(blocks.manifest), SIZE, threads=1)
    with pytest.raises(InputError, match="no object is found in any of the 10 photographs; look"):
        cluster_photographs(constant(-3.0), photographs, config(), ALONE)


def test_damaged_photographs_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = block_shards(tmp_path / "shards", OBJECTS)
    encoder = oracle([blocks], SIZE, "antialias")
    shard = blocks.manifest.root / blocks.manifest.shards[0].name
    data = bytearray(shard.read_bytes())
    place = data.index(b"\x89PNG")  # the first picture's
    data[place + 100] ^= 1
    shard.write_bytes(data)
    photographs = Photographs(UnlabelledShards(blocks.manifest), SIZE, threads=1)
    found = cluster_photographs(encoder, photographs, config(), ALONE)
    assert found.unreadable == 1
    assert found.statistics.sample_ids.tolist() == list(range(1, 10))
    assert sorted(found.images.tolist()) == [2, 3, 3]
    assert "block_000.image: the checksum differs" in caplog.text
    samples = UnlabelledShards(blocks.manifest)
    record = write_clusters(encoder, "trained", samples, config(), found, _folder(tmp_path))
    assert (record.photographs, record.unreadable, record.without_object) == (9, 1, 1)


def test_nothing_that_can_be_read_is_told(tmp_path: Path) -> None:
    blocks = block_shards(tmp_path / "shards", OBJECTS)
    encoder = oracle([blocks], SIZE, "antialias")
    shard = blocks.manifest.root / blocks.manifest.shards[0].name
    shard.write_bytes(bytes(shard.stat().st_size))
    photographs = Photographs(UnlabelledShards(blocks.manifest), SIZE, threads=1)
    with pytest.raises(InputError, match="none of the 10 photographs"):
        cluster_photographs(encoder, photographs, config(), ALONE)


def test_neighbours_are_those_of_the_largest_cosine(blocks: ShardSet) -> None:
    found = clustered(blocks)
    neighbours = nearest_photographs(found, queries=3)
    assert neighbours is not None
    assert neighbours.queries.tolist() == [0, 5, 9]
    assert neighbours.query_class.tolist() == [1, 1, 2]
    assert neighbours.bank[0].tolist() == [2, 5, 7, 1, 3]  # the other ants, then any
    assert neighbours.similarity[0].tolist() == pytest.approx([1, 1, 1, 0, 0])
    assert neighbours.bank_class[0].tolist() == [1, 1, 1, 2, 3]


def _folder(run: Path) -> Path:
    folder = run / FOLDER
    folder.mkdir()
    return folder


@pytest.fixture
def run(tmp_path: Path, blocks: ShardSet) -> Path:
    """A folder with the blocks' clusters."""
    encoder = oracle([blocks], SIZE, "antialias")
    samples = UnlabelledShards(blocks.manifest)
    found = clustered(blocks)
    write_clusters(encoder, "trained", samples, config(), found, _folder(tmp_path))
    return tmp_path


def test_the_head_predicts_the_clusters(run: Path, blocks: ShardSet) -> None:
    head = read_named_head(run / FOLDER / HEAD)
    assert head.classes == ("background", "cluster 01", "cluster 02", "cluster 03")
    assert (head.size, head.resize, head.step) == (SIZE, "antialias", 7)
    predictor = Predictor(oracle([blocks], SIZE, "antialias"), head)
    images = Photographs(UnlabelledShards(blocks.manifest), SIZE, threads=1)
    for number, expected in enumerate(OBJECTS):
        found = predictor.predict(images.read(number).image)
        assert set(np.unique(found.classes).tolist()) == {0, expected}


def test_names_join_clusters_and_remove_them(run: Path) -> None:
    folder = run / FOLDER
    (folder / NAMES).write_text("# mine\n01 = insect\ncluster 3 = insect\n\n2=background\n")
    assert read_names(folder, 3) == ("insect", "background", "insect")
    head = read_named_head(folder / HEAD)
    assert head.classes == ("background", "insect")
    assert head.tensors["class_of_cluster"].tolist() == [0, 1, 0, 1]
    page = write_report(run).read_text()
    assert "insect" in page
    assert "cluster 01" not in page


def test_clusters_that_are_not_named_keep_their_number(tmp_path: Path) -> None:
    write_names(tmp_path, ("ant", "cluster 02"))
    assert read_names(tmp_path, 2) == ("ant", "cluster 02")
    (tmp_path / NAMES).write_text("02 = bee\n")
    assert read_names(tmp_path, 2) == ("cluster 01", "bee")
    (tmp_path / NAMES).unlink()
    assert read_names(tmp_path, 100)[98:] == ("cluster 099", "cluster 100")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("birds\n", "line 1: expected a line like `03 = birds`"),
        ("01 = a\n02 =\n", "line 2: expected a line like `03 = birds`"),
        ("04 = a\n", "line 1: no cluster 4 among 3"),
        ("0 = a\n", "line 1: no cluster 0 among 3"),
        (f"1 = {'a' * 101}\n", "line 1: a name has up to 100 printable characters"),
        ("1 = a\x1bb\n", "line 1: a name has up to 100 printable characters"),
        ("#" * (1 << 20) + "\n", "is larger than any list of names"),
    ],
)
def test_names_that_cannot_be_used_are_told(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / NAMES).write_text(text)
    with pytest.raises(InputError) as error:
        read_names(tmp_path, 3)
    assert told in str(error.value)
    assert str(tmp_path / NAMES) in str(error.value)


def test_names_that_leave_nothing_or_are_no_text_are_told(run: Path) -> None:
    head = read_head(run / FOLDER / HEAD)
    with pytest.raises(InputError, match="leaves nothing to predict"):
        name_classes(head, ("background",) * 3)
    (run / FOLDER / NAMES).write_bytes(b"1 = \xff\n")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_names(run / FOLDER, 3)


def test_names_stay_with_their_clusters(
    run: Path, blocks: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    folder, samples = run / FOLDER, UnlabelledShards(blocks.manifest)
    encoder = oracle([blocks], SIZE, "antialias")
    (folder / NAMES).write_text("1 = ant\n")
    write_clusters(encoder, "trained", samples, config(), clustered(blocks), folder)
    assert (folder / NAMES).read_text() == "1 = ant\n"  # the same clusters
    write_clusters(encoder, "trained", samples, config(2), clustered(blocks, 2), folder)
    assert read_names(folder, 2) == ("cluster 01", "cluster 02")
    assert (folder / f"previous-{NAMES}").read_text() == "1 = ant\n"
    assert "these are other clusters than before" in caplog.text


def test_the_report_shows_clusters_without_a_word_of_truth(run: Path) -> None:
    (run / FOLDER / NAMES).write_text(f"1 = {HOSTILE}\n", encoding="utf-8")
    page = write_report(run).read_text()
    assert "Clusters of your photographs" in page
    assert "Photographs of each cluster" in page
    assert "Nearest neighbours" in page
    assert "Silhouette" in page
    assert HOSTILE not in page
    for word in ("Truth", "mIoU", "IoU", "Needs an evaluation", "–<"):
        assert word not in page, word


@pytest.mark.parametrize(
    "change",
    [
        {"images": []},
        {"pixels": [1]},
        {"images": "many"},
        {"curve": [{"clusters": 2}]},
        {"photographs": None},
    ],
)
def test_a_damaged_record_is_told(run: Path, change: dict[str, object]) -> None:
    path = run / FOLDER / "clusters.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=r"clusters\.json.*run `maskbank cluster` again"):
        write_report(run)


def test_the_command_clusters_a_run(
    tmp_path: Path, blocks: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path / "run")
    shards = blocks.manifest.root
    arguments = (run, "--shards", shards, "--threshold", 0, "--clusters", 2)
    status, out, error = evaluate(capsys, "cluster", *arguments)
    assert status == 0, error
    assert f"next: maskbank predict {run} PHOTOS --output FOLDER" in out
    record = read_record(run / FOLDER)
    assert record is not None
    assert (record.clusters, record.photographs, record.step) == (2, 10, 12)
    assert record.options["size"] == 64  # that of the run's training
    assert (run / "report.html").is_file()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--shards", "nowhere"], "nowhere"),
        (["--shards", "SHARDS", "--most-clusters", "1"], "--most-clusters must be at least 2"),
        (["--shards", "SHARDS", "--foreground", "magic"], "--foreground is 'magic'"),
        (["--shards", "SHARDS", "--output", "FILE/out"], "FILE"),
    ],
)
def test_the_command_refuses_before_any_work(
    tmp_path: Path,
    blocks: ShardSet,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    told: str,
) -> None:
    run, file = tiny_run(tmp_path / "run"), tmp_path / "file"
    file.touch()
    given = [o.replace("SHARDS", str(blocks.manifest.root)) for o in options]
    given = [o.replace("FILE", str(file)) for o in given]
    assert told.replace("FILE", str(file)) in refused(capsys, "cluster", run, *given)
    assert not (run / FOLDER).exists()
