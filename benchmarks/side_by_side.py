"""maskbank beside its peers: one run, one machine, the same data, interleaved windows.

    python -m benchmarks.side_by_side [--root FOLDER] [--shards FOLDER] [--rounds 5] [--steps 10]
        [--only ID,…] [--output FILE.jsonl] [key=value …]

Every contender (see `CONTENDERS`) is a process that trains on demand and otherwise stands still
(`benchmarks.contender`). In each round each of them first eats the batches that it made while it
stood still, which are not counted, and then trains the steps that are. Ratios are taken within a
round. What cannot be run has a row that says why. Without data, scenes are generated. key=value are
settings of maskbank.
"""

import argparse
import fnmatch
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.comparison_data import ComparisonData, find_data
from benchmarks.contender import contender_arguments
from benchmarks.contender_process import ContenderFailed, ContenderProcess
from benchmarks.environments import DEFAULT_FOLDER, NotInstalled, peer_python

TRAINING, LOADING = "training", "loading alone"
_LOADING_STEPS = 10  # times as many, since they are that much shorter


@dataclass(frozen=True)
class Contender:
    """Who can take part.

    Attributes:
        id: short name, for --only.
        module: that is started with --contender.
        what: it does differently, for the table.
        arguments: of its own.
        task: contenders are compared within it.
        environment, packages: of a peer, see `peer_python`.
        needs: forms of the data that it reads.
        saves: what the file of its encoder is called, after the id.
        saliency: whether its encoder predicts one.
    """

    id: str
    module: str
    what: str
    arguments: tuple[str, ...] = ()
    task: str = TRAINING
    environment: str = ""
    packages: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("root",)
    saves: str = ".pt"
    saliency: bool = True


_MASKBANK, _LIGHTLY = "benchmarks.maskbank_contender", "benchmarks.compare_lightly"
_WEBDATASET = "benchmarks.compare_webdataset"
_OURS: dict[str, Any] = {"module": _MASKBANK, "needs": ("shards",), "saves": ".safetensors"}
_LIGHTLYS: dict[str, Any] = {
    "module": _LIGHTLY,
    "environment": "lightly",
    "packages": ("lightly>=1.5",),
    "saliency": False,
}
_WEBDATASETS: dict[str, Any] = {
    "module": _WEBDATASET,
    "environment": "webdataset",
    "packages": ("webdataset>=1.0",),
    "needs": ("shards",),
    "saves": ".safetensors",
}
CONTENDERS = (
    Contender("maskbank", what="the whole training loop, bf16", **_OURS),
    Contender(
        "maskbank-float32",
        what="the same in float32",
        arguments=("run.precision=float32",),
        **_OURS,
    ),
    Contender(
        "maskbank-stride8",
        what="the same in bf16, its loss on a pixel of each 8×8",
        arguments=("loss.pixel_stride=8",),
        **_OURS,
    ),
    Contender("plain", "benchmarks.compare_plain", "the published method written out, float32"),
    Contender("lightly", what="lightly's DenseCL, no decoder, float32", **_LIGHTLYS),
    Contender(
        "lightly-bf16",
        what="lightly's DenseCL, no decoder, bf16",
        arguments=("--precision", "bf16"),
        **_LIGHTLYS,
    ),
    Contender(
        "webdataset",
        what="maskbank's network and loss, bf16, fed by webdataset and PIL",
        **_WEBDATASETS,
    ),
    Contender(
        "torchvision",
        "benchmarks.compare_torchvision",
        "supervised reference loop of torchvision, one view, float32",
        saliency=False,
    ),
    Contender(
        "maskbank-loading",
        what="two views and masks",
        arguments=("--loading",),
        task=LOADING,
        **_OURS,
    ),
    Contender(
        "maskbank-loading-dali",
        what="the same with DALI",
        arguments=("--loading", "data.loader=dali"),
        task=LOADING,
        **_OURS,
    ),
    Contender(
        "webdataset-loading",
        what="two views and masks, webdataset and PIL",
        arguments=("--loading",),
        task=LOADING,
        **_WEBDATASETS,
    ),
)


