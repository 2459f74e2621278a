"""One run at a time in a run directory; a requeued job takes over from its former self."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import InputError
from data_pipeline.files import only_writer, write_json
from trainer.distributed import Ranks
from trainer.preemption import OWNER_FILE, STOP_FILE, StopRequest
from trainer.run_lock import alone_in

MAIN = Ranks(0, 2, torch.device("cpu"), 30.0)
OTHER = Ranks(1, 2, torch.device("cpu"), 30.0)
# holds a run until it is asked to stop, as training does at a step boundary
_FORMER = """
import sys, time
from pathlib import Path
from data_pipeline.files import only_writer
run = Path(sys.argv[1])
with only_writer(run):
    print("in", flush=True)
    while not (run / "STOP").exists():
        time.sleep(0.02)
    (run / "saved").touch()
"""


def test_a_second_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    with (
        only_writer(tmp_path),
        pytest.raises(InputError, match=f"another process is training in {tmp_path}"),
        alone_in(tmp_path, MAIN),
    ):
        pass
    assert not (tmp_path / STOP_FILE).exists()


def test_ranks_but_the_first_do_not_ask(tmp_path: Path) -> None:
    with only_writer(tmp_path), alone_in(tmp_path, OTHER):
        pass


def test_a_requeued_job_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    former = subprocess.Popen(
        [sys.executable, "-c", _FORMER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert former.stdout is not None
    assert former.stdout.readline() == "in\n"
    with alone_in(tmp_path, MAIN):
        assert (tmp_path / "saved").exists()
        assert former.wait(10) == 0


def test_a_former_self_that_does_not_stop_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    hasty = Ranks(0, 2, torch.device("cpu"), 0.2)
    start = time.monotonic()
    with (
        only_writer(tmp_path),
        pytest.raises(TimeoutError, match="ranks of its former start are still training"),
        alone_in(tmp_path, hasty),
    ):
        pass
    assert time.monotonic() - start >= 0.3


def test_an_error_inside_is_passed_on_and_the_lock_is_free(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="own"), alone_in(tmp_path, MAIN):
        raise InputError("own")
    with only_writer(tmp_path):
        pass


def test_without_locks_the_newest_start_owns_the_run(tmp_path: Path) -> None:
    """Some network file systems keep locks to one machine."""
    with StopRequest(tmp_path, MAIN) as former:
        former.begin()
        assert not former.asked()
        with StopRequest(tmp_path, MAIN) as newer:
            newer.begin()
            assert not newer.asked()
        assert former.asked()
        assert former.reason == "another start of the same run"


def test_an_unreadable_owner_stops_nobody(tmp_path: Path) -> None:
    with StopRequest(tmp_path, MAIN) as request:
        request.begin()
        (tmp_path / OWNER_FILE).unlink()
        assert not request.asked()
    with StopRequest(tmp_path, OTHER) as other:  # the others do not look
        other.begin()
        write_json(tmp_path / OWNER_FILE, {})
        assert not other.asked()
