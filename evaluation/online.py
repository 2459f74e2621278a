"""K-means of a network in training, the evaluator that `trainer.online` looks for."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.labelled import LabelledSet, labelled_shards
from data_pipeline.manifest import Manifest
from data_pipeline.sample import StoredSample
from data_pipeline.whole_images import WholeImages
from evaluation.cluster import ClusterConfig
from evaluation.kmeans import assign_images, cluster_images
from evaluation.matching import match_clusters, merge_columns
from evaluation.miou import foreground_iou, score
from evaluation.prototypes import PrototypeConfig
from evaluation.statistics import ImageStatistics, gather_statistics, own_statistics
from trainer.config import TrainConfig
from trainer.distributed import Ranks, any_rank, cores_per_rank
from trainer.model import PixelOutput

_FIRST_SEED = 1234


class EvenlySpread:
    """`count` samples of a labelled set, from its first on, in even distances."""

    def __init__(self, samples: LabelledSet, count: int) -> None:
        self._samples = samples
        self._numbers = np.arange(count) * len(samples) // max(1, count)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._samples.classes

    def __len__(self) -> int:
        return len(self._numbers)

    def __str__(self) -> str:
        return str(self._samples)

    def key(self, number: int) -> str:
        return self._samples.key(int(self._numbers[number]))

    def read(self, number: int) -> StoredSample:
        return self._samples.read(int(self._numbers[number]))

    def remedy(self) -> str:
        return self._samples.remedy()


class OnlineKMeans:
    """As `evaluate_kmeans` with the same options, for any engine, and without an end by bad data.

    Args:
        config: of the run.
        shards: labelled.
        ranks: that share the images.
    """

    def __init__(self, config: TrainConfig, shards: Manifest, ranks: Ranks) -> None:
        online = config.online
        samples = labelled_shards(shards)
        chosen = EvenlySpread(samples, min(online.images or len(samples), len(samples)))
        size = online.size or config.views.image_size
        self._images = WholeImages(chosen, size, config.data.threads or cores_per_rank())
        self._dim, self._ranks = config.model.embedding_dim, ranks
        self._batch_size = online.batch_size
        self._prototype = PrototypeConfig(online.foreground, 0.5, online.pooling)  # type: ignore[arg-type]
        self._clusters = online.clusters or len(samples.classes) - 1
        self._many_to_one = self._clusters > len(samples.classes) - 1
        seeds = tuple(range(_FIRST_SEED, _FIRST_SEED + online.seeds))
        self._clustering = ClusterConfig(pca=online.pca, seeds=seeds)

    def evaluate(
        self, network: Callable[[Tensor], PixelOutput], progress: Callable[[int, int], None]
    ) -> dict[str, float]:
        """K-means mIoU in percent, its deviation over the seeds, and the foreground's IoU."""
        most_images = -(-len(self._images) // self._ranks.world_size)  # of any rank
        passes = _Passes(network, -(-most_images // self._batch_size), progress)
        own, problem = None, ""
        try:
            own = own_statistics(
                *(passes, self._dim, self._images, self._prototype, self._ranks),
                *(self._batch_size, "float32", "label", ""),
            )
        except (InputError, OSError) as error:
            problem = str(error) or type(error).__name__
        passes.take_the_rest(self._images.size, self._ranks)
        if any_rank(own is None, self._ranks) or own is None:
            raise InputError(problem)
        return self._score(gather_statistics(own, self._ranks))

    def _score(self, statistics: ImageStatistics) -> dict[str, float]:
        unsound = ""
        if statistics.binary().sum() == 0:
            unsound = f"every label pixel of {self._images.samples} is ignored; check the labels"
        elif not np.isfinite(statistics.vectors).all():
            unsound = "the network gives embeddings that are not finite"
        if unsound:
            raise InputError(unsound if self._ranks.is_main else "")
        found = cluster_images(statistics, self._clusters, self._clustering, self._ranks)
        values = []
        for clusters in found:
            assignment = assign_images(statistics, clusters)
            matrix = statistics.confusion(assignment, self._clusters + 1)
            match = match_clusters(matrix, many_to_one=self._many_to_one)
            values.append(score(merge_columns(matrix, match)).miou)
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        figures = {
            "kmeans_miou": float(np.mean(values)),
            "kmeans_std": deviation,
            "foreground_iou": foreground_iou(statistics.binary()),
        }
        return {name: value for name, value in figures.items() if np.isfinite(value)}


class _Passes:
    """Forward passes, of which every rank takes `count`: one that has no image left sees zeros."""

    def __init__(
        self,
        network: Callable[[Tensor], PixelOutput],
        count: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self._network, self._count, self._progress = network, count, progress
        self._done = 0
        progress(0, count)

    def __call__(self, images: Tensor) -> PixelOutput:
        output = self._network(images)
        self._done += 1
        self._progress(self._done, self._count)
        return output

    def take_the_rest(self, size: int, ranks: Ranks) -> None:
        while self._done < self._count:
            self(torch.zeros((1, 3, size, size), device=ranks.device))


def make_evaluator(config: TrainConfig, shards: Manifest, ranks: Ranks) -> OnlineKMeans:
    """What `trainer.online` calls."""
    return OnlineKMeans(config, shards, ranks)
