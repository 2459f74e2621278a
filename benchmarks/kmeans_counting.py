"""K-means evaluation from features to mIoU, against counting class pair by class pair.

    python -m benchmarks.kmeans_counting [--images 1449] [--size 512] [--pairs 441] [--seeds 5]

Published code puts the predictions and labels of all images into two arrays and goes over them for
every pair of cluster and class. Here each image adds two rows of counts, from which every
clustering's matrix follows. Both start from the same features (random ones around a direction a
class, at stride 8, made as they are needed), pool and cluster them in the same way; what differs is
the counting, and that published code repeats it for every seed. Both must give the same
matrix. Peak memory is of this process; the pairs run in one of its own, since they hold all pixels.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.cluster import ClusterConfig, fit_clusters
from evaluation.kmeans import assign_images
from evaluation.matching import match_clusters, merge_columns
from evaluation.miou import Counts, confusion, score
from evaluation.prototypes import PrototypeConfig, image_prototypes
from evaluation.statistics import ImageStatistics
from trainer.model import upsample

CLASSES, DIM, STRIDE, BATCH = 21, 32, 8, 8
Labels = NDArray[np.int16]


def image(number: int, size: int) -> tuple[Labels, Tensor, Tensor]:
    """Label int16 [S, S], embeddings [1, D, s, s] and saliency logits [1, 1, s, s]."""
    rng = np.random.default_rng(number)
    label = np.zeros((size, size), np.int16)
    top, left = rng.integers(0, size // 2, 2)
    height, width = rng.integers(size // 8, size // 2, 2)
    own = 1 + number % (CLASSES - 1)
    label[top : top + height, left : left + width] = own
    label[top, left : left + width] = -1
    small = size // STRIDE
    directions = np.random.default_rng(0).normal(size=(CLASSES, DIM)).astype(np.float32)
    inside = label[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE] > 0
    noise = rng.normal(size=(DIM, small, small)).astype(np.float32)
    features = directions[np.where(inside, own, 0)].transpose(2, 0, 1) + noise
    logits = np.where(inside, 3, -3) + rng.normal(size=(small, small))
    return label, torch.from_numpy(features)[None], torch.tensor(logits[None, None]).float()


def predictions(count: int, size: int) -> Iterator[tuple[Labels, NDArray[np.bool_], Tensor]]:
    """Label, foreground [S, S] and vector [D] of every image."""
    for first in range(0, count, BATCH):
        made = [image(number, size) for number in range(first, min(first + BATCH, count))]
        embeddings = torch.cat([one[1] for one in made])
        saliency = upsample(torch.cat([one[2] for one in made]), (size, size))[:, 0]
        vectors, foreground = image_prototypes(embeddings, saliency, PrototypeConfig())
        for one, inside, vector in zip(made, foreground.numpy(), vectors, strict=True):
            yield one[0], inside, vector


def by_counts(count: int, size: int, seeds: int) -> tuple[dict[str, float], list[Counts], object]:
    """Seconds of each part, the matched matrices, and the assignments, as maskbank does it."""
    start = time.perf_counter()
    counting = 0.0
    vectors, tables = [], []
    for label, foreground, vector in predictions(count, size):
        began = time.perf_counter()
        tables.append(confusion(label, foreground, CLASSES, 2).T)
        counting += time.perf_counter() - began
        vectors.append(vector.numpy())
    counts = np.array(tables)
    statistics = ImageStatistics(
        np.stack(vectors), counts[:, 1], counts[:, 0], np.arange(count, dtype=np.int64)
    )
    pooled = time.perf_counter()
    config = ClusterConfig()
    assignments = [
        assign_images(statistics, fit_clusters(statistics.vectors, CLASSES - 1, config, seed))
        for seed in range(1234, 1234 + seeds)
    ]
    clustered = time.perf_counter()
    matrices = []
    for assignment in assignments:
        matrix = statistics.confusion(assignment, CLASSES)
        matrices.append(merge_columns(matrix, match_clusters(matrix)))
    matched = time.perf_counter()
    seconds = {
        "making features, pooling": pooled - start - counting,
        "clustering": clustered - pooled,
        "counting and matching": counting + matched - clustered,
    }
    return seconds, matrices, assignments


def by_pairs(
    count: int, size: int, assignment: NDArray[np.int64], pairs: int
) -> tuple[float, Counts]:
    """Seconds of the first `pairs` pairs of one clustering over all pixels, and pixels of each."""
    truth = np.empty((count, size, size), np.uint8)
    predicted = np.empty((count, size, size), np.uint8)
    for number, (label, foreground, _) in enumerate(predictions(count, size)):
        truth[number] = np.where(label < 0, 255, label)
        predicted[number] = assignment[number] * foreground
    start = time.perf_counter()
    kept = truth.reshape(-1) != 255
    flat_truth, flat_predicted = truth.reshape(-1)[kept], predicted.reshape(-1)[kept]
    table = np.zeros((CLASSES, CLASSES), np.int64)
    for pair in range(pairs):
        cluster, label_class = divmod(pair, CLASSES)
        is_cluster, is_class = flat_predicted == cluster, flat_truth == label_class
        both = int(np.sum(is_cluster & is_class))
        _only_cluster = int(np.sum(is_cluster & ~is_class))
        _only_class = int(np.sum(~is_cluster & is_class))
        table[label_class, cluster] = both
    return time.perf_counter() - start, table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1449)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=CLASSES * CLASSES)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    count, size, pairs, seeds = options.images, options.size, options.pairs, options.seeds
    seconds, matrices, assignments = by_counts(count, size, seeds)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        paired, table = pool.apply(by_pairs, (count, size, assignments[0], pairs))  # type: ignore[index]
    merged = merge_columns(table, match_clusters(table)) if pairs == CLASSES**2 else None
    if merged is not None:
        assert (merged == matrices[0]).all(), "both count the same"
    whole = paired * CLASSES**2 / pairs
    shared = seconds["making features, pooling"] + seconds["clustering"]
    ours = sum(seconds.values())
    print(f"{count} images at {size}², {CLASSES} classes, mIoU {score(matrices[0]).miou:.1f}")
    print("| | seconds |\n|---|---|")
    for name, value in seconds.items():
        print(f"| {name}, {seeds} seeds | {value:.1f} |")
    print(f"| **maskbank, all** | {ours:.1f} |")
    print(f"| {pairs} of {CLASSES**2} pairs, one seed | {paired:.1f} |")
    print(f"| all pairs, one seed | {whole:.1f} |")
    print(f"| **by pairs, all, {seeds} seeds** | {shared + seeds * whole:.1f} |")
    print(f"counting alone, one seed: {whole / seconds['counting and matching']:.0f} times as fast")
    print(f"the whole evaluation, one seed: {(shared + whole) / ours:.1f} times as fast or more")
    print(
        f"the whole evaluation, {seeds} seeds: {(shared + seeds * whole) / ours:.1f} times as fast"
    )
    print(f"peak memory {memory:.2f} GB")


if __name__ == "__main__":
    main()
