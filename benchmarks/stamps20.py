"""Quality on stamps20: trains on its noisy masks, scores K-means and linear before and after.

    python -m benchmarks.stamps20 --root FOLDER --work FOLDER [--steps 1500] [key=value …]

FOLDER is the unpacked data set in the released PASCAL layout. The settings are those under which
the published implementation was measured on this data (ResNet-18 from scratch, 96 px, batch 32,
K = 256, T = .5, m = .99, SGD .05, poly a step), and so is the scoring. Without --root it says so
and ends.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

TRAINING = (
    *(
        "model.backbone=resnet18",
        "model.embedding_dim=32",
        "model.decoder_channels=256",
        "model.dropout=0.5",
    ),
    *("model.atrous_rates=[12,24,36]", "model.momentum=0.99", "bank.capacity=256"),
    *("views.image_size=96", "data.batch_size=32", "loss.temperature=0.5"),
    *("views.jitter_probability=0.8", "views.brightness=0.4", "views.contrast=0.4"),
    *("views.saturation=0.4", "views.hue=0.1", "views.grayscale_probability=0.2"),
    *("optim.lr=0.05", "optim.per=step", "optim.warmup_steps=0", "run.precision=bf16"),
)
KMEANS = (
    *("--size", "160", "--foreground", "probability", "--pooling", "normalized"),
    *("--method", "full", "--starts", "10", "--pca", "0", "--precision", "bf16"),
)
LINEAR = (
    *("--size", "160", "--no-augment", "--epochs", "6", "--decay-epoch", "3"),
    *("--precision", "bf16", "--select", "last"),
)


def run(*arguments: str) -> None:
    """A maskbank command; ends the benchmark when it fails."""
    print("$ maskbank", *arguments, flush=True)
    status = subprocess.call([sys.executable, "-m", "launch.cli", *arguments])
    if status:
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/stamps20"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    if options.root is None:
        print("skipped: stamps20 is not part of maskbank; give its folder as --root")
        return
    work, ranks = options.work, str(options.ranks)
    for split in ("trainaug", "val"):
        source = ("--root", str(options.root), "--split", split)
        masks = ("--masks", "saliency_unsupervised_model", "--samples-per-shard", "400")
        run("shards", "build", "voc", *source, *masks, "--output", str(work / "shards" / split))
    train, val = str(work / "shards/trainaug"), str(work / "shards/val")
    folder = str(work / "run")
    where = (f"data.shards={train}", f"run.directory={folder}", f"run.steps={options.steps}")
    recipe = ("--recipe", "demo_cpu", "--nproc", ranks)
    run("train", *recipe, *where, *TRAINING, *options.settings)
    for network in (("--initial",), ()):
        run("evaluate", "kmeans", folder, "--shards", val, *network, *KMEANS)
        linear = ("linear", folder, "--train-shards", train, "--shards", val)
        run("evaluate", *linear, *network, *LINEAR)
    run("evaluate", "report", folder)
    print("| | mIoU | foreground IoU |\n|---|---|---|")
    for file in sorted((work / "run/evaluation").glob("*.json")):
        found = json.loads(file.read_text())
        miou = f"{found['miou']['mean']:.1f} ± {found['miou']['std']:.1f}"
        print(f"| {file.stem} | {miou} | {found['foreground_iou']:.1f} |")


if __name__ == "__main__":
    main()
