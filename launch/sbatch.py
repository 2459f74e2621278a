"""Batch scripts for SLURM: a pure function from what is to run to the text of a script.

A script is its `#SBATCH` lines, a few settings, the arguments, and one of the bodies in
`launch/batch/`, which are the same for everyone. `slurm/*.sbatch` are what it makes of
`STANDALONE`; `python -m launch.sbatch slurm` writes them again.
"""

import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

Kind = Literal["train", "evaluate", "shards"]
_BODIES = Path(__file__).with_name("batch")
_OPTION = re.compile(r"([a-z][a-z0-9-]*)(?:=(.*))?", re.DOTALL)
_TIME = re.compile(r"\d+(-\d+(:\d+){0,2})?|\d+:\d+(:\d+)?|infinite|UNLIMITED", re.IGNORECASE)
_ARRAY = re.compile(r"[0-9,:-]+(%\d+)?")
# what the script relies on
_OURS = frozenset(
    (
        *("nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "signal", "requeue", "no-requeue"),
        *("output", "error", "array", "wrap", "open-mode", "parsable", "job-name", "dependency"),
        *("kill-on-invalid-dep", "test-only", "wait", "uid", "gid"),
    )
)


@dataclass(frozen=True)
class Resources:
    """What SLURM is asked for; empty texts and zeros are left to the cluster's defaults.

    Attributes:
        nodes: with spare ones.
        gpus_per_node, cpus_per_task: a node, which is one task; mem: a node, as `64G`.
        time: limit, as SLURM writes it: minutes, H:MM:SS or D-HH:MM:SS.
        extra: further sbatch options, as `mail-type=END`.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    mem: str = ""
    time: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    nodelist: str = ""
    exclude: str = ""
    reservation: str = ""
    comment: str = ""
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus_per_node < 0 or self.cpus_per_task < 0:
            raise ValueError("--nodes must be 1 or more; GPUs and CPUs must not be negative")
        if self.time and not _TIME.fullmatch(self.time):
            raise ValueError(
                f"--time {self.time!r} is no time; write minutes, H:MM:SS or D-HH:MM:SS"
            )
        for option in self.extra:
            match = _OPTION.fullmatch(option)
            if match is None:
                raise ValueError(f"--sbatch {option!r} is not of the form option=value")
            if match.group(1) in _OURS:
                raise ValueError(
                    f"--sbatch {match.group(1)} is not yours to set: the script relies on it; look "
                    "for an option of `maskbank submit`, or edit what --dry-run prints"
                )


@dataclass(frozen=True)
class Surroundings:
    """What a command needs around it on a node.

    Attributes:
        python: words that start it; within a container, the container's.
        setup: lines of bash before anything else, as `module load cuda`.
        venv: folder of an environment to activate.
        container: an image for apptainer; empty for none.
        binds: folders that the container sees, as `/data` or `/data:/mnt`.
        gpus: the container sees them.
    """

    python: tuple[str, ...] = ("python",)
    setup: tuple[str, ...] = ()
    venv: str = ""
    container: str = ""
    binds: tuple[str, ...] = ()
    gpus: bool = False


@dataclass(frozen=True)
class Job:
    """One batch job.

    Attributes:
        kind: train, evaluate or shards.
        arguments: of `maskbank KIND`; none makes a script that takes its own.
        name: of the job.
        ranks_per_node: one a GPU, or CPU part.
        spare_nodes: of `resources.nodes`, that take the place of sick ones.
        device: auto, cpu or cuda; what the check of the nodes looks for.
        check_seconds: that the check of all nodes has; 0 for none.
        stage: folder of every node for a copy of the shards; may name variables, as `$TMPDIR`.
        signal_seconds: before the time limit that training is told to end.
        max_restarts: of the job, whatever the reason.
        max_crashes: in a row without a step gained.
        array: of tasks, as `0-7`.
        seeds: training in an array, each task with its number as `run.seed` and its own folder.
        logs: folder of the job's log.
    """

    kind: Kind
    arguments: tuple[str, ...] = ()
    name: str = ""
    resources: Resources = field(default_factory=Resources)
    surroundings: Surroundings = field(default_factory=Surroundings)
    ranks_per_node: int = 1
    spare_nodes: int = 0
    device: str = "auto"
    check_seconds: int = 60
    stage: str = ""
    signal_seconds: int = 180
    max_restarts: int = 1000
    max_crashes: int = 3
    array: str = ""
    seeds: int = 0
    logs: str = ""

    def __post_init__(self) -> None:
        if self.ranks_per_node < 1 or not 0 <= self.spare_nodes < self.resources.nodes:
            raise ValueError("one rank a node and one node besides the spare ones are the least")
        if self.spare_nodes and not self.check_seconds:
            raise ValueError("--spare-nodes needs the check of the nodes: leave --check above 0")
        if not 10 <= self.signal_seconds <= 65_535:
            raise ValueError("--signal must be 10 to 65,535 seconds before the time limit")
        if self.array and not _ARRAY.fullmatch(self.array):
            raise ValueError(f"--array {self.array!r} is no range of tasks; write 0-7 or 0-7%2")
        if any("\0" in word for word in self.arguments):
            raise ValueError("an argument holds a NUL character; no program can be given that")
        if self.seeds and not any(word.startswith(RUN_DIRECTORY) for word in self.arguments):
            raise ValueError(f"--seeds needs {RUN_DIRECTORY}FOLDER: each seed gets a folder in it")
        if "%" in self.logs or "\\" in self.logs:
            raise ValueError(f"--logs {self.logs!r}: SLURM gives % and \\ in it a meaning")

    @property
    def title(self) -> str:
        return self.name or f"maskbank-{self.kind}"

    @property
    def tasks(self) -> str:
        """Of the array, empty for a job that is none."""
        return self.array or (f"0-{self.seeds - 1}" if self.seeds else "")


_GPU_NODES = Resources(nodes=2, gpus_per_node=8, cpus_per_task=64, time="24:00:00")
_GPU_NODE = Resources(gpus_per_node=8, cpus_per_task=64, time="4:00:00")
_CPU_NODE = Resources(cpus_per_task=8, mem="16G", time="12:00:00")
# slurm/KIND.sbatch: for use by hand, taking their arguments from sbatch's command line
STANDALONE: Mapping[Kind, Job] = {
    "train": Job("train", resources=_GPU_NODES, ranks_per_node=8, device="cuda"),
    "evaluate": Job("evaluate", resources=_GPU_NODE, ranks_per_node=8),
    "shards": Job("shards", resources=_CPU_NODE, array="0-3"),
}
RUN_DIRECTORY = "run.directory="
_SAID = {
    "train": """\
# Trains a pixel encoder on one or more nodes, and finishes: near its time limit the job writes a
# checkpoint and requeues itself, when nodes fail SLURM does that, and it goes on where it was.
#
#   sbatch --nodes=4 train.sbatch --recipe voc_supervised_saliency \\
#       data.shards=/data/shards run.directory=/data/runs/voc
#
# Arguments are those of `maskbank train`. What it does in which case: docs/slurm.md.""",
    "evaluate": """\
# Measures a trained network on one or more nodes.
#
#   sbatch evaluate.sbatch kmeans /data/runs/voc --shards /data/shards-val
#
# Arguments are those of `maskbank evaluate`.""",
    "shards": """\
# Builds shards on several nodes; each task of the array writes its part, the last one the manifest.
#
#   sbatch --array=0-7 shards.sbatch folder --images photos --masks masks --output shards/train
#
# Arguments are those of `maskbank shards build`. A task that was killed, or requeued itself near
# its time limit, goes on with what it has not finished; the whole can be submitted again.""",
}


