"""Does a run that is killed at any moment end as if nothing had happened?

    python -m benchmarks.kill_matrix [--runs 60] [--seed 0]

For DDP and DeepSpeed, on 2 and 4 gloo ranks: a run of 24 steps with a checkpoint every 4 is left
alone once. Then the same run is disturbed at a random moment, started again until it is through,
and compared: every tensor of the last checkpoint, bit for bit, and the metrics. Disturbances:
SIGKILL of one rank or of all at a random time; of a random rank within a random step; of the rank
that writes in the middle of a file, before and after the rename, before the mark, and while an old
checkpoint is deleted; and a disk that is full. How long the launcher took to end after the fault is
measured too.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.killed_builds import checksums
from data_pipeline.build_config import BuildConfig
from data_pipeline.sources.generated import list_scenes
from data_pipeline.write_shards import build_shards
from tests.faulty_train import AT_CHECKPOINT
from trainer.checkpoint import newest_checkpoint
from trainer.metrics import read_metrics

STEPS, EVERY = 24, 4
LIMIT = 20.0  # seconds: run.timeout_seconds of these runs
_NOT_COMPARED = ("seconds", "images_per_second", "data_wait", "eta_seconds", "memory_mb")
_ENGINES = {
    "ddp": ("engine.name=ddp",),
    "zero1": ("engine.name=deepspeed", "engine.zero_stage=1"),
    "zero2": ("engine.name=deepspeed", "engine.zero_stage=2"),
    "zero3": ("engine.name=deepspeed", "engine.zero_stage=3"),
}


def settings(shards: Path, run: Path, engine: str) -> list[str]:
    return [
        *("--recipe", "demo_cpu", f"data.shards={shards}", f"run.directory={run}"),
        *(f"run.steps={STEPS}", "run.log_every=4", f"run.checkpoint_every={EVERY}"),
        *("run.threads=1", "data.threads=1", "data.loader=torch", "views.image_size=32"),
        *("data.batch_size=8", "bank.capacity=21", "bank.mask_same_image=true"),
        *("optim.warmup_steps=0", "model.decoder_channels=16", "model.embedding_dim=8"),
        *("run.tensorboard=false", f"run.timeout_seconds={LIMIT}", "run.start_timeout_seconds=60"),
        *_ENGINES[engine],
    ]


def start(
    ranks: int, arguments: Sequence[str], fault: Sequence[str], time_file: Path | None = None
) -> subprocess.Popen[str]:
    """One attempt, in a process group of its own."""
    launcher = [sys.executable, "-m", "launch.ranks", "--standalone", f"--nproc-per-node={ranks}"]
    program = ["-m", "tests.faulty_train", *fault] if fault else ["-m", "trainer.train"]
    return subprocess.Popen(
        [*launcher, *program, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "FAULT_TIME": str(time_file or os.devnull)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def last_step(run: Path) -> int:
    found = [path.name for path in (run / "checkpoints").glob("step-????????")]
    return max((int(name.removeprefix("step-")) for name in found), default=0)


def disturb(
    draw: np.random.Generator, kind: str, ranks: int, run: Path, arguments: list[str]
) -> tuple[float, str, bool]:
    """One attempt that is disturbed; seconds from the fault to the end, its output, whether hit."""
    fault: list[str] = []
    if kind in AT_CHECKPOINT:
        rank = 0 if kind not in ("write", "full-disk") else int(draw.integers(ranks))
        # a rank writes one to four files a checkpoint
        last = 10 if kind in ("write", "full-disk") else 4
        fault = [kind, str(rank), str(int(draw.integers(1, last)))]
    elif kind == "in a step":
        fault = ["kill", str(int(draw.integers(ranks))), str(int(draw.integers(1, STEPS - 4)))]
    time_file = run.with_suffix(".fault")
    process = start(ranks, arguments, fault, time_file)
    if fault:
        output, _ = process.communicate(timeout=300)
        if not time_file.exists():
            return 0.0, output, False
        return time.time() - float(time_file.read_text()), output, True
    target = last_step(run) + int(draw.choice([0, 4, 8, 12]))
    while last_step(run) < min(target, STEPS - EVERY) and process.poll() is None:
        time.sleep(0.005)
    if target == 0:
        time.sleep(float(draw.uniform(2, 6)))  # while it starts
    time.sleep(float(draw.uniform(0, 0.6)))
    before = time.monotonic()
    hit = process.poll() is None
    victims = ranks_of(process)
    if kind == "all ranks":
        victims.append(process.pid)
    else:
        victims = victims[int(draw.integers(ranks)) :][:1]
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    return time.monotonic() - before, output, hit


def final_state(run: Path) -> dict[str, Any]:
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    assert checkpoint.step == STEPS
    files = checksums(checkpoint.path)
    del files["checkpoint.json"], files["COMPLETE"]  # they hold times
    rows = read_metrics(run / "metrics.jsonl")
    kept = [{k: v for k, v in row.items() if k not in _NOT_COMPARED} for row in rows]
    for row in kept:
        row.pop("bank_wait_ms")
    return {"files": files, "metrics": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", help="some of the disturbances only, separated by commas")
    parser.add_argument("--output", type=Path, help="a JSON line for every run")
    options = parser.parse_args()
    draw = np.random.default_rng(options.seed)
    torch.set_num_threads(1)
    kinds = ["one rank", "all ranks", "in a step", *AT_CHECKPOINT]
    if options.kinds:
        kinds = options.kinds.split(",")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_shards(list_scenes(20, 0, 40), folder / "shards", BuildConfig(7, "ids"))
        undisturbed: dict[tuple[str, int], dict[str, Any]] = {}
        engines = [("ddp", 2), ("zero1", 2), ("ddp", 4), ("zero2", 2), ("ddp", 2), ("zero3", 2)]
        engines += [("ddp", 4), ("zero1", 4)]
        for number in track(range(options.runs), "runs"):
            engine, ranks = engines[number % len(engines)]
            kind = kinds[(number + number // (len(engines) * len(kinds))) % len(kinds)]
            if (engine, ranks) not in undisturbed:
                run = folder / f"undisturbed-{engine}-{ranks}"
                finish(ranks, settings(folder / "shards", run, engine))
                undisturbed[engine, ranks] = final_state(run)
            run = folder / f"run-{number}"
            arguments = settings(folder / "shards", run, engine)
            seconds, output, hit = disturb(draw, kind, ranks, run, arguments)
            reached = last_step(run)
            finish(ranks, arguments)
            found, expected = final_state(run), undisturbed[engine, ranks]
            row = {
                "engine": engine,
                "ranks": ranks,
                "kind": kind,
                "hit": hit,
                "step": reached,
                "seconds_to_end": round(seconds, 2),
                "same_state": found["files"] == expected["files"],
                "same_metrics": found["metrics"] == expected["metrics"],
                "said": [line for line in output.splitlines() if line.startswith("maskbank:")][:2],
            }
            rows.append(row)
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if not row["same_state"]:
                print(json.dumps(row), flush=True)
    report(rows)


def finish(ranks: int, arguments: Sequence[str]) -> None:
    process = start(ranks, arguments, ())
    output, _ = process.communicate(timeout=300)
    if process.returncode:
        raise SystemExit(output)


def report(rows: list[dict[str, Any]]) -> None:
    print("| engine | ranks | runs | disturbed | same state | same metrics | slowest end, s |")
    print("|---|---|---|---|---|---|---|")
    for key in sorted({(row["engine"], row["ranks"]) for row in rows}):
        mine = [row for row in rows if (row["engine"], row["ranks"]) == key]
        sums = [sum(row[name] for row in mine) for name in ("hit", "same_state", "same_metrics")]
        slowest = max(row["seconds_to_end"] for row in mine)
        print("|", " | ".join(str(v) for v in (*key, len(mine), *sums, f"{slowest:.1f}")), "|")


if __name__ == "__main__":
    main()
