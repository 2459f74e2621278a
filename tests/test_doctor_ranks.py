"""`maskbank doctor` with real ranks: fine ones, dead ones, and such as cannot find each other."""

import argparse
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launch.doctor_finding import Finding, info
from launch.doctor_join import start_here
from launch.doctor_network import read_interfaces
from launch.doctor_place import find_place, first_host
from launch.doctor_process import TimedProcess
from launch.doctor_ranks import answer_clock, connect, read_clock
from launch.doctor_verdict import clock_finding, difference_findings, rank_findings, shared_finding

NETWORK = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.7"], "ifb0": []}
REFUSED = "Unable to find address for: nope0"


@pytest.fixture
def marked() -> Iterator[dict[str, str]]:
    """An environment by which the processes of a test are found; none of them outlives it."""
    environment = {**os.environ, "MASKBANK_TEST": uuid.uuid4().hex}
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"):
        environment.pop(name, None)
    yield environment
    for _ in range(100):
        if not (left := processes_with(environment["MASKBANK_TEST"])):
            return
        time.sleep(0.1)
    pytest.fail(f"still running: {left}")


def processes_with(*words: str) -> list[int]:
    """Processes in whose command line and environment all the words stand."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "cmdline").read_bytes() + b"\0" + (folder / "environ").read_bytes()
        except OSError:
            continue
        # a rank's variables stand whole between zeros
        if all(word.encode() in text for word in words):
            found.append(int(folder.name))
    return found


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}


def test_the_place_among_ranks() -> None:
    place = find_place(SRUN | TORCHRUN)  # srun torchrun: torchrun's ranks count
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank, place.node) == (3, 4, 1, "1")
    assert (place.address, place.port, place.agent_store) == ("a", 29400, True)
    place = find_place(SRUN)
    assert place is not None
    assert (place.rank, place.world_size, place.address) == (1, 2, "gpu007")
    assert find_place(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert find_place({"MASTER_ADDR": "a"}) is None
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT are not"):
        find_place({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="RANK is 4 of WORLD_SIZE 4, and is counted from 0; "):
        find_place(TORCHRUN | {"RANK": "4"})
    hosts = {"gpu[007-009,12],login": "gpu007", "a,b": "a", "n[1,3]-ib": "n1-ib", "solo": "solo"}
    assert {nodes: first_host(nodes) for nodes in hosts} == hosts


# what becomes of ranks


def arrived(rank: int, host: str = "a", **more: Any) -> dict[str, Any]:
    about = {"host": host, "node": host, "findings": None}
    return {"arrived": about, "stage": "adding 64 MB", **more}


def result(**more: Any) -> dict[str, Any]:
    found = {"backend": "gloo", "latency": 1e-4, "large_seconds": 0.1, "wrong": None}
    return {"result": found | {"interfaces": ["eth0"], "shared": None} | more}


def verdict(*ranks: dict[str, Any], **environment: str) -> list[Finding]:
    report = {"world_size": len(ranks), "waited": 54.0}
    by_rank = {str(rank): found for rank, found in enumerate(ranks)}
    return rank_findings(report | {"ranks": by_rank}, NETWORK, environment)


def test_ranks_that_agree() -> None:
    sum_, network = verdict(arrived(0, **result()), arrived(1, **result()))
    assert sum_.state == "ok"
    assert sum_.values["bytes_per_second"] == pytest.approx(64e7)
    assert network.result == "the ranks talk over eth0"
    (slow, _) = verdict(arrived(0, **result(large_seconds=2.0)), arrived(1, **result()))
    assert (slow.state, "which is slow" in slow.result) == ("warning", True)
    (wrong, _) = verdict(arrived(0, **result()), arrived(1, "b", **result(wrong=7.0)))
    assert wrong.state == "failed"
    assert "rank 1 on b summed to 7 instead of 3" in wrong.result
    assert verdict(arrived(0, **result(wrong=0.0)))[0].state == "failed"


def test_the_rank_that_died_is_named_and_not_those_that_follow() -> None:
    died = {"failed": {"reason": "killed by SIGKILL", "died": True}}
    follows = {"failed": {"reason": "Connection closed by peer [10.0.0.7]", "stage": "adding"}}
    (found,) = verdict(arrived(0, "a", **follows), arrived(1, "b", **died), arrived(2, "a"))
    assert found.result == "rank 1 on b: killed by SIGKILL"
    assert "dmesg" in found.remedy
    own = {"failed": {"reason": REFUSED, "stage": "connecting with gloo"}}
    (found,) = verdict(arrived(0, **own), arrived(1, **own), GLOO_SOCKET_IFNAME="nope0")
    assert found.result == f"ranks 0, 1: {REFUSED} while connecting with gloo"
    assert "eth0 (10.0.0.7)" in found.remedy
    (found,) = verdict(arrived(0), {})
    assert found.result == "rank 1: did not arrive within 54 s"
    (found,) = verdict(arrived(0, **result()), arrived(1))[:1]
    assert found.result == "rank 1: gave no answer within 54 s; it was adding 64 MB"
    (found,) = rank_findings({"error": "no answer within 66 s"}, NETWORK, {})
    assert "GLOO_SOCKET_IFNAME=eth0" in found.remedy


def test_clocks_that_differ_are_measured_through_the_store() -> None:
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    store = HashStore()
    with ThreadPoolExecutor() as pool:
        ahead = pool.submit(read_clock, store, 1, 30.0, lambda: time.time() + 5.0)
        measured = answer_clock(store, 1, 30.0)
    assert measured == ahead.result()
    assert measured is not None
    assert abs(measured["offset"] - 5.0) <= measured["error"] + 0.001
    assert answer_clock(store, 2, 0.1) is None
    exact = {"offset": 0.0, "error": 1e-4}
    found = clock_finding({0: exact, 1: measured}, {0: "a", 1: "b"})
    assert found.state == "warning"
    assert "rank 1 on b is ahead of rank 0 on a" in found.result
    assert clock_finding({0: exact, 1: exact | {"offset": -0.9}}, {}).state == "ok"


def test_folders_and_versions_that_differ_between_nodes() -> None:
    labels = {0: "a", 2: "b"}
    assert shared_finding({0: "own", 2: "seen"}, labels).state == "ok"
    missing = shared_finding({0: "own", 2: "missing"}, labels)
    assert (missing.state, "rank 2 on b does not see" in missing.result) == ("failed", True)
    assert shared_finding({0: "own", 2: "unlocked"}, labels).state == "warning"
    a, b = (info("packages", "", torch=version, numpy="2.0") for version in ("2.9", "2.10"))
    (found,) = difference_findings({"a": [a], "b": [b]})
    assert found.result == "torch differs: 2.9 on a; 2.10 on b"


def test_a_process_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, marked: dict[str, str]
) -> None:
    hang = "import subprocess; subprocess.run(['sleep', '600'])"
    with TimedProcess([sys.executable, "-c", hang], 0.5, marked) as process:
        outcome = process.wait()
    assert (outcome.status, outcome.failure()) == (None, "no answer within 0.5 s")
    tidy = """
