"""What does a memory bank cost that is sharded over many ranks? Bytes, seconds, memory.

    python -m benchmarks.bank_scaling exchange [--ranks 1,2,4,8] [--entries 256,…,16777216]
    python -m benchmarks.bank_scaling hidden   [--ranks 4] [--entries 65536] [--gbit 1]
    python -m benchmarks.bank_scaling sampled  [--ranks 4] [--entries 16777216] [--pixels 4096]

- exchange: the whole bank to every rank, once: bytes counted by the bank and by the network
  interface, against K·D·bytes·(W−1)/W; seconds; memory
- hidden: training steps with the exchange started before the encoder (as in training), after it,
  and with all entries on every rank already; one after another in turn
  (--spare-core: all ranks' encoders on one core, the others left to the transport, as on a node
  whose encoder runs on a GPU)
- sampled: one loss, forward and backward, of a few pixels a rank against a large bank, checked
  against float64 in 16 pixels a rank

All on gloo, one thread a rank, D = 32. With --gbit each rank is a node of its own (network
namespaces; root only) that sends at most so many Gbit/s; without, ranks talk over the loopback.
Without arguments: all three. The figures are printed, and appended as JSON to --output.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import nodes
from data_pipeline.batch import Batch
from trainer.config import load_config
from trainer.distributed import Ranks, barrier, end_ranks, gather_integers, start_ranks
from trainer.encoder import initial_network
from trainer.engine import DdpEngine
from trainer.environment import describe_environment
from trainer.loss import contrast_pixels
from trainer.memory_bank import BankConfig, ShardedMemoryBank
from trainer.momentum import make_momentum_encoder
from trainer.objective import choose_pixels, contrast_views

DIM, BLOCK, PORT = 32, 1 << 16, 29_577
MODES = ("early", "late", "without")
Figures = dict[str, Any]


# --- on every rank ---


def exchange(ranks: Ranks, entries: list[int], rounds: int, dtype: str) -> list[Figures]:
    """Seconds, bytes and memory of gathering the bank, without anything to hide it."""
    found = []
    for capacity in entries:
        bank = full_bank(BankConfig(capacity, dtype), ranks)
        before_memory, before = _peak_memory(reset=True), bank.bytes_received
        if capacity <= BLOCK:
            list(bank.chunks())  # starts connections, and fills the buffers
        seconds, counted, on_wire = [], 0, 0
        for _ in range(rounds):
            before, wire = bank.bytes_received, _interface_bytes()  # while no rank has begun
            barrier(ranks)
            start = time.perf_counter()
            for _ in bank.chunks():
                pass
            seconds.append(time.perf_counter() - start)
            barrier(ranks)
            counted, on_wire = bank.bytes_received - before, _interface_bytes() - wire
        alone = os.environ.get("GLOO_SOCKET_IFNAME") == "eth0"
        world, size = ranks.world_size, bank.keys.itemsize
        found.append(
            {
                "ranks": world,
                "entries": capacity,
                "formula_mb": capacity * DIM * size * (world - 1) / world / 1e6,
                "counted_mb": counted / 1e6,
                # the loopback carries what all ranks receive
                "on_wire_mb": on_wire / (1 if alone else world) / 1e6,
                "seconds": seconds,
                "shard_mb": bank.keys.nbytes / 1e6,
                "peak_extra_mb": (_peak_memory() - before_memory) / 1e6,
            }
        )
    return found


def hidden(
    ranks: Ranks, entries: int, images: int, steps: int, dtype: str, spare_core: bool
) -> list[Figures]:
    """Seconds of a training step with the bank's exchange early, late, and without it."""
    settings = ["model.embedding_dim=32", "run.precision=float32", "model.batch_norm=plain"]
    config = load_config("demo_cpu", None, [*settings, "loss.pixels_per_mask=64"])
    network = initial_network(config).to(memory_format=torch.channels_last)
    momentum_encoder = make_momentum_encoder(network).train()
    engine = DdpEngine(network.train(), momentum_encoder, config.optim, ranks, "float32")
    settings_of_bank = BankConfig(entries, dtype, move="bank")
    shared = full_bank(settings_of_bank, ranks)
    alone = full_bank(settings_of_bank, Ranks(0, 1, ranks.device))  # all entries, here
    list(shared.chunks())  # starts the transport's threads
    if spare_core:  # of this thread, and of autograd's, which it starts
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    batch = some_batch(images, config.views.image_size, ranks)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    exchange_alone, waited = [], 0.0
    for number in range(steps + 1):
        for mode in MODES[number % 3 :] + MODES[: number % 3]:
            bank = alone if mode == "without" else shared
            barrier(ranks)
            start, waited_before = time.perf_counter(), shared.wait_seconds
            chosen = choose_pixels(batch, ranks, config.loss)
            if mode == "early":
                bank.prefetch(chosen.pixels_of_ranks)
            query = engine.forward(batch.query_image)
            with torch.no_grad():
                key = momentum_encoder(batch.key_image)
            if mode != "early":
                bank.prefetch(chosen.pixels_of_ranks)
            losses = contrast_views(query, key, batch, chosen, bank, ranks, config.loss)
            engine.backward(losses.total)
            engine.gradient_is_finite()
            engine.step(0.0)
            barrier(ranks)
            if number:
                seconds[mode].append(time.perf_counter() - start)
                waited += (shared.wait_seconds - waited_before) * (mode == "early")
        start = time.perf_counter()
        for _ in shared.chunks():
            pass
        if number:
            exchange_alone.append(time.perf_counter() - start)
    found: Figures = {"ranks": ranks.world_size, "entries": entries, "images": images, **seconds}
    return [
        {
            **found,
            "alone": exchange_alone,
            "waited": waited / steps,
            "dtype": dtype,
            "spare_core": spare_core,
        }
    ]


