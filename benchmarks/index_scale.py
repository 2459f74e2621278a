"""How soon is the first batch of a billion samples there, and what does it take?

    python -m benchmarks.index_scale [--shards 10000] [--samples 100000] [--batch 64] [--ranks 512]

One shard of 100,000 samples of 16 pixels is written, a few distinct images under different keys,
and its files get 10,000 names by hard links; the manifest lists them all. Each row is a fresh
process that does what a rank does before training: it reads the manifest, looks for missing shards
and takes the first batch; then it goes on to find the samples of further batches. The bytes of all
shards are in the page cache, as they are one file's: what is measured is work, not a disk. The same
is done on a folder without `.records`, where whole indexes are read. Memory is the process's peak,
and how far it is above what was there after all imports.
"""

import argparse
import importlib
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.index import DatasetIndex
from data_pipeline.loader import BatchStream
from data_pipeline.manifest import Manifest, missing_shards, read_manifest
from data_pipeline.order import SampleOrder, batch_positions
from data_pipeline.records import SUFFIX as RECORDS
from data_pipeline.sample import Policy, pack_sample
from data_pipeline.shard_file import ShardWriter, shard_entry, shard_stem, write_shard
from data_pipeline.sources.generated import SceneItem, list_scenes
from data_pipeline.store import LocalStore
from data_pipeline.views import ViewConfig
from trainer.distributed import Ranks
from trainer.environment import describe_environment

SIDE, DISTINCT, WINDOW, SEED = 16, 64, 8, 7
Row = dict[str, Any]
COLUMNS = (
    "rank",
    "index",
    "loader",
    "imports, s",
    "manifest, s",
    "missing shards, s",
    "first batch, s",
    "from the manifest to it, s",
    "peak, MB",
    "above imports, MB",
    "order and index of it, ms",
    "of later ones, ms (median)",
)


# ---------------------------------------------------------------- the data set


def build_one(folder: Path, samples: int) -> Manifest:
    """One shard, written as every build writes it."""
    packed = []
    for item in list_scenes(DISTINCT, SEED, SIDE).entries:
        assert isinstance(item, SceneItem)
        raw = replace(item.read(), label=None)
        packed.append(pack_sample(item.key, item.source, raw, Policy("ids"), None))

    def fill(writer: ShardWriter) -> list[Any]:
        for number in range(samples):
            one = packed[number % DISTINCT]
            described = {
                "key": f"part_{number // 1000:03d}/sample_{number:09d}",
                "source": f"images/part_{number // 1000:03d}/sample_{number:09d}.jpg",
                "height": one.height,
                "width": one.width,
                "proposals": one.proposals,
                "source_bytes": [len(each) for each in one.components.values()],
            }
            writer.copy(described, one.components)
        return []

    marker = write_shard(LocalStore(folder), 0, "", fill)
    entry = shard_entry(0, marker, (folder / f"{shard_stem(0)}.json").read_bytes())
    assert entry is not None
    return Manifest(folder, (entry,), (), 0, {"source": "benchmarks.index_scale"})


def multiply(one: Manifest, folder: Path, shards: int, suffixes: tuple[str, ...]) -> None:
    """The files of a shard under many names, and a manifest that lists them all."""
    folder.mkdir()
    (entry,) = one.shards
    entries = []
    for number in range(shards):
        stem = shard_stem(number)
        for suffix in suffixes:
            os.link(one.root / (entry.stem + suffix), folder / (stem + suffix))
        entries.append(replace(entry, name=f"{stem}.tar", index=f"{stem}.json"))
    replace(one, root=folder, shards=tuple(entries)).write()


# ---------------------------------------------------------------- one process


