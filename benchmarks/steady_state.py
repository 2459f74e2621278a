"""Does anything grow while training goes on? Memory, descriptors, threads, and what stays behind.

    python -m benchmarks.steady_state [--steps 2000] [--since 200] [--online] [--size 40]
                                      [--network small] [--engine ddp] [--loader dali]

`maskbank train` on two ranks with checkpoints, TensorBoard and, if asked for, evaluations while it
trains; generated scenes. Each rank, the launcher and the command are watched from outside, through
/proc, every half second and at every row of the metrics. Levels are medians over the samples within
a few steps; the last ones are before the last step, since then memory is given back. The first
checkpoint takes memory for copies that stays, so where --since is before it, that shows. The
allocator keeps what was freed in pieces and fills the holes only with time: such creep slows down,
a leak does not. So there are slopes (Theil-Sen) for the first and the second half of what lies
between.

Exit status 1 if resident or anonymous memory of a process has grown by more than --tolerance, if
descriptors, threads, processes or shared memory have grown at all, or if anything is left behind:
processes, shared memory, sockets, temporary files. Proportional memory is shown only: it changes
with other programs that use the same libraries.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks._watch import Held, Left, Sample, Watched, command_line, variable, watch
from data_pipeline.build_config import BuildConfig, BuildOptions
from data_pipeline.sources.generated import list_scenes
from data_pipeline.write_shards import build_shards
from launch.torchrun import rank_environment
from trainer.distributed import Ranks
from trainer.environment import describe_environment

RANKS = 2
CACHES = ("torchinductor_",)  # torch's, one for all runs of a user
PROPORTIONAL = "proportional, MB"
MEMORY: dict[str, Callable[[Held], float]] = {
    "resident, MB": lambda held: held.resident,
    PROPORTIONAL: lambda held: held.proportional,
    "anonymous, MB": lambda held: held.anonymous,
}
COUNTS: dict[str, Callable[[Held], float]] = {
    "descriptors": lambda held: held.descriptors.total(),
    "threads": lambda held: held.threads.total(),
    "shared-memory segments": lambda held: len(held.segments),
}
Series = list[tuple[int, float]]


@dataclass(frozen=True)
class Row:
    """One quantity of one process.

    Attributes:
        who, what: process and quantity.
        levels: at the first step that counts, in the middle, and at the end.
        slopes: a thousand steps, in the first and the second half.
        grown: whether that is more than is allowed.
    """

    who: str
    what: str
    levels: tuple[float, float, float]
    slopes: tuple[float, float]
    grown: bool


def role(pid: int) -> str:
    words = command_line(pid)
    if "launch.cli" in words:
        return "command"
    if "launch.ranks" in words:
        return "launcher"
    if "trainer.train" in words:
        return f"rank {variable(pid, 'RANK')}"
    return "others"


def summarise(samples: Sequence[Sample], since: int, last: int, tolerance: float) -> list[Row]:
    """A row for every quantity of every process that was there from `since` to `last`."""
    during = [sample for sample in samples if 0 < sample.step < last]
    names = sorted({name for sample in during for name in sample.held} - {"others"})
    rows = []
    for name in names:
        for what, value in (MEMORY | COUNTS).items():
            series = [(s.step, value(s.held[name])) for s in during if name in s.held]
            if what in MEMORY or any(number for _, number in series):
                allowed = tolerance if what in MEMORY else 0.0
                allowed = float("inf") if what == PROPORTIONAL else allowed
                rows.append(_row(name, what, series, since, last, allowed))
    series = [(sample.step, float(sample.processes)) for sample in during]
    return [*rows, _row("all", "processes", series, since, last, 0.0)]


def _row(who: str, what: str, series: Series, since: int, last: int, allowed: float) -> Row:
    middle = (since + last) // 2
    levels = tuple(level(series, step, since, last) for step in (since, middle, last))
    halves = ((since, middle), (middle, last))
    slopes = tuple(slope([p for p in series if a <= p[0] < b]) for a, b in halves)
    first, _, end = levels
    return Row(who, what, levels, slopes, end > first * (1 + allowed))  # type: ignore[arg-type]


def level(series: Series, step: int, since: int, last: int) -> float:
    """Median of the samples near a step, or the nearest one."""
    width = max(10, (last - since) // 40)
    near = [value for at, value in series if abs(at - step) <= width]
    if not near:
        near = [min(series, key=lambda point: abs(point[0] - step))[1]]
    return statistics.median(near)


def slope(series: Series) -> float:
    """A thousand steps: the median of the slopes between all pairs of samples (Theil, 1950)."""
    steps, values = (np.array(column, float) for column in zip(*series or [(0, 0.0)], strict=True))
    first, second = np.triu_indices(len(steps), 1)
    apart = steps[second] - steps[first]
    slopes = (values[second] - values[first])[apart > 0] / apart[apart > 0]
    return float(np.median(slopes)) * 1000 if len(slopes) else 0.0


def grown_kinds(samples: Sequence[Sample], since: int, last: int) -> list[str]:
    """Kinds of descriptors and names of threads of which there are more at the end."""
    during = [sample for sample in samples if 0 < sample.step < last]
    lines = []
    for name in sorted({name for sample in during for name in sample.held} - {"others"}):
        for what in ("descriptors", "threads"):
            counts: list[tuple[int, Counter[str]]] = [
                (s.step, getattr(s.held[name], what)) for s in during if name in s.held
            ]
            for kind in sorted({kind for _, counter in counts for kind in counter}):
                series = [(step, float(counter[kind])) for step, counter in counts]
                before, after = (level(series, step, since, last) for step in (since, last))
                if after > before:
                    lines.append(f"{name}: {what} of `{kind}`: {before:g} → {after:g}")
    return lines


def grown_mappings(watched: Watched, since: int, last: int, least: float = 1.0) -> list[str]:
    """Kinds of mappings of which at least so many MB more are in memory."""
    lines = []
    for who in sorted({who for _, who in watched.mappings}):
        before, after = (watched.mappings.get((step, who)) for step in (since, last))
        for kind in sorted(after or ()) if before is not None and after is not None else ():
            if after[kind] - before[kind] >= least:
                lines.append(f"{who}: `{kind}`: {before[kind]:.1f} → {after[kind]:.1f} MB")
    return lines


def show(rows: Sequence[Row], since: int, last: int) -> None:
    middle = (since + last) // 2
    heads = [
        "process",
        "what",
        f"step {since:,}",
        f"step {middle:,}",
        f"step {last:,}",
        "end/first",
    ]
    heads += [f"1,000 steps, {a:,}–{b:,}" for a, b in itertools.pairwise((since, middle, last))]
    print(f"| {' | '.join(heads)} | |\n|{'---|' * (len(heads) + 1)}")
    for row in rows:
        digits = 1 if row.what in MEMORY else 0
        levels = " | ".join(f"{value:,.{digits}f}" for value in row.levels)
        ratio = f"{row.levels[2] / row.levels[0]:.3f}" if row.levels[0] else "–"
        slopes = " | ".join(f"{value:+.{digits + 1}f}" for value in row.slopes)
        word = ""
        if row.grown:
            # a leak goes on as fast as before
            slows = row.what in MEMORY and row.slopes[1] < row.slopes[0] / 3
            word = "grown; slows down" if slows else "**grows**"
        print(f"| {row.who} | {row.what} | {levels} | {ratio} | {slopes} | {word} |")


def show_list(title: str, lines: Sequence[str]) -> None:
    print(f"\n{title}: {'nothing' if not lines else ''}")
    for line in lines:
        print(f"- {line}")


def left_lines(left: Left) -> list[str]:
    kinds = {
        "process": left.processes,
        "shared memory": left.segments,
        "in the run directory": left.in_run,
        "temporary file": left.temporary,
    }
    return [f"{kind}: {name}" for kind, names in kinds.items() for name in names]


def training(options: argparse.Namespace, folder: Path) -> list[str]:
    """The command line of the run."""
    config = BuildConfig(100, "ids")
    build_shards(list_scenes(options.images, 1, 64), folder / "shards", config, BuildOptions())
    settings = [
        *(f"data.shards={folder / 'shards'}", f"run.directory={folder / 'run'}"),
        *(f"run.steps={options.steps}", f"run.checkpoint_every={options.checkpoint_every}"),
        *("run.log_every=10", "run.tensorboard=true", f"data.loader={options.loader}"),
        *(f"views.image_size={options.size}", f"data.batch_size={options.batch}"),
        *(f"model.backbone={options.network}", f"engine.name={options.engine}"),
    ]
    if options.online:
        build_shards(list_scenes(64, 2, 64), folder / "val", config, BuildOptions())
        settings += [f"online.shards={folder / 'val'}", f"online.every={options.online_every}"]
        settings += ["online.foreground=probability", "online.pooling=normalized"]
    start = [sys.executable, "-m", "launch.cli", "train", "--recipe", "demo_cpu"]
    return [*start, "--nproc", str(RANKS), *settings, *options.settings]


def save(file: Path, samples: Sequence[Sample]) -> None:
    """A JSON line for every sample and process, appended."""
    with file.open("a") as output:
        for sample in samples:
            for name, held in sample.held.items():
                about = {"seconds": round(sample.seconds, 2), "step": sample.step, "process": name}
                values = {what: value(held) for what, value in (MEMORY | COUNTS).items()}
                output.write(json.dumps({**about, **values}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--since", type=int, default=200, help="step that growth counts from")
    parser.add_argument("--tolerance", type=float, default=0.02, help="of memory")
    parser.add_argument("--checkpoint-every", type=int, default=250)
    parser.add_argument("--online", action="store_true", help="evaluate while training")
    parser.add_argument("--online-every", type=int, default=100)
    parser.add_argument("--network", default="small")
    parser.add_argument("--engine", choices=["ddp", "deepspeed"], default="ddp")
    parser.add_argument("--loader", choices=["auto", "dali", "torch"], default="auto")
    parser.add_argument("--size", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between samples")
    parser.add_argument("--output", type=Path, help="every sample as JSON lines, appended")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the training")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        command = training(options, folder)
        watched = watch(
            *(command, folder / "run", folder / "tmp", role, options.interval),
            map_at=(options.since, options.steps - 10),
            caches=CACHES,
            environment=rank_environment(RANKS),
            log=folder / "log",
        )
        if watched.status:
            raise SystemExit((folder / "log").read_text()[-4000:])
    if options.output:
        save(options.output, watched.samples)
    span = (options.since, options.steps)
    rows = summarise(watched.samples, *span, options.tolerance)
    environment = describe_environment(Ranks(0, 1, torch.device("cpu")))
    seconds = watched.samples[-1].seconds
    print(
        f"{environment['date']}, {environment['cpu']}, {environment['cores']} cores, torch "
        f"{environment['torch']}, DALI {environment['dali']}; {seconds:.0f} s, "
        f"{len(watched.samples)} samples\n\n    "
        + subprocess.list2cmdline(sys.orig_argv[1:]).replace(name, "FOLDER")
        + "\n"
    )
    show(rows, *span)
    show_list("Descriptors and threads that grew", grown_kinds(watched.samples, *span))
    mappings = grown_mappings(watched, options.since, options.steps - 10)
    show_list("Mappings that grew by 1 MB or more", mappings)
    show_list("Left behind", left_lines(watched.left))
    if watched.left.strangers:
        show_list("Shared memory that came meanwhile, of whom is not known", watched.left.strangers)
    sys.exit(bool(watched.left) or any(row.grown for row in rows))


if __name__ == "__main__":
    main()
