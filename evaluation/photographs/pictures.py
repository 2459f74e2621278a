"""Pictures of a clustering, for the report."""

from pathlib import Path

import numpy as np

from data_pipeline.labelled import UnlabelledShards
from evaluation.contact_sheets import QUERIES, write_cluster_sheet, write_neighbour_sheet
from evaluation.examples import write_examples
from evaluation.gallery import Belonging
from evaluation.kmeans_config import KMeansConfig
from evaluation.photographs.cluster_names import BACKGROUND, default_names
from evaluation.photographs.clustering import (
    PhotographClusters,
    as_clustering,
    nearest_photographs,
)
from evaluation.retrieval import RetrievalConfig
from trainer.encoder import Encoder

PROTOCOL = "clusters"


def write_pictures(
    encoder: Encoder,
    samples: UnlabelledShards,
    config: KMeansConfig,
    found: PhotographClusters,
    network: str,
    folder: Path,
    examples: int = 12,
) -> None:
    """Writes what the report shows: photographs of each cluster, examples, nearest neighbours.

    Args:
        encoder, samples, config: what was clustered, and how.
        found: what came of it.
        network: its name.
        folder: where to.
        examples: photographs that are shown with everything that was predicted on them.
    """
    clustering = as_clustering(found)
    belonging = Belonging((BACKGROUND, *default_names(found.count)), PROTOCOL, network)
    # sorted by cluster, so that examples that are evenly spread are of as many clusters as possible
    order = np.argsort(found.assignment, kind="stable")
    with_object = found.statistics.sample_ids[order[found.assignment[order] > 0]]
    path = folder / f"examples-{network}.npz"
    write_examples(encoder, samples, config, clustering, path, examples, with_object)
    write_cluster_sheet(
        encoder, samples, config, clustering, belonging, folder / f"clusters-{network}.npz"
    )
    neighbours_path = folder / f"neighbours-{network}.npz"
    neighbours = nearest_photographs(found, QUERIES)
    if neighbours is None:
        neighbours_path.unlink(missing_ok=True)
        return
    as_retrieval = RetrievalConfig(
        size=config.size,
        prototype=config.prototype,
        batch_size=config.batch_size,
        precision=config.precision,
        resize=config.resize,
    )
    write_neighbour_sheet(
        encoder, samples, samples, as_retrieval, neighbours, belonging, neighbours_path
    )
