"""ImageNet-S' measures of a clustering: a second pass over the images, which segments each one.

They need the maps themselves (boundaries, sizes of objects, image by image), where mIoU needs only
counts.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data_pipeline.labelled import LabelledSet
from data_pipeline.sample import Label
from data_pipeline.whole_images import WholeImage, WholeImages
from evaluation.features import forward, own_batches
from evaluation.imagenet_s_metrics import SIZES, ImageNetSMetrics
from evaluation.kmeans import Clustering
from evaluation.kmeans_config import KMeansConfig
from evaluation.pixel_kmeans import nearest_centres, pixel_embeddings
from evaluation.prototypes import foreground_of, saliency_masks
from evaluation.resolution import at_resolution
from trainer.distributed import Ranks, all_reduce_sum, cores_per_rank
from trainer.encoder import Encoder
from trainer.model import upsample


def segmentation_metrics(
    encoder: Encoder,
    samples: LabelledSet,
    config: KMeansConfig,
    clustering: Clustering,
    ranks: Ranks,
) -> dict[str, float]:
    """Measures in percent of the first seed's clusters, by name; the same on every rank.

    The predictions are those that K-means was scored on, so that mIoU is the first seed's and is
    left out here: image accuracy, F-beta and boundary mIoU; then mIoU and boundary mIoU of four
    sizes of objects, NaN where the data set has none of a size. A collective.
    """
    images = WholeImages(samples, config.size, cores_per_rank(), config.resize)
    measures = ImageNetSMetrics(len(samples.classes))
    for label, prediction in segmented(encoder, images, config, clustering, ranks):
        measures.add(label, prediction)
    for array in measures.arrays().values():
        total = all_reduce_sum(torch.from_numpy(array).to(ranks.device), ranks)
        array[...] = total.cpu().numpy()
    return _named(measures.scores())


def segmented(
    encoder: Encoder,
    images: WholeImages,
    config: KMeansConfig,
    clustering: Clustering,
    ranks: Ranks,
) -> Iterator[tuple[Label, Label]]:
    """Of this rank's images the label and the predicted class of each pixel, int16 [H, W].

    At the pixels that are scored; -1 where a cluster has no class. Outside the foreground all is of
    one class, background as a rule: the one that this cluster was matched to.
    """
    encoder.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    classes = torch.from_numpy(clustering.class_of_cluster).to(torch.int16)
    for batch, pixels in own_batches(images, config.batch_size, ranks, "segmenting"):
        maps = _cluster_maps(encoder, batch, pixels, config, clustering, ranks)
        for image, one in zip(batch, maps.cpu(), strict=True):
            label, prediction = at_resolution(image.label, classes[one], config.resolution)
            yield label, prediction.astype(np.int16)


@torch.inference_mode()
def _cluster_maps(
    encoder: Encoder,
    batch: list[WholeImage],
    pixels: Tensor,
    config: KMeansConfig,
    clustering: Clustering,
    ranks: Ranks,
) -> Tensor:
    """Cluster of each pixel, int64 [b, S, S]; of foregrounds 0 is everything outside."""
    if config.unit == "pixel":
        embeddings = pixel_embeddings(encoder, pixels, config, ranks)
        return nearest_centres(embeddings, clustering.clusters)
    if config.prototype.foreground == "mask":
        saliency = saliency_masks(batch, config.size).to(ranks.device)
    else:
        logits = forward(encoder.network, pixels, config.precision).saliency
        saliency = upsample(logits, (config.size, config.size))[:, 0]
    clusters = [clustering.cluster_of_sample[image.sample_id] for image in batch]
    of_image = torch.tensor(clusters, device=ranks.device)[:, None, None]
    return of_image * foreground_of(saliency, config.prototype)


def _named(scores: dict[str, float]) -> dict[str, float]:
    """For people, the main ones first."""
    named = {
        "image accuracy": scores["image_accuracy"],
        "F-beta": scores["f_beta"],
        "boundary mIoU": scores["boundary_miou"],
    }
    for size in SIZES:
        words = size.replace("_", " ")
        named[f"mIoU, {words}"] = scores[f"miou_{size}"]
        named[f"boundary mIoU, {words}"] = scores[f"boundary_miou_{size}"]
    return named
