"""`maskbank evaluate kmeans`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from data_pipeline.errors import InputError
from data_pipeline.labelled import LabelledSet
from evaluation.cluster import ClusterConfig
from evaluation.commands import options as common
from evaluation.contact_sheets import write_cluster_sheet
from evaluation.examples import write_examples
from evaluation.gallery import Belonging
from evaluation.kmeans import Clustering, evaluate_kmeans
from evaluation.kmeans_config import DEFAULT_PCA, KMeansConfig
from evaluation.prototypes import PrototypeConfig
from evaluation.result import Result
from evaluation.saved_head import SavedHead, clusters_as_tensors
from evaluation.segmentation_metrics import segmentation_metrics
from evaluation.statistics import ImageStatistics
from trainer.distributed import Ranks, cores_per_rank, same_on_all_ranks

Matched = Annotated[
    Optional[str],  # noqa: UP045 (typer)
    typer.Option(help="Matching on iou, count or image; default: the data set's, or iou."),
]
Clustered = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Cluster each image's foreground, or every pixel: image or pixel."),
]
Scored = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Pixels that are scored: label or image (--size); default: data set's."),
]
FitOn = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Centres of pixels are of: test or train; default: the data set's."),
]
Pca = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Whitened PCA to so many; 0: none; default 32, of all pixels none."),
]
# settings that a data set has its own of
PER_DATA_SET = ("criterion", "unit", "resolution", "fit_on", "resize", "mean")


def kmeans(
    network: common.Network,
    shards: common.Shards = None,
    data_set: common.Named = None,
    root: common.Root = None,
    split: common.Split = None,
    masks: common.Masks = None,
    names: common.Names = None,
    categories: common.Categories = None,
    train_shards: common.TrainShards = None,
    initial: common.Initial = False,
    output: common.Output = None,
    size: common.Size = None,
    resize: common.Resizing = None,
    clusters: Annotated[int, typer.Option(help="K; 0: the classes without background.")] = 0,
    foreground: common.Foreground = "logit",
    threshold: common.Threshold = 0.5,
    pooling: common.Pooling = "weighted",
    method: Annotated[str, typer.Option(help="minibatch (published) or full.")] = "minibatch",
    starts: Annotated[int, typer.Option(help="Starts of K-means, the best is kept.")] = 3,
    pca: Pca = None,
    seeds: Annotated[int, typer.Option(help="Clusterings, from seed 1234 on.")] = 5,
    without_foreground: common.WithoutForeground = "zero",
    criterion: Matched = None,
    many_to_one: Annotated[
        bool, typer.Option("--many-to-one", help="Each cluster its best class (over-clustering).")
    ] = False,
    unit: Clustered = None,
    resolution: Scored = None,
    fit_on: FitOn = None,
    mean: common.Averaged = None,
    all_metrics: Annotated[
        bool,
        typer.Option("--all-metrics", help="ImageNet-S' as well, in a second pass; there always."),
    ] = False,
    batch_size: common.BatchSize = 16,
    examples: Annotated[int, typer.Option(help="Pictures kept for the report.")] = 12,
    precision: common.Precision = "float32",
    device: common.Device = "auto",
    html: common.Html = False,
) -> None:
    """K-means mIoU, the published protocol by default; more clusters: over-clustering.

    Writes the scores and the centres (`maskbank predict` takes them) to evaluation/.

    Examples: `maskbank evaluate kmeans runs/demo --shards shards/val`;
    `maskbank evaluate kmeans runs/voc --data-set voc --root VOCSegmentation`;
    `maskbank evaluate kmeans runs/voc --shards shards/val --clusters 500 --many-to-one`
    """
    given: dict[str, Any] = dict(locals())
    with same_on_all_ranks():
        source = common.source(data_set, root, split, masks, names, categories)
        config = _config(source, given)
        subject = common.open_subject(network, initial, output)
        config.require(subject.encoder)
        samples = source.open("test", shards, "--shards")
        fit_samples = open_fit_samples(source, config, train_shards)
    ranks = common.start(device)
    for one in (samples, fit_samples):
        if one is not None:
            common.check_samples(one, ranks)
    every = all_metrics or source.name.startswith("imagenet-s-")
    result = run_kmeans(
        *(subject, samples, config, source.name, ranks, examples, every), fit_samples=fit_samples
    )
    common.finish([result], subject, source, ranks, html)


def _config(source: common.Source, given: dict[str, Any]) -> KMeansConfig:
    """The options, which the configurations check, with the data set's own for those not given."""
    known = {name: given[name] for name in PER_DATA_SET if given[name]}
    settings = {**data_set_settings(source), **known}
    if settings["unit"] == "image":
        settings["fit_on"] = given["fit_on"] or "test"
    pca = DEFAULT_PCA.get(settings["unit"], 0) if given["pca"] is None else given["pca"]
    seeds = tuple(range(1234, 1234 + given["seeds"]))
    return KMeansConfig(
        size=source.size(given["size"]),
        prototype=PrototypeConfig(given["foreground"], given["threshold"], given["pooling"]),
        cluster=ClusterConfig(
            *(given["clusters"], given["method"], given["starts"]),
            pca=pca,
            seeds=seeds,
            without_foreground=given["without_foreground"],
        ),
        many_to_one=given["many_to_one"],
        batch_size=given["batch_size"],
        precision=given["precision"],
        **settings,
    )