def sampled(ranks: Ranks, entries: int, pixels: int, move: str) -> list[Figures]:
    """One loss of `pixels` query pixels a rank against a full bank of `entries`."""
    bank = full_bank(BankConfig(entries, "float32", move=move), ranks)
    shard_mb = bank.keys.nbytes / 1e6
    draw = torch.Generator().manual_seed(1000 + ranks.rank)
    queries = F.normalize(torch.randn(pixels, DIM, generator=draw), dim=1).requires_grad_()
    prototypes = F.normalize(torch.randn(16, DIM, generator=draw), dim=1)
    targets = torch.randint(16, (pixels,), generator=draw)
    memory, start = _peak_memory(reset=True), time.perf_counter()
    moved_pixels = bank.prefetch([pixels] * ranks.world_size)
    parts = bank.parts(queries.detach(), None, 10.0)
    weights = torch.ones(pixels)
    loss = contrast_pixels(queries, targets, prototypes, parts, 0.1, weights).loss
    loss.backward()
    seconds = time.perf_counter() - start
    extra = (_peak_memory() - memory) / 1e6
    assert queries.grad is not None
    error = _error_against_float64(queries, targets, prototypes, entries)
    errors = gather_integers(torch.tensor([int(error * 1e12)]), ranks)
    return [
        {
            "ranks": ranks.world_size,
            "entries": entries,
            "pixels": pixels,
            "moved": "pixels" if moved_pixels else "bank",
            "seconds": seconds,
            "received_mb": bank.bytes_received / 1e6,
            "shard_entries": bank.slots,
            "shard_mb": shard_mb,
            "peak_extra_mb": extra,
            "gradient_error": max(row[0] for row in errors) / 1e12,
        }
    ]


def full_bank(config: BankConfig, ranks: Ranks) -> ShardedMemoryBank:
    """With the entries of `blocks`."""
    bank = ShardedMemoryBank(config, DIM, ranks)
    for keys in blocks(config.capacity):
        bank.enqueue(keys, torch.arange(bank.next_sequence, bank.next_sequence + len(keys)))
    return bank


def blocks(entries: int) -> Iterator[Tensor]:
    """Unit vectors, the same on every rank, so many at a time that they fit anywhere."""
    for first in range(0, entries, BLOCK):
        draw = torch.Generator().manual_seed(first)
        count = min(BLOCK, entries - first)
        yield F.normalize(torch.randn(count, DIM, generator=draw), dim=1)


