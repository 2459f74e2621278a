"""Are a job's arguments right? Asked before it waits in a queue for hours."""

import os
import shutil
import subprocess

from launch.sbatch import Job, Kind
from launch.torchrun import module_command

# what reads the arguments on the nodes, told to read them and do nothing
_READERS: dict[Kind, tuple[str, ...]] = {
    "train": ("trainer.folders", "--check"),
    "evaluate": ("evaluation.cli", "--check-arguments"),
    "shards": ("data_pipeline.cli", "--check-arguments", "build"),
}
_WRONG = 2  # exit status


def problem_of(job: Job) -> str:
    """What the job's own command would say of its arguments, or ''.

    Options, settings, their types and ranges; files and folders may be on the cluster alone. Where
    the command cannot run here, as without torch, the answer is ''.
    """
    module, *options = _READERS[job.kind]
    width = str(shutil.get_terminal_size().columns)
    done = subprocess.run(
        module_command(module, [*options, *job.arguments]),
        env={**os.environ, "COLUMNS": width, "WORLD_SIZE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    return done.stderr.strip() if done.returncode == _WRONG else ""
