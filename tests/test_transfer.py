"""A classifier on a foreign data set: names that mean the same, and what only one side has."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import InputError
from data_pipeline.labelled import ShardSet
from data_pipeline.sources.coco_classes import names_81
from data_pipeline.sources.voc import VOC_CLASSES as VOC
from evaluation.class_names import map_classes, shared_classes
from evaluation.crf import CrfConfig
from evaluation.prototypes import PrototypeConfig
from evaluation.saved_head import SavedHead
from evaluation.transfer import TransferConfig, evaluate_transfer
from tests.evaluation_data import block_shards, coloured, oracle
from trainer.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
KNOWN = ("background", "bee", "zebra", "Ant")  # the data set has background, ant, bee, cow


def head(weight: list[list[float]], classes: tuple[str, ...] = KNOWN) -> SavedHead:
    tensors = {"weight": torch.tensor(weight), "bias": torch.zeros(len(weight))}
    return SavedHead("linear", tensors, classes, "zoo", 48, PrototypeConfig(), 7, "opencv")


# features are one-hot: background, ant, bee, cow. Cows are taken for zebras.
RIGHT = [[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
COWS_ARE_BEES = [[1.0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return block_shards(tmp_path_factory.mktemp("blocks"), [1, 2, 3, 0, 3])


def test_every_class_of_pascal_is_one_of_coco() -> None:
    shared = shared_classes(names_81(), VOC)
    assert len(shared) == 20
    assert shared["aeroplane"] == "airplane"
    assert shared["motorbike"] == "motorcycle"
    assert (shared["sofa"], shared["tv monitor"]) == ("couch", "tv")
    assert (shared["dining table"], shared["potted plant"]) == ("dining table", "potted plant")
    assert len(shared_classes(VOC, names_81())) == 20
    spelled = ("Background", "DiningTable", "potted_plant", "tv-monitor")
    assert set(shared_classes(spelled, names_81())) == {"dining table", "potted plant", "tv"}


def test_what_only_one_side_has() -> None:
    wanted = ("background", "sofa", "stamp", "TV")
    known = ("background", "tv", "giraffe", "couch")
    ignored = map_classes(known, wanted, "ignore")
    assert ignored.of_label is not None
    assert ignored.of_prediction is not None
    assert ignored.of_label.tolist() == [0, 1, -1, 3]
    assert ignored.of_prediction.tolist() == [0, 3, 0, 1]
    merged = map_classes(known, wanted, "background")
    assert merged.of_label is not None
    assert merged.of_label.tolist() == [0, 1, 0, 3]
    label, prediction = np.array([[0, 1, 2, -1, 3]], np.int16), np.array([[2, 3, 1, 1, 0]])
    counts = np.zeros((4, 5), np.int64)
    counts[0, 0] = counts[1, 1] = counts[3, 0] = 1
    assert ignored.count(label, prediction).tolist() == counts.tolist()
    counts[0, 3] = 1
    assert merged.count(label, prediction).tolist() == counts.tolist()
    without = map_classes(known, ("sofa", "tv"), "ignore")
    assert without.of_prediction is not None
    assert without.of_prediction.tolist() == [2, 1, 2, 0], "no class takes what is no background"


def test_pixels_of_unknown_classes_are_ignored_or_background(blocks: ShardSet) -> None:
    network, config = oracle([blocks], 48), TransferConfig()
    [result] = evaluate_transfer(network, head(RIGHT), blocks, config, ALONE)
    assert (result.protocol, result.values, result.step) == ("transfer", (100,), 7)
    assert result.iou[:3].tolist() == [100] * 3
    assert np.isnan(result.iou[3])
    assert result.options["shared"] == ["ant", "bee"]
    assert (result.options["size"], result.options["learned_on"]) == (48, "zoo")
    cows = 20 * (16 + 2) + 20 * (16 + 0)  # the images with the numbers 2 and 4
    assert result.confusion.sum() == 5 * 47 * 48 - cows
    as_background = replace(config, unknown="background")
    [result] = evaluate_transfer(network, head(RIGHT), blocks, as_background, ALONE)
    assert result.values == (100,)
    assert result.confusion.sum() == 5 * 47 * 48
    [result] = evaluate_transfer(network, head(COWS_ARE_BEES), blocks, as_background, ALONE)
    bees = 20 * (16 + 1)
    assert result.iou[2] == pytest.approx(100 * bees / (bees + cows))
    assert result.confusion[0, 2] == cows


def test_crf_is_a_second_result(blocks: ShardSet) -> None:
    config = TransferConfig(size=24, crf=CrfConfig(2, gaussian_sigma=4))
    plain, refined = evaluate_transfer(oracle([blocks], 24), head(RIGHT), blocks, config, ALONE)
    assert (plain.protocol, refined.protocol) == ("transfer", "transfer-crf")
    assert plain.options["size"] == 24
    assert refined.confusion.sum() == plain.confusion.sum()
    assert refined.confusion.tolist() != plain.confusion.tolist()


def test_another_network_is_warned_of_or_refused(
    blocks: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    config = TransferConfig()
    old = replace(head(RIGHT), step=5)
    evaluate_transfer(oracle([blocks], 48), old, blocks, config, ALONE)
    assert "learned at step 5 of a network, and this one is at step 7" in caplog.text
    with pytest.raises(InputError, match="takes 4 features, and this network has 6"):
        evaluate_transfer(coloured(), head(RIGHT), blocks, config, ALONE)
    strange = head(RIGHT, ("background", "gnu", "zebra", "emu"))
    with pytest.raises(InputError, match=r"shares no class .* gnu, zebra, emu, .* ant, bee, cow"):
        evaluate_transfer(oracle([blocks], 48), strange, blocks, config, ALONE)
    clusters = replace(head(RIGHT), kind="kmeans")
    with pytest.raises(InputError, match="is of kind kmeans"):
        evaluate_transfer(oracle([blocks], 48), clusters, blocks, config, ALONE)


def test_impossible_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--unknown is 'wrong'; it can be ignore or background"):
        TransferConfig(unknown="wrong")
    with pytest.raises(InputError, match="--size"):
        TransferConfig(size=0)
    with pytest.raises(InputError, match="needs a data set with a class background"):
        map_classes(("background", "ant"), ("ant", "bee"), "background")
