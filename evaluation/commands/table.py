"""`maskbank evaluate table`: every row of the paper's table, from one command."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from data_pipeline.errors import CannotScore, InputError
from data_pipeline.labelled import LabelledSet
from data_pipeline.whole_images import WholeImages
from evaluation.cluster import ClusterConfig
from evaluation.commands import options as common
from evaluation.commands.finetune import parse_fractions
from evaluation.commands.kmeans import data_set_settings, protocol_name, run_kmeans
from evaluation.commands.linear import run_linear
from evaluation.commands.retrieval import run_retrieval
from evaluation.commands.video import learn_head, run_video
from evaluation.crf import CrfConfig
from evaluation.finetune import FinetuneConfig, evaluate_finetune
from evaluation.kmeans import image_statistics
from evaluation.kmeans_config import DEFAULT_PCA, KMeansConfig
from evaluation.label_splits import drawn_splits, present_classes
from evaluation.linear_probe import LinearConfig, require_comparable
from evaluation.prototypes import PrototypeConfig
from evaluation.report import write_report
from evaluation.result import Result, title_of
from evaluation.retrieval import RetrievalConfig
from evaluation.statistics import ImageStatistics
from evaluation.table import NotScored, show_table, write_table
from evaluation.video import READINGS, Reading, VideoConfig, require_reading, sequences_of
from trainer.distributed import Ranks, cores_per_rank, end_ranks, same_on_all_ranks

Made = tuple[str, Callable[[], list[Result]]]  # a row by title, and what makes it
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
    """All networks on all rows, each written when it is made; shows the table on rank 0.

    Raises:
        typer.Exit: on rank 0, a row could not be scored.
    """
    ranks = common.start(device)
    for samples in dict.fromkeys(sets.values()):
        common.check_samples(samples, ranks)
    results: list[Result] = []
    missing: list[NotScored] = []
    folder, path = subjects[0].folder, None
    for subject in subjects:
        for made in run_table(subject, sets, plan, source.name, ranks):
            if isinstance(made, NotScored):
                missing.append(made)
            else:
                (row,) = common.own_rows([made], sets["test"], subjects[0], source.name, ranks)
                results.append(replace(row, data_set=source.name))
            if ranks.is_main:
                if isinstance(made, Result):
                    results[-1].write(folder)
                path = write_table(results, missing, folder, source.name)
    if path is not None:
        show_table(results, missing, common.console)
        common.console.print(f"written: {path} and .json", soft_wrap=True)
        if html and results:
            common.console.print(f"report: {write_report(folder)}", soft_wrap=True)
    end_ranks()
    # of one rank: the first that leaves with a status ends the others
    if missing and ranks.is_main:
        raise typer.Exit(1)


def run_table(
    subject: common.Subject,
    sets: dict[str, LabelledSet],
    plan: Plan,
    data_set: str,
    ranks: Ranks,
) -> Iterator[Result | NotScored]:
    """All rows of one network, as they are made; a collective.

    Raises:
        InputError: with several ranks, what may be wrong on one of them alone.
    """
    for title, make in _rows_of(subject, sets, plan, data_set, ranks):
        try:
            yield from make()
        except InputError as error:
            if ranks.world_size > 1 and not isinstance(error, CannotScore):
                raise
            yield NotScored(title, subject.name, subject.encoder.step, str(error))


def _rows_of(
    subject: common.Subject,
    sets: dict[str, LabelledSet],
    plan: Plan,
    data_set: str,
    ranks: Ranks,
) -> Iterator[Made]:
    test, where = sets["test"], (data_set, ranks)
    yield from _clusterings(subject, sets, plan, data_set, ranks)
    if "retrieval" in plan.rows:
        bank = sets["bank"]
        yield "retrieval", partial(run_retrieval, subject, bank, test, plan.retrieval, *where)
    if "linear" in plan.rows:
        both = [sets["train"], test]
        yield title_of("linear"), partial(run_linear, subject, both, plan.linear, *where)
    if "finetune" in plan.rows:
        train, threads = sets["train"], cores_per_rank()
        present = present_classes(train, ranks, threads)
        for percent, numbers in drawn_splits(present, plan.fractions, plan.splits).items():
            share = (train, test, {percent: numbers}, plan.finetune, ranks, subject.name, threads)
            row = partial(evaluate_finetune, subject.encoder, *share)
            yield title_of(f"finetune-{percent:g}"), row
    if "video" in plan.rows:
        for reading in READINGS:
            row = partial(_video, subject, sets, reading, plan, data_set, ranks)
            yield title_of(f"davis-{reading}"), row


def _clusterings(
    subject: common.Subject,
    sets: dict[str, LabelledSet],
    plan: Plan,
    data_set: str,
    ranks: Ranks,
) -> Iterator[Made]:
    """K-means and over-clusterings; images are embedded once for all of them."""
    test, kmeans = sets["test"], plan.kmeans
    configs = [kmeans] if "kmeans" in plan.rows else []
    configs += plan.over_clusterings() if "over-clustering" in plan.rows else []

    @cache
    def statistics() -> ImageStatistics | None:
        if kmeans.unit == "pixel":
            return None
        images = WholeImages(test, kmeans.size, cores_per_rank(), kmeans.resize)
        return image_statistics(subject.encoder, images, kmeans, ranks)

    def cluster(config: KMeansConfig) -> list[Result]:
        result = run_kmeans(
            *(subject, test, config, data_set, ranks),
            all_metrics=plan.all_metrics and not config.many_to_one,
            statistics=statistics(),
            fit_samples=sets.get("train") if config.fit_on == "train" else None,
        )
        return [result]

    for config in configs:
        title = title_of(protocol_name(config, len(test.classes)))
        yield title, partial(cluster, config)


def _video(
    subject: common.Subject,
    sets: dict[str, LabelledSet],
    reading: Reading,
    plan: Plan,
    data_set: str,
    ranks: Ranks,
) -> list[Result]:
    head = None
    if reading == "classifier":
        learning = replace(plan.linear, select="last", crf=None)
        head = learn_head(subject, sets["train"], sets["test"], learning, data_set, ranks)
    return run_video(subject, sets["test"], [reading], plan.video, ranks, head)
