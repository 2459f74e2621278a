"""How long until the embeddings are as good? maskbank and its peers, trained side by side.

    python -m benchmarks.time_to_quality --root FOLDER --shards FOLDER --labelled FOLDER
        [--steps 500] [--every 100] [--only maskbank,plain] [--work runs/time_to_quality]

All contenders (`benchmarks.side_by_side`) train the same number of steps of the same batch size,
each with its schedule over those steps, in windows of --window steps by turns, so that whatever the
machine does happens to all of them; only time inside a contender's windows counts as its own. Every
--every steps its encoder is saved. In the end each is scored on the labelled shards with K-means as
`benchmarks.stamps20` scores: on the saliency that it predicts, and the last one on the given masks,
too, which are all that peers without saliency can be scored on. The time to equal quality is that
of maskbank's first score that reaches plain's last.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.comparison_data import find_data
from benchmarks.contender import WARM_UP
from benchmarks.contender_process import ContenderFailed, ContenderProcess
from benchmarks.environments import DEFAULT_FOLDER, NotInstalled, peer_python
from benchmarks.side_by_side import CONTENDERS, Contender, command_of, machine_line
from benchmarks.stamps20 import KMEANS

_LIMIT = 3600.0  # seconds for a window or a start
_STEPS_OF = ("benchmarks.compare_plain", "benchmarks.compare_webdataset")  # have --total-steps


@dataclass
class Trained:
    """A contender's way.

    Attributes:
        seconds: of training, by step.
        saved: encoders, by step.
        scores: K-means results by (step, foreground).
        peak_mb: of its memory.
    """

    contender: Contender
    seconds: dict[int, float] = field(default_factory=dict)
    saved: dict[int, Path] = field(default_factory=dict)
    scores: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    peak_mb: float = 0.0


def train_side_by_side(contenders: list[Contender], options: argparse.Namespace) -> list[Trained]:
    """Trains all of them by turns; steps before a contender is ready count as those that follow."""
    data = find_data(options.root, options.shards, options.work)
    running: list[tuple[Trained, ContenderProcess]] = []
    try:
        for contender in contenders:
            python = peer_python(contender.environment, contender.packages, options.environments)
            command = command_of(python, contender, data, options)
            if contender.module in _STEPS_OF:
                command += ["--total-steps", str(options.steps)]
            log = options.work / "logs" / f"{contender.id}.log"
            running.append((Trained(contender), ContenderProcess(command, log, _LIMIT)))
        done = {trained.contender.id: WARM_UP for trained, _ in running}
        spent = dict.fromkeys(done, 0.0)
        for target in range(options.window, options.steps + 1, options.window):
            for trained, process in running:
                name = trained.contender.id
                answer = process.ask(_LIMIT, steps=target - done[name])
                if target == options.window:  # the first steps, too, at the speed of those after
                    answer["seconds"] *= target / (target - done[name])
                spent[name] += answer["seconds"]
                done[name] = target
                trained.seconds[target] = spent[name]
                trained.peak_mb = answer["peak_rss_mb"]
                print(
                    f"{name}: step {target}, {spent[name]:.0f} s, loss {answer['loss']}", flush=True
                )
                if target % options.every == 0 or target == options.steps:
                    file = options.work.absolute() / f"{name}-{target:05}{trained.contender.saves}"
                    process.ask(_LIMIT, save=str(file))
                    trained.saved[target] = file
    finally:
        for _, process in running:
            process.end()
    return [trained for trained, _ in running]


def score(file: Path, foreground: str, options: argparse.Namespace) -> dict[str, Any]:
    """K-means of a saved encoder, as the command's result file has it."""
    output = options.work / "scores" / f"{file.stem}-{foreground}"
    arguments = list(KMEANS)
    arguments[arguments.index("--foreground") + 1] = foreground
    command = [sys.executable, "-m", "launch.cli", "evaluate", "kmeans", str(file)]
    where = ["--shards", str(options.labelled), "--output", str(output)]
    done = subprocess.run([*command, *where, *arguments], stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{file} could not be scored")
    (found,) = output.rglob("kmeans*.json")
    result: dict[str, Any] = json.loads(found.read_text())
    return result


def score_all(trained: list[Trained], options: argparse.Namespace) -> None:
    for one in trained:
        own = "probability" if one.contender.saliency else "mask"
        for step, file in one.saved.items():
            last = step == max(one.saved)
            for foreground in dict.fromkeys((own, "mask") if last else (own,)):
                one.scores[step, foreground] = score(file, foreground, options)


def table(trained: list[Trained], options: argparse.Namespace) -> str:
    lines = [
        machine_line(),
        "",
        "| contender | step | seconds | K-means mIoU | foreground IoU | peak memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for one in trained:
        for (step, foreground), found in one.scores.items():
            of = "" if foreground == "probability" else ", given masks"
            lines.append(
                f"| {one.contender.id}{of} | {step} | {one.seconds[step]:.0f} | "
                f"{found['miou']['mean']:.1f} ± {found['miou']['std']:.1f} | "
                f"{found['foreground_iou']:.1f} | {one.peak_mb:,.0f} |"
            )
    own = {one.contender.id: one for one in trained}
    if {"maskbank", "plain"} <= own.keys():
        lines += ["", _time_to_equal(own["maskbank"], own["plain"], options.steps)]
    return "\n".join(lines)


def _time_to_equal(ours: Trained, theirs: Trained, steps: int) -> str:
    goal = theirs.scores[steps, "probability"]["miou"]["mean"]
    seconds = theirs.seconds[steps]
    reached = [
        step
        for (step, foreground), found in ours.scores.items()
        if foreground == "probability" and found["miou"]["mean"] >= goal
    ]
    if not reached:
        return f"maskbank did not reach the {goal:.1f} that plain has after {seconds:.0f} s."
    first = ours.seconds[min(reached)]
    return (
        f"plain has {goal:.1f} after {seconds:.0f} s ({steps} steps); maskbank reaches it at step "
        f"{min(reached)}, after {first:.0f} s: {first / seconds:.2f} of the time. "
        f"All {steps} steps take {ours.seconds[steps] / seconds:.2f} of plain's time."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--labelled", type=Path, help="labelled shards to score on")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--window", type=int, default=20)
    parser.add_argument("--only", default="maskbank,plain")
    parser.add_argument("--work", type=Path, default=Path("runs/time_to_quality"))
    parser.add_argument("--output", type=Path, help="JSON lines")
    parser.add_argument("--environments", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if options.root is None or options.labelled is None:
        print("skipped: it takes most of an hour; give --root, --shards and --labelled")
        return
    if options.window <= WARM_UP or options.steps % options.window:
        parser.error(f"--window must be above {WARM_UP} and divide --steps")
    options.settings = [f"run.steps={options.steps}"]
    wanted = options.only.split(",")
    contenders = [contender for contender in CONTENDERS if contender.id in wanted]
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        trained = train_side_by_side(contenders, options)
    except (ContenderFailed, NotInstalled) as error:
        sys.exit(str(error))
    score_all(trained, options)
    rows = [
        {"contender": one.contender.id, "step": step, "foreground": foreground}
        | {"seconds": one.seconds[step], "peak_mb": one.peak_mb}
        | {"miou": found["miou"], "foreground_iou": found["foreground_iou"]}
        for one in trained
        for (step, foreground), found in one.scores.items()
    ]
    output = options.output or options.work / "time_to_quality.jsonl"
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(table(trained, options))


if __name__ == "__main__":
    main()
