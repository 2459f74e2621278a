"""K-means of all pixels: known answers, a plain implementation, and several ranks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_pipeline.errors import InputError
from data_pipeline.labelled import ShardSet, labelled_shards
from data_pipeline.manifest import read_manifest
from data_pipeline.whole_images import WholeImages, normalise
from evaluation.cluster import ClusterConfig, Clusters
from evaluation.kmeans import evaluate_kmeans
from evaluation.kmeans_config import KMeansConfig
from evaluation.pixel_kmeans import nearest_centres
from evaluation.result import Result
from tests.evaluation_data import block_shards, oracle, random_encoder, scene_shards
from tests.published_steps import opencv_nearest
from tests.ranks import run_on_ranks
from trainer.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
PIXELS = KMeansConfig(
    40, cluster=ClusterConfig(4, pca=0, seeds=(1234, 1235)), criterion="count", unit="pixel",
    batch_size=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return scene_shards(tmp_path_factory.mktemp("scenes") / "shards", 9)


def test_a_network_that_knows_everything_scores_100(tmp_path: Path) -> None:
    blocks = block_shards(tmp_path / "shards", [1, 2, 3, 0, 2])
    config = KMeansConfig(
        48, cluster=ClusterConfig(4, "full", pca=0, seeds=(0,)), criterion="count", unit="pixel"
    )
    result, clustering = evaluate_kmeans(oracle([blocks], 48), blocks, config, ALONE)
    assert result.iou.tolist() == [100] * 4
    assert (result.pixel_accuracy, result.foreground_iou) == (100, 100)
    assert sorted(clustering.class_of_cluster.tolist()) == [0, 1, 2, 3]
    assert clustering.cluster_of_sample == {}


def test_every_pixel_is_in_the_cluster_of_its_nearest_centre(scenes: ShardSet) -> None:
    """Counted pixel by pixel with the centres that were found."""
    encoder = random_encoder()
    result, clustering = evaluate_kmeans(encoder, scenes, PIXELS, ALONE)
    matrix = np.zeros((11, 12), np.int64)
    centres = clustering.clusters.centres
    assert centres.shape == (4, 6)
    images = WholeImages(scenes, 40, 1)
    for image in (images.read(i) for i in range(len(images))):
        pixels = normalise(image.pixels)[None].contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            unit = F.normalize(encoder.embeddings(pixels), dim=1)[0].double().numpy()
        distance = ((unit[None] - centres[:, :, None, None]) ** 2).sum(1)
        prediction = clustering.class_of_cluster[distance.argmin(0)]
        height, width = image.label.shape
        large = opencv_nearest(prediction, height, width)
        kept = image.label >= 0
        np.add.at(matrix, (image.label[kept], large[kept]), 1)
    assert np.abs(result.confusion - matrix).sum() <= 4, "all but pixels at ties"
    assert (matrix.sum(0) > 0).sum() == 4


def test_centres_are_of_the_images_to_fit_on(scenes: ShardSet, tmp_path: Path) -> None:
    """As COCO-Stuff-27's, which are of train2017; they are scored elsewhere."""
    encoder, others = random_encoder(), scene_shards(tmp_path, 12, seed=5)
    there, found_there = evaluate_kmeans(encoder, others, PIXELS, ALONE)
    config = replace(PIXELS, fit_on="train", mean="all")
    here, found = evaluate_kmeans(encoder, scenes, config, ALONE, fit_samples=others)
    assert found.clusters.centres.tolist() == found_there.clusters.centres.tolist()
    own, found_here = evaluate_kmeans(encoder, scenes, PIXELS, ALONE)
    assert found.clusters.centres.tolist() != found_here.clusters.centres.tolist()
    pixels = [result.confusion.sum(1).tolist() for result in (here, own, there)]
    assert pixels[0] == pixels[1] != pixels[2]
    assert here.options["fit_on"] == "train"
    with pytest.raises(InputError, match="--fit-on train needs --unit pixel"):
        KMeansConfig(fit_on="train")


def test_whitened_directions_are_part_of_the_distance() -> None:
    draw = np.random.default_rng(0)
    clusters = Clusters(draw.normal(size=5), draw.normal(size=(5, 3)), draw.normal(size=(7, 3)))
    embeddings = torch.from_numpy(draw.normal(size=(2, 5, 4, 6)))
    flat = embeddings.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    expected = clusters.assign(flat).reshape(2, 4, 6)
    assert nearest_centres(embeddings, clusters).tolist() == expected.tolist()


def test_directions_far_shorter_than_the_mean_keep_their_digits() -> None:
    """As of a network whose embeddings have all but collapsed to one direction."""
    draw, spread = np.random.default_rng(0), 1e-6
    mean = np.full(8, 8**-0.5)
    clusters = Clusters(mean, np.eye(8) / spread, draw.normal(size=(20, 8)))
    values = mean[:, None, None] + spread * draw.normal(size=(2, 8, 50, 50))
    embeddings = torch.from_numpy(values).float()
    flat = embeddings.permute(0, 2, 3, 1).reshape(-1, 8).numpy()
    expected = torch.from_numpy(clusters.assign(flat)).view(2, 50, 50)
    assert float((nearest_centres(embeddings, clusters) != expected).float().mean()) < 1e-3


def test_images_cannot_be_counted_by_cluster() -> None:
    with pytest.raises(InputError, match="--criterion image needs --unit image"):
        KMeansConfig(criterion="image", unit="pixel")
    with pytest.raises(InputError, match="--unit is 'object'"):
        KMeansConfig(unit="object")  # type: ignore[arg-type]


def _evaluate(ranks: Ranks, shards: Path) -> Result:
    samples = labelled_shards(read_manifest(shards))
    return evaluate_kmeans(random_encoder(), samples, PIXELS, ranks, threads=1)[0]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_change_nothing(scenes: ShardSet, world_size: int) -> None:
    [alone] = run_on_ranks(_evaluate, 1, scenes.manifest.root)
    for result in run_on_ranks(_evaluate, world_size, scenes.manifest.root):
        assert result.confusion.tolist() == alone.confusion.tolist()
        assert result.values == alone.values
