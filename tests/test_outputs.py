"""Every command refuses an output that cannot be written, before any work, and leaves nothing."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.cli import main as shards
from data_pipeline.errors import InputError
from data_pipeline.files import require_writable, require_writable_file
from data_pipeline.masks.cli import main as masks
from evaluation.cli import main as evaluate
from evaluation.predict_cli import main as predict
from tests.evaluation_command import tiny_run
from tests.evaluation_data import scene_shards
from tests.forked import run_program
from tests.sample_data import folder_pair
from trainer.export_cli import main as export


def test_what_can_be_written_is_told_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for path in (tmp_path, tmp_path / "new" / "deep"):
        require_writable(path)
    for path in (tmp_path / "file", tmp_path / "new" / "deep" / "file"):
        require_writable_file(path)
    for path, reason in (
        (tmp_path / "file", r"--output .*file cannot be used: .*file is not a folder"),
        (tmp_path / "file" / "a" / "b", r"--output .*/a/b cannot be used: .*file is not a folder"),
        (tmp_path / "nowhere" / "a", "nowhere is not a folder"),
        (tmp_path / ("n" * 300), "File name too long"),
        (Path("/proc/x/y"), r"/proc/x/y cannot be written to \(/proc: "),
    ):
        with pytest.raises(InputError, match=reason):
            require_writable(path)
    for path, reason in (
        (tmp_path, "--html .* is a folder; give the path of a file"),
        (tmp_path / "file" / "page", r"--html .*file/page cannot be used: .*file is not a folder"),
        (Path(os.devnull), "is a device or a pipe"),
    ):
        with pytest.raises(InputError, match=reason):
            require_writable_file(path, "--html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere"]


@pytest.mark.slow
def test_every_command_refuses_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, test = tiny_run(tmp_path / "run"), tmp_path / "test"
    scene_shards(test, 4)
    images, truth = folder_pair(tmp_path / "pairs", ["a"])
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    below = file / "below"
    cases: list[tuple[Callable[[list[str]], None], list[object]]] = [
        (evaluate, ["kmeans", run, "--shards", test, "--output", below]),
        (evaluate, ["retrieval", run, "--train-shards", test, "--shards", test, "--output", below]),
        (evaluate, ["table", run, "--shards", test, "--output", below]),
        (evaluate, ["linear", run, "--train-shards", test, "--shards", test, "--cache", below]),
        (evaluate, ["report", run, "--output", below]),
        (evaluate, ["compare", run, run, "--html", below]),
        (predict, [run, images, "--output", below]),
        (export, [run, "--output", below]),
        (shards, ["stats", test, "--html", below]),
        (shards, ["verify", test, "--output", below]),
        (shards, ["build", "scenes", "--count", 4, "--output", below]),
        (masks, ["make", "prior", "--images", images, "--output", below]),
        (masks, ["score", "--masks", truth, "--truth", truth, "--output", below]),
    ]
    for command, arguments in cases:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        assert stop.value.code == 2, arguments
        assert error.count("\n") == 1, error
        assert f"{file} is not a folder; give another path" in error
        assert not out
    assert file.read_bytes() == b"mine"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_two_ranks_refuse_with_one_line(tmp_path: Path) -> None:
    run, test = tiny_run(tmp_path / "run"), tmp_path / "test"
    scene_shards(test, 4)
    (tmp_path / "file").touch()
    command = ["-m", "launch.cli", "evaluate", "--nproc", "2", "kmeans", str(run)]
    command += ["--shards", str(test), "--output", str(tmp_path / "file" / "x")]
    done: subprocess.CompletedProcess[str] = run_program([sys.executable, *command])
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("maskbank")]
    assert len(lines) == 1
    assert "file is not a folder; give another path" in lines[0]
