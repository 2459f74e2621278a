"""Batch scripts: golden files, and what is refused because it would change a script's meaning."""

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.sbatch import STANDALONE, Job, Kind, Resources, Surroundings, render

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/data/sbatch"
EVERYTHING = Job(
    kind="train",
    arguments=(
        "--recipe",
        "voc_unsupervised_saliency",
        "data.shards=/data/my shards",
        "run.directory=runs/x",
    ),
    name='a "name"',
    resources=Resources(
        nodes=5,
        gpus_per_node=4,
        cpus_per_task=32,
        mem="256G",
        time="2-00:00:00",
        partition="gpu",
        account="lab",
        qos="long",
        constraint="a100&ib",
        nodelist="gpu[01-10]",
        exclude="gpu[03,07]",
        reservation="maintenance",
        comment="all of it",
        extra=("mail-type=END", "exclusive"),
    ),
    surroundings=Surroundings(
        python=("python3",),
        setup=("module load apptainer",),
        venv="/home/me/my env",
        container="/images/maskbank.sif",
        binds=("/data", "/scratch:/tmp"),
        gpus=True,
    ),
    ranks_per_node=4,
    spare_nodes=1,
    device="cuda",
    check_seconds=90,
    stage="$TMPDIR/shards",
    signal_seconds=300,
    max_restarts=50,
    max_crashes=2,
    seeds=3,
    logs="my logs",
)


@pytest.mark.parametrize("kind", ["train", "evaluate", "shards"])
def test_ready_scripts_are_what_is_rendered(kind: Kind) -> None:
    """`python -m launch.sbatch slurm` writes them anew."""
    assert (ROOT / f"slurm/{kind}.sbatch").read_text() == render(STANDALONE[kind])


def test_everything_at_once_is_as_it_was() -> None:
    """The part that depends on options; the rest is launch/batch/train.bash as it is."""
    rendered = render(EVERYTHING)
    body = (ROOT / "launch/batch/train.bash").read_text()
    assert rendered.endswith(body)
    assert rendered.removesuffix(body) == (GOLDEN / "everything.sbatch").read_text()


@pytest.mark.parametrize("job", [*STANDALONE.values(), EVERYTHING])
def test_scripts_are_bash(job: Job) -> None:
    checked = subprocess.run(["bash", "-n"], input=render(job), text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def arguments_in_bash(job: Job, stop: str) -> list[str]:
    """What bash makes of the script's lines before its body."""
    script = render(job).partition(stop)[0]
    printed = subprocess.run(
        ["bash", "-c", script + "printf '%s\\0' \"$@\""], capture_output=True, check=True
    ).stdout
    return printed.decode("utf-8", "surrogateescape").split("\0")[:-1]


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
        min_size=1,
        max_size=4,
    )
)
def test_arguments_reach_the_job_unharmed(words: list[str]) -> None:
    job = Job("evaluate", arguments=tuple(words))
    assert arguments_in_bash(job, "set -uo pipefail") == words


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\x1b[2J", "tab\there"])
@pytest.mark.parametrize("where", ["name", "comment", "partition", "extra", "logs"])
def test_control_characters_in_options_are_refused(bad: str, where: str) -> None:
    """A new line would end the `#SBATCH` line, and begin another one."""
    if where in ("name", "logs"):
        job = Job("train", **{where: bad})  # type: ignore[arg-type]
    elif where == "extra":
        job = Job("train", resources=Resources(extra=(f"mail-user={bad}",)))
    else:
        job = Job("train", resources=Resources(**{where: bad}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="which no option of SLURM can"):
        render(job)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": "soon"}, "is no time"),
        ({"time": "1:00\n#SBATCH --uid=0"}, "is no time"),
        ({"nodes": 0}, "--nodes must be 1 or more"),
        ({"extra": ("--uid=0",)}, "not of the form"),
        ({"extra": ("uid=0",)}, "is not yours to set"),
        ({"extra": ("output=/etc/passwd",)}, "is not yours to set"),
    ],
)
def test_senseless_resources_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Resources(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spare_nodes": 1}, "one node besides the spare ones"),
        ({"ranks_per_node": 0}, "one rank a node"),
        ({"signal_seconds": 1}, "--signal must be 10"),
        ({"array": "0-3;rm"}, "is no range of tasks"),
        ({"arguments": ("a\0b",)}, "NUL"),
        ({"seeds": 2, "arguments": ("--recipe", "x")}, "--seeds needs run.directory="),
        ({"logs": "%x"}, "SLURM gives"),
        (
            {"spare_nodes": 1, "resources": Resources(nodes=2), "check_seconds": 0},
            "--spare-nodes needs the check",
        ),
    ],
)
def test_senseless_jobs_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Job("train", **options)  # type: ignore[arg-type]


def test_seeds_get_folders_of_their_own() -> None:
    job = Job("train", arguments=("run.directory=a $b/c",), seeds=2)
    script = render(job)
    assert "#SBATCH --array=0-1\n" in script
    words = shlex.split(
        script.partition("set -- \\\n")[2].partition("\n\n")[0].replace("\\\n", " ")
    )
    assert words == [
        "run.directory=a $b/c/seed-$SLURM_ARRAY_TASK_ID",
        "run.seed=$SLURM_ARRAY_TASK_ID",
    ]
    # the folder's own dollar stays a dollar
    assert "'run.directory=a $b/c'/seed-\"$SLURM_ARRAY_TASK_ID\"" in script


@pytest.mark.parametrize(
    ("stage", "environment", "folder"),
    [
        ("$TMPDIR/x y", {"TMPDIR": "/local/a b"}, "/local/a b/x y"),
        ("${TMPDIR}", {"TMPDIR": "/local"}, "/local"),
        ("/a/$(touch pwned)`id`", {}, "/a/$(touch pwned)`id`"),
        ("/plain", {}, "/plain"),
    ],
)
def test_staging_folders_may_name_variables(
    stage: str, environment: dict[str, str], folder: str
) -> None:
    job = replace(STANDALONE["train"], stage=stage)
    line = next(line for line in render(job).splitlines() if line.startswith("STAGE_FOLDER="))
    printed = subprocess.run(
        ["bash", "-c", f'{line}\nprintf %s "$STAGE_FOLDER"'],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed == folder
