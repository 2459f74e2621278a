"""`maskbank doctor`: examines the machine before hours are spent on it.

Started by hand it looks at this machine and starts ranks of its own. Started as ranks, by torchrun
or srun, it uses these: each node is looked at once, and rank 0 prints one table for all of them.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.doctor_environment import environment_findings
from launch.doctor_finding import Finding, as_json, exit_status, failed, print_table
from launch.doctor_folder import folder_findings
from launch.doctor_join import join, start_here
from launch.doctor_machine import driver_version, machine_findings, read_cores, slurm_finding
from launch.doctor_network import host_finding, interface_findings, read_interfaces
from launch.doctor_place import Place, find_place
from launch.doctor_probes import dali_finding, deepspeed_finding, gpu_findings, torch_finding
from launch.doctor_process import TimedProcess, describe, facts, start_probe
from launch.doctor_software import installed_version, software_findings
from launch.doctor_verdict import difference_findings, node_labels, rank_findings, ranks_not_run

Say = Callable[[str], None]


_LEAST_SECONDS = 5.0  # for a check, whatever the others took
_LOOK_UP_SECONDS = 15.0  # a name server's own limit is 5 to 10


class Device(str, Enum):
    """What the ranks run on; auto takes GPUs where there are any."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(frozen=True)
class DoctorOptions:
    """What is examined.

    Attributes:
        num_ranks: to start on this machine; None for one a GPU, 2 without.
        folder: of runs and shards.
        device: auto, cpu or cuda.
        timeout: seconds that each check which can hang has; the ranks together as well.
        as_json: whether the answer is for programs.
    """

    num_ranks: int | None = None
    folder: Path = Path()
    device: str = "auto"
    timeout: float = 60.0
    as_json: bool = False


@dataclass(frozen=True)
class Around:
    """What is to be known of a node, and whether ranks can be started there."""

    findings: list[Finding]
    num_ranks: int
    torch_works: bool


def run_doctor(options: DoctorOptions) -> int:
    """Examines, prints, and returns the exit status: 1 if something failed, 130 after Ctrl-C."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _terminated)  # else temporary folders stay
    try:
        with _progress() as say:
            found = _examine(options, say)
    except KeyboardInterrupt:
        print("maskbank: interrupted", file=sys.stderr)
        return 130
    if found is None:  # a rank that is not the first
        return 0
    findings, nodes = found
    with contextlib.suppress(AttributeError):  # a pipe of another encoding must not end us
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    if options.as_json:
        print(json.dumps(as_json(findings, nodes), indent=1))
    else:
        print_table(findings, nodes, Console(highlight=False, emoji=False))
    return exit_status(findings)


def _examine(options: DoctorOptions, say: Say) -> tuple[list[Finding], list[str]] | None:
    """All findings and the nodes' names; None on a rank that is not the first."""
    host = os.uname().nodename
    try:
        place = find_place(os.environ)
    except ValueError as error:
        what, _, remedy = str(error).rpartition("; ")
        around = look_around(options, 1, 1, say)
        known = [finding for finding in around.findings if finding.check != "rank variables"]
        return [*known, failed("rank variables", what, remedy)], [host]
    if place is not None:
        return _examine_as_rank(place, options, say)
    around = look_around(options, options.num_ranks, 1, say)
    if not around.torch_works:
        return [*around.findings, ranks_not_run("torch does not work")], [host]
    say(f"{around.num_ranks} ranks that find each other and add numbers")
    report = start_here(around.num_ranks, _rank_options(options), os.environ)
    ranks = rank_findings(report, read_interfaces(), os.environ)
    return [*around.findings, *ranks], [host]


def _examine_as_rank(
    place: Place, options: DoctorOptions, say: Say
) -> tuple[list[Finding], list[str]] | None:
    own: list[Finding] = []
    num_nodes = _first_number("GROUP_WORLD_SIZE", "SLURM_STEP_NUM_NODES")
    num_here = _first_number("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE")
    with tempfile.TemporaryDirectory(prefix="maskbank-doctor-") as name:
        rank_options = _rank_options(options)
        rank_options.report = str(Path(name) / "report.json")
        rank_options.folder = str(options.folder) if num_nodes > 1 else ""
        rank_options.patience = options.timeout  # the nodes are looked at first
        saved = Path(name) / "findings.json"

        def look() -> None:
            own.extend(look_around(options, num_here, num_nodes, say, options.timeout).findings)
            saved.write_text(json.dumps([finding.as_json() for finding in own]))
            say(f"{place.world_size} ranks that find each other and add numbers")

        if place.local_rank == 0:
            rank_options.findings = str(saved)
        report = join(place, rank_options, look if place.local_rank == 0 else None)
    if report is None:
        return None
    ranks = rank_findings(report, read_interfaces(), os.environ)
    by_node = _findings_by_node(report) or {os.uname().nodename: own}
    together = [replace(each, node=node) for node, all_ in by_node.items() for each in all_]
    return [*together, *difference_findings(by_node), *ranks], list(by_node)


