"""Writes a clustering of photographs: the head for predictions, names, figures, pictures."""

import logging
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from data_pipeline.errors import InputError
from data_pipeline.labelled import UnlabelledShards
from evaluation.kmeans_config import KMeansConfig
from evaluation.photographs.cluster_names import BACKGROUND, NAMES, default_names, write_names
from evaluation.photographs.clustering import PhotographClusters
from evaluation.photographs.pictures import write_pictures
from evaluation.photographs.record import HEAD, ClusterRecord
from evaluation.saved_head import SavedHead, clusters_as_tensors, read_head
from trainer.encoder import Encoder

_log = logging.getLogger(__name__)


def write_clusters(
    encoder: Encoder,
    network: str,
    samples: UnlabelledShards,
    config: KMeansConfig,
    found: PhotographClusters,
    folder: Path,
    examples: int = 12,
) -> ClusterRecord:
    """Writes everything into `folder`, and returns the figures.

    Names that people gave to the same clusters stay; those of other clusters are set aside.
    """
    names = default_names(found.count)
    head = SavedHead(
        kind="kmeans",
        tensors=clusters_as_tensors(found.clusters, range(found.count + 1)),
        classes=(BACKGROUND, *names),
        data_set="",
        size=config.size,
        prototype=config.prototype,
        step=encoder.step,
        resize=config.resize,
    )
    path = folder / HEAD
    if not _same_clusters(path, head):
        _set_names_aside(folder)
    head.write(path)
    if not (folder / NAMES).exists():
        write_names(folder, names)
    record = _record(encoder.step, network, config, found)
    record.write(folder)
    write_pictures(encoder, samples, config, found, network, folder, examples)
    return record


def _same_clusters(path: Path, head: SavedHead) -> bool:
    """Whether the head in `path`, if there is one, has the same centres, but for rounding."""
    try:
        before = read_head(path).tensors["centres"]
    except (InputError, KeyError):
        return False
    centres = head.tensors["centres"]
    return before.shape == centres.shape and torch.allclose(before, centres, atol=1e-5)


def _set_names_aside(folder: Path) -> None:
    path, aside = folder / NAMES, folder / f"previous-{NAMES}"
    if path.is_file():
        os.replace(path, aside)
        _log.warning("these are other clusters than before; the former names are in %s", aside)


def _record(
    step: int, network: str, config: KMeansConfig, found: PhotographClusters
) -> ClusterRecord:
    inside = found.statistics.inside[:, 0]
    pixels = np.zeros(found.count + 1, np.int64)
    np.add.at(pixels, found.assignment, inside)
    return ClusterRecord(
        network=network,
        step=step,
        photographs=len(found.assignment),
        without_object=int((found.assignment == 0).sum()),
        unreadable=found.unreadable,
        images=tuple(found.images.tolist()),
        pixels=tuple(pixels[1:].tolist()),
        all_pixels=int(inside.sum() + found.statistics.outside.sum()),
        curve=found.curve,
        options=asdict(config),
    )
