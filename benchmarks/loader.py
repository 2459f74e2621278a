"""How fast is each loader? CPU milliseconds an image, two views, interleaved rounds.

    python -m benchmarks.loader [--shards FOLDER] [--size 224] [--batch 64] [--rounds 5]

Without shards, generated scenes of 320 pixels are used.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from data_pipeline.build_config import BuildConfig
from data_pipeline.fetch import Fetcher
from data_pipeline.index import DatasetIndex
from data_pipeline.loader import make_loader
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.order import SampleOrder
from data_pipeline.reader import SampleReader
from data_pipeline.sources.generated import list_scenes
from data_pipeline.views import ViewConfig
from data_pipeline.write_shards import build_shards
from trainer.distributed import Ranks
from trainer.environment import describe_environment


def measure(manifest: Manifest, size: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds an image of fetching, and of each loader's decoding, by round."""
    threads, cpu = 2, torch.device("cpu")
    index = DatasetIndex(manifest)
    order = SampleOrder(index.counts, 0, 8)
    fetcher = Fetcher(SampleReader(index), order, ViewConfig(image_size=size), threads)
    names = ["torch", *(["dali"] if importlib.util.find_spec("nvidia.dali") else [])]
    loaders = {name: make_loader(name, batch, size, threads, cpu) for name in names}
    found: dict[str, list[float]] = {"fetch": [], **{name: [] for name in names}}
    for number in range(rounds + 1):
        start = time.process_time()
        samples = fetcher.fetch(np.arange(number * batch, (number + 1) * batch))
        spent = {"fetch": time.process_time() - start}
        for name, loader in loaders.items():
            start = time.process_time()
            loader.load(samples)
            spent[name] = time.process_time() - start
        if number:  # the first round warms up
            for name, seconds in spent.items():
                found[name].append(1000 * seconds / batch)
    fetcher.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.shards:
            manifest = read_manifest(options.shards)
        else:
            config = BuildConfig(mask_mode="ids")
            manifest = build_shards(list_scenes(options.batch, 0, 320), Path(folder) / "s", config)
        found = measure(manifest, options.size, options.batch, options.rounds)
    environment = describe_environment(Ranks(0, 1, torch.device("cpu")))
    print(f"{environment['date']}, {environment['cpu']}, {environment['cores']} cores")
    print("| part | cpu-ms an image, median | spread |\n|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f}–{max(values):.2f} |")


if __name__ == "__main__":
    main()
