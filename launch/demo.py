"""The demo: every step of maskbank on generated scenes, as the commands that a user would type."""

import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from launch.torchrun import module_command, rank_environment, run, torchrun_command

console = Console(stderr=True)

SCENE_SIZE = 128  # pixels, about
EVALUATION_SIZE = 96


@dataclass(frozen=True)
class DemoScale:
    """How much is done.

    Attributes:
        train_scenes, test_scenes: generated.
        steps: of training; 0 takes the recipe's.
        linear_epochs: of the linear classifier.
    """

    train_scenes: int = 2000
    test_scenes: int = 400
    steps: int = 0
    linear_epochs: int = 6


@dataclass(frozen=True)
class Step:
    """Commands that run at the same time, and what they are called."""

    title: str
    commands: tuple[list[str], ...]
    num_processes: int = 1


def run_demo(output: Path, num_processes: int, scale: DemoScale) -> int:
    """Runs all steps; returns the exit status of the first that fails, or 0."""
    start = time.monotonic()
    steps = demo_steps(output, num_processes, scale)
    for number, step in enumerate(steps, 1):
        console.rule(f"{number}/{len(steps)} {step.title}", align="left")
        for command in step.commands:
            console.print(f"$ {_shown(command)}", style="dim", markup=False, soft_wrap=True)
        if status := _run_together(step):
            console.print(f"the demo stopped: step {number} ended with status {status}")
            return status
    minutes = (time.monotonic() - start) / 60
    console.print(f"done in {minutes:.1f} minutes; open {output / 'report.html'}", soft_wrap=True)
    return 0


def demo_steps(output: Path, num_processes: int, scale: DemoScale) -> list[Step]:
    """The demo as commands; steps that are done already are quick or go on where they stopped."""
    train, test, run_folder = output / "shards/train", output / "shards/test", output
    settings = [f"data.shards={train}", f"run.directory={run_folder}"]
    if scale.steps:
        settings.append(f"run.steps={scale.steps}")
    return [
        Step(
            "scenes into shards",
            (
                _scenes(train, scale.train_scenes, seed=1),
                _scenes(test, scale.test_scenes, seed=2),
            ),
        ),
        Step(
            f"training on {num_processes} ranks",
            (
                torchrun_command(
                    "trainer.train",
                    ["--recipe", "demo_cpu", *settings],
                    num_processes,
                ),
            ),
            num_processes,
        ),
        Step("K-means, network before and after", _both(_kmeans(run_folder, test)), 2),
        Step(
            "linear classifier, before and after", _both(_linear(run_folder, train, test, scale)), 2
        ),
        Step("report", (module_command("evaluation.cli", ["report", str(run_folder)]),)),
    ]


def _scenes(output: Path, count: int, seed: int) -> list[str]:
    arguments = ["build", "scenes", "--output", str(output), "--count", str(count)]
    arguments += ["--size", str(SCENE_SIZE), "--seed", str(seed), "--samples-per-shard", "250"]
    return module_command("data_pipeline.cli", [*arguments, "--processes", "2"])


def _kmeans(run_folder: Path, test: Path) -> list[str]:
    arguments = ["kmeans", str(run_folder), "--shards", str(test), "--precision", "auto"]
    return module_command("evaluation.cli", [*arguments, "--size", str(EVALUATION_SIZE)])


def _linear(run_folder: Path, train: Path, test: Path, scale: DemoScale) -> list[str]:
    arguments = ["linear", str(run_folder), "--train-shards", str(train), "--shards", str(test)]
    arguments += ["--size", str(EVALUATION_SIZE), "--no-augment", "--precision", "auto"]
    epochs, decay_epoch = scale.linear_epochs, max(0, scale.linear_epochs * 3 // 4 - 1)
    arguments += ["--epochs", str(epochs), "--decay-epoch", str(decay_epoch), "--select", "last"]
    return module_command("evaluation.cli", arguments)


def _both(command: list[str]) -> tuple[list[str], list[str]]:
    return [*command, "--initial"], command


def _run_together(step: Step) -> int:
    """Exit status of the first command that failed; the others run to their end."""
    if len(step.commands) == 1:
        return run(step.commands[0], step.num_processes)
    environment = rank_environment(len(step.commands))
    first, *others = step.commands
    with ExitStack() as files:
        # shown afterwards, since two progress bars would overwrite each other
        outputs = [files.enter_context(tempfile.TemporaryFile()) for _ in others]
        processes = [subprocess.Popen(first, env=environment)]
        processes += [
            subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            for command, output in zip(others, outputs, strict=True)
        ]
        statuses = [process.wait() for process in processes]
        for output in outputs:
            output.seek(0)
            sys.stdout.buffer.write(output.read())
            sys.stdout.flush()
    return next((status for status in statuses if status), 0)


def _shown(command: Sequence[str]) -> str:
    """The command as a user types it."""
    words = ["python" if word.endswith(("python", "python3")) else word for word in command]
    return shlex.join(words)
