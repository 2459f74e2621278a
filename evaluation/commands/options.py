"""What the commands have in common: which network, which images, which ranks, where results go."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console

from data_pipeline.errors import InputError, SampleError
from data_pipeline.files import require_writable
from data_pipeline.labelled import LabelledSet, ListedSet, labelled_shards
from data_pipeline.manifest import read_manifest
from evaluation.datasets import DataSet, Place, Role, data_set
from evaluation.features import own_samples, shown
from evaluation.report import write_report
from evaluation.result import Result
from evaluation.rows import own_row
from trainer.distributed import Ranks, cores_per_rank, end_ranks, start_ranks
from trainer.encoder import Encoder, load_encoder
from trainer.precision import AUTO, fast_precision

console = Console(width=None)

Network = Annotated[
    Path,
    typer.Argument(
        help="Run directory, or a checkpoint: ours, MaskContrast's, MoCo's, torchvision's, DINO's."
    ),
]
Shards = Annotated[Optional[Path], typer.Option(help="Labelled shards to score on.")]  # noqa: UP045 (typer)
TrainShards = Annotated[Optional[Path], typer.Option(help="Labelled shards to learn on.")]  # noqa: UP045
Named = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--data-set", help="Instead of shards, where it lies: voc, coco-stuff-81, …"),
]
Root = Annotated[Optional[Path], typer.Option(help="Folder of --data-set.")]  # noqa: UP045
Split = Annotated[Optional[str], typer.Option(help="Split to score on, if not the published one.")]  # noqa: UP045
Masks = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Folder of saliency masks, in --root or not; for --foreground mask."),
]
Names = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--list", help="Images to score, one a line (COCO-Stuff-27's curated split)."),
]
Categories = Annotated[Optional[Path], typer.Option(help="ImageNet-S's list of categories.")]  # noqa: UP045
Initial = Annotated[bool, typer.Option("--initial", help="Score the network before training.")]
Output = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder of results; default: the run, or runs/NAME for a file."),
]
Size = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Images are resized to this side, pixels; default: the data set's, or 512."),
]
Resizing = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--resize",
        help="Images to squares: opencv (published), antialias, or crop (the centre, as published "
        "for COCO-Stuff-27); default: the data set's, or opencv.",
    ),
]
Averaged = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--mean",
        help="mIoU over all classes (one that the truth lacks counts 0) or those present; default: "
        "the data set's, or present.",
    ),
]
BatchSize = Annotated[int, typer.Option(help="Images a forward pass.")]
Foreground = Annotated[
    str, typer.Option(help="Threshold on logit (published) or probability; or mask: given ones.")
]
Threshold = Annotated[float, typer.Option(help="Of a pixel that is foreground.")]
Pooling = Annotated[str, typer.Option(help="weighted (published) or normalized.")]
WithoutForeground = Annotated[
    str,
    typer.Option(
        help="Images in which nothing is predicted: zero vectors (published), or leave-out of PCA "
        "and clustering."
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="float32, bf16, or auto: bf16 where the hardware has it.",
        callback=lambda given: fast_precision("auto") if given == AUTO else given,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Html = Annotated[bool, typer.Option("--html", help="Write the report, report.html, as well.")]


@dataclass(frozen=True)
class Source:
    """Where labelled images are, as the options say it.

    Attributes:
        data_set: a published one, or None for shards.
        place: of that data set.
        split: to score on; None takes the published one.
    """

    data_set: DataSet | None
    place: Place | None
    split: str | None = None

    @property
    def name(self) -> str:
        return "" if self.data_set is None else self.data_set.name

    def open(self, role: Role, shards: Path | None, option: str) -> LabelledSet:
        """The images of a role: shards where they are given, else the data set's split."""
        if shards is not None:
            return labelled_shards(read_manifest(shards))
        if self.data_set is None or self.place is None:
            raise InputError(f"give {option} FOLDER, or --data-set NAME with --root FOLDER")
        return self.data_set.open(self.place, role, self.split if role == "test" else None)

    def size(self, given: int | None) -> int:
        if given is not None:
            return given
        return 512 if self.data_set is None else self.data_set.size

    def resize(self, given: str | None) -> Any:
        """For a configuration, which checks it; so `mean`."""
        return given or ("opencv" if self.data_set is None else self.data_set.resize)

    def mean(self, given: str | None) -> Any:
        return given or ("present" if self.data_set is None else self.data_set.mean)