import sys, tempfile, time
from launch.doctor_process import run_probe
def probe():
    with tempfile.TemporaryDirectory(dir=sys.argv[1]):
        time.sleep(600)
run_probe(probe)
"""
    with TimedProcess([sys.executable, "-c", tidy, str(tmp_path), "60"], 60, marked) as process:
        for _ in range(600):
            if list(tmp_path.iterdir()):
                break
            time.sleep(0.05)
    assert process.ended()
    assert list(tmp_path.iterdir()) == []
    crash = "import os, sys; print('last words', file=sys.stderr, flush=True); os.abort()"
    with TimedProcess([sys.executable, "-c", crash], 60, marked) as process:
        assert process.wait().failure() == "killed by SIGABRT after: last words"


# real ranks


def run_doctor(
    *arguments: str, environment: dict[str, str], prepare: Callable[[], None] | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", "doctor", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        preexec_fn=prepare,
    )


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def rank_options(seconds: float) -> argparse.Namespace:
    return argparse.Namespace(device="cpu", folder="", seconds=seconds, patience=0.0, findings="")


@pytest.mark.slow
def test_two_ranks_on_this_machine(tmp_path: Path, marked: dict[str, str]) -> None:
    arguments = ["--nproc", "2", "--device", "cpu", "--json", "--timeout", "120"]
    ran = run_doctor(*arguments, "--folder", str(tmp_path), environment=marked)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stderr == ""
    answer = json.loads(ran.stdout)
    assert set(answer) == {"format", "state", "counts", "nodes", "findings"}
    assert answer["format"] == 1
    assert answer["state"] in ("ok", "warning")
    assert answer["nodes"] == [os.uname().nodename]
    keys = {"check", "result", "state", "remedy", "values", "varies", "node"}
    for finding in answer["findings"]:
        assert set(finding) == keys
        assert bool(finding["remedy"]) == (finding["state"] in ("warning", "failed")), finding
    assert sum(answer["counts"].values()) == len(answer["findings"])
    found = {finding["check"]: finding for finding in answer["findings"]}
    assert len(found) == len(answer["findings"])
    added = found["all-reduce"]
    assert added["state"] in ("ok", "warning"), added
    assert added["result"].startswith("gloo, 2 ranks: right sum; ")
    assert added["values"]["bytes_per_second"] > 0
    assert found["clocks"]["values"]["seconds"] < 1
    assert set(found["network"]["values"]["interfaces"]["0"]) <= set(read_interfaces())
    for check in ("Python", "packages", "processor", "memory", "torch", "GPU", "writing", "SLURM"):
        assert found[check]["state"] != "failed"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_is_broken_fails_in_bounded_time_with_remedies(
    tmp_path: Path, marked: dict[str, str]
) -> None:
    (tmp_path / "file").touch()
    broken = marked | {"GLOO_SOCKET_IFNAME": "nope0", "COLUMNS": "1000"}
    arguments = ["--nproc", "2", "--device", "cpu", "--timeout", "120"]
    arguments += ["--folder", str(tmp_path / "file/runs")]
    ran = run_doctor(*arguments, environment=broken, prepare=few_files)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert ran.stderr == ""
    assert "Traceback" not in ran.stdout
    lines = [line.split() for line in ran.stdout.splitlines()]
    rows = {" ".join(words[:2]): number for number, words in enumerate(lines)}
    assert lines[rows["gloo interface"]][2] == "failed"
    assert " ".join(lines[rows["open files"]]).startswith("open files warning 512 allowed; ")
    number = rows["all-reduce failed"]
    text = " ".join(lines[number])
    assert text.startswith(f"all-reduce failed ranks 0, 1: {REFUSED} while connecting with gloo")
    remedy = " ".join(lines[number + 1])
    assert remedy.startswith("→ export GLOO_SOCKET_IFNAME=")
    for name, addresses in read_interfaces().items():
        assert f"{name} ({addresses[0]})" in remedy if addresses else name in remedy
    assert f"{tmp_path / 'file'} is no folder" in ran.stdout
    assert " checks: 3 failed, " in ran.stdout.splitlines()[-1]


def signal_rank_1(environment: dict[str, str], module: str, number: signal.Signals) -> None:
    """Sends it to the process that is rank 1's, once there is one and it has loaded torch."""
    words = (environment["MASKBANK_TEST"], "\0RANK=1\0", module.replace(" ", "\0") + "\0")
    for _ in range(1200):
        for process in processes_with(*words):
            if "doctor_join" in module or "libtorch" in Path(f"/proc/{process}/maps").read_text():
                os.kill(process, number)
                return
        time.sleep(0.05)
    raise TimeoutError(f"no {module}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "number", "seconds", "reason"),
    [
        ("launch.doctor_ranks work", signal.SIGKILL, 90, "killed by SIGKILL"),
        ("launch.doctor_join", signal.SIGKILL, 90, "killed by SIGKILL"),
        ("launch.doctor_ranks work", signal.SIGSTOP, 45, "within"),
    ],
)
def test_a_rank_that_dies_or_hangs_is_named(
    module: str, number: signal.Signals, seconds: int, reason: str, marked: dict[str, str]
) -> None:
    with ThreadPoolExecutor() as pool:
        report = pool.submit(start_here, 2, rank_options(seconds), marked)
        signal_rank_1(marked, module, number)
        found = rank_findings(report.result(), read_interfaces(), marked)
    (failure,) = [finding for finding in found if finding.state == "failed"]
    assert failure.check == "all-reduce"
    assert failure.result.startswith("rank 1: ")
    assert reason in failure.result
    assert failure.values["ranks"] == [1]
    assert failure.remedy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "during"),
    [
        (signal.SIGINT, 130, "launch.doctor_ranks\0work\0"),
        (signal.SIGTERM, 143, "launch.doctor_probes\0torch\0"),
    ],
)
def test_stopped_in_the_middle_nothing_is_left(
    number: signal.Signals, status: int, during: str, tmp_path: Path, marked: dict[str, str]
) -> None:
    temporary, folder = tmp_path / "tmp", tmp_path / "runs"
    temporary.mkdir()
    folder.mkdir()
    command = [sys.executable, "-m", "launch.cli", "doctor", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--folder", str(folder), "--timeout", "120"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=marked | {"TMPDIR": str(temporary)},
    )
    for _ in range(600):
        if processes_with(marked["MASKBANK_TEST"], during):
            break
        time.sleep(0.2)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (status, "")
    assert errors == ("maskbank: interrupted\n" if number == signal.SIGINT else "")
    assert list(temporary.glob("maskbank*")) == []  # torch leaves an empty cache
    assert list(folder.iterdir()) == []


