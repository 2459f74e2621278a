"""The result of one evaluation: as JSON and Markdown, and as a table on the terminal."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipeline.files import atomic_write, write_json
from evaluation.miou import Counts
from evaluation.published import Published, published_figures

TITLES = {
    "kmeans": "K-means",
    "kmeans-many": "over-clustering, each cluster its class of largest IoU",
    "kmeans-majority": "over-clustering, each cluster its most frequent class",
    "linear": "linear classifier",
    "linear-crf": "linear classifier, CRF",
    "retrieval-7": "retrieval, 7 classes",
    "retrieval-21": "retrieval, all classes",
    "transfer": "transfer of a classifier",
    "transfer-crf": "transfer of a classifier, CRF",
    "davis-saliency": "video, the predicted foreground",
    "davis-classifier": "video, linear foreground classifier",
    "davis-propagation": "video, the first frame's mask propagated",
}


@dataclass(frozen=True)
class Result:
    """Scores in percent; per-class figures and confusion matrix are those of the first seed.

    Attributes:
        protocol: kmeans, kmeans-many-K, linear, linear-crf, retrieval-7, finetune-12.5, …; with
            `@` and what differs where there was a row of that name (`rows.py`).
        network: trained, initial, or the name of a file.
        step: steps that the network was trained for.
        values: mIoU of each seed (or the protocol's own main figure, see `measure`).
        iou: [C] per class, NaN where absent.
        confusion: int64 [C, C] or [C, C + 1], truth in rows, the last column no class.
        foreground_iou, pixel_accuracy: of the first seed.
        classes: names, background first.
        images: evaluated.
        seconds: wall time.
        options: that decide the figures.
        data_set: its name, where it has one (`datasets.py`).
        metrics: further figures by name, one for each seed.
        measure: what `values` are.
        parts: figures of each part of the data set, as a video, by name; the same for each part.
    """

    protocol: str
    network: str
    step: int
    values: tuple[float, ...]
    iou: NDArray[np.float64]
    confusion: Counts
    foreground_iou: float
    pixel_accuracy: float
    classes: tuple[str, ...]
    images: int
    seconds: float
    options: dict[str, Any]
    data_set: str = ""
    metrics: dict[str, tuple[float, ...]] = field(default_factory=dict)
    measure: str = "mIoU"
    parts: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def std(self) -> float:
        """Sample standard deviation over seeds; 0 for one seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def title(self) -> str:
        return title_of(self.protocol)

    @property
    def published(self) -> tuple[Published, ...]:
        plain = self.protocol.partition("@")[0]
        return published_figures(self.data_set, plain, self.classes)

    def path(self, folder: Path) -> Path:
        """`evaluation/[DATA SET/]PROTOCOL-NETWORK.json` below the run directory."""
        return folder / "evaluation" / self.data_set / f"{self.protocol}-{self.network}.json"

    def write(self, folder: Path) -> Path:
        """Writes the JSON and the Markdown beside it; returns the JSON's path."""
        path = self.path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.as_json(), indent=1)
        with atomic_write(path.with_suffix(".md")) as file:
            file.write(self.as_markdown().encode())
        return path

    def as_json(self) -> dict[str, Any]:
        pixels = self.confusion.sum(1)
        return {
            "protocol": self.protocol,
            "data_set": self.data_set,
            "network": self.network,
            "step": self.step,
            "measure": self.measure,
            "miou": {
                "mean": _finite(self.mean),
                # not a number is no JSON
                "std": None if np.isnan(self.std) else self.std,
                "values": [None if np.isnan(value) else value for value in self.values],
            },
            "metrics": {
                name: [_finite(value) for value in values] for name, values in self.metrics.items()
            },
            "published": [
                {"what": one.what, "value": one.value, "metric": one.metric}
                for one in self.published
            ],
            "foreground_iou": _finite(self.foreground_iou),
            "pixel_accuracy": _finite(self.pixel_accuracy),
            "per_class": [
                {"class": name, "iou": _finite(iou), "pixels": int(count)}
                for name, iou, count in zip(self.classes, self.iou, pixels, strict=True)
            ],
            "confusion": self.confusion[:, : len(self.classes)].tolist(),
            # pixels of each true class in clusters without a class
            "unmatched": self.confusion[:, len(self.classes) :].sum(1).tolist(),
            "images": self.images,
            "seconds": round(self.seconds, 2),
            "options": self.options,
            **({"parts": self.parts} if self.parts else {}),
        }

    def as_markdown(self) -> str:
        """Headline, further figures with what was published, and a row a class."""
        where = f" on {self.data_set}" if self.data_set else ""
        lines = [
            f"# {self.title}{where}, {self.network} network at step {self.step}",
            "",
            f"{self.measure} **{self.mean:.1f}**{self._spread()}, {self.images} images, "
            f"{self.seconds:.1f} s",
            "",
            *("| figure | ours | published |", "|---|---|---|"),
        ]
        ours = {self.measure: self.values, **self.metrics}
        for name, values in ours.items():
            others = [
                f"{one.value:.1f} ({one.what})" for one in self.published if one.metric == name
            ]
            lines.append(f"| {name} | {mean_and_spread(values)} | {'; '.join(others) or '–'} |")
        lines += ["", "| class | IoU % | pixels |", "|---|---|---|"]
        for name, iou, count in zip(
            self.classes, self.iou, self.confusion.sum(1).tolist(), strict=True
        ):
            lines.append(f"| {name.replace('|', '/')} | {_shown(iou)} | {count} |")
        if self.parts:
            figures = list(next(iter(self.parts.values())))
            lines += ["", f"| part | {' | '.join(figures)} |", "|---" * (1 + len(figures)) + "|"]
        for name, part in self.parts.items():
            row = " | ".join(_figure(part[figure]) for figure in figures)
            lines.append(f"| {name.replace('|', '/')} | {row} |")
        return "\n".join(lines) + "\n"

    def show(self, console: Console) -> None:
        """Prints the table of parts or classes, the figures, and what was published."""
        console.print(self._table_of_parts() if self.parts else self._table_of_classes())
        console.print(
            f"{self.title} of the {self.network} network at step {self.step}, "
            f"{self.images} images: [bold]{self.measure} {self.mean:.1f}[/]{self._spread()}"
        )
        figures = [f"{name} {mean_and_spread(values)}" for name, values in self.metrics.items()]
        console.print(
            f"foreground IoU {_shown(self.foreground_iou)} · "
            f"{' · '.join(figures) or f'pixel accuracy {_shown(self.pixel_accuracy)}'} · "
            f"{self.seconds:.1f} s"
        )
        for one in self.published:
            console.print(f"published: {one.metric} {one.value:.1f}, {one.what}", style="dim")

    def _table_of_classes(self) -> Table:
        table = Table()
        table.add_column("class")
        table.add_column("IoU %", justify="right")
        table.add_column("", width=20)
        for name, iou in zip(self.classes, self.iou, strict=True):
            bar = "" if np.isnan(iou) else "█" * round(iou / 5)
            table.add_row(Text(name), _shown(iou), bar)
        return table

    def _table_of_parts(self) -> Table:
        figures = list(next(iter(self.parts.values())))
        table = Table()
        table.add_column("")
        for figure in figures:
            table.add_column(figure, justify="right")
        for name, values in self.parts.items():
            table.add_row(Text(name), *(_figure(values[figure]) for figure in figures))
        return table

    def _spread(self) -> str:
        return f" ± {self.std:.1f} over {len(self.values)} seeds" if len(self.values) > 1 else ""


