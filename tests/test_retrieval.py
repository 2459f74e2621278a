"""Retrieval: known answers, a hand case, a plain implementation, and several ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import InputError
from data_pipeline.labelled import ShardSet, labelled_shards
from data_pipeline.manifest import read_manifest
from data_pipeline.resize import resize_nearest
from data_pipeline.whole_images import WholeImages, normalise
from evaluation.prototypes import PrototypeConfig
from evaluation.result import Result
from evaluation.retrieval import (
    SEVEN,
    Neighbours,
    RetrievalConfig,
    evaluate_retrieval,
    frequent_classes,
)
from evaluation.statistics import ImageStatistics
from tests.evaluation_data import block_shards, constant, oracle, random_encoder, scene_shards
from tests.ranks import run_on_ranks
from trainer.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
HALVES = PrototypeConfig("probability", 0.5, "normalized")
NAMES = ("background", *SEVEN[:2], "bicycle", *SEVEN[2:])  # class 3 is none of the seven


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardSet, ShardSet]:
    folder = tmp_path_factory.mktemp("scenes")
    return scene_shards(folder / "bank", 20, seed=1), scene_shards(folder / "test", 14, seed=2)


def test_a_network_that_knows_everything_scores_100(tmp_path: Path) -> None:
    bank = block_shards(tmp_path / "bank", [1, 2, 3, 0, 1])
    test = block_shards(tmp_path / "test", [2, 1, 3, 3, 0], (40, 56), first=20)
    config = RetrievalConfig(48)
    [result], nearest = evaluate_retrieval(oracle([bank, test], 48), bank, test, config, ALONE)
    assert result.protocol == "retrieval-4"
    assert result.iou.tolist() == [100] * 4
    assert result.values == (100,)
    assert result.options["bank_used"] == 4, "an image without an object is in no bank"
    assert nearest.queries.tolist() == [0, 1, 2, 3]
    assert nearest.bank[:, 0].tolist() == [1, 0, 2, 2]
    assert nearest.similarity[:, 0].tolist() == pytest.approx([1] * 4)
    assert result.confusion.sum() == sum(48 * 48 - np.count_nonzero(row) for row in _ignored(test))


def _ignored(samples: ShardSet) -> list[np.ndarray]:  # type: ignore[type-arg]
    images = WholeImages(samples, 48, 1)
    labels = [torch.tensor(images.read(i).label) for i in range(len(images))]
    return [resize_nearest(label, (48, 48)).numpy() < 0 for label in labels]


def test_of_seven_classes_the_others_are_ignored_and_background_is_not_in_the_mean(
    tmp_path: Path,
) -> None:
    bank = block_shards(tmp_path / "bank", [1, 3, 2, 5], names=NAMES)
    test = block_shards(tmp_path / "test", [2, 3, 1], names=NAMES, first=20)
    encoder = oracle([bank, test], 48)
    every, seven = evaluate_retrieval(encoder, bank, test, RetrievalConfig(48), ALONE)[0]
    assert (every.protocol, seven.protocol) == ("retrieval-9", "retrieval-7")
    assert every.values == (100,)
    assert seven.classes == ("background", *SEVEN)
    # the image of class 3 has a neighbour all the same, but its object's pixels are ignored
    assert seven.confusion[1:].sum() == every.confusion[[1, 2]].sum()
    assert seven.options["bank_used"] == 3
    assert seven.values[0] == pytest.approx(np.nanmean(seven.iou[1:]))
    assert seven.values == (100,)


def test_a_bank_image_has_the_most_frequent_class_inside_its_mask() -> None:
    inside = np.array([[90, 5, 7, 0], [50, 0, 0, 0], [0, 4, 4, 3]])
    statistics = ImageStatistics(
        np.ones((3, 2), np.float32), inside, np.zeros_like(inside), np.arange(3)
    )
    assert frequent_classes(statistics).tolist() == [2, 0, 1]


def test_equals_a_plain_implementation(scenes: tuple[ShardSet, ShardSet]) -> None:
    bank, test = scenes
    encoder, config = random_encoder(), RetrievalConfig(40, HALVES, batch_size=1)
    [result], _ = evaluate_retrieval(encoder, bank, test, config, ALONE)

    def embedded(samples: ShardSet) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:  # type: ignore[type-arg]
        found = []
        for image in (WholeImages(samples, 40, 1).read(i) for i in range(len(samples))):
            pixels = normalise(image.pixels)[None].contiguous(memory_format=torch.channels_last)
            with torch.inference_mode():
                embeddings, saliency = encoder.embed(pixels)
            unit = torch.nn.functional.normalize(embeddings[0], dim=0).numpy()
            inside = (saliency[0].sigmoid() > 0.5).numpy()
            vector = unit[:, inside].sum(1)
            label = resize_nearest(torch.tensor(image.label), (40, 40)).numpy()
            found.append((vector / max(np.linalg.norm(vector), 1e-12), inside, label))
        return found

    bank_vectors, bank_labels = [], []
    for vector, inside, label in embedded(bank):
        kept = label[inside & (label > 0)]
        if len(kept):
            bank_vectors.append(vector)
            bank_labels.append(int(np.bincount(kept).argmax()))
    matrix = np.zeros((11, 11), np.int64)
    for vector, inside, label in embedded(test):
        own = bank_labels[int(np.argmax(np.stack(bank_vectors) @ vector))]
        for truth, predicted in zip(label.ravel(), (own * inside).ravel(), strict=True):
            if truth >= 0:
                matrix[truth, predicted] += 1
    assert result.confusion.tolist() == matrix.tolist()
    assert (matrix.sum(0) > 0).sum() > 2


def test_nothing_to_retrieve_is_said(scenes: tuple[ShardSet, ShardSet]) -> None:
    with pytest.raises(InputError, match="no image of the bank has a predicted mask"):
        evaluate_retrieval(constant(-1.0), *scenes, RetrievalConfig(16), ALONE)
    with pytest.raises(InputError, match="--resolution is 'pixel'"):
        RetrievalConfig(resolution="pixel")  # type: ignore[arg-type]


def test_published_protocol_is_the_default() -> None:
    config = RetrievalConfig()
    assert (config.size, config.resolution) == (512, "image")
    assert config.prototype == PrototypeConfig("logit", 0.5, "weighted")


def _retrieve(ranks: Ranks, bank: Path, test: Path) -> tuple[list[Result], Neighbours]:
    sets = [labelled_shards(read_manifest(folder)) for folder in (bank, test)]
    config = RetrievalConfig(40, HALVES, batch_size=1)
    return evaluate_retrieval(random_encoder(), *sets, config, ranks, threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_change_nothing(scenes: tuple[ShardSet, ShardSet], world_size: int) -> None:
    folders = [samples.manifest.root for samples in scenes]
    [([alone], nearest)] = run_on_ranks(_retrieve, 1, *folders)
    for [result], found in run_on_ranks(_retrieve, world_size, *folders):
        assert result.confusion.tolist() == alone.confusion.tolist()
        assert result.values == alone.values
        assert found.bank.tolist() == nearest.bank.tolist()
