"""Linear classifier: known answers, a plain implementation, augmentation, and several ranks."""

import itertools
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
from evaluation.augmentation import augmented, turned
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
STREAM, AUGMENT = 11, 12  # of the generators of the order and of augmentation


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


def published_probe(
    encoder: Encoder, train: ShardSet, test: ShardSet, config: LinearConfig
) -> list[tuple[float, NDArray[np.int64]]]:
    """After every epoch the mIoU that it is chosen by, and the confusion that it would score.

    By torch's own mean loss on one batch at a time. As published: batches that are full, the whole
    rate up to and with epoch 25, the mIoU of the squares, and their maps resized to the labels.
    """

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
    found = []
    for epoch in range(config.epochs):
        for group in optimizer.param_groups:
            group["lr"] = config.lr / 10 if epoch > config.decay_epoch else config.lr
        order = generator(config.seeds[0], STREAM, epoch).permutation(len(train_images)).tolist()
        for first in range(0, len(order) - config.batch_size + 1, config.batch_size):
            batch = [train_images.read(i) for i in order[first : first + config.batch_size]]
            labels = [resize_nearest(torch.tensor(image.label), size) for image in batch]
            logits = classifier(torch.stack([features(image) for image in batch]))
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            loss = F.cross_entropy(logits, torch.stack(labels).long(), ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        chosen_by, scored = np.zeros((2, classes, classes), np.int64)
        for image in (test_images.read(i) for i in range(len(test_images))):
            logits = F.interpolate(classifier(features(image)[None]), size, mode="bilinear")
            predicted, label = logits.argmax(1)[0], torch.tensor(image.label)
            square = resize_nearest(label, size).numpy()
            chosen_by += confusion(square, predicted.numpy(), classes, classes)
            height, width = label.shape
            resized = resize_nearest(predicted, (height, width)).numpy()
            scored += confusion(image.label, resized, classes, classes)
        found.append((score(chosen_by).miou, scored))
    return found


@pytest.mark.parametrize("select", ["best", "last"])
def test_equals_the_published_steps(tinted: tuple[ShardSet, ShardSet], select: str) -> None:
    """7 images in batches of 3, so that one is left over, and another best epoch at the labels."""
    config = replace(QUICK, size=24, epochs=6, batch_size=3, lr=3.0, seeds=(19,), select=select)
    [result], _ = evaluate_linear(random_encoder(), *tinted, config, ALONE)
    expected = published_probe(random_encoder(), *tinted, config)
    at_squares = [miou for miou, _ in expected]
    scores = [score(matrix).miou for _, matrix in expected]
    best = int(np.argmax(at_squares))
    assert best != int(np.argmax(scores))
    counted = best if select == "best" else config.epochs - 1
    assert result.values[0] == pytest.approx(scores[counted], abs=0.05)
    moved = np.abs(result.confusion - expected[counted][1]).sum()
    assert moved <= 0.002 * result.confusion.sum(), "all but a few pixels at ties"


def test_fewer_images_than_a_batch_are_one(tinted: tuple[ShardSet, ShardSet]) -> None:
    config = replace(QUICK, size=40, lr=3.0)
    classifiers = [
        evaluate_linear(random_encoder(), *tinted, replace(config, batch_size=size), ALONE)[1]
        for size in (7, 16)
    ]
    assert torch.equal(classifiers[0].weight, classifiers[1].weight)
    assert not torch.equal(classifiers[0].weight, LinearClassifier.drawn(4, 16, 0).weight)


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
    config = replace(QUICK, size=40, epochs=12, decay_epoch=11, lr=3.0, select="last")
    [cached], _ = evaluate_linear(random_encoder(), *tinted, config, ALONE)
    [seen], _ = evaluate_linear(random_encoder(), *tinted, replace(config, augment=True), ALONE)
    [again], _ = evaluate_linear(
        random_encoder(), *tinted, replace(config, augment=True), ALONE, threads=1
    )
    assert seen.confusion.tolist() == again.confusion.tolist()
    assert cached.confusion.tolist() != seen.confusion.tolist()
    assert cached.confusion.sum() == seen.confusion.sum()


def coloured_image(sample_id: int = 3, shape: tuple[int, int] = (64, 64)) -> WholeImage:
    """Each label has its own grey value, so that a picture tells where its label should be."""
    label = np.zeros(shape, np.int16)
    label[8:40, 12:30] = 1
    label[30:60, 34:60] = 2
    image = np.repeat((40 + 80 * label).astype(np.uint8)[..., None], 3, 2)
    return WholeImage(sample_id, "key", torch.tensor(image).permute(2, 0, 1), label, None, image)


def test_augmentation_moves_image_and_label_together() -> None:
    image = coloured_image()
    flipped = 0
    for epoch in range(40):
        pixels, label = augmented(image, 64, 0, epoch)
        assert pixels.shape == (3, 64, 64)
        assert (pixels.dtype, label.dtype) == (torch.uint8, torch.int16)
        # away from edges, where the image is interpolated, the grey value is that of the label
        around = torch.where(pixels[0] < 30, -1, label)[None, None].float()
        inner = -F.max_pool2d(-around, 9, 1, 4) == F.max_pool2d(around, 9, 1, 4)
        known = inner[0, 0] & (pixels[0] >= 30)
        known[[0, 1, 2, -1, -2, -3]] = known[:, [0, 1, 2, -1, -2, -3]] = False
        assert known.sum() > 600
        assert (pixels[0][known].int() == 40 + 80 * label[known].int()).all()
        columns = [(label == i).nonzero()[:, 1].float().mean() for i in (1, 2)]
        flipped += int(columns[0] > columns[1])
        # scale .75…1.25 changes the objects' area by .56…1.56; a part may leave the image
        share = int((label == 1).sum()) / int((image.label == 1).sum())
        assert 0.5 < share < 1.6
    assert 10 < flipped < 30


def cubic(distance: float) -> float:
    """OpenCV's, a = -.75."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def published_turn(image: Any, label: Any, angle: float, scale: float) -> tuple[Any, Any]:
    """Pixel by pixel from where it comes; 0 outside, background in the label."""
    height, width = label.shape
    moved, classes = np.zeros((height, width, 3)), np.zeros_like(label)
    c, s = np.cos(np.radians(angle)) / scale, np.sin(np.radians(angle)) / scale
    for row, column in np.ndindex(height, width):
        y, x = row - (height - 1) / 2, column - (width - 1) / 2
        x, y = c * x - s * y + (width - 1) / 2, s * x + c * y + (height - 1) / 2
        for i, j in itertools.product(range(int(y) - 2, int(y) + 4), range(int(x) - 2, int(x) + 4)):
            if 0 <= i < height and 0 <= j < width:
                moved[row, column] += cubic(y - i) * cubic(x - j) * image[i, j]
                if max(abs(y - i), abs(x - j)) < 0.5:
                    classes[row, column] = label[i, j]
    return moved.round().clip(0, 255), classes


@pytest.mark.parametrize(("angle", "scale"), [(5.0, 0.75), (-3.0, 1.2), (0.0, 1.0)])
def test_images_are_turned_as_published(angle: float, scale: float) -> None:
    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (22, 31, 3)).astype(np.uint8)
    label = draw.integers(-1, 4, (22, 31)).astype(np.int16)
    pixels, classes = turned(
        torch.tensor(image).permute(2, 0, 1), torch.tensor(label)[None], angle, scale
    )
    expected, expected_classes = published_turn(image, label, angle, scale)
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
    assert np.mean(classes[0].numpy() != expected_classes) < 0.01, "but for ties"
    if scale == 1:
        assert classes[0].tolist() == label.tolist()


def test_it_is_the_original_that_is_turned() -> None:
    """Of a picture twice as wide as high, a turn of the square would be another one."""
    image = coloured_image(shape=(64, 128))
    for epoch in range(4):
        draw = generator(0, AUGMENT, epoch, image.sample_id)
        flip, angle, scale = draw.random() < 0.5, draw.uniform(-5, 5), draw.uniform(0.75, 1.25)
        step = -1 if flip else 1
        _, expected = published_turn(image.image[:, ::step], image.label[:, ::step], angle, scale)
        _, label = augmented(image, 64, 0, epoch)
        resized = resize_nearest(torch.tensor(expected.copy()), (64, 64))
        assert (label != resized).float().mean() < 0.005


def test_augmentation_depends_on_seed_epoch_and_image_alone() -> None:
    first, _ = augmented(coloured_image(), 64, 0, 1)
    assert torch.equal(first, augmented(coloured_image(), 64, 0, 1)[0])
    assert not torch.equal(first, augmented(coloured_image(), 64, 1, 1)[0])
    assert not torch.equal(first, augmented(coloured_image(), 64, 0, 2)[0])
    assert not torch.equal(first, augmented(coloured_image(4), 64, 0, 1)[0])


def test_what_comes_from_outside_the_image_is_background() -> None:
    outside = 0
    for epoch in range(20):
        pixels, label = augmented(coloured_image(), 64, 0, epoch)
        assert (label >= 0).all()
        assert (label[pixels[0] == 0] == 0).all()
        outside += int((pixels[0] == 0).any())
    assert outside > 5


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
    """7 and 5 images in batches of 2: one is left over, and of three ranks one has none."""
    crf = CrfConfig(iterations=1)
    config = replace(QUICK, size=40, epochs=8, batch_size=2, lr=0.1, seeds=(0, 1), crf=crf)
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
    config = replace(QUICK, size=40, epochs=8, batch_size=2, lr=0.1, crf=crf)
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
    config = replace(QUICK, size=40, epochs=8, batch_size=2, lr=0.1, select="last", seeds=(2,))
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
