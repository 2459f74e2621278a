"""Whether a folder's file system does what runs and shards stand on: locks, renames, syncs.

`python -m launch.doctor_folder FOLDER SECONDS` tries it in a process of its own, since a network
disk that is gone blocks for ever, and answers with JSON.
"""

import errno
import fcntl
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.doctor_finding import Finding, duration, failed, info, ok, size, warning
from launch.doctor_process import run_probe

GIB, MIB = 1 << 30, 1 << 20
TRACES = ".maskbank-doctor-"  # what a killed probe may leave behind begins with this
_SAMPLE = 64 * MIB
_SECONDS_TO_WRITE = 5.0
_RENAMES = 50
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|lustre|beegfs|gpfs|ceph|glusterfs|afs|9p|virtiofs|orangefs|pvfs2|"
    r"wekafs|panfs|fuse\.(?!(fuse-overlayfs|squashfuse|portal|gvfsd)).*"
)
_LOCAL_LOCKS = ("nolock", "local_lock=all", "local_lock=flock", "localflock")


@dataclass(frozen=True)
class Mount:
    """One line of /proc/mounts."""

    source: str
    point: str
    kind: str
    options: tuple[str, ...]

    @property
    def network(self) -> bool:
        return _NETWORK.fullmatch(self.kind) is not None


def find_mount(mounts: str, folder: str) -> Mount | None:
    """The file system that holds a folder.

    Args:
        mounts: the text of /proc/mounts; a later line covers an earlier one.
        folder: absolute, without symbolic links.
    """
    best = None
    for line in mounts.splitlines():
        words = [re.sub(r"\\([0-7]{3})", _octal, word) for word in line.split(" ")]
        if len(words) < 4:
            continue
        point = words[1].rstrip("/") + "/"
        if f"{folder.rstrip('/')}/".startswith(point) and (
            best is None or len(words[1]) >= len(best.point)
        ):
            best = Mount(words[0], words[1], words[2], tuple(words[3].split(",")))
    return best


def folder_findings(folder: str, facts: Mapping[str, Any]) -> list[Finding]:
    """What `probe_folder` found, as rows.

    Args:
        folder: as the user gave it.
        facts: of the probe; an `error` if it broke or hung.
    """
    if error := facts.get("error"):
        return [
            failed(
                "folder",
                f"{folder}: {error}",
                f"see that its disk answers (ls {folder}; mount), or choose another --folder; "
                f"what is left there as {TRACES}* can be deleted",
            )
        ]
    if problem := facts.get("problem"):
        return [failed("folder", f"{folder}: {problem}", facts["remedy"])]
    findings = [_kind_finding(facts), _space_finding(facts)]
    findings += [_lock_finding(facts), _rename_finding(facts), _speed_finding(facts)]
    return findings


def _kind_finding(facts: Mapping[str, Any]) -> Finding:
    mount = Mount(**facts["mount"]) if facts["mount"] else None
    if mount is None:
        return info("folder", f"{facts['path']}, writable, on an unknown file system")
    where = "over the network" if mount.network else "local"
    said = f"{facts['path']}, writable, {mount.kind} from {mount.source} ({where})"
    values = {"kind": mount.kind, "network": mount.network, "path": facts["path"]}
    local_locks = [option for option in mount.options if option in _LOCAL_LOCKS]
    if mount.network and local_locks:
        return warning(
            "folder",
            f"{said}, mounted with {', '.join(local_locks)}: locks do not reach other nodes",
            "have it mounted with locks (Lustre: -o flock); until then build shards and train "
            "in one folder from one node at a time",
            **values,
        )
    if mount.kind in ("tmpfs", "ramfs"):
        return warning(
            "folder",
            f"{said}: it is in memory and gone after a restart",
            "choose a --folder on a disk for what is to stay",
            **values,
        )
    if mount.kind == "overlay":
        said += "; it goes with its container"
    return ok("folder", said, **values)


def _space_finding(facts: Mapping[str, Any]) -> Finding:
    free, total, inodes = facts["free"], facts["total"], facts["inodes"]
    said = f"{size(free)} free of {size(total)}"
    values = {"free": free, "total": total, "inodes": inodes}
    if inodes is not None and inodes < 10_000:
        said += f", and {inodes} more files at the most"
        return warning(
            "disk space", said, "delete small files, or choose another --folder", **values
        )
    if free < 5 * GIB:
        return warning(
            "disk space",
            f"{said}; a run with its checkpoints takes several GiB",
            "delete what is not needed, set run.keep_checkpoints=1, or choose another --folder",
            **values,
        )
    return Finding("disk space", said, "ok", values=values, varies=True)


def _lock_finding(facts: Mapping[str, Any]) -> Finding:
    if facts["lock"] == "works":
        return ok("file locks", "a lock keeps a second process out and is given back")
    return warning(
        "file locks",
        f"{facts['lock']}; two builds of shards into one folder would not notice each other",
        "start one at a time, or have it mounted with locks (Lustre: -o flock; NFS: without "
        "nolock, with lockd running)",
    )


def _rename_finding(facts: Mapping[str, Any]) -> Finding:
    if facts["rename"] == "works":
        said = f"{_RENAMES} renames over a file that was read meanwhile: always old or new"
        return ok("renames", said)
    remedy = "choose a --folder on another file system; here a killed run can leave half a file"
    return failed("renames", facts["rename"], remedy)