def data_set_settings(source: common.Source) -> dict[str, Any]:
    """What a data set says of K-means, by name in `KMeansConfig`; the defaults for shards."""
    known: Any = KMeansConfig() if source.data_set is None else source.data_set
    return {name: getattr(known, name) for name in PER_DATA_SET}


def open_fit_samples(
    source: common.Source, config: KMeansConfig, train_shards: Path | None
) -> LabelledSet | None:
    """The images that centres are fitted on, where those are not the ones that are scored.

    Raises:
        InputError: they are not there, or were given in vain.
    """
    if config.fit_on == "train":
        return source.open("train", train_shards, "--train-shards")
    if train_shards is not None:
        raise InputError("--train-shards are clustered with --fit-on train --unit pixel alone")
    return None


def run_kmeans(
    subject: common.Subject,
    samples: LabelledSet,
    config: KMeansConfig,
    data_set: str,
    ranks: Ranks,
    examples: int = 12,
    all_metrics: bool = False,
    statistics: ImageStatistics | None = None,
    fit_samples: LabelledSet | None = None,
) -> Result:
    """Evaluates, and writes the centres and pictures for the report beside the results."""
    result, clustering = evaluate_kmeans(
        *(subject.encoder, samples, config, ranks, subject.name, cores_per_rank()),
        *(statistics, fit_samples),
    )
    result = replace(result, protocol=protocol_name(config, len(samples.classes)))
    if all_metrics:
        found = segmentation_metrics(subject.encoder, samples, config, clustering, ranks)
        metrics = {**result.metrics, **{name: (value,) for name, value in found.items()}}
        result = replace(result, metrics=metrics)
    (result,) = common.own_rows([result], samples, subject, data_set, ranks)
    if ranks.is_main:
        folder = result_folder(subject.folder, data_set)
        head = saved_clusters(clustering, config, samples.classes, data_set, result.step)
        head.write(folder / f"{result.protocol}-{subject.name}.safetensors")
        if examples > 0 and config.unit == "image":
            drawn = (subject.encoder, samples, config, clustering)
            if result.protocol == "kmeans":
                write_examples(*drawn, folder / f"examples-{subject.name}.npz", examples)
            path = folder / f"clusters-{result.protocol}-{subject.name}.npz"
            belonging = Belonging(samples.classes, result.protocol, subject.name)
            write_cluster_sheet(*drawn, belonging, path)
    return result


def result_folder(folder: Path, data_set: str) -> Path:
    """Where an evaluation's files go; made if it is missing."""
    path = folder / "evaluation" / data_set
    path.mkdir(parents=True, exist_ok=True)
    return path


def protocol_name(config: KMeansConfig, classes: int) -> str:
    """kmeans, or with more clusters kmeans-many-K (by IoU) or kmeans-majority-K (by pixels)."""
    clusters = config.cluster.clusters or classes - 1
    if config.many_to_one:
        return f"kmeans-{'many' if config.criterion == 'iou' else 'majority'}-{clusters}"
    return "kmeans" if clusters == classes - 1 else f"kmeans-{clusters}"


def saved_clusters(
    clustering: Clustering, config: KMeansConfig, classes: tuple[str, ...], data_set: str, step: int
) -> SavedHead:
    """The first seed's centres as a file for `maskbank predict`."""
    return SavedHead(
        kind="kmeans" if config.unit == "image" else "pixel-kmeans",
        tensors=clusters_as_tensors(clustering.clusters, clustering.class_of_cluster),
        classes=classes,
        data_set=data_set,
        size=config.size,
        prototype=config.prototype,
        step=step,
        resize=config.resize,
    )
