"""Rows of COCO-Stuff against their published steps, written out in NumPy on files read here.

Only the network is ours, and K-means itself: its centres are taken as they were found.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from evaluation.cluster import ClusterConfig
from evaluation.commands.kmeans import data_set_settings
from evaluation.commands.options import Source
from evaluation.datasets import Place, data_set
from evaluation.kmeans import evaluate_kmeans
from evaluation.kmeans_config import KMeansConfig
from evaluation.matching import merge_columns
from evaluation.prototypes import PrototypeConfig
from tests.data_set_trees import DOGS, PEOPLE, SKIES, TREES, coco
from tests.evaluation_data import random_encoder
from tests.published_steps import opencv_cubic, opencv_nearest
from trainer.distributed import Ranks
from trainer.encoder import Encoder

ALONE = Ranks(0, 1, torch.device("cpu"))
SIDE = 32
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
Map = NDArray[Any]


def network_input(square: Map) -> torch.Tensor:
    values = (square / 255 - MEAN) / STD
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None]


@torch.inference_mode()
def embedded(encoder: Encoder, square: Map) -> tuple[Map, Map]:
    """Embeddings [D, S, S] and logits [S, S]."""
    embeddings, saliency = encoder.embed(network_input(square))
    return embeddings[0].double().numpy(), saliency[0].double().numpy()


def files(root: Path, number: int) -> tuple[Map, Map]:
    name = f"{number:012d}"
    image = np.asarray(Image.open(root / "val2017" / f"{name}.jpg"))
    return image, np.asarray(Image.open(root / "stuffthingmaps/val2017" / f"{name}.png"))


def close(found: Map, expected: Map) -> None:
    """But for pixels at a tie, which a grey level of a resized image may turn."""
    assert found.sum() == expected.sum()
    assert (found.sum(1) == expected.sum(1)).all(), "the truth has no ties"
    assert np.abs(found - expected).sum() <= 2, np.abs(found - expected).sum()


def test_coco_stuff_27(tmp_path: Path) -> None:
    """Shorter side to S, the centre, centres of train2017, scored on the squares."""
    root, encoder = coco(tmp_path), random_encoder()
    place, known = Place(root, names=root / "curated.txt"), data_set("coco-stuff-27")
    cluster = ClusterConfig(6, pca=0, seeds=(1234,))
    settings = data_set_settings(Source(known, place))
    config = KMeansConfig(SIDE, cluster=cluster, batch_size=1, **settings)
    train, test = known.open(place, "train"), known.open(place, "test")
    result, found = evaluate_kmeans(encoder, test, config, ALONE, fit_samples=train)
    assert settings["fit_on"] == "train"
    names = {PEOPLE: "person", DOGS: "animal", SKIES: "sky", TREES: "plant"}
    classes, counts = list(test.classes), np.zeros((len(test.classes), 6), np.int64)
    for number in (139, 285):
        image, label = files(root, number)
        wide = SIDE * image.shape[1] // image.shape[0]
        left = (wide - SIDE) // 2
        square = opencv_cubic(image, SIDE, wide, fixed=False)[:, left : left + SIDE]
        truth = opencv_nearest(label, SIDE, wide)[:, left : left + SIDE]
        embeddings, _ = embedded(encoder, square)
        unit = embeddings / np.linalg.norm(embeddings, axis=0)
        centres = found.clusters.centres
        distances = ((unit[None] - centres[:, :, None, None]) ** 2).sum(1)
        for value, cluster_of_pixel in zip(truth.flat, distances.argmin(0).flat, strict=True):
            if value != 255:
                counts[classes.index(names[int(value)]), cluster_of_pixel] += 1
    close(result.confusion, merge_columns(counts, found.class_of_cluster))


@pytest.mark.parametrize("resize", ["opencv", "antialias"])
def test_coco_stuff_81(tmp_path: Path, resize: Any) -> None:
    """A square of S, labels resized to it, scored there; the antialiased one is another image."""
    root, encoder = coco(tmp_path), random_encoder()
    place, known = Place(root), data_set("coco-stuff-81")
    settings = data_set_settings(Source(known, place)) | {"resize": resize}
    prototype = PrototypeConfig("probability", 0.5, "normalized")
    cluster = ClusterConfig(2, pca=0, seeds=(1234,))
    config = KMeansConfig(SIDE, prototype, cluster, batch_size=1, **settings)
    test = known.open(place, "test")
    result, found = evaluate_kmeans(encoder, test, config, ALONE)
    names = {PEOPLE: "person", DOGS: "dog", SKIES: "background", TREES: "background"}
    classes, counts = list(test.classes), np.zeros((len(test.classes), 3), np.int64)
    for place_of_image, number in enumerate((139, 285, 632)):
        image, label = files(root, number)
        square = opencv_cubic(image, SIDE, SIDE, fixed=False)
        truth = opencv_nearest(label, SIDE, SIDE)
        _, logits = embedded(encoder, square)
        own = found.cluster_of_sample[place_of_image]
        for value, logit in zip(truth.flat, logits.flat, strict=True):
            if value != 255:
                counts[classes.index(names[int(value)]), own if logit > 0 else 0] += 1
    expected = merge_columns(counts, found.class_of_cluster)
    if resize == "opencv":
        close(result.confusion, expected)
    else:
        assert np.abs(result.confusion - expected).sum() > 2
