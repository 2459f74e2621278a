"""Linear classifier: known answers, a plain implementation, augmentation, and several ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from data_pipeline.errors import InputError
from data_pipeline.labelled import ShardSet, labelled_shards
from data_pipeline.manifest import read_manifest
from data_pipeline.order import generator
from data_pipeline.pieces import single_threaded_pool
from data_pipeline.resize import resize_nearest
from data_pipeline.whole_images import WholeImage, WholeImages, normalise
from evaluation.augmentation import augmented
from evaluation.crf import CrfConfig, refine
from evaluation.linear_classifier import LinearClassifier, image_gradients
from evaluation.linear_probe import LinearConfig, evaluate_linear, score_own_classifier
from evaluation.miou import confusion, score
from evaluation.result import Result
from tests.evaluation_data import (
    ColourNetwork,
    block_shards,
    coloured,
    oracle,
    random_encoder,
)
from tests.ranks import run_on_ranks
from trainer.distributed import Ranks
from trainer.encoder import Encoder

ALONE = Ranks(0, 1, torch.device("cpu"))
QUICK = LinearConfig(size=48, epochs=4, batch_size=4, lr=1.0, decay_epoch=3, augment=False)
STREAM = 11  # of the generator that orders the training images


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardSet, ShardSet]:
    folder = tmp_path_factory.mktemp("blocks")
    train = block_shards(folder / "train", [1, 2, 3] * 4)
    return train, block_shards(folder / "test", [1, 2, 3, 0, 2], first=50)


@pytest.fixture(scope="module")
def tinted(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardSet, ShardSet]:
    folder = tmp_path_factory.mktemp("tinted")
    train = block_shards(folder / "train", [1, 2, 3, 1, 2, 3, 1], (44, 52), tinted=True)
    test = block_shards(folder / "test", [1, 2, 3, 0, 2], (52, 44), tinted=True, first=50)
    return train, test


def test_published_protocol_is_the_default() -> None:
    assert LinearConfig() == LinearConfig(
        size=512, epochs=60, batch_size=16, lr=0.1, momentum=0.9, weight_decay=1e-4,
        decay_epoch=25, augment=True, select="best", evaluate_every=1, precision="float32",
        seeds=(0,),
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_separable_features_are_learned(blocks: tuple[ShardSet, ShardSet], precision: str) -> None:
    config = replace(QUICK, epochs=20, decay_epoch=15, seeds=(0, 1), precision=precision)
    [result], _ = evaluate_linear(oracle(list(blocks), 48), *blocks, config, ALONE)
    assert result.values == (100, 100)
    assert result.iou.tolist() == [100] * 4
    assert (result.pixel_accuracy, result.foreground_iou) == (100, 100)
    assert (result.images, result.step, result.protocol) == (5, 7, "linear")
    assert result.confusion.sum() == 5 * 47 * 48  # all but the ignored border


def plain_probe(
    encoder: Encoder, train: ShardSet, test: ShardSet, config: LinearConfig
) -> list[NDArray[np.int64]]:
    """Confusion after every epoch, by torch's own mean loss on one batch at a time."""

    def features(image: WholeImage) -> torch.Tensor:
        with torch.no_grad():
            found = encoder.network.features(normalise(image.pixels)[None])[0]
        return found.to(torch.bfloat16).float()

    train_images = WholeImages(train, config.size, threads=1)
    test_images = WholeImages(test, config.size, threads=1)
    classes = len(train.classes)
    torch.manual_seed(config.seeds[0])
    classifier = torch.nn.Conv2d(16, classes, 1)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(config.seeds[0])
        classifier.weight.copy_(0.01 * torch.randn(classes, 16, 1, 1, generator=draw))
        assert classifier.bias is not None
        classifier.bias.zero_()
    optimizer = torch.optim.SGD(classifier.parameters(), 1.0, momentum=0.9, weight_decay=1e-4)
    size = (config.size, config.size)
    matrices = []
    for epoch in range(config.epochs):
        for group in optimizer.param_groups:
            group["lr"] = config.lr if epoch < config.decay_epoch else config.lr / 10
        order = generator(config.seeds[0], STREAM, epoch).permutation(len(train_images)).tolist()
        for first in range(0, len(order), config.batch_size):
            batch = [train_images.read(i) for i in order[first : first + config.batch_size]]
            labels = [resize_nearest(torch.tensor(image.label), size) for image in batch]
            logits = classifier(torch.stack([features(image) for image in batch]))
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            loss = F.cross_entropy(logits, torch.stack(labels).long(), ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        matrix = np.zeros((classes, classes), np.int64)
        for image in (test_images.read(i) for i in range(len(test_images))):
            for_size = F.interpolate(classifier(features(image)[None]), size, mode="bilinear")
            logits = F.interpolate(for_size, image.label.shape, mode="bilinear")
            matrix += confusion(image.label, logits.argmax(1)[0].numpy(), classes, classes)
        matrices.append(matrix)
    return matrices


@pytest.mark.parametrize("select", ["best", "last"])
def test_equals_a_plain_implementation(tinted: tuple[ShardSet, ShardSet], select: str) -> None:
    config = replace(QUICK, size=40, batch_size=3, select=select, seeds=(4,), decay_epoch=2)
    [result], _ = evaluate_linear(random_encoder(), *tinted, config, ALONE)
    matrices = plain_probe(random_encoder(), *tinted, config)
    scores = [score(matrix).miou for matrix in matrices]
    counted = int(np.argmax(scores)) if select == "best" else config.epochs - 1
    assert result.values[0] == pytest.approx(scores[counted], abs=0.05)
    moved = np.abs(result.confusion - matrices[counted]).sum()
    assert moved <= 0.002 * result.confusion.sum(), "all but a few pixels at ties"
    assert len(set(scores)) > 1


def test_only_epochs_that_are_looked_at_can_be_best(tinted: tuple[ShardSet, ShardSet]) -> None:
    config = replace(QUICK, size=40, batch_size=3, lr=3.0)
    [each], _ = evaluate_linear(random_encoder(), *tinted, config, ALONE)
    [last], _ = evaluate_linear(random_encoder(), *tinted, replace(config, select="last"), ALONE)
    [rarely], _ = evaluate_linear(
        random_encoder(), *tinted, replace(config, evaluate_every=9), ALONE
    )
    assert rarely.values == last.values
    assert each.mean >= last.mean


def test_augmentation_changes_what_is_learned(tinted: tuple[ShardSet, ShardSet]) -> None:
    config = replace(QUICK, size=40, lr=3.0, select="last")
    [cached], _ = evaluate_linear(random_encoder(), *tinted, config, ALONE)
    [seen], _ = evaluate_linear(random_encoder(), *tinted, replace(config, augment=True), ALONE)
    [again], _ = evaluate_linear(
        random_encoder(), *tinted, replace(config, augment=True), ALONE, threads=1
    )
    assert seen.confusion.tolist() == again.confusion.tolist()
    assert cached.confusion.tolist() != seen.confusion.tolist()
    assert cached.confusion.sum() == seen.confusion.sum()


def coloured_image(sample_id: int = 3) -> WholeImage:
    """Each label has its own grey value, so that a picture tells where its label should be."""
    label = np.zeros((64, 64), np.int16)
    label[8:40, 12:30] = 1
    label[30:60, 34:60] = 2
    pixels = torch.tensor(40 + 80 * label)[None].repeat(3, 1, 1)
    pixels = pixels.to(torch.uint8)
    return WholeImage(sample_id, "key", pixels, label, None, pixels.permute(1, 2, 0).numpy())


def test_augmentation_moves_image_and_label_together() -> None:
    image = coloured_image()
    flipped = 0
    for epoch in range(40):
        pixels, label = augmented(image, 64, 0, epoch)
        assert pixels.shape == (3, 64, 64)
        assert (pixels.dtype, label.dtype) == (torch.uint8, torch.int16)
        # away from edges, where one of both interpolates, the grey value is that of the label
        around = label[None, None].float()
        inner = -F.max_pool2d(-around, 5, 1, 2) == F.max_pool2d(around, 5, 1, 2)
        known = inner[0, 0] & (label >= 0)
        known[[0, 1, -2, -1]] = known[:, [0, 1, -2, -1]] = False
        assert known.sum() > 1000
        assert (pixels[0][known].int() == 40 + 80 * label[known].int()).all()
        columns = [(label == i).nonzero()[:, 1].float().mean() for i in (1, 2)]
        flipped += int(columns[0] > columns[1])
        # scale .75…1.25 changes the objects' area by .56…1.56; a part may leave the image
        share = int((label == 1).sum()) / int((image.label == 1).sum())
        assert 0.5 < share < 1.6
    assert 10 < flipped < 30


def test_augmentation_depends_on_seed_epoch_and_image_alone() -> None:
    first, _ = augmented(coloured_image(), 64, 0, 1)
    assert torch.equal(first, augmented(coloured_image(), 64, 0, 1)[0])
    assert not torch.equal(first, augmented(coloured_image(), 64, 1, 1)[0])
    assert not torch.equal(first, augmented(coloured_image(), 64, 0, 2)[0])
    assert not torch.equal(first, augmented(coloured_image(4), 64, 0, 1)[0])


def test_what_comes_from_outside_the_image_is_ignored() -> None:
    corners = set()
    for epoch in range(20):
        pixels, label = augmented(coloured_image(), 64, 0, epoch)
        assert ((pixels[0] == 0) <= (label == -1)).all()
        corners.add(int(label[0, 0]))
    assert corners == {-1, 0}


def test_other_classes_and_empty_labels_are_refused(
    blocks: tuple[ShardSet, ShardSet], tmp_path: Path
) -> None:
    other = block_shards(tmp_path / "other", [1], names=("background", "ant", "cow", "bee"))
    with pytest.raises(InputError, match="have different classes"):
        evaluate_linear(random_encoder(), blocks[0], other, QUICK, ALONE)
    ignored = block_shards(tmp_path / "ignored", [255], (1, 40))
    with pytest.raises(InputError, match="is 255"):
        evaluate_linear(random_encoder(), blocks[0], ignored, QUICK, ALONE)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"select": "first"}, "--select is 'first'"),
        ({"epochs": 0}, "--epochs"),
        ({"evaluate_every": 0}, "--evaluate-every"),
        ({"lr": 0.0}, "--lr"),
        ({"decay_epoch": -1}, "--decay-epoch"),
        ({"seeds": ()}, "--seeds"),
        ({"precision": "fp16"}, "--precision is 'fp16'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        LinearConfig(**options)


def test_gradients_of_images_are_those_of_torch() -> None:
    draw = torch.Generator().manual_seed(1)
    classifier = LinearClassifier(torch.randn(4, 6, generator=draw), torch.randn(4, generator=draw))
    features = torch.randn(3, 6, 5, 7, generator=draw)
    labels = torch.randint(-1, 4, (3, 20, 28), generator=draw)
    labels[2] = -1
    rows = image_gradients(classifier, features, labels)
    with single_threaded_pool(2) as pool:
        assert torch.equal(image_gradients(classifier, features, labels, pool), rows)
    for row, one, label in zip(rows, features, labels, strict=True):
        weight, bias = classifier.learnable()
        logits = F.conv2d(one[None], weight[:, :, None, None], bias)
        full = F.interpolate(logits, (20, 28), mode="bilinear")
        loss = F.cross_entropy(full, label[None], ignore_index=-1, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        assert bias.grad is not None
        expected = torch.cat([weight.grad.flatten(), bias.grad])
        torch.testing.assert_close(row[:-1], expected, rtol=1e-5, atol=1e-4)
        assert row[-1] == (label >= 0).sum()


_Learned = tuple[list[Result], LinearClassifier]


def _evaluate(ranks: Ranks, train: Path, test: Path, config: LinearConfig) -> list[_Learned]:
    """With kept features and with drawn ones."""
    sets = [labelled_shards(read_manifest(folder)) for folder in (train, test)]
    return [
        evaluate_linear(coloured(), *sets, replace(config, augment=augment), ranks, threads=1)
        for augment in (False, True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_change_no_bit(tinted: tuple[ShardSet, ShardSet], world_size: int) -> None:
    """7 and 5 images in batches of 4: no share is even, and some ranks have none of a batch."""
    crf = CrfConfig(iterations=1)
    config = replace(QUICK, size=40, epochs=8, decay_epoch=7, lr=0.1, seeds=(0, 1), crf=crf)
    arguments = (tinted[0].manifest.root, tinted[1].manifest.root, config)
    [alone] = run_on_ranks(_evaluate, 1, *arguments)
    for found in run_on_ranks(_evaluate, world_size, *arguments):
        for (results, classifier), (expected, learned) in zip(found, alone, strict=True):
            assert torch.equal(classifier.weight, learned.weight)
            assert torch.equal(classifier.bias, learned.bias)
            assert [one.protocol for one in results] == ["linear", "linear-crf"]
            for result, same in zip(results, expected, strict=True):
                assert result.values == same.values
                assert result.confusion.tolist() == same.confusion.tolist()
            assert (results[0].confusion.sum(0)[1:] > 0).any(), "more than background"
    assert not torch.equal(alone[0][1].weight, alone[1][1].weight)


def test_crf_scores_the_classifier_that_counts(tinted: tuple[ShardSet, ShardSet]) -> None:
    crf = CrfConfig(iterations=2)
    config = replace(QUICK, size=40, epochs=8, decay_epoch=7, lr=0.1, crf=crf)
    (plain, refined), classifier = evaluate_linear(coloured(), *tinted, config, ALONE)
    assert "crf" not in plain.options
    assert refined.options["crf"]["iterations"] == 2
    images = WholeImages(tinted[1], 40, 1)
    matrix = np.zeros((4, 4), np.int64)
    for image in (images.read(i) for i in range(len(images))):
        features = ColourNetwork().features(normalise(image.pixels)[None])
        logits = F.conv2d(
            features.to(torch.bfloat16).float(),
            classifier.weight[:, :, None, None],
            classifier.bias,
        )
        logits = F.interpolate(logits, (40, 40), mode="bilinear")
        logits = F.interpolate(logits, image.label.shape, mode="bilinear")
        found = refine(image.image, logits[0].softmax(0).numpy(), config.crf)
        matrix += confusion(image.label, found.argmax(0), 4, 4)
    assert refined.confusion.tolist() == matrix.tolist()
    assert plain.confusion.tolist() != matrix.tolist()
    assert refined.values[0] == pytest.approx(score(matrix).miou)


def test_the_classifier_of_a_file_is_scored_as_it_is(tinted: tuple[ShardSet, ShardSet]) -> None:
    config = replace(QUICK, size=40, epochs=8, decay_epoch=7, lr=0.1, select="last", seeds=(2,))
    [learned], classifier = evaluate_linear(coloured(), *tinted, config, ALONE)
    released = (classifier.weight[:, :, None, None], classifier.bias)
    encoder = Encoder(ColourNetwork(), 7, classifier=released)  # type: ignore[arg-type]
    config = replace(config, crf=CrfConfig(iterations=1))
    (result, refined), own = score_own_classifier(encoder, tinted[1], config, ALONE)
    assert torch.equal(own.weight, classifier.weight)
    assert (result.protocol, refined.protocol) == ("linear", "linear-crf")
    moved = np.abs(result.confusion - learned.confusion).sum()
    assert moved <= 0.01 * result.confusion.sum(), "features were kept with 8 bits"
    how = {"own_classifier": True, "size": 40, "precision": "float32"}
    assert result.options == {**how, "resize": "opencv", "mean": "present"}


def test_no_classifier_and_another_number_of_classes_are_refused(
    tinted: tuple[ShardSet, ShardSet],
) -> None:
    with pytest.raises(InputError, match="holds no classifier; leave --own-classifier out"):
        score_own_classifier(coloured(), tinted[1], QUICK, ALONE)
    released = (torch.zeros(21, 6, 1, 1), torch.zeros(21))
    encoder = Encoder(ColourNetwork(), 7, classifier=released)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"has 21 classes, and .* has 4"):
        score_own_classifier(encoder, tinted[1], QUICK, ALONE)
