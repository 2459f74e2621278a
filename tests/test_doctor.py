"""`maskbank doctor` on this machine, with real ranks, and on set-ups that are broken on purpose."""

import io
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launch.doctor_environment import environment_findings, threads_finding
from launch.doctor_finding import Finding, exit_status, failed, info, ok, print_table, warning
from launch.doctor_folder import find_mount, folder_findings, probe_folder
from launch.doctor_machine import (
    Cores,
    memory_finding,
    open_files_finding,
    processor_finding,
    read_memory,
    read_quota,
    shared_memory_finding,
)
from launch.doctor_network import (
    connected_interfaces,
    host_finding,
    interface_findings,
    missing_interfaces,
    parse_address,
    read_interfaces,
)
from launch.doctor_probes import dali_finding, deepspeed_finding, gpu_findings
from launch.doctor_process import last_error_line
from launch.doctor_software import parse_requirement, satisfies, version_findings

GIB = 1 << 30
NETWORK = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.7"], "ifb0": [], "docker0": ["172.17.0.1"]}
REFUSED = "Unable to find address for: nope0"


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.state for finding in findings}


# what a version, a processor or a limit means


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.10.0+cu130", ">=2.9", True),
        ("2.9", ">=2.9.0", True),
        ("2.8.1", ">=2.9", False),
        ("3.0", ">=2.9,<3", False),
        ("2.14.1", "==2.14.*", True),
        ("2.14.1", "!=2.14.1", False),
        ("1.4.9", "~=1.4.2", True),
        ("1.5.0", "~=1.4.2", False),
        ("1.0rc2", "", True),
    ],
)
def test_version_ranges(version: str, wanted: str, fits: bool) -> None:
    assert satisfies(version, wanted) is fits


def test_versions_that_are_old_missing_or_optional() -> None:
    lines = [
        "torch>=2.9",
        "numpy>=1.26",
        "moto[server]>=5",
        'timm>=1.0; extra == "masks"',
        'nvidia-dali-cuda130>=1.50; sys_platform == "linux" and extra == "dali"',
    ]
    installed = {"torch": "2.8.0", "torchvision": "0.24", "nvidia-dali-cuda130": "2.4"}
    installed |= {"timm": "0.9", "moto": "5.1"}
    found = version_findings(map(parse_requirement, lines), installed.get)
    assert states(found) == {
        "packages": "info",
        "torch": "warning",
        "numpy": "failed",
        "timm": "warning",
    }
    packages, torch, numpy, timm = found
    assert "DALI 2.4" in packages.result
    assert "without deepspeed, webdataset (optional)" in packages.result
    assert packages.values["torch"] == "2.8.0"
    assert (torch.result, torch.remedy) == (
        "2.8.0; maskbank is made for >=2.9",
        "pip install --upgrade 'torch>=2.9'",
    )
    assert numpy.remedy == "pip install 'numpy>=1.26'"
    assert "timm>=1.0" in timm.remedy


def test_processor_and_what_its_control_group_allows() -> None:
    amx = "model name\t: Xeon\nflags\t\t: fpu amx_bf16 amx_tile avx512_bf16\n"
    found = processor_finding(amx, Cores(64, 64, None), 2)
    assert (found.state, found.result) == ("ok", "Xeon; 64 cores; bf16 in hardware (amx_bf16)")
    assert found.values["amx"] is True
    found = processor_finding("model name : Old\nflags : fpu\n", Cores(64, 8, None), 2)
    assert found.state == "ok"
    assert "8 cores of 64; no bf16 in hardware: on the CPU run.precision=float32" in found.result
    found = processor_finding(amx, Cores(64, 64, 4.5), 2)
    assert found.state == "warning"
    assert "allows 4.5 of 64 cores" in found.result
    assert "OMP_NUM_THREADS=2" in found.remedy