def test_a_store_that_is_not_there_is_named(free_port: int) -> None:
    place = find_place(TORCHRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)})
    assert place is not None
    with pytest.raises(OSError, match=f"127.0.0.1:{free_port}, was not .* 1 s: Connection refused"):
        connect(place, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("started_by", ["torchrun", "srun"])
def test_ranks_of_two_nodes_share_one_table(
    started_by: str, tmp_path: Path, marked: dict[str, str], free_port: int
) -> None:
    arguments = ["-m", "launch.cli", "doctor", "--device", "cpu", "--json"]
    arguments += ["--folder", str(tmp_path), "--timeout", "120"]
    processes = []
    for node in range(2):
        options = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        options += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port}"]
        options += [f"--node-rank={node}", f"--log-dir={tmp_path}", "--no-python", sys.executable]
        slurm = SRUN | {"SLURM_PROCID": str(node), "SLURM_NODEID": str(node)}
        slurm |= {"SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "127.0.0.1"}
        slurm["MASTER_PORT"] = str(free_port)
        by_torchrun = started_by == "torchrun"
        command = [sys.executable, *(options if by_torchrun else []), *arguments]
        processes.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=marked | ({} if by_torchrun else slurm),
            )
        )
    ended = [process.communicate(timeout=300) for process in processes]
    answers = [output for output, _ in ended if output]
    assert len(answers) == 1, ended  # torchrun chooses which node has rank 0
    assert [process.returncode for process in processes] == [0, 0], ended
    answer = json.loads(answers[0])
    host = os.uname().nodename
    assert sorted(answer["nodes"]) == [f"{host} (node 0)", f"{host} (node 1)"]
    local = [finding["node"] for finding in answer["findings"] if finding["check"] == "memory"]
    assert local == answer["nodes"]
    found = {finding["check"]: finding for finding in answer["findings"] if not finding["node"]}
    assert found["all-reduce"]["result"].startswith("gloo, 2 ranks on 2 nodes: right sum; ")
    assert found["shared folder"]["state"] == "ok"
    assert found["clocks"]["values"]["seconds"] < 1
    assert not list(tmp_path.glob(".maskbank*"))


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
