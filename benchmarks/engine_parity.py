"""Do all stages of ZeRO train as DDP does, with gradient accumulation, and across a restart?

    python -m benchmarks.engine_parity [--ranks 1,2] [--output FILE]

Every stage, with and without offloading, and 1 to 4 micro-batches a step, on real gloo ranks: five
steps in one go; the same from its own checkpoint of step 2 in a new process. With 1 and 3
micro-batches also DDP's checkpoint continued by DeepSpeed, and DeepSpeed's by DDP; and five steps
of which the second has a loss that is not finite in the middle of its micro-batches, with clipped
gradients. Each is compared with DDP's five steps: losses, the gradient's norm, weights of both
networks, SGD's momentum, the bank. Float32, batch norm frozen and no dropout: what is left is the
order of sums. Status 1 if a run failed or differs by more than 1e-4.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.side_by_side import machine_line
from data_pipeline.build_config import BuildConfig
from data_pipeline.sources.generated import list_scenes
from data_pipeline.write_shards import build_shards
from launch.torchrun import rank_environment
from tests.run_state import run_state
from trainer.checkpoint import complete_checkpoints
from trainer.metrics import read_metrics

STEPS, RESTART_AT, BATCH = 5, 2, 12
ACCUMULATE = (1, 2, 3, 4)
WAYS = ("whole", "restarted", "from DDP", "to DDP")
PARTS = ("loss", "gradient norm", "model", "momentum", "optimizer", "bank")
_ALSO = (1, 3)  # micro-batches of which more is looked at: other checkpoints, skipped steps
_MOST = 1e-4
# far below the norm of every step's gradient, so that all are clipped
_CLIPPED = ("optim.clip_norm=0.002",)


@dataclass(frozen=True)
class Case:
    """An engine, micro-batches a step, and whether a step is skipped; stage None is DDP."""

    stage: int | None
    offload: bool
    accumulate: int
    skip: bool = False

    @property
    def name(self) -> str:
        engine = "ddp" if self.stage is None else f"zero{self.stage}{'-offload' * self.offload}"
        return f"{engine}-{self.accumulate}{'-skip' * self.skip}"

    @property
    def ways(self) -> tuple[str, ...]:
        """To five steps."""
        return WAYS if self.accumulate in _ALSO and not self.skip else WAYS[:2]

    @property
    def ddp(self) -> "Case":
        """What it is compared with."""
        return Case(None, False, self.accumulate, self.skip)

    def training(self, shards: Path, run: Path) -> dict[str, object]:
        """For `tests.train_many`."""
        settings = [
            *(f"data.shards={shards}", f"run.directory={run}", f"run.steps={STEPS}"),
            *("run.log_every=1", f"run.checkpoint_every={RESTART_AT}", "run.keep_checkpoints=9"),
            *("run.threads=1", "data.threads=1", "data.loader=torch", "run.tensorboard=false"),
            *("views.image_size=24", f"data.batch_size={BATCH}", "bank.capacity=25"),
            *("model.decoder_channels=16", "model.embedding_dim=8", "model.dropout=0"),
            *("model.batch_norm=frozen", "run.precision=float32", "optim.lr=10"),
            *("optim.warmup_steps=0", "optim.schedule=constant", "run.timeout_seconds=60"),
            *(f"optim.accumulate={self.accumulate}", *(_CLIPPED if self.skip else ())),
        ]
        if self.stage is not None:
            settings += ["engine.name=deepspeed", f"engine.zero_stage={self.stage}"]
            settings += ["engine.offload_optimizer=true"] if self.offload else []
        middle = self.accumulate + (self.accumulate + 1) // 2
        begun = any(complete_checkpoints(run))
        return {"settings": settings, "bad_batch": middle if self.skip and not begun else 0}


@dataclass(frozen=True)
class Difference:
    """Between one way to five steps and DDP's; the largest of all steps and entries.

    Attributes:
        error: with which it ended; '' for none.
        largest: by part; of the gradient norm relative to DDP's, of all others absolute.
    """

    error: str
    largest: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.largest.values(), default=float("inf"))

    def __str__(self) -> str:
        return self.error.partition("(")[0][:24] or f"{self.worst:.0e}"


def all_cases(stages: Iterable[int] = (0, 1, 2, 3)) -> list[Case]:
    """Of DeepSpeed; stage 0 has nothing to offload."""
    every = itertools.product(stages, (False, True), ACCUMULATE, (False, True))
    possible = [Case(*one) for one in every if one[0] or not one[1]]
    return [case for case in possible if not case.skip or case.accumulate in _ALSO]


Runner = Callable[[list[str]], object]


def run_in_full(command: list[str]) -> None:
    subprocess.run(command, env=rank_environment(2), check=True, stdout=subprocess.DEVNULL)


def compare(
    cases: Sequence[Case], ranks: int, folder: Path, shards: Path, run: Runner = run_in_full
) -> dict[Case, dict[str, Difference]]:
    """Each case's ways to five steps against DDP's: whole, restarted, from DDP, to DDP.

    Args:
        cases: of DeepSpeed.
        ranks: that train.
        folder: empty, for the run directories.
        shards: to train on.
        run: a command to its end.
    """
    both = dict.fromkeys([*cases, *(case.ddp for case in cases)])
    _train([(case, "whole") for case in both], ranks, folder, shards, run)
    continued = [(case, way) for case in cases for way in case.ways[1:]]
    for case, way in continued:
        begun = case.ddp if way == "from DDP" else case
        _cut(folder / begun.name / "whole", folder / case.name / way)
    _train(continued, ranks, folder, shards, run)
    return {
        case: {
            way: difference(folder / case.name / way, folder / case.ddp.name / "whole")
            for way in case.ways
        }
        for case in cases
    }


def difference(found: Path, expected: Path) -> Difference:
    """Between two run directories."""
    error = found / "error.txt"
    if error.exists():
        return Difference(error.read_text().strip(), {})
    states = [run_state(run, STEPS) for run in (found, expected)]
    assert states[0].keys() == states[1].keys()
    largest = dict.fromkeys(PARTS, 0.0)
    for name, value in states[1].items():
        part = name.partition(".")[0]
        apart = (states[0][name].double() - value.double()).abs()
        largest[part] = max(largest[part], float(apart.max()) if apart.numel() else 0.0)
    rows = [read_metrics(run / "metrics.jsonl") for run in (found, expected)]
    assert [row["step"] for row in rows[0]] == list(range(1, STEPS + 1))
    for mine, theirs in zip(*rows, strict=True):
        apart_by = abs(mine["gradient_norm"] - theirs["gradient_norm"])
        relative = apart_by / max(theirs["gradient_norm"], 1e-12)
        largest["gradient norm"] = max(largest["gradient norm"], relative)
        largest["loss"] = max(largest["loss"], abs(mine["loss"] - theirs["loss"]))
        assert mine["skipped_steps"] == theirs["skipped_steps"]
    return Difference("", largest)


def _train(
    legs: Sequence[tuple[Case, str]], ranks: int, folder: Path, shards: Path, run: Runner
) -> None:
    """All of them in one group of ranks, with a case and a way each; DDP ends what goes to it."""
    runs = []
    for case, way in legs:
        directory = folder / case.name / way
        if (directory / "error.txt").exists():  # there is nothing to go on from
            continue
        engine = case.ddp if way == "to DDP" else case
        runs.append(engine.training(shards, directory))
    file = folder / "runs.json"
    file.write_text(json.dumps(runs), encoding="utf-8")
    launcher = [sys.executable, "-m", "launch.ranks", "--standalone", f"--nproc-per-node={ranks}"]
    run([*launcher, "-m", "tests.train_many", str(file)])


def _cut(whole: Path, copy: Path) -> None:
    """A run directory as it was after the checkpoint to go on from."""
    shutil.copytree(whole, copy)
    for checkpoint in complete_checkpoints(copy):
        if checkpoint.step > RESTART_AT:
            shutil.rmtree(checkpoint.path)


def report(ranks: int, found: dict[Case, dict[str, Difference]]) -> list[str]:
    """A table: one row a stage, offload and number of micro-batches."""
    lines = [
        f"## {ranks} rank{'s' * (ranks > 1)}",
        "",
        f"| ZeRO | micro-batches | {' | '.join(PARTS)} | restarted | from DDP | to DDP "
        "| skipped step | restarted after it |",
        "|" + "---|" * (len(PARTS) + 7),
    ]
    for case, ways in found.items():
        if case.skip:
            continue
        skipped = found.get(Case(case.stage, case.offload, case.accumulate, True), {})
        whole = ways["whole"]
        cells = [f"{whole.largest[part]:.0e}" if whole.largest else str(whole) for part in PARTS]
        cells += [str(ways.get(way, "")) for way in WAYS[1:]]
        cells += [str(skipped.get(way, "")) for way in WAYS[:2]]
        stage = f"{case.stage}{', offload' * case.offload}"
        lines.append(f"| {stage} | {case.accumulate} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, with commas between")
    parser.add_argument("--output", type=Path, help="the file to write; printed without")
    options = parser.parse_args()
    command = " ".join(["python -m benchmarks.engine_parity", *sys.argv[1:]])
    lines = [f"`{command}`, {machine_line()}", ""]
    good = True
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name) / "shards"
        build_shards(list_scenes(60, 0, 40), shards, BuildConfig(30, "ids"))
        for ranks in map(int, options.ranks.split(",")):
            (folder := Path(name) / str(ranks)).mkdir()
            found = compare(all_cases(), ranks, folder, shards)
            lines += report(ranks, found)
            good &= all(one.worst <= _MOST for ways in found.values() for one in ways.values())
    text = "\n".join(lines)
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    sys.exit(not good)


if __name__ == "__main__":
    main()