@dataclass
class Result:
    """What was seen of a contender.

    Attributes:
        ready: what it said of itself.
        windows: its answers, one a round.
        not_run: why there are no figures; empty where there are.
    """

    contender: Contender
    ready: dict[str, Any] = field(default_factory=dict)
    windows: list[dict[str, Any]] = field(default_factory=list)
    not_run: str = ""

    def per_second(self) -> list[float]:
        return [window["images"] / window["seconds"] for window in self.windows]

    def per_cpu_second(self) -> list[float]:
        return [window["images"] / max(window["cpu_seconds"], 1e-9) for window in self.windows]

    def peak_mb(self) -> list[float]:
        return [window["peak_rss_mb"] for window in self.windows]


def compare(
    contenders: Sequence[Contender], data: ComparisonData, options: argparse.Namespace
) -> list[Result]:
    """Runs the contenders side by side; none that fails ends the others."""
    results = [Result(contender) for contender in contenders]
    running: dict[str, ContenderProcess] = {}
    try:
        for result in results:
            _start(result, data, options, running)
        for number in range(options.rounds):
            # there and back, so that a machine that slows down over a round slows all alike
            for result in results if number % 2 == 0 else reversed(results):
                if not result.not_run:
                    _say(f"round {number + 1} of {options.rounds}: {result.contender.id}")
                    _window(result, running[result.contender.id], options)
        for result in results:
            if options.save is not None and result.windows and not result.not_run:
                _save(result.contender, running[result.contender.id], options)
    finally:
        for process in running.values():
            process.end()
    return results


def _start(
    result: Result,
    data: ComparisonData,
    options: argparse.Namespace,
    running: dict[str, ContenderProcess],
) -> None:
    """Starts a contender and waits until it stands still again after its first steps."""
    contender = result.contender
    missing = [form for form in contender.needs if getattr(data, form) is None]
    if missing:
        result.not_run = f"needs --{missing[0]}"
        return
    _say(f"starting {contender.id}")
    try:
        python = peer_python(contender.environment, contender.packages, options.environments)
        command = command_of(python, contender, data, options)
        log = options.work / "logs" / f"{contender.id}.log"
        process = ContenderProcess(command, log, options.start_limit)
    except (NotInstalled, ContenderFailed) as error:
        result.not_run = str(error)
        return
    running[contender.id], result.ready = process, process.ready


def command_of(
    python: Path, contender: Contender, data: ComparisonData, options: argparse.Namespace
) -> list[str]:
    """What starts a contender."""
    start, size, batch = [str(python), "-m", contender.module], options.size, options.batch
    if contender.module == _MASKBANK:
        settings = (f"views.image_size={size}", f"data.batch_size={batch}", *options.settings)
        return [*start, "--shards", str(data.shards), *settings, *contender.arguments]
    where = [word for form in contender.needs for word in (f"--{form}", str(getattr(data, form)))]
    sizes = ["--size", str(size), "--batch", str(batch), "--workers", str(options.workers)]
    return [*start, "--contender", *where, *sizes, *contender.arguments]


def _window(result: Result, process: ContenderProcess, options: argparse.Namespace) -> None:
    """One timed window, after the batches that were made while the contender stood still."""
    prefetched = int(result.ready["settings"].get("prefetched", 0))
    time.sleep(options.pause)  # the one before fills its queues and comes to rest
    try:
        process.ask(options.window_limit, steps=max(1, prefetched))
        steps = options.steps * (_LOADING_STEPS if result.contender.task == LOADING else 1)
        result.windows.append(process.ask(options.window_limit, steps=steps))
    except ContenderFailed as error:
        result.not_run = f"failed in round {len(result.windows) + 1}: {error}"
        process.kill()


def _save(contender: Contender, process: ContenderProcess, options: argparse.Namespace) -> None:
    """Its encoder into the folder --save; who has none says so."""
    options.save.mkdir(parents=True, exist_ok=True)
    file = options.save.absolute() / f"{contender.id}{contender.saves}"
    try:
        process.ask(options.window_limit, save=str(file))
    except ContenderFailed as error:
        _say(f"{contender.id}: {error}")