def test_limits_of_control_groups_of_both_versions(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable:  6291456 kB\n")
    assert read_memory(root, proc) == (8 * GIB, 6 * GIB, None)
    assert read_quota(root, proc) is None
    (proc / "self/cgroup").write_text("0::/job/step\n")
    (root / "job/step").mkdir(parents=True)
    (root / "job/cpu.max").write_text("150000 100000\n")
    (root / "job/step/cpu.max").write_text("max 100000\n")
    (root / "job/memory.max").write_text(f"{4 * GIB}\n")
    (root / "job/memory.current").write_text(f"{3 * GIB}\n")
    (root / "job/memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    (root / "job/step/memory.max").write_text("max\n")
    assert read_quota(root, proc) == 1.5
    assert read_memory(root, proc) == (8 * GIB, 2 * GIB, 4 * GIB)  # cache is given back
    (proc / "self/cgroup").write_text("4:memory:/box\n1:cpu,cpuacct:/box\n")
    for name in ("memory/box", "cpu,cpuacct/box"):
        (root / name).mkdir(parents=True)
    (root / "cpu,cpuacct/box/cpu.cfs_quota_us").write_text("50000\n")
    (root / "cpu,cpuacct/box/cpu.cfs_period_us").write_text("100000\n")
    (root / "memory/box/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert read_quota(root, proc) == 0.5
    assert read_memory(root, proc) == (8 * GIB, 6 * GIB, None)


def test_amounts_that_are_too_small() -> None:
    assert memory_finding(8 * GIB, 4 * GIB, None).state == "ok"
    found = memory_finding(8 * GIB, GIB, 2 * GIB)
    assert found.state == "warning"
    assert "control group" in found.result
    assert "--mem" in found.remedy
    assert shared_memory_finding(2 * GIB, GIB).state == "ok"
    assert "--shm-size" in shared_memory_finding(64 << 20, 64 << 20).remedy
    assert "nearly full" in shared_memory_finding(8 * GIB, GIB // 4).result
    assert open_files_finding(4096, 4096).state == "ok"
    assert open_files_finding(resource.RLIM_INFINITY, resource.RLIM_INFINITY).state == "ok"
    assert open_files_finding(1024, 8192).remedy.startswith("ulimit -n 8192")
    assert "the hard limit is 2048" in open_files_finding(1024, 2048).remedy


# GPUs, DALI and DeepSpeed, from what their probes answer


def test_gpus_that_are_there_busy_broken_or_hidden() -> None:
    fine = {"name": "H100", "memory": 80 * GIB, "free": 79 * GIB}
    busy = fine | {"free": 20 * GIB}
    broken = {"name": "H100", "memory": 80 * GIB, "error": "no kernel image is available"}
    found = gpu_findings({"gpus": [fine, busy, broken]}, "auto", "550.54.15")
    assert states(found) == {"GPU 0": "ok", "GPU 1": "warning", "GPU 2": "failed"}
    assert found[0].result == "H100, 80 GiB, driver 550.54.15"
    assert "60 GiB of it are in use" in found[1].result
    assert "no kernel image" in found[2].result
    assert gpu_findings({}, "auto", None)[0] == info("GPU", "none; training runs on the CPU")
    assert gpu_findings({}, "cuda", None)[0].state == "failed"
    hidden = gpu_findings({"cuda": "13.0", "visible_devices": ""}, "auto", "550")[0]
    assert (hidden.state, hidden.remedy) == ("warning", "unset CUDA_VISIBLE_DEVICES")
    assert "built without CUDA" in gpu_findings({"cuda": None}, "auto", "550")[0].remedy


def test_dali_and_deepspeed_that_are_missing_or_broken() -> None:
    assert dali_finding({}, installed=False).state == "info"
    found = dali_finding({"error": "killed by SIGILL"}, installed=True)
    assert (found.state, "data.loader=torch" in found.remedy) == ("failed", True)
    grey = {"version": "2", "decoder": "cpu", "shape": [1, 32, 32, 3], "mean": 9.0, "seconds": 1.0}
    assert "wrongly: grey 9" in dali_finding(grey, installed=True).result
    assert dali_finding(grey | {"mean": 128.4}, installed=True).state == "ok"
    assert deepspeed_finding({}, installed=False).state == "info"
    assert deepspeed_finding({"error": "no answer within 60 s"}, installed=True).state == "warning"
    facts = {"version": "1", "accelerator": "the CPU", "compiles": True, "seconds": 1.0}
    assert deepspeed_finding(facts, installed=True).state == "ok"
    assert "ninja" in deepspeed_finding(facts | {"missing": ["ninja"]}, installed=True).remedy


# the folder


MOUNTS = r"""/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw,vers=4.2 0 0
scratch@tcp:/fs /home/big\040disk lustre rw,localflock 0 0
tmpfs /dev/shm tmpfs rw 0 0
s3fs /bucket fuse.s3fs rw 0 0
"""


def test_the_file_system_of_a_folder() -> None:
    kinds = {
        "/work": ("ext4", False),
        "/home": ("nfs4", True),
        "/homes": ("ext4", False),
        "/home/me": ("nfs4", True),
        "/home/big disk/runs": ("lustre", True),
        "/bucket/a": ("fuse.s3fs", True),
    }
    for folder, (kind, network) in kinds.items():
        mount = find_mount(MOUNTS, folder)
        assert mount is not None
        assert (mount.kind, mount.network) == (kind, network), folder


def test_a_folder_that_works(tmp_path: Path) -> None:
    facts = probe_folder(tmp_path)
    assert (facts["lock"], facts["rename"], facts["sync_error"]) == ("works", "works", "")
    assert facts["written"] >= 1 << 20
    assert list(tmp_path.iterdir()) == []
    found = states(folder_findings(str(tmp_path), facts))
    assert set(found) == {"folder", "disk space", "file locks", "renames", "writing"}
    assert "failed" not in found.values()


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for folder, problem, remedy in (
        (tmp_path / "none", "does not exist", f"mkdir -p {tmp_path / 'none'}"),
        (tmp_path / "file", "is no folder", "choose another"),
        (tmp_path / "file/below", f"{tmp_path / 'file'} is no folder", "choose another"),
        (tmp_path / "link", "which does not exist", f"mkdir -p {tmp_path / 'gone'}"),
        (Path("/proc"), "cannot be written", "choose another"),
    ):
        (found,) = folder_findings(str(folder), probe_folder(folder))
        assert found.state == "failed"
        assert problem in found.result
        assert remedy in found.remedy


def test_file_systems_without_what_runs_need(tmp_path: Path) -> None:
    good = probe_folder(tmp_path)
    lustre = find_mount(MOUNTS, "/home/big disk")
    assert lustre is not None
    bad = good | {
        "mount": vars(lustre),
        "free": GIB,
        "lock": "flock is refused: No locks available",
        "rename": "a file was missing for a moment while it was replaced",
        "sync_error": "Invalid argument",
    }
    found = folder_findings("runs", bad)
    assert states(found) == {
        "folder": "warning",
        "disk space": "warning",
        "file locks": "warning",
        "renames": "failed",
        "writing": "failed",
    }
    assert "localflock" in found[0].result
    (hung,) = folder_findings("runs", {"error": "no answer within 60 s"})
    assert (hung.state, "ls runs" in hung.remedy) == ("failed", True)


# the network and the environment


@pytest.mark.parametrize(
    ("backend", "value", "missing"),
    [
        ("gloo", "eth0", []),
        ("gloo", "eth0,nope0", ["nope0"]),
        ("gloo", "eth", ["eth"]),
        ("gloo", "ifb0", ["ifb0"]),
        ("nccl", "eth", []),
        ("nccl", "ib,eth", []),
        ("nccl", "=eth", ["eth"]),
        ("nccl", "^docker,lo", []),
        ("nccl", "^docker,lo,eth", ["^docker,lo,eth"]),
    ],
)
def test_names_of_interfaces(backend: str, value: str, missing: list[str]) -> None:
    assert missing_interfaces(backend, value, NETWORK) == missing


def test_variables_that_name_no_interface() -> None:
    environment = {"GLOO_SOCKET_IFNAME": "nope0", "NCCL_SOCKET_IFNAME": "ifb0"}
    gloo, nccl = interface_findings(environment, NETWORK, "gloo")
    assert (gloo.state, nccl.state) == ("failed", "warning")
    said = "GLOO_SOCKET_IFNAME=nope0, but nope0 is no interface of this machine"
    assert (gloo.check, gloo.result) == ("gloo interface", said)
    assert gloo.remedy.startswith("export GLOO_SOCKET_IFNAME=eth0, or unset it")
    assert "eth0 (10.0.0.7), lo (127.0.0.1); without an address: ifb0" in gloo.remedy
    assert nccl.result.endswith("ifb0 has no address")
    assert interface_findings({"GLOO_SOCKET_IFNAME": ""}, NETWORK, "gloo") == []


def test_the_own_name() -> None:
    facts = {"host": "a", "addresses": ["127.0.1.1"], "usable": ["127.0.1.1"]}
    assert host_finding(facts, NETWORK, 1, None).state == "ok"
    alone = host_finding(facts, NETWORK, 2, None)
    assert alone.state == "warning"
    assert "GLOO_SOCKET_IFNAME=eth0 on all nodes" in alone.remedy
    assert host_finding(facts, NETWORK, 2, "eth0").state == "info"
    both = facts | {"usable": ["127.0.1.1", "10.0.0.7"]}
    assert "a leads to 127.0.1.1, which" in host_finding(both, NETWORK, 2, None).result
    unknown = host_finding({"error": "Name or service not known"}, NETWORK, 1, None)
    assert (unknown.state, "to /etc/hosts" in unknown.remedy) == ("failed", True)
    elsewhere = host_finding(facts | {"usable": []}, NETWORK, 1, None)
    assert "127.0.1.1 is another's" in elsewhere.result
    longer = host_finding(facts | {"full_name": "a.b", "full_usable": False}, NETWORK, 1, None)
    assert longer.result.startswith("a.b leads to no address of this machine")


def test_connections_of_this_process_are_found() -> None:
    assert parse_address("0100007F") == "127.0.0.1"
    assert parse_address("0000000000000000FFFF00000100007F") == "127.0.0.1"
    assert parse_address("00000000000000000000000001000000") == "::1"
    loopback = next(name for name, all_ in read_interfaces().items() if "127.0.0.1" in all_)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            assert loopback in connected_interfaces(without_port=1)


def test_environments_that_break_runs() -> None:
    assert environment_findings({}, 4, 2, None) == [threads_finding(None, 4, 2)]
    assert threads_finding(None, 4, 2).state == "info"
    assert threads_finding(None, 1, 2).state == "warning"
    assert threads_finding("2", 4, 2).state == "ok"
    assert "OMP_NUM_THREADS=2" in threads_finding("4", 4, 2).remedy
    assert "no number" in threads_finding("many", 4, 2).result
    broken = {
        "MASTER_ADDR": "gpu7",
        "CUDA_VISIBLE_DEVICES": "",
        "TMPDIR": "/nowhere/tmp",
        "NCCL_DEBUG": "INFO",
        "TORCH_DISTRIBUTED_DEBUG": "OFF",
    }
    found = environment_findings(broken, 4, 2, "550")
    assert states(found) == {
        "threads": "info",
        "rank variables": "warning",
        "visible GPUs": "warning",
        "TMPDIR": "warning",
        "debugging": "info",
    }
    assert "unset MASTER_ADDR;" in found[1].remedy
    assert "NCCL_DEBUG=INFO:" in found[4].result


# how it is shown


def shown(findings: list[Finding], nodes: list[str], width: int) -> str:
    text = io.StringIO()
    print_table(findings, nodes, Console(file=text, width=width))
    return text.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_of_a_remedy_is_cut_off(width: int) -> None:
    remedy = "export GLOO_SOCKET_IFNAME=eth0, or unset it; there are: " + "eth0 (10.0.0.7), " * 9
    name = "/very" * 30
    page = shown([failed("all-reduce", f"[bold]{name}\x1b[31m", remedy)], ["a"], width)
    assert all(len(line) <= width for line in page.splitlines())
    squeezed = "".join(page.split())
    assert "".join(remedy.split()) in squeezed
    assert f"[bold]{name}" in squeezed
    assert "\x1b" not in page
    assert page.endswith("1 checks: 1 failed; what to do stands after the arrows\n")


def test_nodes_that_say_the_same_share_a_row() -> None:
    everywhere = [Finding("open files", "20000", "ok", node=node) for node in "abcde"]
    some = [
        Finding("memory", f"{n} GiB free", "ok", node=node, varies=True)
        for n, node in enumerate("abcd")
    ]
    low = Finding("memory", "1 GiB free", "warning", "end what runs", varies=True, node="e")
    page = shown([*everywhere, *some, low, ok("clocks", "alike")], list("abcde"), 80)
    rows = [line.split() for line in page.splitlines()]
    assert ["open", "files", "ok", "all", "20000"] in rows
    assert [
        "memory",
        "ok",
        "a,",
        "b,",
        "c",
        "and",
        "1",
        "more",
        "0",
        "GiB",
        "free",
        "(others",
        "alike)",
    ] in rows
    assert ["memory", "warning", "e", "1", "GiB", "free"] in rows
    assert rows[-1][:2] == ["4", "checks:"]


def test_states_and_exit_status() -> None:
    assert exit_status([ok("a", "b"), warning("a", "b", "c"), info("a", "b")]) == 0
    assert exit_status([ok("a", "b"), failed("a", "b", "c")]) == 1
    for state in ("warning", "failed"):
        with pytest.raises(AssertionError):
            Finding("a", "b", state)


def test_the_line_that_says_why_a_process_died() -> None:
    trace = "Traceback (most recent call last):\n  File x\nImportError: libcudart.so.13: no\n\n"
    assert last_error_line(trace + "=====\n") == "ImportError: libcudart.so.13: no"
    gloo = "RuntimeError: [enforce fail at /w/gloo/device.cc:84] ifa != nullptr. " + REFUSED
    assert last_error_line(gloo) == REFUSED
    assert last_error_line("terminate called\n  what\n") == "terminate called"
    assert last_error_line("") == ""


def test_help_needs_no_torch() -> None:
    code = "import sys, launch.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