def _error_against_float64(
    queries: Tensor, targets: Tensor, prototypes: Tensor, entries: int
) -> float:
    """Of the gradient of 16 pixels, in parts of its largest component."""
    assert queries.grad is not None
    some = slice(0, len(queries), max(1, len(queries) // 16))
    wide = queries.detach()[some].double()
    right = prototypes[targets[some]].double()
    lse = torch.full((len(wide),), -torch.inf, dtype=torch.float64)
    mean = torch.zeros_like(wide)
    for keys in itertools.chain([prototypes], blocks(entries)):
        logits = wide @ keys.double().T * 10
        both = torch.logaddexp(lse, logits.logsumexp(1))
        mean = mean * (lse - both).exp()[:, None]
        mean += (logits - both[:, None]).exp() @ keys.double()
        lse = both
    expected = (mean - right) * 10
    return float((queries.grad[some] - expected).abs().max() / expected.abs().max())


def some_batch(images: int, size: int, ranks: Ranks) -> Batch:
    draw = torch.Generator().manual_seed(ranks.rank)
    views = torch.randn(2, images, 3, size, size, generator=draw)
    masks = torch.zeros(2, images, size, size, dtype=torch.uint8)
    masks[:, :, size // 4 : -size // 4, size // 4 : -size // 4] = 1
    ids = torch.arange(images) + ranks.rank * images
    query, key = (view.contiguous(memory_format=torch.channels_last) for view in views)
    return Batch(query, key, masks[0], masks[1], ids)


def _interface_bytes() -> int:
    """Received by this node so far."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return int(Path(f"/sys/class/net/{name}/statistics/rx_bytes").read_text())


def _peak_memory(reset: bool = False) -> int:
    """Most bytes held since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024


# --- the process that starts them ---


@contextmanager
def _prefixes(world_size: int, gbit: float) -> Iterator[list[list[str]]]:
    with nodes.nodes(world_size, gbit) if gbit else nullcontext([[]] * world_size) as prefixes:
        yield prefixes


def on_ranks(question: str, world_size: int, gbit: float, **arguments: Any) -> list[Figures]:
    """What rank 0 found."""
    address = nodes.address(0) if gbit else "127.0.0.1"
    common = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(PORT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0" if gbit else "lo",
    }
    with _prefixes(world_size, gbit) as prefixes:
        processes = [
            subprocess.Popen(
                [
                    *(*prefix, sys.executable, "-m", "benchmarks.bank_scaling"),
                    *("worker", question, "--arguments", json.dumps(arguments)),
                ],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            )
            for rank, prefix in enumerate(prefixes)
        ]
        try:
            output, _ = processes[0].communicate(timeout=1800)
            statuses = [process.wait(60) for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(statuses):
        raise RuntimeError(f"{question}: the ranks ended with {statuses}")
    found: list[Figures] = json.loads(output.splitlines()[-1])
    return found


def work(question: str, arguments: Figures) -> None:
    torch.set_num_threads(1)
    ranks = start_ranks("cpu", 1800)
    found = {"exchange": exchange, "hidden": hidden, "sampled": sampled}[question](
        ranks, **arguments
    )
    if ranks.is_main:
        print(json.dumps(found), flush=True)
    end_ranks()


def show_exchange(rows: list[Figures]) -> None:
    print(
        "| ranks | entries | MB a rank: formula | counted | on the wire | s, median (spread) |",
        end="",
    )
    print(" MB/s | shard MB |\n|" + "---|" * 8)
    for row in rows:
        seconds = row["seconds"]
        middle = statistics.median(seconds)
        print(
            f"| {row['ranks']} | {row['entries']:,} | {row['formula_mb']:,.3f} | "
            f"{row['counted_mb']:,.3f} | {row['on_wire_mb']:,.3f} | {middle:.4f} "
            f"({min(seconds):.4f}–{max(seconds):.4f}) | {row['counted_mb'] / middle:,.0f} | "
            f"{row['shard_mb']:,.2f} |"
        )


def show_hidden(rows: list[Figures]) -> None:
    for row in rows:
        middle = {key: statistics.median(row[key]) for key in ("early", "late", "without", "alone")}
        left = [a - b for a, b in zip(row["early"], row["without"], strict=True)]
        late = [a - b for a, b in zip(row["late"], row["without"], strict=True)]
        share = 1 - statistics.median(left) / middle["alone"]
        spread = statistics.stdev(left) if len(left) > 1 else float("nan")
        error = spread / len(left) ** 0.5 / middle["alone"]
        print(
            f"{row['entries']:,} entries ({row['dtype']}), {row['ranks']} ranks, "
            f"{row['images']} images a rank, {len(left)} steps of each kind, medians:"
        )
        print("| | ms |\n|---|---|")
        print(f"| exchange alone | {1000 * middle['alone']:.1f} |")
        print(f"| step without exchange | {1000 * middle['without']:.1f} |")
        print(f"| step, exchange started before the encoder | {1000 * middle['early']:.1f} |")
        print(f"| step, exchange started after the encoder | {1000 * middle['late']:.1f} |")
        print(f"| longer than without, in pairs: early | {1000 * statistics.median(left):.1f} |")
        print(f"| longer than without, in pairs: late | {1000 * statistics.median(late):.1f} |")
        print(f"| waited for the exchange in a step (rank 0) | {1000 * row['waited']:.2f} |")
        print(
            f"\nhidden behind the encoder: {share:.0%} of the exchange (standard error {error:.0%})"
        )


def show_sampled(rows: list[Figures]) -> None:
    for row in rows:
        print("\n".join(f"- {key}: {value}" for key, value in row.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    questions = ["exchange", "hidden", "sampled"]
    parser.add_argument("question", nargs="?", choices=[*questions, "worker"])
    parser.add_argument("worker_question", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", help="how many; several for exchange")
    parser.add_argument("--entries", help="of the bank over all ranks; several for exchange")
    parser.add_argument("--pixels", type=int, default=4096, help="a rank, for sampled")
    parser.add_argument("--images", type=int, default=8, help="a rank, for hidden")
    parser.add_argument("--spare-core", action="store_true", help="for hidden")
    parser.add_argument("--rounds", type=int, help="steps of each kind, or exchanges")
    parser.add_argument("--dtype", default="float32", help="of the bank")
    parser.add_argument("--move", default="auto", help="auto, bank or pixels, for sampled")
    parser.add_argument("--gbit", type=float, default=0.0, help="of each node's link")
    parser.add_argument("--output", type=Path, help="JSON lines, appended")
    options = parser.parse_args()
    if options.question == "worker":
        work(options.worker_question, json.loads(options.arguments))
        return
    if options.gbit and (reason := nodes.why_not()):
        print(f"skipped: {reason}")
        return
    environment = describe_environment(Ranks(0, 1, torch.device("cpu")))
    link = f"{options.gbit:g} Gbit/s a node" if options.gbit else "loopback"
    print(
        f"{environment['date']}, {environment['cpu']}, {environment['cores']} cores, {link}, "
        f"torch {environment['torch']}, gloo, one thread a rank, D = {DIM}"
    )
    for question in [options.question] if options.question else questions:
        print(f"\n## {question}\n", flush=True)
        ranks = [
            int(n)
            for n in (options.ranks or ("1,2,4,8" if question == "exchange" else "4")).split(",")
        ]
        default = {"exchange": "256,4096,65536,1048576,16777216", "hidden": "65536"}
        entries = [
            int(n) for n in (options.entries or default.get(question, "16777216")).split(",")
        ]
        arguments: Figures
        if question == "exchange":
            arguments = {"entries": entries, "rounds": options.rounds or 5, "dtype": options.dtype}
        elif question == "hidden":
            arguments = {
                "entries": entries[0],
                "images": options.images,
                "steps": options.rounds or 40,
                "dtype": options.dtype,
                "spare_core": options.spare_core,
            }
        else:
            arguments = {"entries": entries[0], "pixels": options.pixels, "move": options.move}
        rows = [
            row for world in ranks for row in on_ranks(question, world, options.gbit, **arguments)
        ]
        {"exchange": show_exchange, "hidden": show_hidden, "sampled": show_sampled}[question](rows)
        if options.output:
            with options.output.open("a") as file:
                for row in rows:
                    about = {"question": question, "gbit": options.gbit, **environment}
                    file.write(json.dumps({**about, **row}) + "\n")


if __name__ == "__main__":
    main()