def title_of(protocol: str) -> str:
    """A protocol's name for people, with what tells its row from others (`rows.py`)."""
    plain, _, told = protocol.partition("@")
    if told:
        return f"{title_of(plain)} ({told.replace('=', ' ').replace(',', ', ')})"
    if protocol in TITLES:
        return TITLES[protocol]
    start, _, last = protocol.rpartition("-")
    if start.startswith("kmeans"):
        named = "K-means, one to one" if start == "kmeans" else TITLES.get(start, start)
        return f"{named}, K = {last}"
    if start == "retrieval":
        return TITLES["retrieval-21"]
    if start in ("finetune", "finetune-crf"):
        return f"fine-tuning on {last}% of the labels{', CRF' if start.endswith('crf') else ''}"
    return protocol


def mean_and_spread(values: tuple[float, ...]) -> str:
    """`12.3 ± 0.4`, or `12.3` for one value; what is not finite is left out."""
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return "–"
    mean = f"{np.mean(finite):.1f}"
    return f"{mean} ± {np.std(finite, ddof=1):.1f}" if len(finite) > 1 else mean


def _figure(value: float) -> str:
    """A percentage, or a count as it is."""
    return str(value) if isinstance(value, int) else _shown(value)


def _shown(percent: float) -> str:
    return "absent" if np.isnan(percent) else f"{percent:.1f}"


def _finite(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)
