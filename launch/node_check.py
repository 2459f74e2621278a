"""A minute before the hours: every node of a job is looked at, and sick ones are left out.

`look` runs on each node under srun: the devices, the shards, the run directory, and a sum over all
nodes. `choose` then prints the nodes to train on; where too many are sick it says which and why.
"""

import argparse
import contextlib
import json
import os
import random
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.doctor_finding import Finding, failed, ok
from launch.doctor_join import join
from launch.doctor_network import read_interfaces
from launch.doctor_place import find_place
from launch.doctor_process import describe, facts, start_probe
from launch.doctor_ranks import write_json
from launch.doctor_verdict import rank_findings

REPORT = "all-reduce.json"
_BYTES_READ = 1 << 20  # of each shard that is tried
_SHARDS_TRIED = 3
_TRAINED = "all nodes add numbers"


@dataclass(frozen=True)
class Choice:
    """The nodes to train on, and what is wrong with the others."""

    nodes: tuple[str, ...]
    sick: Mapping[str, str]


def shards_finding(shards: str) -> Finding:
    """Whether this node reads the manifest, and some shards of the size that it says."""
    check = "shards"
    if not shards:
        return ok(check, "none are named; training will say so")
    if "://" in shards:
        return ok(check, f"{shards} is an address; it is read through a cache")
    folder, remedy = Path(shards), "is its file system mounted on this node?"
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        entries = [(str(one["name"]), int(one["bytes"])) for one in manifest["shards"]]
        for name, size in random.sample(entries, min(_SHARDS_TRIED, len(entries))):
            path = folder / Path(name).name
            with path.open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    return failed(check, f"{path} has {found} bytes instead of {size}", remedy)
                file.seek(random.randrange(max(1, size - _BYTES_READ)))
                file.read(_BYTES_READ)
    except OSError as error:
        return failed(check, f"{error.filename} cannot be read ({error.strerror})", remedy)
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{folder}/manifest.json cannot be understood ({describe(error)})"
        return failed(check, problem, "build the shards again, or copy them again")
    return ok(check, f"{len(entries)} shards")


def run_finding(record: Path) -> Finding:
    """Whether this node writes into the run directory, which is to be the same everywhere."""
    remedy = "choose a run.directory that all nodes share"
    if not record.is_dir():
        return failed("run directory", f"{record} is not there on this node", remedy)
    try:
        with tempfile.TemporaryFile(dir=record) as file:
            file.write(b"maskbank")
    except OSError as error:
        return failed("run directory", f"{record} cannot be written ({error.strerror})", remedy)
    return ok("run directory", "can be written")


def device_finding(device: str, num_ranks: int, seconds: float) -> Finding:
    """Whether torch works here, with a device for each rank."""
    found = facts(start_probe("launch.doctor_probes", ["torch", device], seconds))
    if "error" in found:
        remedy = "mend it there; raise --check if the node is only slow to load it"
        return failed("devices", f"torch does not work: {found['error']}", remedy)
    gpus = found.get("gpus", [])
    broken = [gpu for gpu in gpus if "error" in gpu]
    if device == "cpu" or (device == "auto" and not gpus):
        return ok("devices", "CPU")
    if len(gpus) - len(broken) < num_ranks:
        why = f": {broken[0]['error']}" if broken else ""
        what = f"{len(gpus) - len(broken)} of {num_ranks} GPUs can be used{why}"
        return failed("devices", what, "look at nvidia-smi and dmesg there; have it drained")
    return ok("devices", f"{len(gpus)} GPUs")


