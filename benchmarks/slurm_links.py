"""What do slow links between nodes make of a training step with a memory bank? Under SLURM.

    python -m benchmarks.slurm_links [--links 0,1,0.1] [--rounds 8] [--output FILE]

A SLURM cluster of two nodes is made on this machine (root only), each node with a network of its
own that sends at most so many Gbit/s (0: no limit). For each link one job goes through sbatch and
srun, torchrun starts one rank a node, and the ranks take steps of every kind, one after another in
turn:

- none: no bank; the batch's own prototypes are all-gathered, as in every kind
- replicated: every rank holds all entries; what travels is the all-gather of the batch's prototypes
- hidden: the sharded bank, its exchange started before the encoders, as in training
- exposed: the sharded bank, its exchange waited for before the encoders start
- pixels: the sharded bank, to which the query pixels travel: bank.move=auto takes that here

first with both encoders and DDP's exchange of gradients, then without that exchange, then with a
sleep of a given length in place of both encoders, as on a node whose encoders run on a GPU; such a
step has no backward pass of an encoder either. The losses of the four kinds with a bank must agree.
The figures are printed, and appended as JSON to --output.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import nodes
from benchmarks.bank_scaling import DIM, full_bank, some_batch
from data_pipeline.batch import Batch
from launch.sbatch import Job, Resources, Surroundings, render
from tests.slurm_cluster.cluster import ENDED, Cluster
from tests.slurm_cluster.cluster import why_not as no_cluster
from trainer.config import TrainConfig, load_config
from trainer.distributed import (
    Ranks,
    all_gather_rows,
    all_reduce_sum,
    barrier,
    end_ranks,
    start_ranks,
)
from trainer.encoder import initial_network
from trainer.engine import DdpEngine
from trainer.environment import describe_environment
from trainer.memory_bank import BankConfig, ShardedMemoryBank
from trainer.model import PixelOutput
from trainer.momentum import make_momentum_encoder
from trainer.objective import LossConfig, choose_pixels, contrast_views

ROOT = Path(__file__).parent.parent
KINDS = ("none", "replicated", "hidden", "exposed", "pixels")
STRIDE = 8
Figures = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is measured on every link.

    Attributes:
        entries, dtype: of the bank over all ranks.
        images, size: of a rank, and their pixels a side.
        backbone, precision: of the encoders.
        pixels_per_mask: most query pixels of a mask; an image has one mask.
        rounds: steps of each kind that count; with a stand-in, twice as many.
        stand_ins: seconds, in place of the encoders.
    """

    entries: int = 65_536
    dtype: str = "float16"
    images: int = 16
    size: int = 96
    backbone: str = "resnet18"
    precision: str = "bf16"
    pixels_per_mask: int = 64
    rounds: int = 8
    stand_ins: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)

    def config(self) -> TrainConfig:
        network = [f"model.backbone={self.backbone}", f"model.embedding_dim={DIM}"]
        network += ["model.decoder_channels=256", "model.batch_norm=plain", "model.dropout=0"]
        data = [f"views.image_size={self.size}", f"loss.pixels_per_mask={self.pixels_per_mask}"]
        return load_config("demo_cpu", None, [*network, *data])


# --- on every rank ---


class RealEncoders:
    """The network, its momentum encoder, and the gradients' exchange unless that is left out."""

    def __init__(self, engine: DdpEngine, exchange_gradients: bool) -> None:
        self._engine, self._exchange = engine, exchange_gradients

    def around(self) -> AbstractContextManager[None]:
        return self._engine.accumulating(more_follow=not self._exchange)

    def forward(self, batch: Batch) -> tuple[PixelOutput, PixelOutput]:
        return self._engine.forward(batch.query_image), self._engine.embed_keys(batch.key_image)

    def learn(self, loss: Tensor) -> None:
        """Backward, and a step of the optimizer."""
        self._engine.backward(loss)
        self._engine.gradient_is_finite()
        self._engine.step(0.0)  # so that all kinds see the same weights