def look_around(
    options: DoctorOptions,
    num_ranks: int | None,
    num_nodes: int,
    say: Say,
    total_seconds: float = float("inf"),
) -> Around:
    """Every check of this machine alone.

    Args:
        num_ranks: that share it; None for one a GPU, 2 without.
        num_nodes: that the ranks are on.
        total_seconds: for all checks together, about.
    """
    environment, driver = dict(os.environ), driver_version()
    end = time.monotonic() + total_seconds

    def limit(most: float = options.timeout) -> float:
        return max(min(most, options.timeout, end - time.monotonic()), _LEAST_SECONDS)

    say("folder and host name")
    folder = facts(start_probe("launch.doctor_folder", [str(options.folder)], limit()))
    host = facts(start_probe("launch.doctor_network", [], limit(_LOOK_UP_SECONDS)))
    say("torch and the GPUs")
    torch = facts(_start_probe("torch", options.device, limit()))
    usable = [gpu for gpu in torch.get("gpus", []) if "error" not in gpu]
    on_gpu = options.device != "cpu" and bool(usable)
    cores, interfaces = read_cores().usable, read_interfaces()
    chosen = environment.get("GLOO_SOCKET_IFNAME")
    num_ranks = num_ranks or (len(usable) if on_gpu else 2)
    say("DALI and DeepSpeed")
    device = "cuda" if on_gpu else "cpu"
    both = [_start_probe(name, device, limit()) for name in ("dali", "deepspeed")]
    dali, deepspeed = (facts(process) for process in both)
    if "error" in torch:
        deepspeed = {"error": "torch cannot"}
    checks: list[Callable[[], list[Finding]]] = [
        software_findings,
        lambda: machine_findings(num_ranks),
        lambda: gpu_findings(torch, options.device, driver),
        lambda: [torch_finding(torch)],
        lambda: [dali_finding(dali, installed_version("nvidia-dali-cuda130") is not None)],
        lambda: [deepspeed_finding(deepspeed, installed_version("deepspeed") is not None)],
        lambda: folder_findings(str(options.folder), folder),
        lambda: environment_findings(environment, cores, num_ranks, driver),
        lambda: interface_findings(environment, interfaces, "nccl" if on_gpu else "gloo"),
        lambda: [host_finding(host, interfaces, num_nodes, chosen)],
        lambda: [slurm_finding(environment, shutil.which("sbatch") is not None)],
    ]
    findings = [finding for check in checks for finding in _guarded(check)]
    return Around(findings, num_ranks, "error" not in torch)


def _terminated(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _start_probe(name: str, device: str, seconds: float) -> TimedProcess:
    return start_probe("launch.doctor_probes", [name, device], seconds)


def _guarded(check: Callable[[], list[Finding]]) -> list[Finding]:
    """A check that breaks is a finding, not the end of the others."""
    try:
        return check()
    except Exception as error:
        return [
            failed(
                "doctor",
                f"a check broke: {describe(error)}",
                "report this to maskbank, with the output of `maskbank doctor --json`",
            )
        ]


def _findings_by_node(report: Mapping[str, Any]) -> dict[str, list[Finding]]:
    """What each node's first rank found there."""
    if "error" in report:
        return {}
    labels, found = node_labels(report), {}
    for rank, label in sorted(labels.items()):
        if findings := report["ranks"][str(rank)]["arrived"]["findings"]:
            found[label] = [Finding(**finding) for finding in findings]
    return found


def _rank_options(options: DoctorOptions) -> argparse.Namespace:
    return argparse.Namespace(
        device=options.device,
        folder="",
        seconds=options.timeout,
        patience=0.0,
        report="",
        findings="",
    )


def _first_number(*variables: str) -> int:
    """That the first variable which is set begins with, as in SLURM's 4(x2); else 1."""
    for name in variables:
        if number := re.match(r"\d+", os.environ.get(name, "")):
            return int(number.group())
    return 1


@contextlib.contextmanager
def _progress() -> Iterator[Say]:
    """Says on a terminal what is being looked at, on the first rank; nothing elsewhere."""
    console = Console(stderr=True, emoji=False)
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if not console.is_terminal or rank != "0":
        yield lambda text: None
        return
    with console.status("looking around") as status:
        yield lambda text: status.update(f"looking at: {text}")