def render(job: Job) -> str:
    """The script; sbatch takes it as it is.

    Raises:
        ValueError: something cannot be written into a script without changing its meaning.
    """
    lines = ["#!/bin/bash", _SAID[job.kind], *_directives(job), "", *_settings(job)]
    if job.arguments:
        lines += ["", *_arguments(job)]
    body = (_BODIES / f"{job.kind}.bash").read_text(encoding="utf-8")
    return "\n".join([*lines, "", body])


def _directives(job: Job) -> list[str]:
    asked, options = job.resources, [("job-name", job.title)]
    if job.tasks:
        options.append(("array", job.tasks))
    nodes = 1 if job.kind == "shards" else asked.nodes
    options += [("nodes", str(nodes)), ("ntasks-per-node", "1")]
    named = {
        "gpus-per-node": asked.gpus_per_node,
        "cpus-per-task": asked.cpus_per_task,
        **{one.name: getattr(asked, one.name) for one in fields(asked) if one.type is str},
    }
    options += [(name, str(value)) for name, value in named.items() if value]
    if job.kind == "train":
        options.append(("signal", f"B:USR1@{job.signal_seconds}"))
    if job.kind == "shards":
        options.append(("signal", "B:USR1@120"))
    options += [("requeue", ""), ("open-mode", "append"), ("output", _log_file(job))]
    for option in asked.extra:
        name, _, value = option.partition("=")
        options.append((name, value))
    return [
        f"#SBATCH --{name}" + (f"={_quoted(value)}" if value else "") for name, value in options
    ]


