"""K-means evaluation: known answers, a plain implementation, and several ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import jaccard_score

from data_pipeline.errors import InputError
from data_pipeline.labelled import ShardSet, labelled_shards
from data_pipeline.manifest import read_manifest
from data_pipeline.whole_images import WholeImages
from evaluation.cluster import ClusterConfig
from evaluation.features import own_batches
from evaluation.kmeans import Clustering, evaluate_kmeans
from evaluation.kmeans_config import KMeansConfig
from evaluation.online import EvenlySpread
from evaluation.prototypes import PrototypeConfig
from evaluation.result import Result
from evaluation.statistics import collect_statistics
from tests.evaluation_data import (
    BlockItem,
    block_shards,
    constant,
    oracle,
    random_encoder,
    scene_shards,
)
from tests.published_steps import nearest
from tests.ranks import run_on_ranks
from trainer.distributed import Ranks
from trainer.encoder import Encoder
from trainer.model import ModelConfig, PixelEncoder

ALONE = Ranks(0, 1, torch.device("cpu"))
BLOCKS = [1, 2, 3] * 8 + [0, 1]  # one image without an object
HALVES = PrototypeConfig("probability", 0.5, "normalized")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return block_shards(tmp_path_factory.mktemp("blocks") / "shards", BLOCKS)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return scene_shards(tmp_path_factory.mktemp("scenes") / "shards")


def background_share(classes: list[int]) -> float:
    labels = [BlockItem(i, label, 48, 48).label() for i, label in enumerate(classes)]
    pixels = np.concatenate([label.ravel() for label in labels])
    return float((pixels == 0).sum() / (pixels != 255).sum())


def assert_same(first: Result, second: Result) -> None:
    """Every figure, to the last bit; seconds aside."""
    assert first.confusion.tolist() == second.confusion.tolist()
    np.testing.assert_array_equal(first.iou, second.iou)
    for name in ("values", "foreground_iou", "pixel_accuracy", "images", "step", "options"):
        assert getattr(first, name) == getattr(second, name), name


@pytest.mark.parametrize("method", ["minibatch", "full"])
@pytest.mark.parametrize("pca", [0, 32])
def test_a_network_that_knows_everything_scores_100(
    blocks: ShardSet, method: Any, pca: int
) -> None:
    config = KMeansConfig(size=48, cluster=ClusterConfig(method=method, pca=pca), batch_size=4)
    result, clustering = evaluate_kmeans(oracle([blocks], 48), blocks, config, ALONE)
    assert result.values == (100.0,) * 5
    assert result.iou.tolist() == [100.0] * 4
    assert result.foreground_iou == result.pixel_accuracy == 100
    assert result.options["images_without_foreground"] == 1
    assert result.images == len(BLOCKS)
    assert (result.mean, result.std, result.step) == (100, 0, 7)
    classes = clustering.class_of_cluster
    assert [classes[clustering.cluster_of_sample[i]] for i in range(len(BLOCKS))] == BLOCKS


@pytest.mark.parametrize("logit", [-1.0, 0.4, 1.0])
def test_a_collapsed_network_finds_background_only(blocks: ShardSet, logit: float) -> None:
    """All is one segment: of the class with most pixels, the others score 0."""
    config = KMeansConfig(size=48, cluster=ClusterConfig(seeds=(1, 2)))
    result, _ = evaluate_kmeans(constant(logit), blocks, config, ALONE)
    share = 100 * background_share(BLOCKS)
    assert result.iou.tolist() == pytest.approx([share, 0, 0, 0])
    assert result.values == pytest.approx((share / 4, share / 4))
    assert result.pixel_accuracy == pytest.approx(share)
    nothing_found = logit < 0.5
    assert result.foreground_iou == pytest.approx(0 if nothing_found else 100 - share)
    assert result.options["images_without_foreground"] == (len(BLOCKS) if nothing_found else 0)


def plain_matrix(
    encoder: Encoder, samples: ShardSet, config: KMeansConfig, clustering: Clustering
) -> NDArray[np.int64]:
    """Predicts maps at S, resizes them to each image and counts pixel by pixel."""
    classes = len(samples.classes)
    matrix = np.zeros((classes, classes + 1), np.int64)
    images = WholeImages(samples, config.size, threads=1)
    # the same batches, since the last bit of a logit can depend on what is beside it
    found = []
    for _, pixels in own_batches(images, config.batch_size, ALONE, "embedding"):
        with torch.inference_mode():
            found += list(encoder.embed(pixels)[1])
    for i, saliency in enumerate(found):
        image = images.read(i)
        own_class = clustering.class_of_cluster[clustering.cluster_of_sample[i]]
        inside = (saliency.sigmoid() > config.prototype.threshold).numpy()
        prediction = np.where(inside, own_class, clustering.class_of_cluster[0])
        height, width = image.label.shape
        for row in range(height):
            for column in range(width):
                if (truth := int(image.label[row, column])) >= 0:
                    y = nearest(row, config.size, height)
                    x = nearest(column, config.size, width)
                    matrix[truth, prediction[y, x]] += 1
    return matrix


@pytest.mark.parametrize(
    ("clusters", "many_to_one", "size"),
    [(0, False, 40), (4, False, 40), (17, False, 37), (17, True, 40)],
)
def test_counts_of_images_equal_a_plain_implementation(
    scenes: ShardSet, clusters: int, many_to_one: bool, size: int
) -> None:
    cluster = ClusterConfig(clusters=clusters, pca=4, seeds=(1234,))
    config = KMeansConfig(size, HALVES, cluster, many_to_one=many_to_one, batch_size=7)
    encoder = random_encoder()
    result, clustering = evaluate_kmeans(encoder, scenes, config, ALONE)
    matrix = plain_matrix(encoder, scenes, config, clustering)
    assert result.confusion.tolist() == matrix.tolist()
    assert 2 < len(set(clustering.cluster_of_sample.values()) - {0}) <= (clusters or 10)
    unmatched = max(0, clusters + 1 - 11) if not many_to_one else 0
    assert (clustering.class_of_cluster == -1).sum() == unmatched
    # as if each pixel were listed
    truth, prediction = (
        np.repeat(axis, matrix.ravel()) for axis in np.indices(matrix.shape).reshape(2, -1)
    )
    present = np.unique(truth)
    each = 100 * jaccard_score(truth, prediction, labels=present, average=None)
    assert result.iou[present].tolist() == pytest.approx(each.tolist())
    assert result.values[0] == pytest.approx(each.mean())


def test_seeds_are_reproducible_and_differ(scenes: ShardSet) -> None:
    config = KMeansConfig(40, HALVES, ClusterConfig(pca=4, starts=1))
    first, _ = evaluate_kmeans(random_encoder(), scenes, config, ALONE)
    again, _ = evaluate_kmeans(random_encoder(), scenes, config, ALONE, threads=1)
    assert_same(first, again)
    assert len(set(first.values)) > 1
    assert first.mean == pytest.approx(sum(first.values) / 5)
    assert first.std == pytest.approx(np.std(first.values, ddof=1))
    backwards = replace(config, cluster=replace(config.cluster, seeds=(1238, 1234)))
    other, _ = evaluate_kmeans(random_encoder(), scenes, backwards, ALONE)
    assert other.values == (first.values[4], first.values[0])


def test_one_image_is_enough(tmp_path: Path) -> None:
    manifest = block_shards(tmp_path / "one", [2])
    result, _ = evaluate_kmeans(oracle([manifest], 48), manifest, KMeansConfig(48), ALONE)
    assert result.iou[[0, 2]].tolist() == [100, 100]
    assert np.isnan(result.iou[[1, 3]]).all()
    assert result.mean == 100


def test_few_images_for_the_whitening_are_warned_of(
    blocks: ShardSet, scenes: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate_kmeans(oracle([blocks], 48), blocks, KMeansConfig(48), ALONE)
    assert not caplog.records
    few = KMeansConfig(40, HALVES, ClusterConfig(pca=32))
    evaluate_kmeans(oracle([scenes], 40), scenes, few, ALONE)  # 11 dimensions, 40 images
    assert not caplog.records
    encoder = random_encoder()
    encoder.network.embedding_head = torch.nn.Conv2d(16, 24, 1)
    encoder.network.config = replace(encoder.network.config, embedding_dim=24)
    evaluate_kmeans(encoder, scenes, few, ALONE)
    assert len(caplog.records) == 1, "once, not for each seed"
    assert "are few for 24 whitened directions" in caplog.records[0].getMessage()


def test_labels_are_needed_and_something_in_them(tmp_path: Path) -> None:
    ignored = block_shards(tmp_path / "ignored", [255, 255], (1, 40))  # only the border
    with pytest.raises(InputError, match="is 255"):
        evaluate_kmeans(constant(1.0), ignored, KMeansConfig(16), ALONE)
    manifest = block_shards(tmp_path / "partly", [1, 2]).manifest
    with pytest.raises(InputError, match="names no classes"):
        labelled_shards(replace(manifest, classes=("background",)))
    shard = replace(manifest.shards[0], labels=1)
    with pytest.raises(InputError, match="1 of 2 samples have no label"):
        labelled_shards(replace(manifest, shards=(shard,)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"criterion": "pixels"}, "--criterion is 'pixels'"),
        ({"size": 0}, "--size"),
        ({"batch_size": 0}, "--batch-size"),
        ({"precision": "fp8"}, "--precision is 'fp8'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        KMeansConfig(**options)


def test_published_protocol_is_the_default() -> None:
    config = KMeansConfig()
    assert (config.size, config.criterion, config.many_to_one) == (512, "iou", False)
    assert config.prototype == PrototypeConfig("logit", 0.5, "weighted")
    assert config.cluster.seeds == (1234, 1235, 1236, 1237, 1238)
    assert (config.cluster.method, config.cluster.batch_size) == ("minibatch", 1000)
    assert (config.cluster.pca, config.cluster.clusters) == (32, 0)
    assert config.cluster.without_foreground == "zero"


def test_what_becomes_of_images_without_foreground_is_checked_and_kept(blocks: ShardSet) -> None:
    with pytest.raises(InputError, match="--without-foreground is 'drop'"):
        ClusterConfig(without_foreground="drop")  # type: ignore[arg-type]
    leave_out = ClusterConfig(seeds=(1,), without_foreground="leave-out")
    with pytest.raises(InputError, match="--without-foreground needs --unit image"):
        KMeansConfig(48, cluster=leave_out, unit="pixel")
    for cluster in (leave_out, ClusterConfig(seeds=(1,))):
        result, clustering = evaluate_kmeans(
            oracle([blocks], 48), blocks, KMeansConfig(48, cluster=cluster), ALONE
        )
        assert result.options["cluster"]["without_foreground"] == cluster.without_foreground
        assert clustering.cluster_of_sample[BLOCKS.index(0)] == 0, "background either way"


def _evaluate(ranks: Ranks, shards: Path, config: KMeansConfig) -> tuple[Result, Clustering]:
    samples = labelled_shards(read_manifest(shards))
    return evaluate_kmeans(random_encoder(), samples, config, ranks, threads=1)


def test_neither_threads_nor_the_batch_change_a_bit(scenes: ShardSet) -> None:
    """Of a network that says something else with a team of threads, and to other batches."""
    config = ModelConfig(backbone="resnet18", embedding_dim=8, decoder_channels=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Encoder(PixelEncoder(config), step=0)
    found, before = [], torch.get_num_threads()
    images = WholeImages(EvenlySpread(scenes, 4), 96, 1)
    try:
        for threads, batch in ((1, 4), (2, 4), (3, 1), (2, 3)):
            torch.set_num_threads(threads)
            found.append(collect_statistics(encoder, images, HALVES, ALONE, batch).vectors)
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        np.testing.assert_array_equal(one, found[0])
    assert np.abs(found[0]).sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_change_nothing(scenes: ShardSet, world_size: int) -> None:
    config = KMeansConfig(40, HALVES, ClusterConfig(pca=4), batch_size=7)
    [(alone, clustering)] = run_on_ranks(_evaluate, 1, scenes.manifest.root, config)
    for result, found in run_on_ranks(_evaluate, world_size, scenes.manifest.root, config):
        assert_same(result, alone)
        assert found.cluster_of_sample == clustering.cluster_of_sample
        assert found.class_of_cluster.tolist() == clustering.class_of_cluster.tolist()


@pytest.mark.slow
def test_more_ranks_than_images(tmp_path: Path) -> None:
    manifest = block_shards(tmp_path / "two", [1, 2])
    config = KMeansConfig(48, HALVES, ClusterConfig(seeds=(1,)))
    [(alone, _)] = run_on_ranks(_evaluate, 1, manifest.manifest.root, config)
    for result, _ in run_on_ranks(_evaluate, 3, manifest.manifest.root, config):
        assert_same(result, alone)


def test_as_many_clusters_as_images_are_warned_of(
    blocks: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    found = len([label for label in BLOCKS if label])
    for clusters, warned in ((found - 1, 0), (found, 1)):
        cluster = ClusterConfig(clusters, pca=0, seeds=(1, 2))
        evaluate_kmeans(
            oracle([blocks], 48), blocks, KMeansConfig(48, cluster=cluster, many_to_one=True), ALONE
        )
        assert len(caplog.records) == warned
    assert f"{found} clusters are enough for each of {found} images" in caplog.text