def source(
    named: str | None,
    root: Path | None,
    split: str | None = None,
    masks: str | None = None,
    names: Path | None = None,
    categories: Path | None = None,
) -> Source:
    """The options of a data set, checked against each other.

    Raises:
        InputError: an unknown name, or options without the one they belong to.
    """
    if named is None:
        given = {"--root": root, "--split": split, "--masks": masks, "--list": names}
        lonely = [option for option, value in given.items() if value is not None]
        if lonely:
            raise InputError(f"{lonely[0]} belongs to --data-set; shards are one split already")
        return Source(None, None)
    if root is None:
        raise InputError("--data-set needs --root, the folder that it lies in")
    if not root.is_dir():
        raise InputError(f"--root {root} is not a folder")
    return Source(data_set(named), Place(root, masks, names, categories), split)


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        encoder: the network.
        name: trained, initial, or that of a file.
        folder: where results go.
    """

    encoder: Encoder
    name: str
    folder: Path


def open_subject(network: Path, initial: bool, output: Path | None) -> Subject:
    """The network that a command names, and the folder of its results.

    Raises:
        InputError: it cannot be loaded, or results cannot be written there.
    """
    encoder = load_encoder(network, initial)
    if network.is_file():
        name = network.name.partition(".")[0] or "network"
        folder = output or Path("runs") / name
    else:
        name = "initial" if initial else "trained"
        in_run = (network / "config.yaml").is_file()
        folder = output or (network if in_run else network.resolve().parents[1])
    require_writable(
        folder / "evaluation", "the folder of results" if output is None else "--output"
    )
    return Subject(encoder, name, folder)


def start(device: str) -> Ranks:
    """This process as one of the ranks, with its share of the cores."""
    ranks = start_ranks(device, timeout_seconds=1800)
    if ranks.device.type == "cpu":
        torch.set_num_threads(cores_per_rank())
    return ranks


def check_samples(samples: LabelledSet, ranks: Ranks) -> None:
    """Decodes every image and label of a data set as it lies; shards were checked when built.

    Raises:
        InputError: naming the first that cannot be used: wrong sizes, values that are no class, ….
    """
    if not isinstance(samples, ListedSet):
        return
    numbers = own_samples(len(samples), ranks).tolist()
    with ThreadPoolExecutor(cores_per_rank()) as pool:
        found = pool.map(lambda number: _problem(samples, number), numbers)
        problems = [one for one in shown(found, f"checking {samples}", len(numbers), ranks) if one]
    if problems:
        more = f" (and {len(problems) - 1:,} more)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}; evaluation needs every sample: {samples.remedy()}")


def _problem(samples: LabelledSet, number: int) -> str | None:
    try:
        samples.read(number)
    except SampleError as error:
        return error.reason
    return None


def own_rows(
    results: list[Result], samples: LabelledSet, subject: Subject, data_set: str, ranks: Ranks
) -> list[Result]:
    """The results as rows of their own beside those there are; named on rank 0, which writes."""
    if not ranks.is_main:
        return results
    place = subject.folder / "evaluation" / data_set
    return [own_row(result, samples, place) for result in results]


def finish(
    results: list[Result], subject: Subject, source: Source, ranks: Ranks, html: bool
) -> None:
    """Writes and shows what was found, on rank 0, and ends the ranks."""
    if ranks.is_main:
        for result in results:
            result = replace(result, data_set=source.name)
            path = result.write(subject.folder)
            result.show(console)
            console.print(f"written: {path} and .md", soft_wrap=True)
        if html:
            console.print(f"report: {write_report(subject.folder)}", soft_wrap=True)
    end_ranks()
