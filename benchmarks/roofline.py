"""How far is each part of a training step from what this machine could do at best?

    python -m benchmarks.roofline [--network resnet18] [--size 96] [--batch 32] [--bank 4096]
                                  [--precision bf16] [--threads 2] [--device cpu] [--rounds 10]

One rank, the parts of `trainer.train`'s step on batches of generated scenes, one after another as
in training; medians over rounds with their spread. The floor of a part is the larger of

- bytes that it has to move at least, over the rate of a copy of as many bytes (read and written)
- operations of its matrix products and convolutions, over the rate of the fastest matrix product of
  that type: of the largest product's own shape in each part, or a square one

all measured in the same run, on the same threads. The operations are those of the code that runs,
counted where it calls the library (torch.utils.flop_counter's formulas, 2 a multiply-add), so that
whatever skips work has a lower floor. Bytes are a formula of the tensors' sizes, beside each part:
every operand and result once, as if all that lies between two products were fused into them. What
neither counts (exponentials, decoding JPEG, launches, small tensors) is in the time only, and a
pass that only reads may go faster than a copy.

On a GPU the times are those of events in the stream, but for fetching and decoding, which are
timed here until the GPU is done.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.floors import Machine, Products, Stopwatch, Work, floor, measure_rates, name_of
from benchmarks.scaling import NETWORKS, spread
from data_pipeline.batch import Batch
from data_pipeline.build_config import BuildConfig, BuildOptions
from data_pipeline.fetch import FetchedSample, Fetcher
from data_pipeline.index import DatasetIndex
from data_pipeline.loader import make_loader
from data_pipeline.order import SampleOrder
from data_pipeline.reader import SampleReader
from data_pipeline.sources.generated import list_scenes
from data_pipeline.write_shards import build_shards
from trainer.config import load_config
from trainer.distributed import Ranks
from trainer.environment import describe_environment
from trainer.model import PixelOutput
from trainer.objective import contrast_views
from trainer.preflight import plan_run
from trainer.skips import StatisticsKeeper
from trainer.state import TrainState

_SECONDS = 0.2  # of measuring a rate


class Step:
    """Takes a training step part by part.

    Args:
        state: of the training.
        folder: of the shards.
    """

    def __init__(self, state: TrainState, loader: str) -> None:
        self.state, self.number = state, 0
        config, manifest = state.config, state.plan.manifest
        index, threads = DatasetIndex(manifest), config.data.threads
        order = SampleOrder(index.counts, config.run.seed, config.data.window)
        self.fetcher = Fetcher(SampleReader(index), order, config.views, threads)
        size = config.data.batch_size
        place = (size, config.views.image_size, threads, state.ranks.device)
        self.loader = make_loader(loader, *place)
        self.keeper = StatisticsKeeper((state.engine.network, state.engine.momentum_encoder))
        adamw = config.optim.name == "adamw"
        self.parts = {
            "momentum update": Work("weights read, averages read and written, float32"),
            "choosing pixels": Work("masks read"),
            "query forward": Work("each product's operands and result"),
            "key forward": Work("each product's operands and result"),
            "loss, both ways": Work(
                "masks, coarse outputs, gradients of the query's; products' operands and results"
            ),
            "backward": Work("each product's operands and result"),
            "gradient norm": Work("gradients read, float32"),
            "optimizer step": Work(
                "weights and both averages read and written, gradients read, float32"
                if adamw
                else "weights and momentum read and written, gradients read, float32"
            ),
            "statistics keeper": Work("batch norm's buffers of both networks, read and written"),
            "order and fetch": Work("encoded files read, masks written"),
            "decode and augment": Work("encoded images and masks read, two views written"),
        }
        self._set_bytes(adamw)

    def _set_bytes(self, adamw: bool) -> None:
        """Those that are known before the step; products add theirs."""
        network, momentum_encoder = self.state.engine.network, self.state.engine.momentum_encoder
        weights = sum(one.nbytes for one in network.parameters())
        trained = sum(one.nbytes for one in network.parameters() if one.requires_grad)
        buffers = sum(b.nbytes for n in (network, momentum_encoder) for b in n.buffers())
        known = {
            "momentum update": 3 * weights,
            "gradient norm": trained,
            "optimizer step": (7 if adamw else 5) * trained,
            "statistics keeper": 2 * buffers,
        }
        for name, size in known.items():
            self.parts[name].bytes = size

    def take(self, run: Callable[[str, Callable[[], Any], bool], Any]) -> None:
        """One step; `run` is given each part's name, the call, and whether it is the host's."""
        state, engine, config = self.state, self.state.engine, self.state.config
        positions = np.arange(config.data.batch_size) + self.number * config.data.batch_size
        samples = run("order and fetch", lambda: self.fetcher.fetch(positions), True)
        batch: Batch = run("decode and augment", lambda: self.loader.load(samples), True)
        self._batch, self._samples = batch, samples
        m = config.model.momentum
        run("momentum update", lambda: engine.update_momentum(m), False)
        at = state.begin(self.number, 0)
        chosen = run("choosing pixels", lambda: state.choose_pixels(batch, at), False)
        state.bank.prefetch(chosen.pixels_of_ranks)
        query = run("query forward", lambda: engine.forward(batch.query_image), False)
        key = run("key forward", lambda: state.embed_keys(batch, at), False)
        # cut off, so that the loss's part of the backward pass ends here
        cut = PixelOutput(*(one.detach().requires_grad_() for one in query))
        self._outputs = cut, key

        def loss() -> None:
            rest = (chosen, state.bank, state.ranks, config.loss)
            engine.backward(contrast_views(cut, key, batch, *rest).total)

        run("loss, both ways", loss, False)
        gradients = [one.grad for one in cut]
        run("backward", lambda: torch.autograd.backward(tuple(query), gradients), False)
        run("gradient norm", engine.gradient_is_finite, False)
        run("optimizer step", lambda: engine.step(state.lr(self.number)), False)
        run("statistics keeper", self.keeper.keep, False)
        self.number += 1

    def count(self) -> None:
        """Takes a step and fills in bytes and operations."""

        def run(name: str, call: Callable[[], Any], host: bool) -> Any:
            if host:
                return call()
            with Products(self.parts[name]):
                return call()

        self.take(run)
        batch, (cut, key) = self._batch, self._outputs
        masks = (batch.query_mask, batch.key_mask)
        add = {
            "choosing pixels": _bytes(masks),
            "loss, both ways": _bytes((*masks, *cut, *cut, *key)),
            "order and fetch": self._file_bytes(self._samples)
            + sum(sample.mask.nbytes for sample in self._samples),
            "decode and augment": sum(s.image.nbytes + s.mask.nbytes for s in self._samples)
            + _bytes((batch.query_image, batch.key_image, *masks)),
        }
        for name, size in add.items():
            self.parts[name].bytes += size

    def _file_bytes(self, samples: Sequence[FetchedSample]) -> int:
        """Of images and masks as they are stored."""
        reader, starts = self.fetcher.reader, self.fetcher.reader.index.starts
        total = 0
        for sample in samples:
            shard = int(np.searchsorted(starts, sample.sample_id, side="right")) - 1
            raw = reader.read(shard, sample.sample_id - int(starts[shard]))
            total += len(raw.image) + len(raw.mask or b"")
        return total

    def close(self) -> None:
        self.fetcher.close()
        self.loader.close()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def make_step(options: argparse.Namespace, folder: Path) -> Step:
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    scenes = list_scenes(max(2 * options.batch, 64), 1, 2 * options.size)
    build_shards(scenes, folder / "shards", BuildConfig(32, "ids"), BuildOptions())
    settings = [
        *(f"data.shards={folder / 'shards'}", f"run.directory={folder / 'run'}"),
        *(f"data.batch_size={options.batch}", f"data.threads={options.threads}"),
        *("run.steps=1000000", "optim.lr=0.001", f"run.device={options.device}"),
        *(f"views.image_size={options.size}", f"run.precision={options.precision}"),
        *(f"bank.capacity={options.bank}", *_network(options.network), *options.settings),
    ]
    config = load_config("demo_cpu", None, settings)
    state = TrainState(config, plan_run(config, 1), None, Ranks(0, 1, device))
    count, width = config.bank.capacity, config.model.embedding_dim
    keys = F.normalize(torch.randn(count, width, device=device), dim=1)
    state.bank.enqueue(keys, torch.full((count,), 1 << 40, device=device))
    return Step(state, options.loader)


def _network(name: str) -> tuple[str, ...]:
    rest = ("model.decoder_channels=256", "model.embedding_dim=32", "model.atrous_rates=[12,24,36]")
    return NETWORKS.get(name, (f"model.backbone={name}", *rest))


def measure(step: Step, rounds: int) -> dict[str, Work]:
    """Seconds of every part and of the whole step, after two steps that do not count."""
    stopwatch = Stopwatch(step.state.ranks.device)
    for number in range(rounds + 2):
        step.take(stopwatch.run)
        for name, seconds in stopwatch.read().items():
            if number >= 2:
                step.parts[name].seconds.append(seconds)
    step.count()
    return step.parts


def rows_of(parts: dict[str, Work], machine: Machine) -> list[dict[str, Any]]:
    measure_rates(parts.values(), machine)
    for work in parts.values():  # all products, before the first floor
        for dtype in work.flops:
            machine.product_rate(dtype)
    rows = []
    for name, work in parts.items():
        seconds, bound = floor(work, machine)
        rows.append(
            {
                "part": name,
                "ms": [1000 * value for value in work.seconds],
                "gflop": sum(work.flops.values()) / 1e9,
                "mb": work.bytes / 1e6,
                "floor_ms": 1000 * seconds,
                "bound": bound,
                "share": seconds / statistics.median(work.seconds),
                "formula": work.formula,
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]], machine: Machine) -> None:
    print("| part | ms, median (spread) | GFLOP | MB | floor, ms | set by | achieved | bytes are |")
    print("|" + "---|" * 8)
    for row in rows:
        print(
            f"| {row['part']} | {spread(row['ms'], 2)} | {row['gflop']:.2f} | {row['mb']:.2f} "
            f"| {row['floor_ms']:.3f} | {row['bound']} | {row['share']:.0%} | {row['formula']} |"
        )
    steps = [sum(times) for times in zip(*(row["ms"] for row in rows), strict=True)]
    total = sum(row["floor_ms"] for row in rows)
    share = total / statistics.median(steps)
    print(f"| all, one after another | {spread(steps, 1)} | | | {total:.2f} | | {share:.0%} | |")
    print(f"\nCopies, read and written: {machine.copies()}.")
    for (dtype, (m, k, n)), rate in machine.products.items():
        print(f"- {name_of(dtype)} product {m:,} × {k:,} × {n:,}: {rate / 1e9:,.0f} GFLOP/s")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--network", default="resnet18", help="any model.backbone")
    parser.add_argument("--size", type=int, default=96, help="side of the views, pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bank", type=int, default=4096, help="entries")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="bf16")
    parser.add_argument("--threads", type=int, default=cores, help="of torch and of the loader")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--loader", choices=["auto", "dali", "torch"], default="auto")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rate-seconds", type=float, default=_SECONDS, help="for each rate")
    parser.add_argument("--output", type=Path, help="JSON lines, appended")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the training")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch sees no GPU")
        return
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        step = make_step(options, Path(name))
        try:
            parts = measure(step, options.rounds)
        finally:
            step.close()
        environment = describe_environment(step.state.ranks)
        machine = Machine(step.state.ranks.device, options.rate_seconds)
        rows = rows_of(parts, machine)
    print(
        f"{environment['date']}, {environment['cpu']}, {options.threads} of {environment['cores']} "
        f"cores, {environment['device']}, torch {environment['torch']}, DALI "
        f"{environment['dali']}; load {os.getloadavg()[0]:.1f}\n\n"
        f"    {subprocess.list2cmdline(sys.orig_argv[1:])}\n"
    )
    show(rows, machine)
    if options.output:
        about = {**environment, **{k: v for k, v in vars(options).items() if k != "output"}}
        with options.output.open("a") as file:
            for row in rows:
                file.write(json.dumps({**about, **row}) + "\n")


if __name__ == "__main__":
    main()
