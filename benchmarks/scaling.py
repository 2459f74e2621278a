"""How does a training step scale over ranks on one machine, and what is in the way?

    python -m benchmarks.scaling [--ranks 1,2,4,8] [--network resnet18] [--size 96] [--rounds 5]
                                 [--precision bf16] [--plot FILE.png] [--output FILE]

Weak scaling gives each rank --images a step, strong scaling shares --global-images over all ranks.
The step is that of `trainer.train`, with all its collectives, in four kinds, one after another in
turn: as in training; without the bank; without data loading (the same batch every time); without
both. The processes of all numbers of ranks are there from the start and take steps when they are
told to, the others waiting, so that what the machine does meanwhile meets all alike.

Ranks share this machine's cores, each has its share of threads, so that more ranks have nothing
more to compute with: ideal is the same number of images a second in all, an efficiency of 1. What
is lost is what ranks cost: collectives, smaller batches, and what each of them does for itself.
gloo over the loopback. Figures are medians over rounds with their spread; efficiency is taken
within rounds.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from data_pipeline.build_config import BuildConfig, BuildOptions
from data_pipeline.sources.generated import list_scenes
from data_pipeline.write_shards import build_shards
from trainer.config import load_config
from trainer.distributed import Ranks, barrier, cores_per_rank, end_ranks, start_ranks
from trainer.environment import describe_environment
from trainer.memory_bank import BankConfig, ShardedMemoryBank
from trainer.objective import contrast_views
from trainer.preflight import plan_run
from trainer.state import TrainState

KINDS = {  # with the bank, with data loading
    "as in training": (True, True),
    "without bank": (False, True),
    "without data loading": (True, False),
    "without both": (False, False),
}
MODES = ("weak", "strong")
PREFETCH = 2
WARM = PREFETCH + 1  # steps that use up what was loaded while others took theirs
NETWORKS = {
    "small": ("model.backbone=small", "model.decoder_channels=64", "model.embedding_dim=16"),
    "resnet18": (
        *("model.backbone=resnet18", "model.decoder_channels=256", "model.embedding_dim=32"),
        *("model.atrous_rates=[12,24,36]", "model.dropout=0.5"),
    ),
}
Figures = dict[str, float]
Rounds = dict[tuple[int, str], list[Figures]]  # by ranks and kind, one a round


@dataclass(frozen=True)
class Group:
    """So many ranks that take steps together.

    Attributes:
        world_size: ranks.
        batch_size: images a step, over all of them.
        settings: of the training.
    """

    world_size: int
    batch_size: int
    settings: tuple[str, ...]


# --- on every rank ---


class Worker:
    """One rank of a group, with everything that training has."""

    def __init__(self, group: Group) -> None:
        self.ranks = start_ranks("cpu", 1800)
        self.config = load_config("demo_cpu", None, list(group.settings))
        torch.set_num_threads(self.config.run.threads or cores_per_rank())
        plan = plan_run(self.config, group.world_size)
        self.state = TrainState(self.config, plan, None, self.ranks)
        width = self.config.model.embedding_dim
        empty = ShardedMemoryBank(BankConfig(0), width, self.ranks)
        self.banks = {True: self.state.bank, False: empty}
        draw = torch.Generator().manual_seed(0)  # the same on every rank
        keys = F.normalize(torch.randn(self.config.bank.capacity, width, generator=draw), dim=1)
        self.state.bank.enqueue(keys, torch.full((len(keys),), 1 << 40))
        self.stream = self.state.stream()
        self.batch = next(self.stream)
        self.step = 0

    def run(self, kind: str, steps: int) -> Figures:
        """Takes steps of a kind; the first ones, `WARM`, do not count.

        Returns seconds of a step, on all ranks together; milliseconds a step that this rank waited
        for the bank's exchange and for data; and MB that it held at the most.
        """
        with_bank, with_data = KINDS[kind]
        bank, stream = self.banks[with_bank], self.stream
        for _ in range(WARM):
            self._take_step(bank, with_data)
        barrier(self.ranks)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start, waited, loading = time.perf_counter(), bank.wait_seconds, stream.wait_seconds
        for _ in range(steps):
            self._take_step(bank, with_data)
        barrier(self.ranks)
        seconds = (time.perf_counter() - start) / steps
        figures = {
            "seconds": seconds,
            "exchange_ms": 1000 * (bank.wait_seconds - waited) / steps,
            "data_ms": 1000 * (stream.wait_seconds - loading) / steps,
            "peak_mb": _peak_mb(),
        }
        self._rest()
        return figures

    def close(self) -> None:
        self.stream.close()
        barrier(self.ranks)
        end_ranks()

    def _take_step(self, bank: ShardedMemoryBank, with_data: bool) -> None:
        """The body of `trainer.train`'s loop."""
        state, engine, config = self.state, self.state.engine, self.config
        engine.update_momentum(config.model.momentum)
        batch = next(self.stream) if with_data else self.batch
        at = state.begin(self.step, 0)
        chosen = state.choose_pixels(batch, at)
        moved_pixels = bank.prefetch(chosen.pixels_of_ranks)
        with engine.accumulating(more_follow=False):
            query = engine.forward(batch.query_image)
            key = state.embed_keys(batch, at)
            losses = contrast_views(query, key, batch, chosen, bank, self.ranks, config.loss)
            engine.backward(losses.total)
        state.add(losses, moved_pixels)
        state.finish_step(self.step, False)
        self.step += 1

    def _rest(self) -> None:
        """Until the next batches are ready, so that they are not loaded while others are timed."""
        deadline = time.monotonic() + 10
        spent = 1.0
        while spent > 0.005 and time.monotonic() < deadline:
            before = time.process_time()
            time.sleep(0.1)
            spent = time.process_time() - before


