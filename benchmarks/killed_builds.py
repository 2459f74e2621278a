"""Does a build that is killed at any moment end in the same bytes?

    python -m benchmarks.killed_builds [--runs 50] [--kills 2]

A folder of pictures, some of them damaged and some of them twice, is built once undisturbed. Then,
`runs` times, the same build is killed with SIGKILL, workers and all, at a random moment of its
course, started again, killed again, and in the end left to finish; nodes, processes and `--append`
change from run to run. All files are compared.
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.shards import make_pictures

SAMPLES, LATER = 600, 150


def make_source(root: Path) -> None:
    """Pictures in `first/` and, for appending, in `first/` and `second/`; some bad, some twice."""
    make_pictures(root / "all", SAMPLES + LATER, 48)
    for kind in ("images", "masks"):
        files = sorted((root / "all" / kind).rglob("*.*"))
        for number, path in enumerate(files):
            part = "first" if number < SAMPLES else "second"
            for folder in {"first", "both"} if part == "first" else {"both"}:
                target = root / folder / kind / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                data = path.read_bytes()
                if kind == "images" and number % 50 == 7:
                    data = data[: len(data) // 2]
                target.write_bytes(data)
                if number % 40 == 3:
                    target.with_stem(f"copy_{path.stem}").write_bytes(data)


def command(source: Path, output: Path, *more: str) -> list[str]:
    folders = ["--images", str(source / "images"), "--masks", str(source / "masks")]
    start = [sys.executable, "-m", "data_pipeline.cli", "build", "folder", *folders]
    return [*start, "--output", str(output), "--samples-per-shard", "40", *more]


def run(arguments: list[str], seconds: float | None = None) -> bool:
    """Runs a build, killing it after so many seconds; whether it came to its end."""
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return False
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {errors.decode()}")
    return True


def checksums(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_source(root)
        expected = {}
        lengths = {}
        for append in (False, True):
            output = root / f"undisturbed-{append}"
            run(command(root / "first", output))
            if append:
                run(command(root / "both", output, "--append"))
            expected[append] = checksums(output)
        for processes in ("1", "2"):
            start = time.perf_counter()
            run(command(root / "first", root / f"timed-{processes}", "--processes", processes))
            lengths[processes] = time.perf_counter() - start
        killed = same = runs_killed = 0
        for number in range(options.runs):
            output = root / f"run-{number}"
            append = bool(rng.random() < 0.3)
            source, more = root / "first", []
            if append:
                run(command(source, output))
                # the same source, grown: what is new is appended
                source, more = root / "both", ["--append"]
            kills = 0
            for _ in range(4 * options.kills):
                processes = str(rng.integers(1, 3))
                arguments = command(source, output, "--processes", processes, *more)
                if rng.random() < 0.3:
                    arguments += ["--num-nodes", "2", "--node-rank", str(rng.integers(2))]
                kills += not run(arguments, float(rng.uniform(0.1, 1.0)) * lengths[processes])
                if kills == options.kills:
                    break
            killed += kills
            runs_killed += kills > 0
            run(command(source, output, *more))
            found = checksums(output)
            same += found == expected[append]
            if found != expected[append]:
                differ = {
                    key
                    for key in {*found, *expected[append]}
                    if found.get(key) != expected[append].get(key)
                }
                print(f"run {number} (append: {append}) differs in {sorted(differ)}", flush=True)
        print(
            f"{same} of {options.runs} runs ended in the same bytes; {killed} kills in all, "
            f"{runs_killed} runs were killed once at least"
        )
        sys.exit(same != options.runs)


if __name__ == "__main__":
    main()