def table(results: Sequence[Result], data: ComparisonData, options: argparse.Namespace) -> str:
    """Markdown: where it was run, one table a task, and who runs on which versions."""
    lines = [
        f"{machine_line()}; {data.description}; "
        f"{options.size} pixels, batch {options.batch}; median (least–greatest) of "
        f"{options.rounds} interleaved rounds of {options.steps} steps ({_LOADING_STEPS} times as "
        "many of loading alone); × is against the first row, within a round",
    ]
    for task in dict.fromkeys(result.contender.task for result in results):
        rows = [result for result in results if result.contender.task == task]
        lines += [
            "",
            f"| {task} | images/s | × | images per CPU-second | × | peak memory, MB |",
            "|---|---|---|---|---|---|",
        ]
        first = next((row for row in rows if not row.not_run), None)
        lines += [_row(row, first) for row in rows]
    lines += ["", *_version_lines(results)]
    return "\n".join(lines)


def _row(result: Result, first: Result | None) -> str:
    title = f"{result.contender.id}: {result.contender.what}"
    if result.not_run or first is None:
        return f"| {title} | not run: {result.not_run.replace('|', '/')} | | | | |"
    speed, thrift = result.per_second(), result.per_cpu_second()
    cells = [
        title,
        _spread(speed, 1),
        _spread(_ratios(speed, first.per_second()), 2),
        _spread(thrift, 1),
        _spread(_ratios(thrift, first.per_cpu_second()), 2),
        f"{max(result.peak_mb()):,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _ratios(values: Sequence[float], first: Sequence[float]) -> list[float]:
    return [value / other for value, other in zip(values, first, strict=True)]


def _spread(values: Sequence[float], digits: int) -> str:
    median, least, most = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({least:.{digits}f}–{most:.{digits}f})"


def _version_lines(results: Sequence[Result]) -> list[str]:
    """Versions, contenders of the same ones together."""
    groups: dict[str, list[str]] = {}
    for result in results:
        if result.ready:
            versions = result.ready.get("versions", {}).items()
            said = ", ".join(f"{name} {version}" for name, version in versions)
            groups.setdefault(said, []).append(result.contender.id)
    return [f"- {', '.join(names)}: {said}" for said, names in groups.items()]


def write_lines(file: Path, results: Sequence[Result], data: ComparisonData) -> None:
    """One JSON line a contender."""
    machine = {"date": _date(), "cpu": _processor(), "cores": len(os.sched_getaffinity(0))}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as output:
        for result in results:
            row = {"question": "side_by_side", **machine, "data": data.description}
            row |= {**asdict(result), "contender": result.contender.id}
            row |= {"task": result.contender.task, "what": result.contender.what}
            output.write(json.dumps(row) + "\n")


def script(
    description: str | None,
    only: Sequence[str],
    contend: Callable[[argparse.Namespace], None] | None = None,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """The main of this file and of `compare_*`: a contender, or a comparison of `only`."""
    parser = contender_arguments(description)
    if add_arguments is not None:
        add_arguments(parser)
    if contend is not None and "--contender" in sys.argv[1:]:
        contend(parser.parse_args())
        return
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="timed, of each contender a round")
    parser.add_argument("--only", metavar="ID,…", default=",".join(only), help="or patterns")
    parser.add_argument("--output", type=Path, help="JSON lines")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="for the encoders, at the end")
    parser.add_argument("--work", type=Path, default=Path("runs/side_by_side"))
    parser.add_argument("--environments", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--pause", type=float, default=1.5, help="seconds before each window")
    parser.add_argument("--start-limit", type=float, default=600.0, help="seconds")
    parser.add_argument("--window-limit", type=float, default=900.0, help="seconds")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    chosen = [
        contender
        for contender in CONTENDERS
        if any(fnmatch.fnmatchcase(contender.id, wanted) for wanted in options.only.split(","))
    ]
    if not chosen:
        parser.error(f"--only: there are {', '.join(contender.id for contender in CONTENDERS)}")
    # a driver that is told to end still ends its contenders
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    data = find_data(options.root, options.shards, options.work)
    results = compare(chosen, data, options)
    if options.output is not None:
        write_lines(options.output, results, data)
    print(table(results, data, options))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def machine_line() -> str:
    """Date, processor and cores."""
    return f"{_date()}, {_processor()}, {len(os.sched_getaffinity(0))} cores"


def _date() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    script(__doc__, ["*"])
