"""Processor, memory and limits of this machine, as the kernel tells them without blocking."""

import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path

from launch.doctor_finding import Finding, info, ok, size, warning

GIB = 1 << 30
OPEN_FILES_NEEDED = 4096
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # the first version of cgroups has a very large number instead of none
_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")  # the last one is Arm's


@dataclass(frozen=True)
class Cores:
    """What this process may use.

    Attributes:
        online: processors of the machine.
        affinity: those it may be put on.
        quota: processor seconds a second that its control group allows; None for no limit.
    """

    online: int
    affinity: int
    quota: float | None

    @property
    def usable(self) -> int:
        return self.affinity if self.quota is None else min(self.affinity, max(1, int(self.quota)))


def machine_findings(num_ranks: int) -> list[Finding]:
    """All checks of this file, on this machine."""
    shm = _usage("/dev/shm")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [
        processor_finding(_read(_PROC / "cpuinfo"), read_cores(), num_ranks),
        memory_finding(*read_memory()),
        shared_memory_finding(*shm)
        if shm
        else warning(
            "shared memory",
            "there is no /dev/shm; ranks and workers cannot share memory",
            "mount it: mount -t tmpfs tmpfs /dev/shm",
        ),
        open_files_finding(soft, hard),
    ]


def read_cores() -> Cores:
    affinity = len(os.sched_getaffinity(0))
    return Cores(os.cpu_count() or affinity, affinity, read_quota())


def processor_finding(cpuinfo: str, cores: Cores, num_ranks: int) -> Finding:
    """The processor, the cores that may be used, and whether bfloat16 is quick on it.

    Args:
        cpuinfo: the text of /proc/cpuinfo.
        num_ranks: that share the cores.
    """
    fields = [line.partition(":") for line in cpuinfo.splitlines()]
    named = {name.strip(): value.strip() for name, _, value in fields}
    flags = set((named.get("flags") or named.get("Features") or "").split())
    model = named.get("model name") or platform.machine()
    bf16 = [flag for flag in _BF16_FLAGS if flag in flags]
    allowed = f"{cores.usable} core{'s' * (cores.usable > 1)}"
    if cores.affinity < cores.online or cores.usable < cores.affinity:
        allowed += f" of {cores.online}"
    kind = f"bf16 in hardware ({bf16[0]})" if bf16 else "no bf16 in hardware"
    values = {
        "model": model,
        "online": cores.online,
        "affinity": cores.affinity,
        "quota": cores.quota,
        "bf16": bool(bf16),
        "amx": "amx_tile" in flags,
    }
    result = f"{model}; {allowed}; {kind}"
    if not bf16:
        result += ": on the CPU run.precision=float32 is faster"
    if cores.usable < cores.affinity:
        return warning(
            "processor",
            f"{result}; the control group allows {cores.quota:g} of {cores.affinity} cores, but "
            "threads are counted by the latter",
            f"export OMP_NUM_THREADS={max(1, cores.usable // num_ranks)}, and data.threads the "
            "same; or ask for more processors (docker --cpus, SLURM --cpus-per-task)",
            **values,
        )
    return ok("processor", result, **values)


def memory_finding(total: int, free: int, limit: int | None) -> Finding:
    """Memory that a run could take.

    Args:
        total: of the machine, bytes.
        free: of it, or of what the control group still allows, bytes.
        limit: of the control group, bytes.
    """
    capped = limit is not None and limit < total
    result = f"{size(free)} free of {size(total)}"
    if capped and limit is not None:
        result = f"{size(free)} free of the {size(limit)} that the control group allows"
    values = {"total": total, "free": free, "limit": limit}
    if free >= 2 * GIB:
        return Finding("memory", result, "ok", values=values, varies=True)
    remedy = "end what else runs here"
    remedy += ", or ask for more (SLURM --mem, docker --memory)" if capped else ""
    return warning("memory", result, f"{remedy}; a rank needs 2 GiB or more", **values)


