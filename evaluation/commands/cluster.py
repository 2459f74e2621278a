"""`maskbank cluster`: groups of unlabelled photographs, as classes for `maskbank predict`."""

import logging
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.table import Table
from rich.text import Text

from data_pipeline.errors import InputError
from data_pipeline.files import require_writable
from data_pipeline.labelled import UnlabelledShards
from data_pipeline.manifest import missing_shards, read_manifest, require_component
from evaluation.commands import options as common
from evaluation.kmeans_config import KMeansConfig
from evaluation.photographs.cluster_names import NAMES, read_names
from evaluation.photographs.clustering import FULL_KMEANS, cluster_photographs
from evaluation.photographs.images import Photographs
from evaluation.photographs.number_of_clusters import MOST_CLUSTERS
from evaluation.photographs.record import FOLDER, HEAD, ClusterRecord
from evaluation.photographs.write_clusters import write_clusters
from evaluation.prototypes import PrototypeConfig
from evaluation.report import write_report
from trainer.distributed import cores_per_rank, end_ranks, same_on_all_ranks
from trainer.encoder import read_run_config

_log = logging.getLogger(__name__)
_SIZE_OF_FILES = 224  # pixels, of a network whose training is not known


def cluster(
    network: common.Network,
    shards: Annotated[Path, typer.Option(help="Shards of the photographs, labelled or not.")],
    clusters: Annotated[
        int, typer.Option(help="K; 0 chooses it by the silhouettes of 2 to --most-clusters.")
    ] = 0,
    most_clusters: Annotated[int, typer.Option(help="Largest K to try.")] = MOST_CLUSTERS,
    output: common.Output = None,
    size: Annotated[
        Optional[int],  # noqa: UP045 (typer)
        typer.Option(help="Side that images are resized to, pixels; default: that of training."),
    ] = None,
    foreground: Annotated[
        str, typer.Option(help="Threshold on saliency's probability or logit; or the shards' mask.")
    ] = "probability",
    threshold: common.Threshold = 0.5,
    pooling: Annotated[str, typer.Option(help="normalized or weighted, of an object's pixels.")] = (
        "normalized"
    ),
    seed: Annotated[int, typer.Option(help="Of K-means.")] = FULL_KMEANS.seeds[0],
    batch_size: common.BatchSize = 16,
    examples: Annotated[int, typer.Option(help="Photographs shown in full in the report.")] = 12,
    precision: common.Precision = "float32",
    device: common.Device = "auto",
) -> None:
    """Group unlabelled photographs by their objects; the groups are `maskbank predict`'s classes.

    Writes clusters/ below the run, and the report with pictures of each cluster. Name the clusters
    in clusters/names.txt.

    Example: `maskbank cluster runs/mine --shards shards/mine`, then
    `maskbank predict runs/mine photos --output predicted`
    """
    with same_on_all_ranks():
        if most_clusters < 2 or examples < 1:
            raise InputError("--most-clusters must be at least 2, --examples at least 1")
        config = KMeansConfig(
            size=_training_size(network) if size is None else size,
            prototype=PrototypeConfig(foreground, threshold, pooling),  # type: ignore[arg-type]
            cluster=replace(FULL_KMEANS, clusters=clusters, seeds=(seed,)),
            batch_size=batch_size,
            precision=precision,
            resize="antialias",  # no published figure asks for OpenCV's aliasing
        )
        subject = common.open_subject(network, False, output)
        config.require(subject.encoder)
        manifest = read_manifest(shards, check_files=False)
        if foreground == "mask":
            require_component(manifest, "mask", "--foreground mask")
        folder = subject.folder / FOLDER
        require_writable(folder, "the folder of clusters")
        folder.mkdir(parents=True, exist_ok=True)
    ranks = common.start(device)
    if ranks.is_main and (missing := missing_shards(manifest)):
        _log.warning(missing)
    samples = UnlabelledShards(manifest)
    photographs = Photographs(samples, config.size, cores_per_rank(), config.resize)
    with same_on_all_ranks():
        found = cluster_photographs(subject.encoder, photographs, config, ranks, most_clusters)
    if ranks.is_main:
        record = write_clusters(
            subject.encoder, subject.name, samples, config, found, folder, examples
        )
        _show(record, folder)
        _tell_what_is_next(subject, network, folder)
    end_ranks()


def _training_size(network: Path) -> int:
    run = network if (network / "config.yaml").is_file() else network.resolve().parents[1]
    known = not network.is_file() and (run / "config.yaml").is_file()
    return read_run_config(run).views.image_size if known else _SIZE_OF_FILES


def _show(record: ClusterRecord, folder: Path) -> None:
    """The clusters as a table, and what was left out."""
    table = Table("cluster", "photographs", "of all pixels, %", title=_title(record))
    for column in table.columns[1:]:
        column.justify = "right"
    names = read_names(folder, record.clusters)
    for name, images, pixels in zip(names, record.images, record.pixels, strict=True):
        table.add_row(Text(name), f"{images:,}", f"{100 * pixels / record.all_pixels:.1f}")
    common.console.print(table)
    if record.without_object:
        common.console.print(f"{record.without_object:,} photographs without an object")
    if record.unreadable:
        common.console.print(f"{record.unreadable:,} photographs could not be read")


def _title(record: ClusterRecord) -> str:
    chosen = ""
    if record.curve:
        tried = max(one.clusters for one in record.curve)
        chosen = f", the number that the silhouettes of 2 to {tried} speak for"
    clusters = "1 cluster" if record.clusters == 1 else f"{record.clusters} clusters"
    return f"{clusters} of {record.photographs:,} photographs{chosen}"


def _tell_what_is_next(subject: common.Subject, network: Path, folder: Path) -> None:
    print_line = partial(common.console.print, soft_wrap=True, markup=False)
    print_line(f"report: {write_report(subject.folder)}")
    print_line(f"names: {folder / NAMES}, to be edited")
    head = "" if subject.folder == network else f" --head {shlex.quote(str(folder / HEAD))}"
    print_line(f"next: maskbank predict {shlex.quote(str(network))} PHOTOS --output FOLDER{head}")
