"""The result of one evaluation: as JSON, and as a table on the terminal."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipeline.files import write_json
from evaluation.miou import Counts


@dataclass(frozen=True)
class Result:
    """Scores in percent; per-class figures and confusion matrix are those of the first seed.

    Attributes:
        protocol: kmeans or linear.
        network: trained or initial.
        step: steps that the network was trained for.
        values: mIoU of each seed.
        iou: [C] per class, NaN where absent.
        confusion: int64 [C, C] or [C, C + 1], truth in rows, the last column no class.
        foreground_iou, pixel_accuracy: of the first seed.
        classes: names, background first.
        images: evaluated.
        seconds: wall time.
        options: that decide the figures.
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

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def std(self) -> float:
        """Sample standard deviation over seeds; 0 for one seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    def write(self, run: Path) -> Path:
        """Writes `evaluation/PROTOCOL-NETWORK.json` below the run directory."""
        path = run / "evaluation" / f"{self.protocol}-{self.network}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = self.confusion.sum(1)
        value = {
            "protocol": self.protocol,
            "network": self.network,
            "step": self.step,
            "miou": {"mean": self.mean, "std": self.std, "values": list(self.values)},
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
        }
        write_json(path, value, indent=1)
        return path

    def show(self, console: Console) -> None:
        """Prints the per-class table."""
        spread = f" ± {self.std:.1f} over {len(self.values)} seeds" if len(self.values) > 1 else ""
        table = Table()
        table.add_column("class")
        table.add_column("IoU %", justify="right")
        table.add_column("", width=20)
        for name, iou in zip(self.classes, self.iou, strict=True):
            bar = "" if np.isnan(iou) else "█" * round(iou / 5)
            table.add_row(Text(name), _shown(iou), bar)
        console.print(table)
        console.print(
            f"{self.protocol} of the {self.network} network at step {self.step}, "
            f"{self.images} images: [bold]mIoU {self.mean:.1f}[/]{spread}"
        )
        console.print(
            f"foreground IoU {_shown(self.foreground_iou)} · pixel accuracy "
            f"{_shown(self.pixel_accuracy)} · {self.seconds:.1f} s"
        )


def _shown(percent: float) -> str:
    return "absent" if np.isnan(percent) else f"{percent:.1f}"


def _finite(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)
