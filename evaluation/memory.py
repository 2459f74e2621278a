"""How much memory there is, so that a cache that cannot fit is refused before it is filled."""

import os
from pathlib import Path

from data_pipeline.errors import InputError

_CGROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that this machine still has, or its container or job where that has less."""
    available = _of_machine()
    for folder in _own_cgroups():
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
            statistics = (folder / "memory.stat").read_text().split()
        except (OSError, ValueError):
            continue
        if limit != "max":
            # the kernel gives cached files back before it runs out
            cached = int(
                dict(zip(statistics[::2], statistics[1::2], strict=False))["inactive_file"]
            )
            available = min(available, int(limit) - used + cached)
    return max(0, available)


def require_memory(needed: int, available: int, what: str, advice: str) -> None:
    """Raises InputError unless `needed` bytes leave a tenth of the `available` ones."""
    if needed > 0.9 * available:
        raise InputError(
            f"{what} take {needed / 2**30:.1f} GiB of memory, and {available / 2**30:.1f} GiB are "
            f"available; {advice}"
        )


def _of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _own_cgroups() -> list[Path]:
    """Folders of this process's control group (version 2) and of those around it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    if not own:
        return []
    folder = _CGROUPS / own[0]
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(_CGROUPS))]
