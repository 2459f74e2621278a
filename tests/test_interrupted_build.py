"""A build that is killed, interrupted or out of disk: nothing half-written, and it goes on."""

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build_config import BuildConfig, BuildOptions
from data_pipeline.errors import InputError, SampleError
from data_pipeline.sources.generated import list_scenes
from data_pipeline.write_shards import build_shards
from tests.sample_data import build_scene_shards, checksums, write

SCENES, SHARD = 24, 4
LONG_SHARDS = """
import sys
from pathlib import Path
from data_pipeline.sources.generated import list_scenes
from data_pipeline.sources.item import Listing
from data_pipeline.build_config import BuildConfig, BuildOptions
from data_pipeline.write_shards import build_shards
if __name__ == "__main__":
    items = [*list_scenes(20, 0, 16).entries, *list_scenes(180, 1, 4096).entries]
    config = BuildConfig(20, "ids", shuffle_seed=-1)
    build_shards(
        Listing(items), Path(sys.argv[1]), config, BuildOptions(int(sys.argv[2])),
        lambda plan: lambda done, failed: done and print(done, failed, flush=True),
    )
"""
BUILD = """
import sys
from pathlib import Path
from data_pipeline.sources.generated import list_scenes
from data_pipeline.build_config import BuildConfig, BuildOptions
from data_pipeline.write_shards import build_shards
if __name__ == "__main__":
    print("start", flush=True)
    build_shards(
        list_scenes(24, 0, 48), Path(sys.argv[1]), BuildConfig(4, "ids"),
        BuildOptions(int(sys.argv[2])),
        lambda plan: lambda done, failed: done and print(done, failed, flush=True),
    )
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    build_scene_shards(root, SCENES, samples_per_shard=SHARD)
    return root


def test_errors_survive_the_way_between_processes() -> None:
    for error in (
        InputError("what, where, what to do"),
        SampleError("mask", "has colours"),
        OSError(errno.ENOSPC, "no space left; free some", "/somewhere"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        assert vars(copy) == vars(error)


def start_build(
    tmp_path: Path, output: Path, processes: int, script: str = BUILD
) -> "subprocess.Popen[str]":
    path = write(tmp_path / "build.py", script.encode())
    return subprocess.Popen(
        [sys.executable, str(path), str(output), str(processes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_lines(process: "subprocess.Popen[str]", count: int) -> None:
    assert process.stdout is not None
    for _ in range(count):
        assert process.stdout.readline()


def wait_for_group(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """Output of the process and of all that it started: it ends when none of them lives."""
    return process.communicate(timeout=60)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "shards"
    moments = np.random.default_rng(0).permutation(SCENES // SHARD - 1)
    for number, moment in enumerate(sorted(moments.tolist())):
        process = start_build(tmp_path, output, processes=1 + number % 2)
        wait_for_lines(process, 1 + moment)
        process.kill()
        wait_for_group(process)  # workers end with their parent
        assert process.returncode == -signal.SIGKILL
    process = start_build(tmp_path, output, processes=2)
    _, errors = wait_for_group(process)
    assert (process.returncode, errors) == (0, "")
    assert checksums(output) == checksums(shards)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_ctrl_c_ends_a_build_at_once_and_cleanly(tmp_path: Path, processes: int) -> None:
    output = tmp_path / "shards"
    arguments = f"build scenes --count 400 --size 96 --samples-per-shard 20 -p {processes}"
    process = subprocess.Popen(
        [sys.executable, "-m", "data_pipeline.cli", *arguments.split(), "-o", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("building: ")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    _, errors = wait_for_group(process)
    assert process.returncode == 130
    told = [line for line in errors.splitlines() if not line.startswith("building: ")]
    assert told == [
        "maskbank: interrupted; run the same command again to go on: finished shards are kept"
    ]
    names = os.listdir(output)
    assert not [name for name in names if name.endswith(".tmp")]
    assert "manifest.json" not in names
    finished = sum(name.startswith("shard-") and name.endswith(".json") for name in names)
    assert 1 <= finished < 20


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_does_not_wait_for_the_shards_under_way(tmp_path: Path, processes: int) -> None:
    process = start_build(tmp_path, tmp_path / "shards", processes, script=LONG_SHARDS)
    wait_for_lines(process, 1)  # the other shards take minutes each: waiting would run out of time
    process.send_signal(signal.SIGINT)
    wait_for_group(process)
    assert process.returncode == -signal.SIGINT
    assert len(list((tmp_path / "shards").glob("shard-*.json"))) == 1
    assert not list((tmp_path / "shards").glob(".*"))


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told_as_such(tmp_path: Path) -> None:
    process = start_build(tmp_path, tmp_path / "shards", processes=2, script=LONG_SHARDS)
    wait_for_lines(process, 1)  # a shard is written: so the workers are there
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    workers = [child for child, command in commands.items() if b"spawn_main" in command]
    assert len(workers) == 2
    for worker in workers:  # Ctrl-C is not theirs to see
        status = Path(f"/proc/{worker}/status").read_text()
        blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
        assert blocked & (1 << (signal.SIGINT - 1))
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = wait_for_group(process)
    assert process.returncode == 1
    assert "InputError: a worker process was killed from outside" in errors
    assert not list((tmp_path / "shards").glob(".*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if made.returncode:
        pytest.skip(f"no file system may be mounted here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def build_two(output: Path) -> None:
    build_scene_shards(output, 2, size=32, samples_per_shard=1)


def full_disk_error(output: Path) -> OSError | None:
    try:
        build_two(output)
    except OSError as error:
        return error
    return None


def test_a_full_disk_is_told_and_leaves_nothing_half_written(
    small_disk: Path, tmp_path: Path
) -> None:
    build_two(tmp_path / "whole")
    whole = checksums(tmp_path / "whole")
    ballast, finished = small_disk / "ballast", set()
    # a page less of ballast each time, so that the disk is full at every file of the build once
    for pages in range(63, 0, -1):
        output = small_disk / f"shards_{pages}"
        output.mkdir()
        ballast.write_bytes(bytes(pages * 4096))
        error = full_disk_error(output)
        found = checksums(output)
        assert found.items() <= whole.items()  # whole files only, and no temporary ones
        if error is None:
            break
        message = "no space left; free some and run the same command again: finished shards stay"
        assert (error.errno, error.strerror, error.filename) == (errno.ENOSPC, message, str(output))
        finished |= set(found)
        ballast.unlink()
        build_two(output)  # the same again, with space
        assert checksums(output) == whole
        shutil.rmtree(output)
    assert finished == set(whole) - {"manifest.json"}


@pytest.mark.slow
def test_a_full_disk_is_told_by_worker_processes_too(small_disk: Path) -> None:
    listing, config = list_scenes(60, 0, 64), BuildConfig(5, "ids")
    with pytest.raises(OSError, match="no space left; free some") as caught:
        build_shards(listing, small_disk / "shards", config, BuildOptions(2))
    assert caught.value.errno == errno.ENOSPC
    assert not list((small_disk / "shards").glob(".*"))
    assert not (small_disk / "shards" / "manifest.json").exists()


def test_a_disk_that_is_read_only_is_refused_at_once(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(
        InputError, match=r"disk cannot be written to \(.*: Read-only file system\); give another"
    ):
        build_scene_shards(small_disk, 2)
    with pytest.raises(InputError, match=r"below cannot be written to \(.*: Read-only"):
        build_scene_shards(small_disk / "below", 2)
