"""What do bank size and pixels per mask do to quality? Trains on stamps20, scores K-means.

    python -m benchmarks.bank_ablation --root FOLDER --work FOLDER [--seeds 3] [--steps 1000]

FOLDER is the unpacked data set in the released PASCAL layout. Bank sizes 0, 256, 4,096 and 65,536
(the last with same-image masking) with all pixels, then 256 and 64 pixels a mask with 256 entries;
every setting with the same seeds, a process with one thread each, as many at a time as there are
cores. What is there already is not trained again. Without --root it says so and ends.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SETTINGS: dict[str, tuple[str, ...]] = {
    "no bank": ("bank.capacity=0",),
    "256 entries": ("bank.capacity=256",),
    "4,096 entries": ("bank.capacity=4096",),
    "65,536 entries, same image masked": ("bank.capacity=65536", "bank.mask_same_image=true"),
    "256 entries, 256 pixels a mask": ("bank.capacity=256", "loss.pixels_per_mask=256"),
    "256 entries, 64 pixels a mask": ("bank.capacity=256", "loss.pixels_per_mask=64"),
}
TRAINING = (
    *("model.embedding_dim=32", "views.image_size=48", "data.batch_size=32", "data.threads=1"),
    *("views.jitter_probability=0.8", "views.brightness=0.4", "views.contrast=0.4"),
    *("views.saturation=0.4", "views.hue=0.1", "views.grayscale_probability=0.2"),
    *("run.precision=bf16", "run.threads=1", "run.tensorboard=false", "run.log_every=20"),
    *("run.checkpoint_every=100", "data.loader=torch"),
)
KMEANS = (
    *("--size", "96", "--foreground", "probability", "--pooling", "normalized"),
    *("--method", "full", "--starts", "10", "--pca", "0"),
)


def maskbank(log: Path, *arguments: str) -> None:
    """A command in one thread; raises when it fails, its output is in `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        command = [sys.executable, "-m", "launch.cli", *arguments]
        subprocess.run(command, stdout=file, stderr=file, env=environment, check=True)


def score(work: Path, name: str, seed: int, steps: int) -> dict[str, float]:
    """Trains and scores one run, or reads what was found before."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in name)
    run = work / f"{slug}-{seed}"
    result = run / "evaluation/kmeans-trained.json"
    log = work / f"{run.name}.log"
    if not result.exists():
        where = (f"data.shards={work / 'trainaug'}", f"run.directory={run}", f"run.seed={seed}")
        length = (f"run.steps={steps}",)
        recipe = ("--recipe", "demo_cpu", "--nproc", "1")
        maskbank(log, "train", *recipe, *where, *length, *TRAINING, *SETTINGS[name])
        maskbank(log, "evaluate", "kmeans", str(run), "--shards", str(work / "val"), *KMEANS)
    found = json.loads(result.read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    print(f"{name}, seed {seed}: {found['miou']['mean']:.1f}", flush=True)
    return {
        "miou": found["miou"]["mean"],
        "foreground": found["foreground_iou"],
        "fill": last["bank_fill"],
        "same_image": last["bank_same_image"],
        "hardest": last["hardest_similarity"],
        "positive": last["positive_similarity"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/bank_ablation"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    if options.root is None:
        print("skipped: stamps20 is not part of maskbank; give its folder as --root")
        return
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    for split in ("trainaug", "val"):
        source = ("--root", str(options.root), "--split", split)
        masks = ("--masks", "saliency_unsupervised_model", "--samples-per-shard", "400")
        build = ("shards", "build", "voc", *source, *masks, "--output", str(work / split))
        maskbank(work / "shards.log", *build)
    jobs = [(name, seed) for seed in range(options.seeds) for name in SETTINGS]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(lambda job: score(work, *job, options.steps), jobs))
    table = {
        name: [f for (n, _), f in zip(jobs, found, strict=True) if n == name] for name in SETTINGS
    }
    print("| bank, pixels | mIoU, mean ± sd over training seeds | each | foreground IoU |", end="")
    print(" fill | same image | positive | hardest |\n|" + "---|" * 8)
    for name, rows in table.items():
        miou = [row["miou"] for row in rows]
        spread = statistics.stdev(miou) if len(miou) > 1 else 0.0
        mean = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
        each = ", ".join(f"{value:.1f}" for value in miou)
        print(
            f"| {name} | {mean['miou']:.1f} ± {spread:.1f} | {each} | {mean['foreground']:.1f} | "
            f"{mean['fill']:.0%} | {mean['same_image']:.2%} | {mean['positive']:.2f} | "
            f"{mean['hardest']:.2f} |"
        )


if __name__ == "__main__":
    main()
