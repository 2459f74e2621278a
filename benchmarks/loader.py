"""What does an image cost until it is in a batch? Ours, DALI alone, and a DataLoader with PIL.

    python -m benchmarks.loader [--root FOLDER --shards FOLDER] [--size 224] [--rounds 5]

Two views of every image, two threads or workers each, from files in the page cache to a batch:
- maskbank: our order, checksums, crops that are drawn again, with the loader of CPUs and with DALI;
- DALI alone: its own reader on the same shards, its own random crops, none of them drawn again, its
  own colours, no checksum, no order that can be resumed;
- DataLoader: PIL and torchvision's transforms on files, crops drawn again.
Interleaved rounds. CPU time is that of all threads and workers. Without data scenes are generated.
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.comparison_data import MASKS, ComparisonData, find_data
from benchmarks.contender import cpu_seconds
from benchmarks.plain_method import TwoViews
from benchmarks.side_by_side import machine_line
from data_pipeline.loader import BatchStream
from data_pipeline.manifest import read_manifest
from data_pipeline.views import ViewConfig

_THREADS, _SHARE = 2, 0.25  # of a window, thrown away: what was made while the loader stood still


def maskbank(data: ComparisonData, loader: str, size: int, batch: int) -> Iterator[Any]:
    assert data.shards is not None
    return BatchStream(
        read_manifest(data.shards),
        ViewConfig(image_size=size),
        loader=loader,
        batch_size=batch,
        seed=0,
        window=8,
        rank=0,
        world_size=1,
        start=0,
        threads=_THREADS,
        prefetch=1,
        device=torch.device("cpu"),
    )


def data_loader(data: ComparisonData, size: int, batch: int) -> Iterator[Any]:
    assert data.root is not None
    loader = DataLoader(
        TwoViews(data.root, MASKS, size),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=_THREADS,
        prefetch_factor=1,
        persistent_workers=True,
    )
    while True:
        yield from loader


def dali_alone(data: ComparisonData, size: int, batch: int) -> Iterator[Any]:
    """The graph that one would write with DALI's own operators."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    assert data.shards is not None
    tars = sorted(str(path) for path in data.shards.glob("*.tar"))
    indexes = [str(Path(tar).with_suffix(".idx")) for tar in tars]

    @pipeline_def(batch_size=batch, num_threads=_THREADS, device_id=None, seed=0)
    def graph() -> tuple[Any, ...]:
        encoded, encoded_mask = fn.readers.webdataset(
            paths=tars,
            index_paths=indexes,
            ext=["jpg", "mask.png"],
            random_shuffle=True,
            name="reader",
        )
        image = fn.decoders.image(encoded, output_type=types.RGB)
        mask = fn.decoders.image(encoded_mask, output_type=types.GRAY)
        views, masks = [], []
        for _ in range(2):
            start, shape = fn.random_crop_generator(
                image.shape(), random_area=[0.2, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
            )
            window = {"start": start, "shape": shape, "axis_names": "HW"}
            side = {"resize_x": size, "resize_y": size}
            crop = fn.resize(fn.slice(image, **window), **side, interp_type=types.INTERP_LINEAR)
            cut = fn.resize(fn.slice(mask, **window), **side, interp_type=types.INTERP_NN)
            jitter = fn.random.coin_flip(probability=0.8)
            jitter = fn.cast(jitter, dtype=types.FLOAT)
            factor = {
                name: 1 + jitter * fn.random.uniform(range=[-0.4, 0.4])
                for name in ("brightness", "contrast")
            }
            grey = fn.cast(fn.random.coin_flip(probability=0.8), dtype=types.FLOAT)
            saturation = grey * (1 + jitter * fn.random.uniform(range=[-0.4, 0.4]))
            hue = jitter * fn.random.uniform(range=[-36.0, 36.0])
            coloured = fn.color_twist(crop, **factor, saturation=saturation, hue=hue)
            flip = fn.random.coin_flip(probability=0.5)
            views.append(
                fn.crop_mirror_normalize(
                    coloured,
                    mirror=flip,
                    mean=[123.675, 116.28, 103.53],
                    std=[58.395, 57.12, 57.375],
                    dtype=types.FLOAT,
                    output_layout="HWC",
                )
            )
            masks.append(fn.flip(cut, horizontal=flip))
        return (*views, *masks)

    names = ["query_image", "key_image", "query_mask", "key_mask"]
    return iter(DALIGenericIterator([graph()], names, reader_name="reader", auto_reset=True))


def endless(make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """An iterator that begins anew where it ends."""
    while True:
        yield from make()


def measure(
    loaders: dict[str, Iterator[Any]], batch: int, rounds: int, batches: int
) -> dict[str, list[tuple[float, float]]]:
    """Images a second and CPU milliseconds an image, by round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, loader in loaders.items():
            time.sleep(0.5)
            for _ in range(max(2, round(_SHARE * batches))):
                next(loader)
            begun, spent = time.perf_counter(), cpu_seconds(os.getpid())
            for _ in range(batches):
                next(loader)
            seconds = time.perf_counter() - begun
            spent = cpu_seconds(os.getpid()) - spent
            found[name].append((batches * batch / seconds, 1000 * spent / (batches * batch)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, help="data set in the released PASCAL layout")
    parser.add_argument("--shards", type=Path, help="the same data as shards")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=12, help="timed, of each loader a round")
    parser.add_argument("--work", type=Path, default=Path("runs/side_by_side"))
    options = parser.parse_args()
    data = find_data(options.root, options.shards, options.work)
    size, batch = options.size, options.batch
    torch.set_num_threads(_THREADS)
    loaders = {
        "DataLoader, PIL": data_loader(data, size, batch),
        "maskbank": maskbank(data, "torch", size, batch),
    }
    if importlib.util.find_spec("nvidia.dali"):
        loaders["maskbank with DALI"] = maskbank(data, "dali", size, batch)
        loaders["DALI alone"] = endless(lambda: dali_alone(data, size, batch))
    found = measure(loaders, batch, options.rounds, options.batches)
    print(f"{machine_line()}; {data.description}; {size} pixels, batch {batch}\n")
    print("| loader | cpu-ms an image | images per cpu-second, × DataLoader | images/s |")
    print("|---|---|---|---|")
    first = [spent for _, spent in found["DataLoader, PIL"]]
    for name, rows in found.items():
        speed, spent = [row[0] for row in rows], [row[1] for row in rows]
        ratios = [one / mine for one, mine in zip(first, spent, strict=True)]
        cells = [f"{_spread(spent, 2)}", f"{_spread(ratios, 2)}", f"{_spread(speed, 0)}"]
        print(f"| {name} | {' | '.join(cells)} |")
    for loader in loaders.values():
        with suppress(AttributeError):
            loader.close()  # type: ignore[attr-defined]


def _spread(values: list[float], digits: int) -> str:
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