def look(options: argparse.Namespace) -> int:
    """Looks at this node; every node's findings are left in the record, the sum in `REPORT`."""
    node = node_name()
    findings: list[Finding] = []

    def look_around() -> None:
        limit = 0.8 * options.seconds
        findings.append(device_finding(options.device, options.ranks_per_node, limit))
        findings.append(shards_finding(options.shards))
        findings.append(run_finding(options.record))
        with contextlib.suppress(OSError):  # who leaves nothing is sick
            rows = [finding.as_json() for finding in findings]
            write_json(options.record / f"node-{node}.json", rows)

    place = find_place(os.environ)
    if place is None:  # the only node
        look_around()
        return 0
    with tempfile.TemporaryDirectory(prefix="maskbank-check-") as folder:
        rank = argparse.Namespace(
            device=options.device,
            folder="",
            seconds=options.seconds / 2,
            patience=options.seconds,
            report=f"{folder}/report.json",
            findings="",
        )
        report = join(place, rank, look_around)
    if report is not None:
        rows = [one.as_json() for one in rank_findings(report, read_interfaces(), os.environ)]
        write_json(options.record / REPORT, rows)
    return 0


def choose(
    names: Sequence[str],
    findings: Mapping[str, Sequence[Finding]],
    together: Sequence[Finding] | None,
    num_nodes: int,
) -> Choice:
    """The first `num_nodes` that are well: a pure function.

    Args:
        names: of the job's nodes, in SLURM's order; rank i of the sum is on the i-th.
        findings: by node; one that left none did not answer.
        together: of the sum over all nodes; None where it was not tried.
        num_nodes: that are needed.
    """
    sick = {}
    for name in names:
        if name not in findings:
            sick[name] = "it gave no answer"
        elif bad := [one for one in findings[name] if one.state == "failed"]:
            sick[name] = f"{bad[0].check}: {bad[0].result}; {bad[0].remedy}"
    for finding in together or ():
        if finding.state != "failed":
            continue
        blamed = [names[rank] for rank in finding.values.get("ranks", ()) if rank < len(names)]
        if not blamed or len(blamed) == len(names):
            blamed = [name for name in names if name in sick] or list(names)
        for name in blamed:
            sick.setdefault(name, f"{finding.check}: {finding.result}; {finding.remedy}")
    return Choice(tuple(name for name in names if name not in sick)[:num_nodes], sick)


def choose_nodes(options: argparse.Namespace) -> int:
    """Prints the nodes to train on, comma by comma; says which are left out, and why."""
    names = options.names.split()
    findings = {name: read_findings(options.record / f"node-{name}.json") for name in names}
    known = {name: found for name, found in findings.items() if found is not None}
    together = read_findings(options.record / REPORT) if len(names) > 1 else None
    if len(names) > 1 and together is None:
        together = [failed(_TRAINED, "the first node has no result", "look at its log")]
    choice = choose(names, known, together, options.num_nodes)
    for name, reason in choice.sick.items():
        _say(f"{name} is left out: {reason}")
    if len(choice.nodes) < options.num_nodes:
        first, reason = next(iter(choice.sick.items()))
        remedy = f"submit with --exclude={','.join(choice.sick)}, or with --spare-nodes"
        _say(
            f"{len(choice.nodes)} of {len(names)} nodes are well, {options.num_nodes} are needed "
            f"({first}: {reason})" + (f"; {remedy}" if choice.nodes else "")
        )
        return 1
    print(",".join(choice.nodes))
    return 0


def read_findings(file: Path) -> list[Finding] | None:
    """From a file of the record; None where it is missing or torn."""
    try:
        rows: Any = json.loads(file.read_text())
        return [Finding(**row) for row in rows]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _say(message: str) -> None:
    print(f"maskbank: {message}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.node_check", description=__doc__)
    parser.add_argument("what", choices=("look", "choose"))
    parser.add_argument("--record", type=Path, required=True, help="folder of this start")
    parser.add_argument("--shards", default="")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--num-nodes", type=int, default=1, help="that are needed")
    parser.add_argument("--names", default="", help="of all nodes, in SLURM's order")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args(arguments)
    return look(options) if options.what == "look" else choose_nodes(options)


if __name__ == "__main__":
    sys.exit(main())