def _peak_mb() -> float:
    """Most memory held since the peak was begun anew."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if "VmHWM" in line).split()[1]) * 1024 / 1e6


def work(group: Group, rank: int, port: int, commands: Connection) -> None:
    """Obeys until it is told None."""
    world = {"WORLD_SIZE": group.world_size, "LOCAL_WORLD_SIZE": group.world_size}
    place = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (world | place).items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"})
    worker = Worker(group)
    commands.send("ready")
    while (command := commands.recv()) is not None:
        commands.send(worker.run(*command))
    worker.close()


# --- the process that tells them ---


class Started:
    """The processes of a group."""

    def __init__(self, group: Group) -> None:
        self.group = group
        context = multiprocessing.get_context("forkserver")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._connections, self._processes = [], []
        for rank in range(group.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(group, rank, port, theirs), daemon=True)
            process.start()
            theirs.close()  # so that its end is seen here
            self._connections.append(ours)
            self._processes.append(process)
        self._answers()

    def run(self, kind: str, steps: int) -> Figures:
        """Steps on all ranks; the longest time, mean waits, and the most memory."""
        for connection in self._connections:
            connection.send((kind, steps))
        found = self._answers()
        return {
            "seconds": max(one["seconds"] for one in found),
            "exchange_ms": statistics.mean(one["exchange_ms"] for one in found),
            "data_ms": statistics.mean(one["data_ms"] for one in found),
            "peak_mb": max(one["peak_mb"] for one in found),
        }

    def close(self) -> None:
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            process.join(60)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _answers(self) -> list[Any]:
        try:
            return [connection.recv() for connection in self._connections]
        except EOFError:
            statuses = [process.exitcode for process in self._processes]
            raise RuntimeError(
                f"a rank of {self.group.world_size} has ended, its words are above; {statuses}"
            ) from None


def measure(groups: Sequence[Group], rounds: int, steps: int) -> Rounds:
    """Every kind of step in every group, in turn, each round beginning with another one."""
    started: list[Started] = []
    found: Rounds = {}
    try:
        started.extend(Started(group) for group in groups)
        turns = [(group, kind) for group in started for kind in KINDS]
        for number in range(rounds + 1):
            first = number * 5 % len(turns)
            for one, kind in turns[first:] + turns[:first]:
                figures = one.run(kind, steps)
                if not number:  # memory is found, connections are made
                    continue
                figures["images_per_second"] = one.group.batch_size / figures["seconds"]
                found.setdefault((one.group.world_size, kind), []).append(figures)
        for one in started:
            one.close()
    finally:
        for one in started:
            one.kill()
    return found


def efficiencies(found: Rounds, ranks: int, kind: str) -> list[float]:
    """Images a second in all against those of the fewest ranks, in the same round."""
    fewest = min(world for world, _ in found)
    pairs = zip(found[ranks, kind], found[fewest, kind], strict=True)
    return [one["images_per_second"] / other["images_per_second"] for one, other in pairs]


def costs(found: Rounds, ranks: int, kind: str) -> list[float]:
    """Time of a step as in training over that of this kind, on as many ranks, in each round."""
    pairs = zip(found[ranks, "as in training"], found[ranks, kind], strict=True)
    return [one["seconds"] / other["seconds"] for one, other in pairs]


def spread(values: Sequence[float], digits: int) -> str:
    return (
        f"{statistics.median(values):,.{digits}f} "
        f"({min(values):,.{digits}f}–{max(values):,.{digits}f})"
    )


def show(found: Rounds, batches: dict[int, int]) -> None:
    heads = ["ranks", "images a step", "step", "images/s in all", "efficiency"]
    heads += ["step as in training takes", "exchange not hidden, ms", "data waited for, ms"]
    print(f"| {' | '.join(heads)} | peak MB a rank |\n|{'---|' * (len(heads) + 1)}")
    for (ranks, kind), rows in sorted(found.items(), key=lambda item: item[0][0]):
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        cells = [str(ranks), str(batches[ranks]), kind, spread(columns["images_per_second"], 1)]
        cells += [spread(efficiencies(found, ranks, kind), 2)]
        cells += [f"× {spread(costs(found, ranks, kind), 2)}"]
        cells += [f"{statistics.median(columns[name]):.2f}" for name in ("exchange_ms", "data_ms")]
        print(f"| {' | '.join(cells)} | {max(columns['peak_mb']):,.0f} |")


def draw(found: dict[str, Rounds], file: Path) -> None:
    """Efficiency against the number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, _ = pyplot.subplots(1, len(found), figsize=(5 * len(found), 3.6), sharey=True)
    for axis, (mode, rounds) in zip(figure.axes, found.items(), strict=True):
        worlds = sorted({world for world, _ in rounds})
        for kind in KINDS:
            all_values = [efficiencies(rounds, world, kind) for world in worlds]
            middle = [statistics.median(values) for values in all_values]
            below = [a - min(values) for a, values in zip(middle, all_values, strict=True)]
            above = [max(values) - a for a, values in zip(middle, all_values, strict=True)]
            axis.errorbar(worlds, middle, (below, above), marker="o", capsize=3, label=kind)
        axis.axhline(1, color="grey", linestyle=":", linewidth=1)
        axis.set(title=f"{mode} scaling, shared cores", xlabel="ranks", xscale="log")
        axis.set_xticks(worlds, [str(world) for world in worlds])
        axis.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("images/s in all, of one rank's")
    figure.axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def make_groups(options: argparse.Namespace, mode: str, folder: Path) -> list[Group]:
    groups = []
    for ranks in options.ranks:
        size = options.images * ranks if mode == "weak" else options.global_images
        settings = [
            *(f"data.shards={folder / 'shards'}", f"run.directory={folder / f'{mode}-{ranks}'}"),
            *(f"data.batch_size={size}", f"data.loader={options.loader}", "run.steps=1000000"),
            *(f"data.prefetch={PREFETCH}", f"views.image_size={options.size}", "optim.lr=0.001"),
            *(f"bank.capacity={options.bank}", f"run.precision={options.precision}"),
            *(f"loss.pixels_per_mask={options.pixels_per_mask}", *NETWORKS[options.network]),
        ]
        groups.append(Group(ranks, size, (*settings, *options.settings)))
    return groups


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda text: [int(word) for word in text.split(",")]  # noqa: E731
    parser.add_argument("--ranks", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--modes", default=",".join(MODES), help="weak, strong or both")
    parser.add_argument("--network", choices=sorted(NETWORKS), default="resnet18")
    parser.add_argument("--size", type=int, default=96, help="side of the views, pixels")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="bf16")
    parser.add_argument("--images", type=int, default=8, help="a rank and step, weak")
    parser.add_argument("--global-images", type=int, default=32, help="a step in all, strong")
    parser.add_argument("--bank", type=int, default=4096, help="entries")
    parser.add_argument("--pixels-per-mask", type=int, default=0, help="0: all")
    parser.add_argument("--loader", choices=["auto", "dali", "torch"], default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of a kind and round")
    parser.add_argument("--plot", type=Path, help="picture; needs the extra `plots`")
    parser.add_argument("--output", type=Path, help="JSON lines, appended")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the training")
    return parser.parse_args()


def main() -> None:
    options = parse()
    # imported once, in the process that all ranks are forked from
    multiprocessing.set_forkserver_preload(["trainer.state", "data_pipeline.write_shards"])
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install -e '.[plots]'")
    environment = describe_environment(Ranks(0, 1, torch.device("cpu")))
    print(
        f"{environment['date']}, {environment['cpu']}, {environment['cores']} cores shared by all "
        f"ranks, torch {environment['torch']}, gloo; load when this began {os.getloadavg()[0]:.1f}"
        f"\n\n    {subprocess.list2cmdline(sys.orig_argv[1:])}"
    )
    found: dict[str, Rounds] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenes = list_scenes(400, 1, 2 * options.size)
        build_shards(scenes, folder / "shards", BuildConfig(100, "ids"), BuildOptions())
        for mode in options.modes.split(","):
            groups = make_groups(options, mode, folder)
            found[mode] = measure(groups, options.rounds, options.steps)
            print(f"\n## {mode.capitalize()} scaling\n", flush=True)
            show(found[mode], {group.world_size: group.batch_size for group in groups})
            if options.output:
                with options.output.open("a") as file:
                    for (ranks, kind), rows in found[mode].items():
                        about = {**environment, "mode": mode, "ranks": ranks, "kind": kind}
                        about |= {"network": options.network, "size": options.size}
                        file.write(json.dumps({**about, "rounds": rows}) + "\n")
    if options.plot:
        draw(found, options.plot)


if __name__ == "__main__":
    main()
