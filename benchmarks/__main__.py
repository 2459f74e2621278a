"""Runs every benchmark: `make bench`, or `python -m benchmarks [--root … ] [--only loader,shards]`.

What each of them prints goes to runs/bench/NAME.md, their rows to runs/bench/NAME_….jsonl, and the
plots of the README to runs/bench/. All of it takes hours; a benchmark that fails ends none of the
others. With stamps20, or another data set in the released PASCAL layout, as --root, comparisons run
on it instead of generated scenes, and time to quality is measured.
"""

import argparse
import datetime
import subprocess
import sys
from pathlib import Path

# imported by others; contenders, which `side_by_side` starts; and what comes last
_PARTS = {
    *("comparison_data", "contender", "contender_process", "dilated_resnet", "environments"),
    *("floors", "maskbank_contender", "nodes", "plain_method", "plots"),
}
SCRIPTS = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if not path.stem.startswith(("_", "gpu_", "compare_")) and path.stem not in _PARTS
)
_ON_FILES = ("loader", "side_by_side", "stamps20", "time_to_quality")
_ON_SHARDS = ("loader", "side_by_side", "time_to_quality")


def arguments_of(script: str, options: argparse.Namespace) -> list[str]:
    found = []
    if options.root is not None and script in _ON_FILES:
        found += ["--root", str(options.root)]
    if options.shards is not None and script in _ON_SHARDS:
        found += ["--shards", str(options.shards)]
    if options.labelled is not None and script == "time_to_quality":
        found += ["--labelled", str(options.labelled)]
    if script in ("side_by_side", "time_to_quality"):
        date = datetime.datetime.now(datetime.timezone.utc).date()
        found += ["--output", str(options.output / f"{script}_{date}.jsonl")]
    return found


def run(script: str, arguments: list[str], log: Path) -> int:
    """Its status; what it prints is shown and kept."""
    command = [sys.executable, "-m", f"benchmarks.{script}", *arguments]
    print("$ " + " ".join(["python", *command[1:]]), flush=True)
    with log.open("w", encoding="utf-8") as file:
        file.write(f"`{' '.join(['python', *command[1:]])}`\n\n")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
        return process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, help="data set in the released PASCAL layout")
    parser.add_argument("--shards", type=Path, help="its training split as shards")
    parser.add_argument("--labelled", type=Path, help="its validation split as shards")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--only", default=",".join(SCRIPTS), metavar="NAME,…")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(SCRIPTS):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(SCRIPTS)}")
    options.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for script in wanted:
        if run(script, arguments_of(script, options), options.output / f"{script}.md"):
            failed.append(script)
    where = ["--results", str(options.output), "--output", str(options.output)]
    run("plots", where, options.output / "plots.md")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