def _speed_finding(facts: Mapping[str, Any]) -> Finding:
    if facts["sync_error"]:
        return failed(
            "writing",
            f"fsync does not work: {facts['sync_error']}",
            "choose a --folder on another file system; here a crash can lose what was saved",
        )
    speed = facts["written"] / facts["write_seconds"]
    said = f"{speed / 1e6:,.0f} MB/s ({size(facts['written'])} with fsync); a small file with "
    said += f"fsync takes {duration(facts['sync_seconds'])}"
    values = {"bytes_per_second": speed, "sync_seconds": facts["sync_seconds"]}
    if speed < 20e6 or facts["sync_seconds"] > 1:
        remedy = "choose a --folder on a faster disk, or raise run.checkpoint_every"
        return Finding("writing", said, "warning", remedy, values, varies=True)
    return Finding("writing", said, "ok", values=values, varies=True)


def probe_folder(folder: Path) -> dict[str, Any]:
    """Tries everything in a temporary folder of `folder`, which is gone afterwards."""
    path = os.path.realpath(folder)
    if problem := _unusable(folder):
        return problem
    try:
        scratch = Path(tempfile.mkdtemp(prefix=TRACES, dir=path))
    except OSError as error:
        return {"problem": f"cannot be written ({error.strerror})", "remedy": _remedy(error, path)}
    mount = find_mount(Path("/proc/mounts").read_text(errors="replace"), path)
    usage = os.statvfs(path)
    found: dict[str, Any] = {
        "path": path,
        "mount": asdict(mount) if mount else None,
        "free": usage.f_bavail * usage.f_frsize,
        "total": usage.f_blocks * usage.f_frsize,
        "inodes": usage.f_favail if usage.f_files else None,
    }
    try:
        found["lock"] = try_lock(scratch / "lock")
        found["rename"] = try_renames(scratch)
        found |= _try_writing(scratch, min(_SAMPLE, found["free"] // 10))
    except OSError as error:
        return {"problem": f"cannot be written ({error.strerror})", "remedy": _remedy(error, path)}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def _unusable(folder: Path) -> dict[str, Any]:
    """What is wrong with it before anything is tried; empty if nothing is."""
    try:
        if folder.is_dir():
            return {}
        above = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        if not above.is_dir():
            return {"problem": f"{above} is no folder", "remedy": "choose another --folder"}
        if folder.is_symlink():
            target = os.readlink(folder)
            problem = f"is a link to {target}, which does not exist"
            return {"problem": problem, "remedy": f"mkdir -p {target}, or choose another --folder"}
    except OSError as error:
        return {"problem": str(error.strerror), "remedy": "choose another --folder"}
    return {"problem": "does not exist", "remedy": f"mkdir -p {folder}, or choose another --folder"}


def _remedy(error: OSError, path: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "delete what is not needed (df, quota), or choose another --folder"
    if error.errno == errno.EROFS:
        return "it is mounted read-only: choose another --folder, or mount -o remount,rw"
    return f"choose another --folder, or have its owner let you write (ls -ld {path})"


def try_lock(path: Path) -> str:
    """Whether flock keeps another process out while it is held, and no longer: "works", or not."""
    with path.open("w") as mine:
        try:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"flock is refused: {error.strerror}"
        if _other_process_locks(path):
            return "two processes hold the same lock at the same time"
        fcntl.flock(mine, fcntl.LOCK_UN)
        if not _other_process_locks(path):
            return "a lock is not given back"
    return "works"


def _other_process_locks(path: Path) -> bool:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with path.open("r+") as theirs:
                fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def try_renames(folder: Path) -> str:
    """Whether a reader sees a whole file, old or new, while it is replaced: "works", or not."""
    target, stop = folder / "target", folder / "stop"
    contents = [bytes([65 + number]) * 8192 for number in range(2)]
    target.write_bytes(contents[0])
    writer, reader = os.getpid(), os.fork()
    if reader == 0:
        status = 2
        try:
            while not stop.exists() and os.getppid() == writer:
                if target.read_bytes() not in contents:
                    os._exit(3)
            status = 0
        finally:
            os._exit(status)
    try:
        for number in range(_RENAMES):
            fresh = folder / "fresh"
            fresh.write_bytes(contents[(number + 1) % 2])
            os.replace(fresh, target)
        last = target.read_bytes()
    except OSError as error:
        return f"a file cannot be renamed over another: {error.strerror}"
    finally:
        stop.touch()
        ended = os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1])
    if last != contents[_RENAMES % 2]:
        return "after a rename the file still has its old content"
    seen = {0: "works", 3: "a reader saw part of a file while it was replaced"}
    return seen.get(ended, "a file was missing for a moment while it was replaced")


def _try_writing(folder: Path, count: int) -> dict[str, Any]:
    """Seconds for one large file and for a small one, each with fsync."""
    block, written, sync_error = os.urandom(4 * MIB), 0, ""
    start = time.perf_counter()
    with (folder / "large").open("wb", buffering=0) as file:
        while written < count and time.perf_counter() - start < _SECONDS_TO_WRITE:
            written += file.write(block)
        sync_error = _sync(file.fileno())
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    with (folder / "small").open("wb", buffering=0) as file:
        file.write(b"1")
        sync_error = sync_error or _sync(file.fileno())
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync_error = sync_error or _sync(descriptor)
    finally:
        os.close(descriptor)
    return {
        "written": written,
        "write_seconds": seconds,
        "sync_seconds": time.perf_counter() - start,
        "sync_error": sync_error,
    }


def _sync(descriptor: int) -> str:
    try:
        os.fsync(descriptor)
    except OSError as error:
        return str(error.strerror)
    return ""


def _octal(match: "re.Match[str]") -> str:
    return chr(int(match.group(1), 8))


if __name__ == "__main__":
    run_probe(lambda: probe_folder(Path(sys.argv[1])))
