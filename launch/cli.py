"""The command `maskbank`: finds out who does it, and starts that with the arguments as they are."""

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from launch.demo import DemoScale, run_demo
from launch.doctor import Device, DoctorOptions, run_doctor
from launch.torchrun import module_command, run, split_nproc, torchrun_command

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Learn to segment images without labels: shards → train → evaluate.",
    epilog="Try `maskbank demo`; every command has `--help` with an example.",
)
_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
NumProcesses = Annotated[
    int, typer.Option("--nproc", "-n", min=1, help="Ranks on this machine: one a GPU, or CPU part.")
]


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the demo.")] = Path("runs/demo"),
    num_processes: NumProcesses = 2,
    scenes: Annotated[int, typer.Option(min=8, help="Scenes to train on.")] = 2000,
    steps: Annotated[int, typer.Option(min=0, help="Training steps; 0: the recipe's.")] = 0,
) -> None:
    """Scenes → shards → training on 2 ranks → measures → report.html, in a few minutes on a CPU.

    Example: `maskbank demo --output runs/demo`
    """
    scale = DemoScale(train_scenes=scenes, test_scenes=max(8, scenes // 5), steps=steps)
    sys.exit(run_demo(output, num_processes, scale))


@app.command(context_settings=_FORWARD)
def shards(context: typer.Context) -> None:
    """Pack images, masks and labels into shards: `maskbank shards build …`."""
    sys.exit(run(module_command("data_pipeline.cli", context.args)))


@app.command(context_settings=_FORWARD)
def masks(context: typer.Context) -> None:
    """Make saliency masks of images that have none, and score them: `maskbank masks make …`."""
    sys.exit(run(module_command("data_pipeline.masks.cli", context.args)))


@app.command()
def train(
    recipe: Annotated[Optional[str], typer.Option(help="A recipe that comes along.")] = None,  # noqa: UP045 (typer)
    config: Annotated[Optional[Path], typer.Option(help="A YAML file over the recipe.")] = None,  # noqa: UP045
    num_processes: NumProcesses = 1,
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings over both."),
    ] = None,
) -> None:
    """Train a pixel encoder; settings as `key=value` win over recipe and file.

    The same command started again goes on from the newest checkpoint.

    Example: `maskbank train --recipe demo_cpu --nproc 2 data.shards=shards/train
    run.directory=runs/mine run.steps=500`
    """
    arguments = list(settings or [])
    if config is not None:
        arguments = ["--config", str(config), *arguments]
    if recipe is not None:
        arguments = ["--recipe", recipe, *arguments]
    # what is wrong is said here, once, before any rank starts
    checks = module_command("trainer.preflight", ["--world-size", str(num_processes), *arguments])
    if status := run(checks):
        sys.exit(status)
    sys.exit(run(torchrun_command("trainer.train", arguments, num_processes), num_processes))


@app.command(context_settings=_FORWARD)
def evaluate(context: typer.Context) -> None:
    """Measure a trained network: `maskbank evaluate kmeans|linear|report …`."""
    sys.exit(_run_on_ranks("evaluation.cli", context.args))


@app.command(context_settings=_FORWARD)
def cluster(context: typer.Context) -> None:
    """Group unlabelled photographs into classes: `maskbank cluster RUN --shards SHARDS`."""
    sys.exit(_run_on_ranks("evaluation.cli", ["cluster", *context.args]))


@app.command(context_settings=_FORWARD)
def predict(context: typer.Context) -> None:
    """Class maps of images: `maskbank predict RUN IMAGES… --output FOLDER`."""
    sys.exit(_run_on_ranks("evaluation.predict_cli", context.args))


@app.command(context_settings=_FORWARD)
def export(context: typer.Context) -> None:
    """Write a network for other programs: `maskbank export NETWORK --format onnx --output FILE`."""
    sys.exit(run(module_command("trainer.export_cli", context.args)))


@app.command(context_settings={**_FORWARD, "allow_interspersed_args": False})
def submit(context: typer.Context) -> None:
    """Hand work to SLURM: `maskbank submit train --nodes 2 … -- ARGUMENTS`, and chains of jobs."""
    from launch import submit_cli

    sys.exit(submit_cli.main(context.args, Console()))


@app.command()
def follow(
    jobs: Annotated[list[str], typer.Argument(help="Numbers of jobs.")],
    run_folders: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--run", help="Run directory whose metrics to show; repeatable."),
    ] = None,
) -> None:
    """Watch SLURM jobs to their end: states, nodes, metrics. Ctrl-C leaves them running.

    Example: `maskbank follow 1234 1235 --run runs/voc`
    """
    from launch.follow import follow

    sys.exit(follow(jobs, run_folders or [], Console()))


@app.command()
def doctor(
    num_processes: Annotated[
        Optional[int],  # noqa: UP045 (typer)
        typer.Option("--nproc", "-n", min=1, help="Ranks to start: by default one a GPU, else 2."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where runs and shards are to be.")] = Path("."),
    device: Annotated[Device, typer.Option(help="What the ranks are to run on.")] = Device.auto,
    timeout: Annotated[
        float, typer.Option(min=5, help="Seconds for each check that may hang, and for all ranks.")
    ] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Examine this machine before hours are spent on it: versions, devices, disk, ranks.

    Exit status 1 if something failed; each failure and warning comes with what to do.

    Example: `maskbank doctor --folder /data/runs`; on several nodes, in a job:
    `srun --ntasks-per-node=1 maskbank doctor --folder /shared/runs`
    """
    sys.exit(run_doctor(DoctorOptions(num_processes, folder, device.value, timeout, as_json)))


def _run_on_ranks(module: str, arguments: list[str]) -> int:
    """Runs a module on as many ranks as `--nproc N` among its arguments says; its exit status."""
    try:
        num_processes, others = split_nproc(arguments)
    except ValueError as error:
        print(f"maskbank: {error}", file=sys.stderr)
        return 2
    return run(torchrun_command(module, others, num_processes), num_processes)


def main() -> None:
    app(prog_name="maskbank")


if __name__ == "__main__":
    main()