def memory(kind: str) -> float:
    """`VmRSS` or its peak `VmHWM` of this process, MB. (`getrusage` begins with the parent's.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 1e3
    raise RuntimeError("/proc/self/status is not that of Linux")


def measure_first_batch(options: Row) -> Row:
    """What a rank does until its first batch is there, and what finding later ones takes."""
    logging.disable(logging.WARNING)  # of folders without records
    importlib.import_module(f"data_pipeline.{options['loader']}_loader")
    imported, before = time.monotonic(), memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    manifest = read_manifest(options["folder"], check_files=False)
    read = time.monotonic()
    assert missing_shards(manifest) is None
    looked = time.monotonic()
    whole = options["batch"] * options["ranks"]
    start = int(options["epochs"] * manifest.samples / whole)
    part = {"rank": options["ranks"] // 3, "world_size": options["ranks"]}
    stream = BatchStream(
        manifest,
        ViewConfig(image_size=SIDE),
        **part,
        loader=options["loader"],
        batch_size=whole,
        seed=SEED,
        window=WINDOW,
        start=start,
        threads=2,
        prefetch=1,
        device=torch.device("cpu"),
    )
    batch = next(stream)
    there = time.monotonic()
    assert len(batch.query_image) == options["batch"]
    stream.close()
    del stream, batch
    following = find_batches(manifest, start, whole, part, options["following"])
    peak = memory("VmHWM")
    return {
        "imports": imported - options["began"],
        "manifest": read - imported,
        "missing": looked - read,
        "batch": there - looked,
        "all": there - imported,
        "from_start": there - options["began"],
        "peak": peak,
        "above": peak - before,
        "cold": following[0],
        "later": statistics.median(following[1:]),
    }


def find_batches(
    manifest: Manifest, start: int, whole: int, part: dict[str, int], count: int
) -> list[float]:
    """Seconds of order and index, without a byte of a sample: a batch without caches, and more."""
    began = time.perf_counter()
    index = DatasetIndex(manifest)
    order = SampleOrder(index.counts, SEED, WINDOW)
    seconds = []
    for step in range(start, start + count + 1):
        places = zip(*order.locate(batch_positions(step, whole, **part)), strict=True)
        for shard, sample in places:
            index.record(int(shard), int(sample))
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    return seconds


def measure_order(options: Row) -> Row:
    """The order alone, of so many shards of so many samples."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    total = options["shards"] * options["samples"]
    moments = [time.perf_counter()]
    order = SampleOrder([options["samples"]] * options["shards"], SEED, WINDOW)
    moments.append(time.perf_counter())
    for position in (0, options["batch"], int(3.5 * total), int(3.5 * total) + options["batch"]):
        order.locate(position + np.arange(options["batch"]))
        moments.append(time.perf_counter())
    for window in range(8):  # until its cache is full
        order.locate(np.array([window * WINDOW * options["samples"] % total]))
    made, first, warm, other, other_warm = np.diff(moments).tolist()
    return {
        "made": made,
        "first": first,
        "warm": max(warm, other_warm),
        "other": other,
        "above": memory("VmHWM") - before,
    }


def in_a_process(what: str, options: Row) -> Row:
    command = [sys.executable, "-m", "benchmarks.index_scale", "--child", what]
    options = {**options, "began": time.monotonic()}  # one clock for all processes
    done = subprocess.run(
        [*command, json.dumps(options)], stdout=subprocess.PIPE, text=True, check=True
    )
    row: Row = json.loads(done.stdout)
    return row


# ---------------------------------------------------------------- all of it


def show(title: str, index: str, loader: str, row: Row) -> None:
    seconds = (row[name] for name in ("imports", "manifest", "missing", "batch", "all"))
    cells = [title, index, loader, *(f"{value:.2f}" for value in seconds)]
    cells += [f"{row['peak']:,.0f}", f"{row['above']:,.0f}"]
    cells += [f"{1000 * row['cold']:,.0f}", f"{1000 * row['later']:,.1f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def measure(options: argparse.Namespace, folder: Path) -> None:
    began = time.perf_counter()
    (folder / "one").mkdir()
    one = build_one(folder / "one", options.samples)
    built = time.perf_counter() - began
    multiply(one, folder / "records", options.shards, (".tar", ".idx", ".json", RECORDS))
    multiply(one, folder / "whole", options.shards, (".tar", ".idx", ".json"))
    (entry,) = one.shards
    sizes = [(one.root / name).stat().st_size / 1e6 for name in (entry.index, entry.records)]
    print(
        f"{options.shards:,} shards of {options.samples:,} samples, mixed {WINDOW} shards at a "
        f"time; of a shard, .json {sizes[0]:.1f} MB, .records {sizes[1]:.1f} MB. Writing it took "
        f"{built:.0f} s.\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    )
    loaders = ["dali", "torch"] if importlib.util.find_spec("nvidia.dali") else ["torch"]
    cases = [
        ("alone, from the start", {"epochs": 0.0, "ranks": 1}),
        ("alone, in the middle of epoch 3", {"epochs": 3.4567, "ranks": 1}),
        (f"1 of {options.ranks}, from the start", {"epochs": 0.0, "ranks": options.ranks}),
    ]
    for where, index in (("records", ".records"), ("whole", ".json")):
        for title, case in cases:
            for loader in loaders if case is cases[0][1] else loaders[:1]:
                given = {"batch": options.batch, "following": options.following, "loader": loader}
                row = in_a_process("batch", {**given, **case, "folder": str(folder / where)})
                show(title, index, loader, row)
    given = {"shards": options.shards, "samples": options.samples, "batch": options.batch}
    row = in_a_process("order", given)
    first, other, warm = (1000 * row[name] for name in ("first", "other", "warm"))
    print(
        f"\nThe order alone is made in {1000 * row['made']:.1f} ms. It finds a batch in "
        f"{first:.0f} ms in a window that it does not know yet, in {other:.0f} ms in another "
        f"epoch, in {warm:.2f} ms in a window that it knows, and takes {row['above']:.0f} MB with "
        "all windows that it keeps."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=100_000, help="of a shard")
    parser.add_argument("--batch", type=int, default=64, help="of one rank")
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--following", type=int, default=100, help="batches after the first")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, given = options.child
        measured = {"batch": measure_first_batch, "order": measure_order}[what](json.loads(given))
        print(json.dumps(measured))
        return
    environment = describe_environment(Ranks(0, 1, torch.device("cpu")))
    names = ("date", "cpu", "python", "torch", "dali", "numpy")
    print(", ".join(f"{name} {environment[name]}" for name in names), end="")
    print(f", {environment['cores']} cores")
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    main()