class StandIn:
    """Takes as long as it is told, and no core."""

    def __init__(self, seconds: float, images: int, size: int, ranks: Ranks) -> None:
        self._seconds = seconds
        side, draw = -(-size // STRIDE), torch.Generator().manual_seed(ranks.rank)
        self._query, self._key = (
            PixelOutput(
                torch.randn(images, DIM, side, side, generator=draw).requires_grad_(grad),
                torch.randn(images, 1, side, side, generator=draw).requires_grad_(grad),
            )
            for grad in (True, False)
        )

    def around(self) -> AbstractContextManager[None]:
        return nullcontext()

    def forward(self, batch: Batch) -> tuple[PixelOutput, PixelOutput]:
        time.sleep(self._seconds)
        return self._query, self._key

    def learn(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]


Encoders = RealEncoders | StandIn


def make_banks(setting: Setting, ranks: Ranks) -> dict[str, ShardedMemoryBank]:
    """One of each kind, all but the first with the same entries."""
    alone = Ranks(0, 1, ranks.device)  # as if all entries were this rank's
    where = {"none": ranks, "replicated": alone}
    moves = {kind: "pixels" if kind == "pixels" else "bank" for kind in KINDS}
    return {
        kind: full_bank(
            BankConfig(0 if kind == "none" else setting.entries, setting.dtype, move=moves[kind]),
            where.get(kind, ranks),
        )
        for kind in KINDS
    }


def take_step(
    kind: str,
    bank: ShardedMemoryBank,
    encoders: Encoders,
    batch: Batch,
    ranks: Ranks,
    config: LossConfig,
) -> float:
    """As the training loop does it; returns this rank's part of the contrastive loss."""
    chosen = choose_pixels(batch, ranks, config)
    bank.prefetch(chosen.pixels_of_ranks)
    if kind == "exposed":
        await_exchange(bank)
    with encoders.around():
        query, key = encoders.forward(batch)
        losses = contrast_views(query, key, batch, chosen, bank, ranks, config)
        encoders.learn(losses.total)
    return float(losses.contrastive)


def await_exchange(bank: ShardedMemoryBank) -> None:
    """Of the two chunks that are under way at a time, here the whole bank."""
    assert bank._pending is not None
    assert not bank._pending._spans, "the bank is larger than two chunks"
    for _, transfers in bank._pending._under_way:
        for transfer in transfers:
            bank._exchange.wait(transfer)


def steps_in_turn(
    encoders: Encoders,
    rounds: int,
    banks: dict[str, ShardedMemoryBank],
    batch: Batch,
    ranks: Ranks,
    config: LossConfig,
) -> Figures:
    """Seconds, bytes and seconds waited of each kind of step; the first round does not count."""
    columns = ("seconds", "wire", "waited", "counted", "loss")
    found: Figures = {kind: {column: [] for column in columns} for kind in KINDS}
    disagreement = 0.0
    for number in range(rounds + 1):
        losses = {}
        first = number % len(KINDS)
        for kind in KINDS[first:] + KINDS[:first]:
            bank, row = banks[kind], found[kind]
            waited, counted = bank.wait_seconds, bank.bytes_received
            seconds, wire, losses[kind] = timed(
                lambda kind=kind, bank=bank: take_step(  # type: ignore[misc]
                    kind, bank, encoders, batch, ranks, config
                ),
                ranks,
            )
            if number:
                row["seconds"].append(seconds)
                row["wire"].append(wire)
                row["waited"].append(bank.wait_seconds - waited)
                row["counted"].append(bank.bytes_received - counted)
                row["loss"].append(losses[kind])
        with_bank = [losses[kind] for kind in KINDS[1:]]
        disagreement = max(disagreement, (max(with_bank) - min(with_bank)) / max(with_bank))
    for kind in KINDS:
        found[kind]["held"] = banks[kind].keys.nbytes
    return {"kinds": found, "disagreement": disagreement}


def timed(what: Callable[[], Any], ranks: Ranks) -> tuple[float, int, Any]:
    """Seconds until all ranks are done, bytes that this node received meanwhile, the result."""
    barrier(ranks)
    before, start = received_bytes(), time.perf_counter()
    result = what()
    barrier(ranks)
    return time.perf_counter() - start, received_bytes() - before, result


def received_bytes(name: str = "eth0") -> int:
    """By the node's interface, headers included."""
    # /sys shows the network of whoever mounted it, /proc/net that of this process
    for line in Path("/proc/net/dev").read_text().splitlines():
        interface, colon, numbers = line.partition(":")
        if colon and interface.strip() == name:
            return int(numbers.split()[0])
    raise RuntimeError(f"this node has no interface {name}")


def alone(setting: Setting, parameters: int, ranks: Ranks) -> Figures:
    """What travels in a step, each by itself: the bank, the batch's prototypes, the gradients."""
    bank = make_banks(setting, ranks)["hidden"]
    gradients, keys = torch.zeros(parameters), torch.zeros(setting.images, DIM)
    counts = [setting.images] * ranks.world_size
    transfers: dict[str, Callable[[], Any]] = {
        "bank": lambda: list(bank.chunks()),
        "prototypes": lambda: all_gather_rows(keys, counts, ranks),
        "gradients": lambda: all_reduce_sum(gradients, ranks),
    }
    found: Figures = {name: {"seconds": [], "wire": []} for name in transfers}
    for number in range(min(setting.rounds, 5) + 1):
        for name, transfer in transfers.items():
            seconds, wire, _ = timed(transfer, ranks)
            if number:
                found[name]["seconds"].append(seconds)
                found[name]["wire"].append(wire)
    return found


def measure(setting: Setting, ranks: Ranks) -> Figures:
    """All parts, one after another."""
    config = setting.config()
    network = initial_network(config).to(memory_format=torch.channels_last)
    momentum_encoder = make_momentum_encoder(network).train()
    engine = DdpEngine(network.train(), momentum_encoder, config.optim, ranks, setting.precision)
    batch = some_batch(setting.images, setting.size, ranks)
    parts: dict[str, Encoders] = {
        "with gradients": RealEncoders(engine, True),
        "without gradients": RealEncoders(engine, False),
    }
    for seconds in setting.stand_ins:
        parts[f"{seconds:g} s"] = StandIn(seconds, setting.images, setting.size, ranks)
    parameters = sum(one.numel() for one in network.parameters() if one.requires_grad)
    found: Figures = {
        "ranks": ranks.world_size,
        "query_pixels": choose_pixels(batch, ranks, config.loss).pixels_of_ranks[0],
        "gradients_mb": parameters * 4 / 1e6,
        "alone": alone(setting, parameters, ranks),
        "parts": {},
    }
    for name, encoders in parts.items():
        rounds = setting.rounds * (2 if isinstance(encoders, StandIn) else 1)
        banks = make_banks(setting, ranks)
        found["parts"][name] = steps_in_turn(encoders, rounds, banks, batch, ranks, config.loss)
    return found


def work(file: Path, setting: Setting) -> None:
    torch.set_num_threads(1)
    ranks = start_ranks("cpu", 600)
    found = measure(setting, ranks)
    if ranks.is_main:
        file.write_text(json.dumps(found))
    end_ranks()


# --- where they are submitted ---


def on_nodes(cluster: Cluster, gbit: float, setting: Setting, folder: Path) -> Figures:
    """One job on two nodes that send at most so many Gbit/s; 0 leaves their links as they are.

    Raises:
        RuntimeError: the job failed; with its log.
    """
    for node in ("node1", "node2") if gbit else ():
        rate = ("rate", f"{gbit * 1000:g}mbit", "burst", "256kb", "latency", "100ms")
        cluster.node("exec", node, "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *rate)
    file, log = folder / "figures.json", folder / "job.log"
    job = Job(
        kind="evaluate",
        arguments=("rank", "--file", str(file), "--setting", json.dumps(asdict(setting))),
        resources=Resources(nodes=2, cpus_per_task=1, nodelist="node1,node2"),
        surroundings=Surroundings(python=(sys.executable,)),
    )
    script = render(job).replace("-m evaluation.cli", "-m benchmarks.slurm_links")
    assert "-m benchmarks.slurm_links" in script
    number = cluster.submit(script, f"--output={log}", f"--chdir={ROOT}")
    while (state := cluster.state(number)) not in ENDED:
        time.sleep(2)  # the nodes' cores are this machine's
    if state != "COMPLETED":
        raise RuntimeError(f"the job on links of {gbit:g} Gbit/s is {state}:\n{log.read_text()}")
    found: Figures = json.loads(file.read_text())
    return found


def spread(values: Sequence[float], digits: int) -> str:
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def with_error(values: Sequence[float]) -> str:
    """Median, the mean's standard error, and the spread."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return spread(values, 1).replace(" ", f" ± {error:.1f} ", 1)


def ratios(kinds: Figures, kind: str) -> list[float]:
    """Of each step's time to that of the step without a bank in the same round."""
    both = zip(kinds[kind]["seconds"], kinds["none"]["seconds"], strict=True)
    return [one / other for one, other in both]


def longer(kinds: Figures, kind: str) -> list[float]:
    """Milliseconds that each step took longer than the replicated bank's in the same round."""
    both = zip(kinds[kind]["seconds"], kinds["replicated"]["seconds"], strict=True)
    return [1000 * (one - other) for one, other in both]


def show_steps(part: Figures) -> None:
    kinds = part["kinds"]
    print("| bank | s a step, median (spread) | of no bank, pairs | ", end="")
    print("ms longer than replicated, pairs | waited ms | MB received | MB of keys held |")
    print("|" + "---|" * 7)
    for kind in KINDS:
        row = kinds[kind]
        print(
            f"| {kind} | {spread(row['seconds'], 3)} | {spread(ratios(kinds, kind), 3)} "
            f"| {with_error(longer(kinds, kind))} | {1000 * statistics.median(row['waited']):.1f} "
            f"| {statistics.median(row['wire']) / 1e6:.3f} | {row['held'] / 1e6:.2f} |"
        )


def show_stand_ins(parts: dict[str, Figures]) -> None:
    """A column for each length of the sleep."""
    print("\n### A sleep in place of both encoders\n")
    for title in ("ms a step, median (spread)", "ms longer than replicated, pairs"):
        print(f"| {title} | {' | '.join(parts)} |\n|" + "---|" * (1 + len(parts)))
        for kind in KINDS:
            all_kinds = [part["kinds"] for part in parts.values()]
            if "longer" in title:
                cells = [with_error(longer(kinds, kind)) for kinds in all_kinds]
            else:
                cells = [spread([1000 * s for s in k[kind]["seconds"]], 1) for k in all_kinds]
            print(f"| {kind} | {' | '.join(cells)} |")
        print()


def show(gbit: float, found: Figures) -> None:
    print(f"\n## {f'{gbit:g} Gbit/s a node' if gbit else 'Links without a limit'}\n")
    print("| travels alone | ms, median (spread) | MB received |\n|---|---|---|")
    for name, row in found["alone"].items():
        milliseconds = [1000 * value for value in row["seconds"]]
        wire = statistics.median(row["wire"]) / 1e6
        print(f"| {name} | {spread(milliseconds, 1)} | {wire:.3f} |")
    print(f"\n### Both encoders, {found['gradients_mb']:.1f} MB of gradients exchanged by DDP\n")
    show_steps(found["parts"]["with gradients"])
    print("\n### Both encoders, gradients not exchanged\n")
    show_steps(found["parts"]["without gradients"])
    show_stand_ins({name: part for name, part in found["parts"].items() if name.endswith(" s")})
    worst = max(part["disagreement"] for part in found["parts"].values())
    print(f"{found['query_pixels']} query pixels a rank; ", end="")
    print(f"losses with a bank differ by at most {worst:.1e} of themselves")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("worker", nargs="?", choices=["rank"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--links", default="0,1,0.1", help="Gbit/s that a node sends; 0: no limit")
    names = ("entries", "images", "size", "rounds", "dtype", "backbone", "precision")
    for name in names:
        default = getattr(Setting, name)
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--output", type=Path, help="JSON lines, appended")
    options = parser.parse_args()
    if options.worker:
        work(options.file, Setting(**options.setting))
        return
    if reason := nodes.why_not() or no_cluster():
        print(f"skipped: {reason}")
        return
    setting = Setting(**{name: getattr(options, name) for name in names})
    environment = describe_environment(Ranks(0, 1, torch.device("cpu")))
    print(
        f"{environment['date']}, {environment['cpu']}, {environment['cores']} cores, torch "
        f"{environment['torch']}, gloo, two nodes under SLURM, one rank a node, one thread a rank, "
        f"D = {DIM}; {setting}"
    )
    process = os.getpid()
    for gbit in map(float, options.links.split(",")):
        load = os.getloadavg()[0]
        network = f"10.{128 + process % 64}.{process // 64 % 256}"
        with (
            tempfile.TemporaryDirectory() as folder,
            Cluster(Path(folder) / "cluster", 2, network) as cluster,
        ):
            found = on_nodes(cluster, gbit, setting, Path(folder))
        show(gbit, found)
        print(f"load of the machine when this began: {load:.1f}", flush=True)
        if options.output:
            about = {"gbit": gbit, "load": load, **environment, **asdict(setting)}
            with options.output.open("a") as file:
                file.write(json.dumps({**about, **found}) + "\n")


if __name__ == "__main__":
    main()
