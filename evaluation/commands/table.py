"""`maskbank evaluate table`: every row of the paper's table, from one command."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from data_pipeline.errors import InputError
from data_pipeline.labelled import LabelledSet
from data_pipeline.whole_images import WholeImages
from evaluation.cluster import ClusterConfig
from evaluation.commands import options as common
from evaluation.commands.finetune import parse_fractions, run_finetune
from evaluation.commands.kmeans import data_set_settings, run_kmeans
from evaluation.commands.linear import run_linear
from evaluation.commands.retrieval import run_retrieval
from evaluation.commands.video import learn_head, run_video
from evaluation.crf import CrfConfig
from evaluation.finetune import FinetuneConfig
from evaluation.kmeans import image_statistics
from evaluation.kmeans_config import DEFAULT_PCA, KMeansConfig
from evaluation.linear_probe import LinearConfig, require_comparable
from evaluation.prototypes import PrototypeConfig
from evaluation.report import write_report
from evaluation.result import Result
from evaluation.retrieval import RetrievalConfig
from evaluation.table import show_table, write_table
from evaluation.video import READINGS, VideoConfig, require_reading, sequences_of
from trainer.distributed import Ranks, cores_per_rank, end_ranks, same_on_all_ranks

ROWS = ("kmeans", "over-clustering", "retrieval", "linear", "finetune", "video")
MAJORITY_CLUSTERS = 500  # of the later reading of over-clustering
_NEEDS = {"retrieval": "bank", "linear": "train", "finetune": "train", "video": "train"}


def table(
    network: common.Network,
    train_shards: common.TrainShards = None,
    bank_shards: Annotated[
        Optional[Path],  # noqa: UP045 (typer)
        typer.Option(help="Labelled shards of the retrieval bank; default: --train-shards."),
    ] = None,
    shards: common.Shards = None,
    data_set: common.Named = None,
    root: common.Root = None,
    masks: common.Masks = None,
    names: common.Names = None,
    categories: common.Categories = None,
    with_initial: Annotated[
        bool, typer.Option("--with-initial", help="The network before training as well.")
    ] = False,
    output: common.Output = None,
    rows: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help=f"Some of {', '.join(ROWS)}; default: all that the data allow."),
    ] = None,
    size: common.Size = None,
    resize: common.Resizing = None,
    foreground: common.Foreground = "logit",
    threshold: common.Threshold = 0.5,
    pooling: common.Pooling = "weighted",
    method: Annotated[str, typer.Option(help="K-means: minibatch (published) or full.")] = (
        "minibatch"
    ),
    starts: Annotated[int, typer.Option(help="Starts of K-means.")] = 3,
    pca: Annotated[Optional[int], typer.Option(help="Whitened PCA of K-means; 0: none.")] = None,  # noqa: UP045
    without_foreground: common.WithoutForeground = "zero",
    clusters: Annotated[int, typer.Option(help="K of over-clustering; 500 comes too.")] = 50,
    epochs: Annotated[int, typer.Option(help="Epochs of the linear classifier.")] = 60,
    decay_epoch: Annotated[int, typer.Option(help="Its rate is a tenth after it.")] = 25,
    augment: Annotated[bool, typer.Option(help="Of the linear classifier.")] = True,
    crf: Annotated[bool, typer.Option(help="The linear classifier with a CRF as well.")] = True,
    fractions: Annotated[
        str, typer.Option(help="Of fine-tuning: shares of the labels, percent.")
    ] = "1,2,5,12.5,100",
    splits: Annotated[int, typer.Option(help="Of fine-tuning: draws of each share.")] = 3,
    finetune_epochs: Annotated[int, typer.Option(help="Of fine-tuning.")] = 30,
    min_steps: Annotated[int, typer.Option(help="Of fine-tuning, at least.")] = 2000,
    mean: common.Averaged = None,
    precision: common.Precision = "float32",
    device: common.Device = "auto",
    html: common.Html = False,
) -> None:
    """Every row of the paper's table that the data allow, with the published figures beside.

    Examples: `maskbank evaluate table runs/voc --data-set voc --root VOCSegmentation
    --with-initial --html`; `maskbank evaluate --nproc 8 table runs/mine --train-shards shards/train
    --shards shards/val --rows kmeans,linear`
    """
    given: dict[str, Any] = dict(locals())
    with same_on_all_ranks():
        source = common.source(data_set, root, None, masks, names, categories)
        plan = _plan(source, given)
        subjects = [common.open_subject(network, False, output)]
        if with_initial:
            subjects.append(common.open_subject(network, True, output))
        for subject in subjects:
            plan.require(subject)
        sets = _open(source, plan, shards, train_shards, bank_shards)
    _evaluate(subjects, sets, plan, source, device, html)


@dataclass(frozen=True)
class Plan:
    """What each row does.

    Attributes:
        rows: that are made, of `ROWS`.
        kmeans: of the row itself; over-clustering changes clusters and matching.
        clusters: K of over-clustering.
        all_metrics: whether K-means' segmentations are measured in all ways (ImageNet-S).
        retrieval, linear, finetune, video: of their rows.
        fractions, splits: of fine-tuning.
    """

    rows: tuple[str, ...]
    kmeans: KMeansConfig
    clusters: int
    all_metrics: bool
    retrieval: RetrievalConfig
    linear: LinearConfig
    finetune: FinetuneConfig
    video: VideoConfig
    fractions: tuple[float, ...]
    splits: int

    def require(self, subject: common.Subject) -> None:
        """Raises InputError where the network lacks what a row needs."""
        if "kmeans" in self.rows or "over-clustering" in self.rows:
            self.kmeans.require(subject.encoder)
        if "retrieval" in self.rows:
            self.retrieval.require(subject.encoder)
        if "video" in self.rows:
            require_reading(subject.encoder, "saliency", None)

    def over_clusterings(self) -> list[KMeansConfig]:
        """Both readings: by IoU, and the most frequent class of 500 clusters."""
        many = replace(self.kmeans, many_to_one=True, criterion="iou")
        return [
            replace(many, cluster=replace(many.cluster, clusters=self.clusters)),
            replace(
                many,
                criterion="count",
                cluster=replace(many.cluster, clusters=MAJORITY_CLUSTERS),
            ),
        ]


def _plan(source: common.Source, given: dict[str, Any]) -> Plan:
    """The options as the configurations of the rows, which check them."""
    size, precision = source.size(given["size"]), given["precision"]
    resize, mean = source.resize(given["resize"]), source.mean(given["mean"])
    frames: Any = "opencv" if resize == "crop" else resize  # of the row that has no crop
    settings = data_set_settings(source) | {"resize": resize, "mean": mean}
    prototype = PrototypeConfig(given["foreground"], given["threshold"], given["pooling"])
    pca = DEFAULT_PCA[settings["unit"]] if given["pca"] is None else given["pca"]
    return Plan(
        rows=_rows(source, given),
        kmeans=KMeansConfig(
            size=size,
            prototype=prototype,
            cluster=ClusterConfig(
                method=given["method"],
                starts=given["starts"],
                pca=pca,
                without_foreground=given["without_foreground"],
            ),
            precision=precision,
            **settings,
        ),
        clusters=given["clusters"],
        all_metrics=source.name.startswith("imagenet-s"),
        retrieval=RetrievalConfig(size, prototype, precision=precision, resize=resize, mean=mean),
        linear=LinearConfig(
            size=size,
            epochs=given["epochs"],
            decay_epoch=given["decay_epoch"],
            augment=given["augment"],
            precision=precision,
            crf=CrfConfig() if given["crf"] else None,
            resize=resize,
            mean=mean,
        ),
        finetune=FinetuneConfig(
            size=size,
            epochs=given["finetune_epochs"],
            min_steps=given["min_steps"],
            precision=precision,
            resize=resize,
        ),
        video=VideoConfig(size, prototype, precision=precision, resize=frames),
        fractions=parse_fractions(given["fractions"], given["splits"]),
        splits=given["splits"],
    )


def _rows(source: common.Source, given: dict[str, Any]) -> tuple[str, ...]:
    """The rows asked for, or all that the data set has and the shards allow."""
    if source.name == "davis-2016":
        possible: tuple[str, ...] = ("video",)
    elif source.data_set is not None and source.data_set.unit == "pixel":
        possible = ("kmeans", "linear", "finetune")
    else:
        possible = tuple(row for row in ROWS if row != "video")
        if source.data_set is None and given["train_shards"] is None:
            with_bank = given["bank_shards"] is not None
            need = {None, "bank"} if with_bank else {None}
            possible = tuple(row for row in possible if _NEEDS.get(row) in need)
    if given["rows"] is None:
        return possible
    asked = [name.strip() for name in given["rows"].split(",")]
    wrong = [name for name in asked if name not in ROWS]
    if wrong:
        raise InputError(f"--rows has {wrong[0]!r}; it can have {', '.join(ROWS)}")
    return tuple(row for row in ROWS if row in asked)


def _open(
    source: common.Source,
    plan: Plan,
    shards: Path | None,
    train_shards: Path | None,
    bank_shards: Path | None,
) -> dict[str, LabelledSet]:
    """The sets that the rows need, by role."""
    sets: dict[str, LabelledSet] = {"test": source.open("test", shards, "--shards")}
    needed = {_NEEDS[row] for row in plan.rows if row in _NEEDS}
    if "kmeans" in plan.rows and plan.kmeans.fit_on == "train":
        needed.add("train")
    if "train" in needed:
        sets["train"] = source.open("train", train_shards, "--train-shards")
        require_comparable(sets["train"], sets["test"])
    if "bank" in needed:
        if source.data_set is None and bank_shards is None and "train" in sets:
            sets["bank"] = sets["train"]
        else:
            given = bank_shards or (train_shards if source.data_set is None else None)
            sets["bank"] = source.open("bank", given, "--bank-shards")
    if "video" in plan.rows:
        sequences_of(sets["test"])
    return sets


def _evaluate(
    subjects: list[common.Subject],
    sets: dict[str, LabelledSet],
    plan: Plan,
    source: common.Source,
    device: str,
    html: bool,
) -> None:
    """All networks on all rows; writes and shows the table on rank 0."""
    ranks = common.start(device)
    for samples in dict.fromkeys(sets.values()):
        common.check_samples(samples, ranks)
    results = [
        replace(result, data_set=source.name)
        for subject in subjects
        for result in run_table(subject, sets, plan, source.name, ranks)
    ]
    if ranks.is_main:
        for result in results:
            result.write(subjects[0].folder)
        show_table(results, common.console)
        path = write_table(results, subjects[0].folder)
        common.console.print(f"written: {path} and .json", soft_wrap=True)
        if html:
            report = write_report(subjects[0].folder)
            common.console.print(f"report: {report}", soft_wrap=True)
    end_ranks()


def run_table(
    subject: common.Subject,
    sets: dict[str, LabelledSet],
    plan: Plan,
    data_set: str,
    ranks: Ranks,
) -> list[Result]:
    """All rows of one network; images are embedded once for all clusterings."""
    test, results = sets["test"], []
    clusterings = [plan.kmeans] if "kmeans" in plan.rows else []
    clusterings += plan.over_clusterings() if "over-clustering" in plan.rows else []
    statistics = None
    if clusterings and plan.kmeans.unit == "image":
        images = WholeImages(test, plan.kmeans.size, cores_per_rank(), plan.kmeans.resize)
        statistics = image_statistics(subject.encoder, images, plan.kmeans, ranks)
    for config in clusterings:
        every = plan.all_metrics and not config.many_to_one
        results.append(
            run_kmeans(
                *(subject, test, config, data_set, ranks),
                all_metrics=every,
                statistics=statistics,
                fit_samples=sets.get("train") if config.fit_on == "train" else None,
            )
        )
    if "retrieval" in plan.rows:
        results += run_retrieval(subject, sets["bank"], test, plan.retrieval, data_set, ranks)
    if "linear" in plan.rows:
        results += run_linear(subject, [sets["train"], test], plan.linear, data_set, ranks)
    if "finetune" in plan.rows:
        results += run_finetune(
            *(subject, sets["train"], test, plan.finetune, ranks, plan.fractions, plan.splits)
        )
    if "video" in plan.rows:
        learning = replace(plan.linear, select="last", crf=None)
        head = learn_head(subject, sets["train"], test, learning, data_set, ranks)
        results += run_video(subject, test, list(READINGS), plan.video, ranks, head)
    return results