def shared_memory_finding(total: int, free: int) -> Finding:
    """/dev/shm, over which ranks and workers hand each other tensors; bytes."""
    result = f"/dev/shm: {size(free)} free of {size(total)}"
    values = {"total": total, "free": free}
    if total < GIB:
        return warning(
            "shared memory",
            f"{result}; 1 GiB at least should be there",
            "enlarge it: docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm",
            **values,
        )
    if free < min(GIB / 2, 0.1 * total):
        return warning(
            "shared memory",
            f"{result}: nearly full",
            "delete what ended programs left there (ls -l /dev/shm), or enlarge it",
            **values,
        )
    return Finding("shared memory", result, "ok", values=values, varies=True)


def open_files_finding(soft: int, hard: int, needed: int = OPEN_FILES_NEEDED) -> Finding:
    """The limit of open files: sockets to each rank, shards, shared tensors."""
    unlimited = resource.RLIM_INFINITY
    values = {
        "soft": None if soft == unlimited else soft,
        "hard": None if hard == unlimited else hard,
    }
    if soft == unlimited or soft >= needed:
        said = "no limit" if soft == unlimited else f"{soft} allowed"
        return ok("open files", said, **values)
    if hard == unlimited or hard >= needed:
        goal = 65536 if hard == unlimited else min(hard, 65536)
        remedy = f"ulimit -n {goal}, in the shell or batch script that starts the run"
    else:
        remedy = (
            f"the hard limit is {hard}: raise it in /etc/security/limits.conf (nofile), or with "
            "docker run --ulimit nofile=65536, then ulimit -n 65536"
        )
    return warning(
        "open files", f"{soft} allowed; it should be {needed} at least", remedy, **values
    )


def read_quota(root: Path = _CGROUPS, proc: Path = _PROC) -> float | None:
    """Processor seconds a second that this process's control groups allow."""
    quotas = []
    for folder in _control_groups("cpu", root, proc):
        words = _read(folder / "cpu.max").split()
        if not words:
            words = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def read_memory(root: Path = _CGROUPS, proc: Path = _PROC) -> tuple[int, int, int | None]:
    """Bytes: the machine's memory, what is free for us, and our control groups' limit."""
    kib = dict(_pair(line) for line in _read(proc / "meminfo").splitlines() if line.strip())
    total, free = 1024 * kib.get("MemTotal", 0), 1024 * kib.get("MemAvailable", 0)
    limits = []
    for folder in _control_groups("memory", root, proc):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if not limit.strip().isdigit() or int(limit) >= _NO_LIMIT:
            continue
        stat = dict(_pair(line) for line in _read(folder / "memory.stat").splitlines())
        cache = stat.get("total_inactive_file", stat.get("inactive_file", 0))  # given back at need
        limits.append(int(limit))
        free = min(free, max(0, int(limit) - int(used or 0) + cache))
    return total, free, min(limits, default=None)


def slurm_finding(environment: dict[str, str], has_sbatch: bool) -> Finding:
    """Whether this is a SLURM job, or could start one."""
    if job := environment.get("SLURM_JOB_ID"):
        nodes = environment.get("SLURM_JOB_NUM_NODES", "?")
        return info("SLURM", f"job {job} on {nodes} node{'s' * (nodes != '1')}", job=job)
    return info("SLURM", "sbatch is on the PATH" if has_sbatch else "not on this machine", job=None)


def driver_version() -> str | None:
    """Of NVIDIA's kernel module; None where it is not loaded, empty where it does not say."""
    text = _read(_PROC / "driver/nvidia/version")
    if not text:
        return "" if Path("/dev/nvidiactl").exists() else None
    words = text.splitlines()[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def _control_groups(controller: str, root: Path, proc: Path) -> list[Path]:
    """Folders of this process's control groups, up to the root, of both versions."""
    folders = []
    for line in _read(proc / "self/cgroup").splitlines():
        number, names, path = line.split(":", 2)
        mounts: tuple[Path, ...]
        if number == "0":
            mounts = (root, root / "unified")
        elif controller in names.split(","):
            mounts = (root / controller, root / names)
        else:
            continue
        inside = [Path(path.lstrip("/")), *Path(path.lstrip("/")).parents]
        folders += [mount / each for mount in mounts for each in inside]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _pair(line: str) -> tuple[str, int]:
    words = line.replace(":", " ").split()
    return (words[0], int(words[1])) if len(words) > 1 and words[1].isdigit() else (line, 0)


def _usage(folder: str) -> tuple[int, int] | None:
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
