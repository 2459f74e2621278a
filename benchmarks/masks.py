"""How good and how fast are masks made without weights? IoU, cpu-ms a picture.

    python -m benchmarks.masks --root STAMPS20 [--scenes 300] [--pictures 100] [--rounds 5]

The root is a PASCAL tree in the released layout whose `saliency_supervised_model` holds true masks.
Without it there is nothing to compare with but generated scenes.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_pipeline.masks.background_prior import BackgroundPrior, PriorConfig
from data_pipeline.masks.make_masks import MakeOptions, make_masks
from data_pipeline.masks.postprocess import PostprocessConfig
from data_pipeline.masks.predictor import Predictor, UInt8
from data_pipeline.masks.score_masks import score_masks
from data_pipeline.sources.scenes import render_scene, scene_size
from trainer.distributed import Ranks
from trainer.environment import describe_environment

SCENE_SEED = 11


@dataclass(frozen=True)
class Prior:
    """The prior as in the paper, or refined."""

    fine_superpixels: int

    def load(self, threads: int) -> Predictor:
        return BackgroundPrior(PriorConfig(fine_superpixels=self.fine_superpixels))


METHODS = {"background prior, as published": Prior(0), "and refined (the default)": Prior(800)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    environment = describe_environment(Ranks(0, 1, torch.device("cpu")))
    print(f"{environment['date']}, {environment['cpu']}, {environment['cores']} cores\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = {}
        if options.root is None:
            print("stamps20 is left out: give --root its folder\n")
        else:
            sets["stamps20"] = (
                options.root / "images",
                options.root / "saliency_supervised_model",
            )
        sets["scenes"] = write_scenes(folder / "scenes", options.scenes)
        quality(sets, folder, options.processes)
        images = sets.get("stamps20", sets["scenes"])[0]
        speed(images, options.pictures, options.rounds)


def write_scenes(folder: Path, count: int) -> tuple[Path, Path]:
    """Generated scenes of about 240 pixels a side, and their masks."""
    for part in ("images", "truth"):
        (folder / part).mkdir(parents=True)
    for index in range(count):
        scene = render_scene(SCENE_SEED, index, *scene_size(SCENE_SEED, index, 240))
        Image.fromarray(scene.image).save(folder / "images" / f"{index:05d}.png")
        mask = np.uint8(255) * (scene.mask > 0)
        Image.fromarray(mask).save(folder / "truth" / f"{index:05d}.png")
    return folder / "images", folder / "truth"


def quality(sets: dict[str, tuple[Path, Path]], folder: Path, processes: int) -> None:
    """Prints scores of the masks; a picture without a mask counts as one where none was found."""
    print("| pictures | masks | IoU | F | MAE | S | skipped | s a thousand |")
    print("|---|---|---|---|---|---|---|---|")
    for (name, (images, truth)), (title, method) in itertools.product(
        sets.items(), METHODS.items()
    ):
        output = folder / f"{name}-{method.fine_superpixels}"
        start = time.monotonic()
        made = make_masks(images, output, method, PostprocessConfig(), MakeOptions(processes))
        seconds = time.monotonic() - start
        score = score_masks(output, truth, missing_as_empty=True, processes=processes)
        print(
            f"| {name}, {score.images:,} | {title} | {score.iou:.3f} | {score.f_beta:.3f} | "
            f"{score.mae:.3f} | {score.s_measure:.3f} | {made.skipped} | "
            f"{1000 * seconds / score.images:.0f} |",
            flush=True,
        )


def speed(images: Path, count: int, rounds: int) -> None:
    """Prints cpu-ms a picture of the map alone, as stored and at 500 pixels, interleaved."""
    stored = [np.asarray(Image.open(path).convert("RGB")) for path in first(images, count)]
    large = [enlarge(image, 500) for image in stored]
    cases = list(itertools.product(METHODS.items(), (("as stored", stored), ("500 pixels", large))))
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for (title, method), (size, pictures) in cases:
            predictor = method.load(1)
            start = time.process_time()
            predictor.predict(pictures)
            spent = 1000 * (time.process_time() - start) / len(pictures)
            if number:  # the first round warms up
                found.setdefault((title, size), []).append(spent)
    print("\n| map | size | cpu-ms a picture, median | spread |\n|---|---|---|---|")
    for (title, size), values in found.items():
        median, spread = statistics.median(values), f"{min(values):.0f}–{max(values):.0f}"
        print(f"| {title} | {size} | {median:.0f} | {spread} |")


def first(images: Path, count: int) -> Iterator[Path]:
    return itertools.islice((images / name for name in sorted(os.listdir(images))), count)


def enlarge(image: UInt8, longest: int) -> UInt8:
    height, width = image.shape[:2]
    scale = longest / max(height, width)
    return np.asarray(Image.fromarray(image).resize((round(width * scale), round(height * scale))))


if __name__ == "__main__":
    main()