def _log_file(job: Job) -> str:
    number = "%A_%a" if job.tasks else "%j"
    folder = job.logs.rstrip("/") + "/" if job.logs else ""
    return f"{folder}maskbank-{job.kind}-{number}.log"


def _settings(job: Job) -> list[str]:
    around = job.surroundings
    lines = list(around.setup)
    if around.venv:
        lines.append(f"source {shlex.quote(around.venv + '/bin/activate')} || exit")
    python = [shlex.quote(word) for word in around.python]
    if around.container:
        inside = ["apptainer", "exec", *(["--nv"] if around.gpus else [])]
        for bind in around.binds:
            inside += ["--bind", shlex.quote(bind)]
        python = [*inside, shlex.quote(around.container), *python]
    lines.append(f"PYTHON=({' '.join(python)})")
    if job.kind != "shards":
        lines.append(f"RANKS_PER_NODE={job.ranks_per_node}")
    if job.kind == "train":
        lines += [
            f"DEVICE={shlex.quote(job.device)}",
            f"SPARE_NODES={job.spare_nodes}  # of the nodes above, for sick ones",
            f"CHECK_SECONDS={job.check_seconds}  # for a look at all nodes before; 0: none",
            f"STAGE_FOLDER={_with_variables(job.stage)}  # for a copy of the shards on every node",
            f"SIGNAL_SECONDS={job.signal_seconds}  # as in --signal above",
            f"MAX_CRASHES={job.max_crashes}  # in a row without a step gained",
        ]
    if job.kind != "evaluate":
        lines.append(f"MAX_RESTARTS={job.max_restarts}  # of the job, whatever the reason")
    return lines


def _arguments(job: Job) -> list[str]:
    words = [shlex.quote(word) for word in job.arguments]
    if job.seeds:
        words = [
            f'{word}/seed-"$SLURM_ARRAY_TASK_ID"' if given.startswith(RUN_DIRECTORY) else word
            for given, word in zip(job.arguments, words, strict=True)
        ]
        words.append('run.seed="$SLURM_ARRAY_TASK_ID"')
    return ["set -- \\", *(f"    {word} \\" for word in words[:-1]), f"    {words[-1]}"]


def _quoted(value: str) -> str:
    """For a `#SBATCH` line, which no shell reads: in double quotes where that is needed."""
    bad = [character for character in value if ord(character) < 32 or ord(character) == 127]
    if bad:
        raise ValueError(f"{value!r} holds {bad[0]!r}, which no option of SLURM can; take it out")
    if re.fullmatch(r"[A-Za-z0-9_./:@%+,=\[\]-]+", value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _with_variables(folder: str) -> str:
    """A folder in which `$NAME` and `${NAME}` stay variables, and nothing else means anything."""
    parts = re.split(r"(\$\{?[A-Za-z_][A-Za-z0-9_]*\}?)", folder)
    words = []
    for part in parts:
        if match := re.fullmatch(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?", part):
            words.append(f'"${{{match.group(1)}:?is not set}}"')
        elif part:
            words.append(shlex.quote(part))
    return "".join(words) or "''"


def main() -> None:
    folder = Path(sys.argv[1])
    for kind, job in STANDALONE.items():
        (folder / f"{kind}.sbatch").write_text(render(job), encoding="utf-8")


if __name__ == "__main__":
    main()
