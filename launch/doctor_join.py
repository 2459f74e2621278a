"""Beside each rank: starts what needs torch, in processes with a time limit, and outlives them.

`python -m launch.doctor_join …` is what torchrun starts for a check of one machine; under a
torchrun or srun of the user's, `maskbank doctor` itself calls `join`.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.doctor_place import Place, find_place
from launch.doctor_process import Outcome, TimedProcess, lasting, live_at_most
from launch.doctor_ranks import STORE_UNREACHED, add_arguments, join_arguments, write_json
from launch.torchrun import module_command, rank_environment

_GRACE = 3.0  # seconds that the processes here have beyond what they give themselves
_SECONDS_TO_POST = 15.0


def join(
    place: Place, options: argparse.Namespace, look_around: Callable[[], None] | None = None
) -> dict[str, Any] | None:
    """Takes part in the check as one rank.

    Args:
        place: of this rank.
        options: of `doctor_ranks`; `findings` may name a file that `look_around` writes.
        look_around: checks this node; called once the store is being served.

    Returns:
        What became of all ranks, as `doctor_ranks.collect` writes it, or an `error`; None on all
        ranks but 0.
    """
    environment = {**os.environ, **place.environment()}
    limit = options.patience + options.seconds + _GRACE
    with contextlib.ExitStack() as processes:

        def begin(role: str, *more: str, seconds: float = limit) -> TimedProcess:
            arguments = [role, *more, *join_arguments(options)]
            command = module_command("launch.doctor_ranks", arguments)
            return processes.enter_context(TimedProcess(command, seconds, environment))

        collector = begin("collect") if place.rank == 0 else None
        if look_around is not None:
            look_around()
        worker = begin("work", seconds=options.patience + options.seconds)
        report = Path(options.report)
        # the worker still has to put things away when all results are in
        all_done = lasting(lambda: collector is not None and collector.ended(), _GRACE)
        outcome = worker.wait(ready=all_done)
        if outcome.failure() and not (collector and collector.ended()):
            if outcome.status != STORE_UNREACHED:
                begin("post", f"--reason={outcome.failure()}", seconds=_SECONDS_TO_POST).wait()
            elif place.rank:
                host = os.uname().nodename
                said = f"maskbank doctor: rank {place.rank} on {host}: {outcome.failure()}"
                print(said, file=sys.stderr, flush=True)
        return None if collector is None else _read_report(report, collector.wait())


def start_here(
    num_ranks: int, options: argparse.Namespace, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Ranks on this machine, by torchrun; returns the report, or an `error`."""
    with tempfile.TemporaryDirectory(prefix="maskbank-doctor-") as folder:
        options.report = str(Path(folder) / "report.json")
        options.folder = ""  # one machine need not look whether others see it
        report, exits = Path(options.report), Path(f"{options.report}.exits")
        arguments = ["start", f"--nproc={num_ranks}", *join_arguments(options)]
        command = module_command("launch.doctor_ranks", arguments)
        seconds = options.patience + options.seconds + 2 * _GRACE
        ranks = {**rank_environment(num_ranks), **environment}
        with TimedProcess(command, seconds, ranks) as torchrun:
            outcome = torchrun.wait(ready=lasting(report.exists, _GRACE))
        if not report.exists() and exits.exists():
            return _dead_ranks(num_ranks, json.loads(exits.read_text()))
        return _read_report(report, outcome)


def _read_report(path: Path, outcome: Outcome) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {"error": outcome.failure() or "the ranks left no report"}
    return report


def _dead_ranks(num_ranks: int, ended: Mapping[str, Any]) -> dict[str, Any]:
    """The report that rank 0 could not write: torchrun ended all with the first that died."""
    rank = str(ended["first"])
    status = int(ended["exits"][rank])
    failure = {"reason": Outcome(status, "", "", 0.0).failure(), "died": True, "time": time.time()}
    ranks: dict[str, dict[str, Any]] = {str(each): {} for each in range(num_ranks)}
    return {"world_size": num_ranks, "ranks": {**ranks, rank: {"failed": failure}}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.doctor_join")
    add_arguments(parser)
    parser.add_argument("--parent", type=int, help="process number of torchrun")
    options = parser.parse_args(arguments)
    live_at_most(options.patience + options.seconds + 10, options.parent)
    place = find_place(os.environ)
    assert place is not None, "torchrun starts this"
    final = Path(options.report)
    report = join(place, options)
    if report is not None and "error" in report:
        write_json(final, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
