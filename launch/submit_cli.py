"""`maskbank submit`: options into jobs, jobs into SLURM; --then parts the jobs of a chain."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from launch.check_arguments import problem_of
from launch.doctor import Device
from launch.follow import follow
from launch.sbatch import Job, Kind, Resources, Surroundings, render
from launch.slurm_client import SlurmError
from launch.submit import Submitted, run_folders, submit

THEN = "--then"
KINDS = ("train", "evaluate", "shards")

_ASK = {"rich_help_panel": "What SLURM is asked for"}
_RUN = {"rich_help_panel": "How it runs"}
_AROUND = {"rich_help_panel": "What is around it"}
_EPILOG = """
Everything behind `--` is what `maskbank train`, `evaluate` or `shards build` take.
Jobs parted by `--then` start one after the other, each when the one before it is COMPLETED.

Example: `maskbank submit shards --array 0-7 -- folder --images photos --masks masks --output shards
--then train --nodes 2 --gpus-per-node 8 --time 24:00:00 -- --recipe voc_supervised_saliency
data.shards=shards run.directory=runs/voc
--then evaluate --gpus-per-node 8 -- kmeans runs/voc --shards shards-val`
"""

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
Text = str | None


@dataclass(frozen=True)
class Request:
    """One job of a command line, and what is to be done with all of them."""

    job: Job
    dry_run: bool
    follow: bool


@app.command(no_args_is_help=True, epilog=_EPILOG)
def request(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(metavar="train|evaluate|shards", help="What to do.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="-- ARGUMENTS...")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the scripts, which sbatch takes; submit nothing."),
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Watch the jobs to their end.")] = False,
    nodes: Annotated[int, typer.Option(help="Machines to train on.", **_ASK)] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="One rank each; 0: CPUs.", **_ASK)] = 0,
    cpus_per_task: Annotated[
        int, typer.Option(help="Cores a node; for shards, processes.", **_ASK)
    ] = 0,
    mem: Annotated[str, typer.Option(help="Memory a node: 64G.", **_ASK)] = "",
    time: Annotated[str, typer.Option(help="Limit: minutes, H:MM:SS, D-HH:MM:SS.", **_ASK)] = "",
    partition: Annotated[str, typer.Option("--partition", "-p", help="Queue.", **_ASK)] = "",
    account: Annotated[str, typer.Option("--account", "-A", help="Who pays.", **_ASK)] = "",
    qos: Annotated[str, typer.Option(help="Quality of service.", **_ASK)] = "",
    constraint: Annotated[str, typer.Option(help="Features of nodes.", **_ASK)] = "",
    nodelist: Annotated[str, typer.Option(help="These nodes.", **_ASK)] = "",
    exclude: Annotated[str, typer.Option(help="Not these nodes.", **_ASK)] = "",
    reservation: Annotated[str, typer.Option(help="By name.", **_ASK)] = "",
    comment: Annotated[str, typer.Option(help="For the job's record.", **_ASK)] = "",
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPTION=VALUE", help="A further option of sbatch; repeatable.", **_ASK
        ),
    ] = None,
    job_name: Annotated[str, typer.Option("--job-name", "-J", **_RUN)] = "",
    array: Annotated[str, typer.Option(help="Tasks that share building: 0-7.", **_RUN)] = "",
    seeds: Annotated[
        int, typer.Option(help="So many trainings, run.seed=0, 1, … in folders seed-0, …", **_RUN)
    ] = 0,
    ranks_per_node: Annotated[int, typer.Option(help="0: one a GPU, or one.", **_RUN)] = 0,
    spare_nodes: Annotated[
        int, typer.Option(help="Asked for besides --nodes, in place of sick ones.", **_RUN)
    ] = 0,
    check: Annotated[
        int, typer.Option(help="Seconds for a look at all nodes before training; 0: none.", **_RUN)
    ] = 60,
    signal: Annotated[
        int, typer.Option(help="Seconds before the limit that training is told to end.", **_RUN)
    ] = 180,
    max_restarts: Annotated[int, typer.Option(help="For whatever reason.", **_RUN)] = 1000,
    max_crashes: Annotated[int, typer.Option(help="In a row without a step gained.", **_RUN)] = 3,
    stage: Annotated[
        str, typer.Option(metavar="FOLDER", help="Copy shards to each node: '$TMPDIR'.", **_RUN)
    ] = "",
    logs: Annotated[str, typer.Option(metavar="FOLDER", help="Of the jobs' logs.", **_RUN)] = "",
    venv: Annotated[str, typer.Option(metavar="FOLDER", help="To activate.", **_AROUND)] = "",
    container: Annotated[
        str, typer.Option(metavar="IMAGE", help="To run in, by apptainer.", **_AROUND)
    ] = "",
    bind: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER", help="In the container.", **_AROUND)
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(metavar="LINE", help="Of bash, before all: 'module load cuda'.", **_AROUND),
    ] = None,
) -> None:
    """Hand work to SLURM: it survives time limits, preemption and broken nodes, and finishes."""
    context.obj.append({name: value for name, value in locals().items() if name != "context"})


def make_job(given: dict[str, Any]) -> Job:
    """The job that options describe.

    Raises:
        ValueError: an option makes no sense; names it.
    """
    kind: Kind = given["kind"]
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of job; it is one of {', '.join(KINDS)}")
    if not given["arguments"]:
        wanted = "shards build" if kind == "shards" else kind
        raise ValueError(f"the arguments of `maskbank {wanted}` are missing; give them behind --")
    if kind != "train" and (given["seeds"] or given["spare_nodes"] or given["stage"]):
        raise ValueError("--seeds, --spare-nodes and --stage are for train")
    if kind != "shards" and given["array"]:
        raise ValueError("--array is for shards; for trainings that differ by seed take --seeds")
    same = ("gpus_per_node", "cpus_per_task", "mem", "time", "partition", "account", "qos")
    more = ("constraint", "nodelist", "exclude", "reservation", "comment")
    resources = Resources(
        nodes=given["nodes"] + given["spare_nodes"],
        extra=tuple(given["sbatch"] or ()),
        **{name: given[name] for name in (*same, *more)},
    )
    inside = bool(given["venv"] or given["container"])
    around = Surroundings(
        python=("python3",) if given["container"] else ("python",) if inside else (sys.executable,),
        setup=tuple(given["setup"] or ()),
        venv=given["venv"],
        container=given["container"],
        binds=tuple(given["bind"] or ()),
        gpus=given["gpus_per_node"] > 0,
    )
    return Job(
        kind=kind,
        arguments=tuple(given["arguments"]),
        name=given["job_name"],
        resources=resources,
        surroundings=around,
        ranks_per_node=given["ranks_per_node"] or given["gpus_per_node"] or 1,
        device=Device.cuda.value if given["gpus_per_node"] else Device.auto.value,
        check_seconds=given["check"],
        signal_seconds=given["signal"],
        **{name: given[name] for name in ("array", "seeds", "spare_nodes", "stage", "logs")},
        **{name: given[name] for name in ("max_restarts", "max_crashes")},
    )


def parse(words: Sequence[str]) -> list[Request]:
    """The jobs of a command line.

    Raises:
        ValueError: what is wrong with which.
        SystemExit: help was asked for, or an option is wrong; that has been shown.
    """
    pieces: list[list[str]] = [[]]
    for word in words:
        if word == THEN:
            pieces.append([])
        else:
            pieces[-1].append(word)
    command = typer.main.get_command(app)
    requests = []
    for number, piece in enumerate(pieces, 1):
        given: list[dict[str, Any]] = []
        try:
            command.main(piece, "maskbank submit", obj=given, help_option_names=["-h", "--help"])
        except SystemExit:
            if not given:  # --help, or an error that has been shown
                raise
        try:
            job = make_job(given[0])
        except ValueError as error:
            where = f"job {number} of {len(pieces)}: " if len(pieces) > 1 else ""
            raise ValueError(f"{where}{error}") from None
        requests.append(Request(job, given[0]["dry_run"], given[0]["follow"]))
    return requests


def main(words: Sequence[str], console: Console) -> int:
    """Does what a command line asks for; returns the exit status."""
    try:
        requests = parse(words)
        jobs = [one.job for one in requests]
        with ThreadPoolExecutor() as pool:
            problems = list(pool.map(problem_of, jobs))
        for number, (job, problem) in enumerate(zip(jobs, problems, strict=True), 1):
            if problem:
                print(problem, file=sys.stderr)
                if len(jobs) > 1:
                    what = f"job {number} of {len(jobs)}, {job.kind}"
                    print(f"maskbank: that is {what}; nothing was submitted", file=sys.stderr)
                return 2
        if any(one.dry_run for one in requests):
            sys.stdout.write("\n".join(render(job) for job in jobs))
            return 0
        done = submit(jobs)
    except (ValueError, SlurmError, OSError) as error:
        print(f"maskbank: {error}", file=sys.stderr)
        return 2
    _show(done, console)
    if any(one.follow for one in requests):
        runs = [folder for one in done for folder in run_folders(one.job)]
        return follow([one.id for one in done], runs, console)
    console.print(f"watch them with: maskbank follow {' '.join(one.id for one in done)}")
    return 0


def _show(done: Sequence[Submitted], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("job", "what", "tasks", "nodes", "after", "log"):
        table.add_column(title)
    for one in done:
        log = (
            Path(one.job.logs) / f"maskbank-{one.job.kind}-{one.id}{'_*' * bool(one.job.tasks)}.log"
        )
        nodes = "1" if one.job.kind == "shards" else str(one.job.resources.nodes)
        table.add_row(
            one.id, one.job.title, one.job.tasks or "1", nodes, one.after or "-", str(log)
        )
    console.print(table, markup=False)
