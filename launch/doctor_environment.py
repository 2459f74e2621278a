"""Environment variables that break or slow down runs."""

import os
from collections.abc import Mapping

from launch.doctor_finding import Finding, info, ok, warning

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLOW = {
    "CUDA_LAUNCH_BLOCKING": ("1",),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL",),
    "NCCL_P2P_DISABLE": ("1",),
    "NCCL_SHM_DISABLE": ("1",),
    "NCCL_IB_DISABLE": ("1",),
    "NCCL_DEBUG": ("INFO", "TRACE"),
}


def environment_findings(
    environment: Mapping[str, str], cores: int, num_ranks: int, driver: str | None
) -> list[Finding]:
    """What is set, or half set, that a run will suffer from.

    Args:
        cores: that the ranks of this node share.
        num_ranks: on this node.
        driver: of NVIDIA, None where there is none.
    """
    found = [
        threads_finding(environment.get("OMP_NUM_THREADS"), cores, num_ranks),
        rank_variables_finding(environment),
        visible_devices_finding(environment.get("CUDA_VISIBLE_DEVICES"), driver),
        _temporary_folder_finding(environment.get("TMPDIR")),
        _slow_finding(environment),
    ]
    return [finding for finding in found if finding is not None]


def threads_finding(value: str | None, cores: int, num_ranks: int) -> Finding:
    """OMP_NUM_THREADS against this rank's share of the cores."""
    share = max(1, cores // num_ranks)
    ranks = f"{num_ranks} rank{'s' * (num_ranks > 1)}"
    if value is None:
        if num_ranks > cores:
            return warning(
                "threads",
                f"{ranks} share {cores} core{'s' * (cores > 1)} and will wait for each other",
                f"--nproc {cores} at the most, or ask for more cores",
            )
        each = f"maskbank gives each of {ranks} {share} of {cores} cores"
        return info("threads", f"OMP_NUM_THREADS is not set; {each}", threads=share)
    remedy = f"export OMP_NUM_THREADS={share}, or unset it"
    if not value.isdigit() or int(value) < 1:
        return warning("threads", f"OMP_NUM_THREADS is {value!r}, which is no number", remedy)
    threads = int(value)
    if threads * num_ranks > cores:
        said = f"OMP_NUM_THREADS={threads} for {ranks} is more than the {cores} cores"
        return warning("threads", said, remedy, threads=threads)
    return ok("threads", f"OMP_NUM_THREADS={threads} for {ranks}, {cores} cores", threads=threads)


def rank_variables_finding(environment: Mapping[str, str]) -> Finding | None:
    """Whether what torchrun sets is set by halves, as after an export that was forgotten."""
    there = [name for name in _RANK_VARIABLES if environment.get(name)]
    missing = [name for name in _RANK_VARIABLES if name not in there]
    if not there or not missing:
        return None
    shown = ", ".join(f"{name}={environment[name]}" for name in there)
    return warning(
        "rank variables",
        f"{shown}, but not {', '.join(missing)}",
        f"unset {' '.join(there)}; torchrun and maskbank set all of them for the ranks",
    )


def visible_devices_finding(value: str | None, driver: str | None) -> Finding | None:
    if value is None:
        return None
    if value.strip() in ("", "-1", "NoDevFiles"):
        if driver is None:
            return info("visible GPUs", "CUDA_VISIBLE_DEVICES is empty, and there is no GPU")
        return warning(
            "visible GPUs",
            "CUDA_VISIBLE_DEVICES is empty: it hides all GPUs of this machine",
            "unset CUDA_VISIBLE_DEVICES, or name GPUs: export CUDA_VISIBLE_DEVICES=0",
        )
    return info("visible GPUs", f"CUDA_VISIBLE_DEVICES={value}")


def _temporary_folder_finding(folder: str | None) -> Finding | None:
    if not folder or os.access(folder, os.W_OK):
        return None
    return warning(
        "TMPDIR",
        f"{folder} does not exist or cannot be written; temporary files go elsewhere",
        "export TMPDIR=/tmp, or a folder of a local disk",
    )


def _slow_finding(environment: Mapping[str, str]) -> Finding | None:
    """Settings for debugging that were left on; not wrong, but good to know."""
    said = [f"{name}={environment[name]}" for name in _SLOW if _is_set(environment, name)]
    if not said:
        return None
    return info("debugging", f"{', '.join(said)}: runs are slower, or say more")


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").upper() in _SLOW[name]
