"""Restarts without a step gained end; a person's start may always try."""

from pathlib import Path

import pytest

from trainer.restarts import STARTS, NoRestartHelps, is_restart, note_start, read_starts


def test_restarts_that_gain_nothing_are_counted(tmp_path: Path) -> None:
    note_start(tmp_path, 0, 2, False, 2)
    note_start(tmp_path, 0, 2, True, 2)
    note_start(tmp_path, 0, 2, True, 2)
    with pytest.raises(NoRestartHelps, match="was restarted 2 times in a row from step 0"):
        note_start(tmp_path, 0, 2, True, 2)
    note_start(tmp_path, 0, 2, False, 2)
    note_start(tmp_path, 0, 2, True, 2)
    assert [row["automatic"] for row in read_starts(tmp_path / STARTS)] == [
        *(False, True, True, False, True)
    ]


def test_a_gain_starts_the_count_anew(tmp_path: Path) -> None:
    for step in (0, 0, 4, 4, 8, 8):
        note_start(tmp_path, step, 2, True, 2)
    with pytest.raises(NoRestartHelps):
        note_start(tmp_path, 8, 2, True, 2)
    note_start(tmp_path, 8, 2, True, 0)  # no limit


def test_torn_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    note_start(tmp_path, 3, 1, True, 1)
    with (tmp_path / STARTS).open("a") as file:
        file.write('[1]\n{"step": 3\n{"automatic": true}\n')
    assert [row["step"] for row in read_starts(tmp_path / STARTS)] == [3]


@pytest.mark.parametrize(
    ("name", "value", "restart"),
    [
        ("TORCHELASTIC_RESTART_COUNT", "0", False),
        ("TORCHELASTIC_RESTART_COUNT", "2", True),
        ("SLURM_RESTART_COUNT", "1", False),  # of nodes that failed, perhaps
    ],
)
def test_launchers_say_that_they_restart(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, restart: bool
) -> None:
    for known in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv(name, value)
    assert is_restart() == restart
