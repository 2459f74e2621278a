"""Fine-tuning on a share of the labels: which images, what is learned, and several ranks."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_pipeline.errors import InputError
from data_pipeline.labelled import ShardSet, labelled_shards
from data_pipeline.manifest import read_manifest
from data_pipeline.order import generator
from data_pipeline.resize import resize_nearest
from data_pipeline.whole_images import WholeImages, normalise
from evaluation.commands.finetune import FRACTIONS, parse_fractions
from evaluation.crf import CrfConfig
from evaluation.finetune import FinetuneConfig, evaluate_finetune, learn, learnable_copy
from evaluation.label_splits import (
    balanced_order,
    drawn_splits,
    listed_splits,
    present_classes,
    read_ids,
    share_of,
)
from evaluation.linear_classifier import LinearClassifier
from evaluation.miou import Counts, confusion, score
from tests.evaluation_data import block_shards, random_encoder
from tests.ranks import run_on_ranks
from trainer.distributed import Ranks
from trainer.encoder import Encoder
from trainer.partial import PartialEncoder
from trainer.settings import ModelConfig

ALONE = Ranks(0, 1, torch.device("cpu"))
QUICK = FinetuneConfig(
    size=32, epochs=1, min_steps=3, batch_size=4, at_once=2, lr=0.02, augment=False
)
ORDER = 13  # stream of the generator that orders the images


@pytest.fixture(scope="module")
def tinted(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardSet, ShardSet]:
    folder = tmp_path_factory.mktemp("tinted")
    train = block_shards(folder / "train", [1, 1, 1, 2, 1, 3, 1], (44, 52), tinted=True)
    test = block_shards(folder / "test", [1, 2, 3], (52, 44), tinted=True, first=50)
    return train, test


def test_smaller_shares_are_in_larger_ones_and_have_every_class() -> None:
    draw = np.random.default_rng(0)
    present = draw.random((400, 6)) < [0.9, 0.5, 0.3, 0.1, 0.02, 0.0]
    present[7, 1:] = False
    orders = [balanced_order(present, seed) for seed in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(400)), "every image once"
        counts = present[order[:20]].sum(0)
        assert (counts[1:5] >= 4).all(), "balanced, although class 4 is in 2% of the images"
        shares = [set(share_of(order, percent).tolist()) for percent in FRACTIONS]
        assert [len(share) for share in shares] == [4, 8, 20, 50, 400]
        assert all(small <= large for small, large in pairwise(shares))
        assert present[list(shares[0]), 1:5].any(0).all()
        assert 7 in order[-int((~present[:, 1:].any(1)).sum()) :], "without a class: last"
    assert orders[0].tolist() != orders[1].tolist()
    assert orders[0].tolist() == balanced_order(present, 0).tolist()
    assert len(share_of(orders[0], 0.01)) == 1


def test_classes_of_images_are_read(tinted: tuple[ShardSet, ShardSet]) -> None:
    present = present_classes(tinted[0], ALONE, 1)
    assert present[:, 0].all()
    assert present[:, 1].tolist() == [True, True, True, False, True, False, True]
    assert np.flatnonzero(present[:, 2]).tolist() == [3]
    assert np.flatnonzero(present[:, 3]).tolist() == [5]
    [three] = drawn_splits(present, (43,), 1)[43]
    assert {3, 5} < set(three.tolist())


def test_lists_of_ids(tinted: tuple[ShardSet, ShardSet], tmp_path: Path) -> None:
    train = tinted[0]
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("block_005\n\n  block_001\nblock_005\n")
    second.write_text(f"{train.key(0)}\n{train.key(2)}\n")
    assert read_ids(first, train).tolist() == [1, 5]
    splits = listed_splits([first, second], train)
    assert [one.tolist() for one in splits[28.6]] == [[1, 5], [0, 2]]
    first.write_text("block_005\nblock_1\nblock_2\n")
    with pytest.raises(InputError, match=r"first: 2 of its keys are not in .*: block_1, block_2;"):
        read_ids(first, train)
    first.write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        read_ids(first, train)
    with pytest.raises(InputError, match="cannot be read"):
        read_ids(tmp_path / "none", train)


def learned(
    ranks: Ranks, encoder: Encoder, samples: ShardSet, config: FinetuneConfig, seed: int = 1
) -> list[torch.Tensor]:
    """Weights of network and classifier after learning on five of seven images."""
    network = learnable_copy(encoder, ranks)
    weights = LinearClassifier.drawn(4, network.config.decoder_channels, seed).learnable()
    images = WholeImages(samples, config.size, 1)
    numbers = np.array([0, 2, 3, 5, 6])
    learn(network, LinearClassifier(*weights), images, numbers, config, ranks, seed, "test")
    return [one.detach() for one in (*network.state_dict().values(), *weights)]


def test_equals_a_plain_implementation(tinted: tuple[ShardSet, ShardSet]) -> None:
    found = learned(ALONE, random_encoder(), tinted[0], QUICK)
    network = random_encoder().network
    network.requires_grad_(True)
    head = torch.nn.Conv2d(16, 4, 1)
    start = LinearClassifier.drawn(4, 16, 1)
    with torch.no_grad():
        head.weight.copy_(start.weight[..., None, None])
        head.bias.copy_(start.bias)  # type: ignore[union-attr]
    groups: list[dict[str, Any]] = [
        {"params": network.parameters()},
        {"params": head.parameters()},
    ]
    optimizer = torch.optim.SGD(groups, 0.02, momentum=0.9, weight_decay=1e-4)
    images = WholeImages(tinted[0], 32, 1)
    batches = []
    for epoch in range(2):
        order = np.array([0, 2, 3, 5, 6])[generator(1, ORDER, epoch).permutation(5)]
        batches += [order[:4].tolist(), order[4:].tolist()]
    for step, batch in enumerate(batches[:3]):
        rate = 0.02 * (1 - step / 3) ** 0.9
        groups[0]["lr"], groups[1]["lr"] = rate, 10 * rate
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = values["lr"]
        read = [images.read(i) for i in batch]
        labels = torch.stack([resize_nearest(torch.tensor(i.label), (32, 32)) for i in read])
        logits = head(network.features(normalise(torch.stack([i.pixels for i in read]))))
        logits = F.interpolate(logits, (32, 32), mode="bilinear")
        optimizer.zero_grad()
        F.cross_entropy(logits, labels.long(), ignore_index=-1).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    expected = [*network.state_dict().values(), head.weight[..., 0, 0], head.bias]
    before = [*random_encoder().network.state_dict().values()]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    moved = sum(not torch.equal(one, old) for one, old in zip(found, before, strict=False))
    assert moved > 10, "the network learns, not only the classifier"


def _learned(ranks: Ranks, folder: Path) -> list[torch.Tensor]:
    samples = labelled_shards(read_manifest(folder))
    # of another seed: with 1 a unit lies within rounding of 0, where its gradient jumps
    return learned(ranks, random_encoder(), samples, replace(QUICK, augment=True), seed=2)


@pytest.mark.slow
def test_ranks_change_it_by_rounding_only(tinted: tuple[ShardSet, ShardSet]) -> None:
    """5 images in batches of 4: the second batch is one image, which one of three ranks has."""
    folder = tinted[0].manifest.root
    [alone] = run_on_ranks(_learned, 1, folder)
    found = run_on_ranks(_learned, 3, folder)
    for one in found:
        for mine, theirs, same in zip(one, alone, found[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
            assert torch.equal(mine, same), "all ranks have one network"


def tuned_confusion(
    encoder: Encoder, sets: tuple[ShardSet, ShardSet], config: FinetuneConfig, seed: int
) -> Counts:
    """Of what `learned` makes of the network, image by image."""
    network = learnable_copy(encoder, ALONE)
    weights = learned(ALONE, encoder, sets[0], config, seed)
    names = network.state_dict()
    network.load_state_dict(dict(zip(names, weights, strict=False)))
    weight, bias = weights[-2:]
    images = WholeImages(sets[1], config.size, 1)
    matrix = np.zeros((4, 4), np.int64)
    for image in (images.read(i) for i in range(len(images))):
        with torch.no_grad():
            features = network.features(normalise(image.pixels)[None])
        logits = F.conv2d(features, weight[..., None, None], bias)
        logits = F.interpolate(logits, (config.size, config.size), mode="bilinear")
        height, width = image.label.shape
        predicted = resize_nearest(logits[0].argmax(0), (height, width)).numpy()
        matrix += confusion(image.label, predicted, 4, 4)
    return matrix


def test_a_share_is_learned_and_the_encoder_stays(tinted: tuple[ShardSet, ShardSet]) -> None:
    encoder = random_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    config = replace(QUICK, crf=CrfConfig(2, gaussian_sigma=4))
    splits = {12.5: [np.array([0, 2, 3, 5, 6]), np.array([0, 2, 3, 5, 6])]}
    plain, refined = evaluate_finetune(encoder, *tinted, splits, config, ALONE)
    assert (plain.protocol, refined.protocol) == ("finetune-12.5", "finetune-crf-12.5")
    assert plain.title == "fine-tuning on 12.5% of the labels"
    assert refined.title == "fine-tuning on 12.5% of the labels, CRF"
    assert (plain.step, plain.images, plain.network) == (3, 3, "trained")
    assert len(plain.values) == 2
    assert (plain.options["learned_on"], plain.options["steps"]) == ([5, 5], [3, 3])
    assert "crf" not in plain.options
    assert refined.options["crf"]["iterations"] == 2
    assert refined.confusion.tolist() != plain.confusion.tolist()
    by_hand = [tuned_confusion(encoder, tinted, config, seed) for seed in (0, 1)]
    assert plain.confusion.tolist() == by_hand[0].tolist()
    assert plain.values == tuple(score(one).miou for one in by_hand)
    assert len(set(plain.values)) == 2, "seeds differ"
    assert (plain.confusion.sum(0) > 0).sum() > 1, "more than one class is predicted"
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(one.requires_grad for one in encoder.parameters())


def test_a_backbone_alone_learns_too(tinted: tuple[ShardSet, ShardSet]) -> None:
    parts = frozenset(("backbone",))
    torch.manual_seed(0)
    network = PartialEncoder(ModelConfig(backbone="small"), parts)
    encoder = Encoder(network, 0, parts)
    config = replace(QUICK, precision="bf16", lr=0.001)
    [result] = evaluate_finetune(encoder, *tinted, {100.0: [np.arange(7)]}, config, ALONE)
    assert result.confusion.sum() == 3 * 51 * 44


def test_weights_that_are_no_numbers_are_an_error(tinted: tuple[ShardSet, ShardSet]) -> None:
    config = replace(QUICK, lr=1e30)
    with pytest.raises(
        InputError, match=r"100%, split 1: the weights are no numbers after 3 steps"
    ):
        evaluate_finetune(random_encoder(), *tinted, {100.0: [np.arange(7)]}, config, ALONE)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FinetuneConfig(at_once=0), "--at-once"),
        (lambda: FinetuneConfig(min_steps=-1), "--min-steps"),
        (lambda: FinetuneConfig(lr=0), "--lr"),
        (lambda: parse_fractions("1,x", 3), "--fractions is '1,x'"),
        (lambda: parse_fractions("0,1", 3), "above 0 and up to 100"),
        (lambda: parse_fractions("101", 3), "above 0 and up to 100"),
        (lambda: parse_fractions("1", 0), "--splits is 0"),
    ],
)
def test_impossible_options_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


def test_steps_are_those_of_the_epochs_but_never_few() -> None:
    assert FinetuneConfig().steps(106) == 2000
    assert FinetuneConfig().steps(10582) == 30 * 662
    assert parse_fractions("1, 12.5,1", 1) == (1, 12.5)
