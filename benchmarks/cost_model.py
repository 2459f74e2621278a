"""What will a bank cost on W ranks? The model of `docs/scaling.md`, its check, its pictures.

    python -m benchmarks.cost_model [--measured benchmarks/results/bank_*.jsonl] [--docs docs]

Fits the machine's constants to some of the measured rows, predicts the others, and then predicts
GPUs from their makers' figures. Tables are printed; the pictures need matplotlib (`pip install
'.[plots]'`).
"""

import argparse
import importlib.util
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIM = 32
CHUNK = 65_536
_LINK_FITTED = (256, 1 << 20)
Row = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """Constants of one kind of rank.

    Attributes:
        pixel_seconds: of a query pixel, whatever the bank.
        pair_seconds: of a query pixel and a key.
        link_bytes: bytes a second that a rank receives in an all-gather.
        chunk_seconds: of an all-gather of nothing.
        encoder_seconds: both forward passes, behind which the exchange may hide.
        backward_seconds: the rest of the step.
    """

    pixel_seconds: float
    pair_seconds: float
    link_bytes: float
    chunk_seconds: float
    encoder_seconds: float = 0.0
    backward_seconds: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Of the bank in one step of one rank: bytes received, bytes held, seconds."""

    moved: str
    received: float
    held: float
    exchange: float
    loss: float
    exposed: float
    step: float


def bank_bytes(entries: int, ranks: int, key_bytes: int, dim: int = DIM) -> float:
    """Received by a rank when the bank travels: K·D·bytes·(W−1)/W."""
    return entries * dim * key_bytes * (ranks - 1) / ranks


def pixel_bytes(pixels: int, ranks: int, dim: int = DIM) -> float:
    """Received by a rank when N pixels a rank travel: queries, then mean keys and two numbers."""
    return (ranks - 1) * pixels * 4 * (2 * dim + 2)


def cost(machine: Machine, pixels: int, entries: int, ranks: int, key_bytes: int) -> Cost:
    """Of one step.

    Args:
        machine: of each rank.
        pixels: N, query pixels a rank.
        entries: K, over all ranks.
        ranks: W.
        key_bytes: 4 or 2.
    """
    row = DIM * key_bytes
    bank, moving = bank_bytes(entries, ranks, key_bytes), pixel_bytes(pixels, ranks)
    loss = pixels * (machine.pixel_seconds + entries * machine.pair_seconds)
    shard = entries / ranks * (row + 12)  # sample id and time of entry with each key
    own = pixels * 4 * (3 * DIM + 4)  # queries, mean key, gradient
    if moving < bank:  # after the encoder: nothing hides it
        exchange = moving / machine.link_bytes + 2 * machine.chunk_seconds
        exposed = exchange if ranks > 1 else 0.0
        held = shard + own + ranks * pixels * 4 * (2 * DIM + 4)
        moved, received = "pixels", moving
    else:
        chunks = max(1, -(-entries // CHUNK))
        wire = bank / chunks / machine.link_bytes + machine.chunk_seconds
        exchange = chunks * wire if ranks > 1 else 0.0
        exposed = _exposed(machine, chunks, wire, loss / chunks) if ranks > 1 else 0.0
        held = shard + own + (2 * min(entries, CHUNK) * row if ranks > 1 else 0.0)
        moved, received = "bank", bank
    step = machine.encoder_seconds + loss + exposed + machine.backward_seconds
    return Cost(moved, received, held, exchange, loss, exposed, step)


def _exposed(machine: Machine, chunks: int, wire: float, attend: float) -> float:
    """Seconds that the loss waits: two chunks are under way at a time, from before the encoder."""
    now, link_free, started = machine.encoder_seconds, 0.0, [0.0, 0.0]
    waited = 0.0
    for number in range(chunks):
        ready = max(link_free, started[number % 2]) + wire
        link_free = ready
        waited += max(0.0, ready - now)
        now = max(now, ready) + attend
        started[number % 2] = now  # its memory is free for the chunk after the next
    return waited


def fit_loss(rows: list[Row]) -> tuple[float, float]:
    """(pixel_seconds, pair_seconds) that give the smallest relative error, all K ≤ 4,096."""
    import numpy as np

    fitted = [row for row in rows if row["keys"] <= 4096 + 64]
    seconds = np.array([statistics.median(row["seconds"]) for row in fitted])
    design = np.array([[row["pixels"], row["pixels"] * row["keys"]] for row in fitted])
    constants, *_ = np.linalg.lstsq(design / seconds[:, None], np.ones(len(fitted)), rcond=None)
    return float(constants[0]), float(constants[1])


def fit_link(rows: list[Row]) -> tuple[float, float]:
    """(bytes a second, seconds of an exchange of nothing) from 256 and 2²⁰ entries."""
    small, large = (next(r for r in rows if r["entries"] == n) for n in _LINK_FITTED)
    latency = statistics.median(small["seconds"])
    rest = statistics.median(large["seconds"]) - latency
    return (large["counted_mb"] - small["counted_mb"]) * 1e6 / max(rest, 1e-9), latency


def exchange_seconds(row: Row, link: tuple[float, float]) -> float:
    """Of gloo, which runs two chunks at a time, so that latency counts once."""
    return link[1] + row["counted_mb"] * 1e6 / link[0]


# What the makers state, less what is usual: no measurement. See docs/scaling.md.
H100 = {
    "400 Gbit/s a GPU": Machine(1e-9, 5e-13, 0.7 * 8 * 50e9, 5e-5, 8e-3, 10e-3),
    "200 Gbit/s a node": Machine(1e-9, 5e-13, 0.7 * 25e9, 5e-5, 8e-3, 10e-3),
}
ALL_PIXELS, FEW_PIXELS = 16 * 224 * 224 // 4, 16 * 64
ENTRIES = [256, 4096, 65_536, 1 << 20, 1 << 24]
RANKS = [8, 16, 32, 64, 128, 256, 512]


def show_checks(loss: list[Row], exchange: list[Row], sampled: list[Row]) -> None:
    pixel, pair = fit_loss(loss)
    print(f"loss: {pixel * 1e9:.0f} ns a pixel + {pair * 1e9:.2f} ns a pixel and key\n")
    print("| N × K | measured s | model s | model/measured | |\n|---|---|---|---|---|")
    for row in loss:
        measured = statistics.median(row["seconds"])
        model = row["pixels"] * (pixel + pair * row["keys"])
        note = "fitted" if row["keys"] <= 4096 + 64 else "predicted"
        print(f"| {row['pixels']:,} × {row['keys']:,} | {measured:.2f} | {model:.2f} | ", end="")
        print(f"{model / measured:.2f} | {note} |")
    print("\n| network | ranks | entries | MB a rank | measured s | model s | model/measured | |")
    print("|" + "---|" * 8)
    for key in sorted({(row["gbit"], row["ranks"]) for row in exchange if row["ranks"] > 1}):
        rows = [row for row in exchange if (row["gbit"], row["ranks"]) == key]
        link = fit_link(rows)
        name = f"{key[0]:g} Gbit/s" if key[0] else "loopback"
        for row in rows:
            model, measured = exchange_seconds(row, link), statistics.median(row["seconds"])
            fitted = row["entries"] in _LINK_FITTED
            print(
                f"| {name} | {row['ranks']} | {row['entries']:,} | {row['counted_mb']:,.2f} | "
                f"{measured:.4f} | {model:.4f} | {model / measured:.2f} | "
                f"{'fitted' if fitted else 'predicted'} |"
            )
    for row in sampled:
        model = row["ranks"] * row["pixels"] * (pixel + pair * row["entries"])
        print(
            f"\n{row['pixels']:,} pixels a rank, {row['entries']:,} entries, {row['ranks']} ranks "
            f"on the same cores: measured {row['seconds']:.0f} s, model {model:.0f} s"
        )


def show_predictions() -> None:
    columns = ("network", "pixels a GPU", "entries", "GPUs", "moved", "MB received", "MB held")
    columns += ("exchange ms", "not hidden ms", "loss ms", "step ms")
    print(f"\n| {' | '.join(columns)} |\n|" + "---|" * len(columns))
    for name, machine in H100.items():
        for pixels in (ALL_PIXELS, FEW_PIXELS):
            for entries in ENTRIES[2:]:
                for ranks in (8, 64, 512):
                    found = cost(machine, pixels, entries, ranks, 2)
                    print(
                        f"| {name} | {pixels:,} | {entries:,} | {ranks} | {found.moved} | "
                        f"{found.received / 1e6:,.1f} | {found.held / 1e6:,.0f} | "
                        f"{found.exchange * 1e3:.2f} | {found.exposed * 1e3:.2f} | "
                        f"{found.loss * 1e3:.1f} | {found.step * 1e3:.0f} |"
                    )


def draw_measured(methods: list[Row], exchange: list[Row], file: Path) -> None:
    from matplotlib import pyplot

    loss = [row for row in methods if row["method"] == "maskbank"]
    pixel, pair = fit_loss(loss)
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.4))
    markers = {"maskbank": "o", "linear": "s", "rows": "^", "dense": "d"}
    for number, (method, marker) in enumerate(markers.items()):
        own = [row for row in methods if row["method"] == method]
        pairs = [row["pixels"] * row["keys"] for row in own]
        seconds = [statistics.median(row["seconds"]) for row in own]
        left.loglog(pairs, seconds, marker, color=f"C{number}", label=method)
    for row in loss:
        pairs = row["pixels"] * row["keys"]
        model = row["pixels"] * (pixel + pair * row["keys"])
        left.plot(pairs, model, "x", color="black", label="model" if row is loss[0] else None)
        place = (-60, 3) if row["keys"] == 320 else (-10, -16)
        label = f"{row['pixels'] // 1000}k × {row['keys']:,}"
        left.annotate(label, (pairs, model), textcoords="offset points", xytext=place, fontsize=8)
    left.set(xlabel="N · K", ylabel="seconds, forward and backward", title="loss, 2 CPU cores")
    left.legend()
    for number, ranks in enumerate(sorted({row["ranks"] for row in exchange if row["ranks"] > 1})):
        rows = [row for row in exchange if row["ranks"] == ranks and not row["gbit"]]
        mb = [max(row["on_wire_mb"], 1e-3) for row in rows]
        entries = [row["entries"] for row in rows]
        middle.loglog(entries, mb, "o", color=f"C{number}", label=f"{ranks} ranks, on the wire")
        formula = [bank_bytes(k, ranks, 4) / 1e6 for k in entries]
        middle.loglog(entries, formula, "-", color=f"C{number}", linewidth=0.8)
    middle.set(
        xlabel="entries", ylabel="MB received by a rank", title="traffic; lines: K·D·4·(W−1)/W"
    )
    middle.legend()
    for number, key in enumerate(
        sorted({(r["gbit"], r["ranks"]) for r in exchange if r["ranks"] > 1})
    ):
        rows = [row for row in exchange if (row["gbit"], row["ranks"]) == key]
        link = fit_link(rows)
        name = f"{key[1]} ranks, " + (f"{key[0]:g} Gbit/s" if key[0] else "loopback")
        entries = [row["entries"] for row in rows]
        measured = [statistics.median(row["seconds"]) for row in rows]
        right.loglog(entries, measured, "o", color=f"C{number}", label=name)
        model = [exchange_seconds(row, link) for row in rows]
        right.loglog(entries, model, "-", color=f"C{number}", linewidth=0.8)
    right.set(xlabel="entries", ylabel="seconds", title="exchange alone; lines: model")
    right.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=90)


def draw_predictions(file: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4.4))
    entries = [2**power for power in range(8, 25)]
    for number, ranks in enumerate((8, 64, 512)):
        for name, machine in H100.items():
            style = "-" if "a GPU" in name else "--"
            for panel, pixels in zip(panels, (ALL_PIXELS, FEW_PIXELS), strict=False):
                steps = [1000 * cost(machine, pixels, k, ranks, 2).step for k in entries]
                label = f"{ranks} GPUs, {name}"
                panel.loglog(entries, steps, style, color=f"C{number}", label=label)
        held = [cost(machine, ALL_PIXELS, k, ranks, 2).held / 1e6 for k in entries]
        panels[2].loglog(entries, held, "-", color=f"C{number}", label=f"{ranks} GPUs, all pixels")
        held = [cost(machine, FEW_PIXELS, k, ranks, 2).held / 1e6 for k in entries]
        panels[2].loglog(entries, held, ":", color=f"C{number}", label=f"{ranks} GPUs, 64 a mask")
    panels[0].set(title=f"all pixels: {ALL_PIXELS:,} a GPU", xlabel="entries", ylabel="step, ms")
    panels[1].set(
        title=f"64 pixels a mask: {FEW_PIXELS:,} a GPU", xlabel="entries", ylabel="step, ms"
    )
    panels[2].set(title="memory of bank and loss", xlabel="entries", ylabel="MB a GPU")
    for panel in panels[:2]:
        panel.set_ylim(10, 3000)
    for panel in panels:
        panel.legend(fontsize=7)
    figure.suptitle(
        "predicted, not measured: H100, ResNet-50, 16 images of 224 pixels a GPU, float16 keys"
    )
    figure.tight_layout()
    figure.savefig(file, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = sorted(Path(__file__).with_name("results").glob("bank_*.jsonl"))
    parser.add_argument("--measured", type=Path, nargs="*", default=results)
    parser.add_argument("--docs", type=Path, help="folder for the pictures; none without")
    options = parser.parse_args()
    rows = [json.loads(line) for file in options.measured for line in file.open()]
    methods = [row for row in rows if row["question"] == "loss"]
    loss = [row for row in methods if row["method"] == "maskbank"]
    exchange = [row for row in rows if row["question"] == "exchange"]
    sampled = [row for row in rows if row["question"] == "sampled"]
    if not loss or not exchange:
        print("skipped: nothing measured; run benchmarks.bank_loss and benchmarks.bank_scaling")
        return
    show_checks(loss, exchange, sampled)
    show_predictions()
    if options.docs and importlib.util.find_spec("matplotlib"):
        import matplotlib

        matplotlib.use("agg")
        draw_measured(methods, exchange, options.docs / "scaling-measured.png")
        draw_predictions(options.docs / "scaling-predicted.png")


if __name__ == "__main__":
    main()
