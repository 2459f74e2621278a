"""The command as a user meets it: help, and the demo from end to end, small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.demo import DemoScale, demo_steps
from launch.torchrun import split_nproc
from tests.forked import run_program


def maskbank(*arguments: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "demo"),
        (("demo",), "maskbank demo --output"),
        (("train",), "maskbank train --recipe demo_cpu"),
    ],
)
def test_help_shows_an_example(arguments: tuple[str, ...], expected: str) -> None:
    result = maskbank(*arguments, "--help")
    assert result.returncode == 0
    assert expected in result.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("kmeans", "run"), (1, ["kmeans", "run"])),
        (("--nproc", "4", "kmeans", "run"), (4, ["kmeans", "run"])),
        (("kmeans", "--nproc", "2", "run", "--html"), (2, ["kmeans", "run", "--html"])),
        (("kmeans", "run", "--nproc=3"), (3, ["kmeans", "run"])),
        (
            ("run", "--title=--nproc 2", "x--nproc=2"),
            (1, ["run", "--title=--nproc 2", "x--nproc=2"]),
        ),
        (("run", "--nproc", "2", "--", "--nproc", "7"), (2, ["run", "--", "--nproc", "7"])),
    ],
)
def test_the_number_of_ranks_may_stand_anywhere(
    words: tuple[str, ...], expected: tuple[int, list[str]]
) -> None:
    assert split_nproc(words) == expected


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_number_of_ranks_that_is_none_is_refused_before_torch_is_loaded(command: str) -> None:
    for words in (("--nproc", "two"), ("--nproc=0",), ("--nproc",)):
        result = maskbank(command, "run", *words)
        assert result.returncode == 2
        assert "maskbank: --nproc is '" in result.stderr


@pytest.mark.slow
def test_commands_show_their_ranks_and_others_refuse_them() -> None:
    for words in (("evaluate", "kmeans"), ("predict",), ("train",), ("doctor",), ("demo",)):
        result = maskbank(*words, "-h")
        assert result.returncode == 0, result.stderr
        assert " --nproc " in result.stdout
    result = maskbank("evaluate", "report", "-h")
    assert "--nproc" not in result.stdout
    result = maskbank("evaluate", "report", "run", "--nproc", "2")
    assert result.returncode == 2
    assert "maskbank: this command works in one process; leave --nproc out\n" in result.stderr
    # ranks that are torchrun's are not silently as many as another number says
    result = run_program([sys.executable, "-m", "evaluation.predict_cli", "--nproc", "2"])
    assert result.returncode == 2
    assert "--nproc 2 is for `maskbank`, which starts the ranks" in result.stderr


@pytest.mark.slow
def test_the_demo_ends_with_a_report(tmp_path: Path) -> None:
    output = tmp_path / "demo run"
    result = maskbank("demo", "--output", str(output), "--scenes", "40", "--steps", "4")
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("kmeans-initial", "kmeans-trained", "linear-initial", "linear-trained"):
        found = json.loads((output / "evaluation" / f"{name}.json").read_text())
        assert 0 <= found["miou"]["mean"] <= 100
        assert found["images"] == 8
        assert len(found["per_class"]) == 11
        assert found["step"] == (4 if name.endswith("trained") else 0)
    page = (output / "report.html").read_text()
    assert "data:image/png;base64," in page
    # a second time the shards are there, and training is done
    for step in demo_steps(output, 2, DemoScale(40, 8, 4))[:2]:
        for command in step.commands:
            again = run_program(command)
            assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_the_demo_stops_at_the_first_step_that_fails(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/train").write_text("in the way")
    result = maskbank("demo", "--output", str(tmp_path), "--scenes", "8", "--steps", "1")
    assert result.returncode == 2
    assert "the demo stopped: step 1" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_readme_begins_with_the_two_commands_that_make_knows() -> None:
    root = Path(__file__).parent.parent
    block = [line for line in (root / "README.md").read_text().splitlines() if line][1:3]
    assert [line.split()[:2] for line in block] == [["make", "demo"], ["make", "test"]]
    rules = (root / "Makefile").read_text()
    assert "\ndemo: " in rules
    assert "\ntest: " in rules
