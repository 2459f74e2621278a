"""What a run ran on, for `environment.json` and the report."""

import importlib.metadata
import os
import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

from trainer.distributed import Ranks


def describe_environment(ranks: Ranks) -> dict[str, str]:
    """Versions, processor and ranks; nothing that names the machine or its user."""
    described = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dali": _version("nvidia-dali-cuda130"),
        "numpy": _version("numpy"),
        "cpu": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "ranks": str(ranks.world_size),
        "device": "CPU",
    }
    if ranks.device.type == "cuda":
        described["device"] = torch.cuda.get_device_name(ranks.device)
        described["cuda"] = str(torch.version.cuda)
    return described


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
