"""Pictures for the report: what is written, and that equal networks give equal pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.whole_images import WholeImage
from evaluation.cluster import ClusterConfig, Clusters
from evaluation.examples import cluster_maps, principal_colours, write_examples
from evaluation.kmeans import Clustering, evaluate_kmeans
from evaluation.kmeans_config import KMeansConfig
from evaluation.prototypes import PrototypeConfig
from evaluation.report_data import read_examples
from tests.evaluation_data import BlockItem, block_shards, oracle, random_encoder, scene_shards
from trainer.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
HALVES = PrototypeConfig("probability")


def image_numbered(sample_id: int) -> WholeImage:
    pixels = torch.zeros(3, 2, 2, dtype=torch.uint8)
    return WholeImage(
        sample_id,
        str(sample_id),
        pixels,
        np.zeros((2, 2), np.int16),
        None,
        pixels.permute(1, 2, 0).numpy(),
    )


def test_arrays_are_what_the_report_reads(tmp_path: Path) -> None:
    manifest = scene_shards(tmp_path / "shards", 9)
    config = KMeansConfig(36, HALVES, ClusterConfig(pca=4), batch_size=2)
    _, clustering = evaluate_kmeans(random_encoder(), manifest, config, ALONE)
    path = tmp_path / "examples.npz"
    write_examples(random_encoder(), manifest, config, clustering, path, count=5)
    arrays = read_examples(path)
    assert arrays is not None
    shapes = {name: (array.shape, array.dtype.name) for name, array in arrays.items()}
    maps = dict.fromkeys(("clusters", "label"), ((5, 36, 36), "int16"))
    maps["mask"] = ((5, 36, 36), "uint8")
    pictures = dict.fromkeys(("image", "embedding_rgb"), ((5, 36, 36, 3), "uint8"))
    assert shapes.pop("key")[0] == (5,)
    assert shapes == maps | pictures | {"saliency": ((5, 36, 36), "float32")}
    assert ((arrays["saliency"] >= 0) & (arrays["saliency"] <= 1)).all()
    assert len(set(arrays["key"].tolist())) == 5
    inside = arrays["saliency"] > 0.5
    assert 0 < inside.mean() < 1
    background = clustering.class_of_cluster[0]
    assert (arrays["clusters"][~inside] == background).all()
    # equal networks give equal files
    write_examples(random_encoder(), manifest, config, clustering, tmp_path / "b.npz", count=5)
    assert path.read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_pictures_of_a_network_that_knows_everything(tmp_path: Path) -> None:
    classes = [1, 2, 3, 0, 1, 2, 3]
    manifest = block_shards(tmp_path / "shards", classes)
    # the one image without an object would take one of three clusters
    config = KMeansConfig(48, cluster=ClusterConfig(without_foreground="leave-out"))
    _, clustering = evaluate_kmeans(oracle([manifest], 48), manifest, config, ALONE)
    path = tmp_path / "examples.npz"
    write_examples(oracle([manifest], 48), manifest, KMeansConfig(48), clustering, path, count=3)
    arrays = read_examples(path)
    assert arrays is not None
    assert arrays["key"].tolist() == ["block_000", "block_003", "block_006"]  # evenly spaced
    for i, index in enumerate((0, 3, 6)):
        item = BlockItem(index, classes[index], 48, 48)
        label = item.label().astype(np.int16)
        label[label == 255] = -1
        assert (arrays["label"][i] == label).all()
        assert (arrays["clusters"][i] == label.clip(0)).all()
        assert (arrays["mask"][i] == (label > 0)).all()
        noise = np.random.default_rng(index).integers(0, 256, (48, 48, 3))
        assert (arrays["image"][i] == noise).all()
        # pixels of one class have one colour, pixels of another class another
        for value in np.unique(label.clip(0)):
            assert len(np.unique(arrays["embedding_rgb"][i][label.clip(0) == value], axis=0)) == 1
    assert len(np.unique(arrays["embedding_rgb"].reshape(-1, 3), axis=0)) == 3


def test_fewer_images_than_asked_for_and_no_masks(tmp_path: Path) -> None:
    manifest = block_shards(tmp_path / "shards", [1, 2], masked=False)
    encoder, config = oracle([manifest], 48), KMeansConfig(48)
    _, clustering = evaluate_kmeans(encoder, manifest, config, ALONE)
    write_examples(encoder, manifest, config, clustering, tmp_path / "two.npz", count=12)
    arrays = read_examples(tmp_path / "two.npz")
    assert arrays is not None
    assert arrays["key"].tolist() == ["block_000", "block_001"]
    assert not arrays["mask"].any()


def test_cluster_maps_of_a_hand_case() -> None:
    clusters = Clusters(np.zeros(2), np.eye(2), np.zeros((3, 2)))
    clustering = Clustering({4: 2, 7: 3, 9: 0}, np.array([0, 5, 1, -1]), clusters)
    images = [image_numbered(number) for number in (4, 7, 9)]
    foreground = np.array([[[True, False], [False, True]]] * 3)
    assert cluster_maps(images, foreground, clustering).tolist() == [
        [[1, 0], [0, 1]],
        [[-1, 0], [0, -1]],  # a cluster without a class
        [[0, 0], [0, 0]],
    ]
    moved = Clustering(clustering.cluster_of_sample, np.array([3, 5, 1, 0]), clusters)
    assert cluster_maps(images[:1], foreground[:1], moved).tolist() == [[[1, 3], [3, 1]]]


def test_colours_are_the_principal_directions() -> None:
    draw = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 6, 20, 20, generator=draw)
    embeddings *= torch.tensor([1.0, 9.0, 0.1, 3.0, 0.1, 0.1])[None, :, None, None]
    colours = principal_colours(embeddings)
    assert colours.shape == (2, 20, 20, 3)
    assert colours.dtype == np.uint8
    for channel, dimension in enumerate((1, 3, 0)):
        values = embeddings[:, dimension].numpy().ravel()
        correlation = np.corrcoef(values, colours[..., channel].ravel())[0, 1]
        assert correlation > 0.95, "with the sign of its largest component"
        assert (colours[..., channel] == 0).mean() == pytest.approx(0.02, abs=0.01)
        assert (colours[..., channel] == 255).mean() == pytest.approx(0.02, abs=0.01)


def test_colours_are_deterministic_and_do_not_depend_on_scale_or_offset() -> None:
    draw = torch.Generator().manual_seed(1)
    embeddings = torch.randn(2, 5, 12, 12, generator=draw)
    colours = principal_colours(embeddings).astype(int)
    assert (principal_colours(embeddings.clone()) == colours).all()
    moved = principal_colours(3 * embeddings + 7)
    assert np.abs(moved - colours).max() <= 1


@pytest.mark.parametrize("dim", [1, 2])
def test_fewer_than_three_dimensions_repeat(dim: int) -> None:
    draw = torch.Generator().manual_seed(1)
    colours = principal_colours(torch.randn(1, dim, 8, 8, generator=draw))
    assert colours.shape == (1, 8, 8, 3)
    assert (colours[..., dim - 1] == colours[..., 2]).all()
    assert (principal_colours(torch.ones(1, dim, 8, 8)) == 0).all()
