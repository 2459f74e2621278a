"""Pictures of the comparisons: from JSON lines in benchmarks/results/ to docs/*.png.

    python -m benchmarks.plots [--results benchmarks/results] [--output docs]

The newest `side_by_side_*.jsonl` gives images a second and peak memory, the newest
`time_to_quality_*.jsonl` mIoU over time. Needs matplotlib (the extra `plots`).
"""

import argparse
import importlib.util
import json
import statistics
from pathlib import Path
from typing import Any

_OURS, _OTHERS = "#1f6f8b", "#c9c9c9"
_TITLES = {
    "maskbank": "maskbank, bf16",
    "maskbank-float32": "maskbank, float32",
    "maskbank-stride8": "maskbank, bf16, a pixel of each 8×8",
    "plain": "the method plainly, float32",
    "lightly": "lightly DenseCL*, float32",
    "lightly-bf16": "lightly DenseCL*, bf16",
    "webdataset": "maskbank fed by webdataset + PIL",
    "torchvision": "torchvision, supervised*, one view",
}


def newest(results: Path, question: str) -> list[dict[str, Any]]:
    """Rows of the newest file of a question, none where there is no file."""
    files = sorted(results.glob(f"{question}_*.jsonl"), key=lambda file: file.stem[-10:])
    if not files:
        return []
    return [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()]


def plot_speed(rows: list[dict[str, Any]], output: Path) -> None:
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["contender"] in _TITLES and not row["not_run"]]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.45 * len(rows) + 1.2), sharey=True)
    names = [_TITLES[row["contender"]] for row in rows]
    colours = [_OURS if row["contender"].startswith("maskbank") else _OTHERS for row in rows]
    speeds = [[w["images"] / w["seconds"] for w in row["windows"]] for row in rows]
    middle = [statistics.median(speed) for speed in speeds]
    below = [m - min(speed) for m, speed in zip(middle, speeds, strict=True)]
    above = [max(speed) - m for m, speed in zip(middle, speeds, strict=True)]
    axes[0].barh(names, middle, xerr=[below, above], color=colours, capsize=3)
    axes[0].set_xlabel("images a second")
    memory = [max(w["peak_rss_mb"] for w in row["windows"]) / 1000 for row in rows]
    axes[1].barh(names, memory, color=colours)
    axes[1].set_xlabel("peak memory, GB")
    axes[0].invert_yaxis()
    figure.suptitle(f"Training, ResNet-18, {rows[0]['cores']} cores, {rows[0]['date']}")
    _save(figure, output)


def plot_quality(rows: list[dict[str, Any]], output: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    for name, colour in (("maskbank", _OURS), ("plain", "#8a8a8a")):
        own = [r for r in rows if r["contender"] == name and r["foreground"] == "probability"]
        if not own:
            continue
        own.sort(key=lambda row: row["step"])
        means = [row["miou"]["mean"] for row in own]
        spread = [row["miou"]["std"] for row in own]
        minutes = [row["seconds"] / 60 for row in own]
        label = _TITLES[name]
        axis.errorbar(minutes, means, spread, color=colour, marker="o", capsize=3, label=label)
    axis.legend(loc="lower right", frameon=False)
    axis.set_xlabel("minutes of training")
    axis.set_ylabel("K-means mIoU")
    axis.set_xlim(left=0)
    figure.suptitle("The same steps, the same batches' size, the same schedule")
    _save(figure, output)


def _save(figure: Any, output: Path) -> None:
    figure.tight_layout()
    figure.savefig(output, dpi=110, metadata={"Software": None})
    print(output)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--output", type=Path, default=Path("docs"))
    options = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        print("skipped: matplotlib is not installed (pip install 'maskbank[plots]')")
        return
    import matplotlib

    matplotlib.use("Agg")
    speed = newest(options.results, "side_by_side")
    quality = newest(options.results, "time_to_quality")
    if speed:
        plot_speed(speed, options.output / "speed.png")
    if quality:
        plot_quality(quality, options.output / "quality.png")


if __name__ == "__main__":
    main()
