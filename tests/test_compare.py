"""Runs side by side: which figures meet, which settings differ, and what untrusted files do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from data_pipeline.errors import InputError
from evaluation.cli import main
from evaluation.compare import (
    Column,
    compared_rows,
    differing_settings,
    distinct_title,
    flat_settings,
    read_columns,
    shared_pictures,
    show_comparison,
    write_comparison,
)

HOSTILE = "<script>alert(1)</script>"


def result(
    folder: Path, name: str, values: list[float], data_set: str = "", **metrics: list[float]
) -> None:
    """PROTOCOL-NETWORK.json of two classes."""
    protocol, _, network = name.rpartition("-")
    place = folder / "evaluation" / data_set
    place.mkdir(parents=True, exist_ok=True)
    payload = {
        "protocol": protocol, "network": network, "metrics": metrics,
        "miou": {"mean": float(np.mean(values)), "values": values}, "confusion": [[1, 0], [0, 1]],
        "per_class": [{"class": c, "iou": 50.0, "pixels": 1} for c in ("background", HOSTILE)],
    }  # fmt: skip
    (place / f"{name}.json").write_text(json.dumps(payload))


def examples(folder: Path, network: str, keys: list[str]) -> None:
    shape = (len(keys), 4, 4)
    segments = np.ones(shape, np.int16)
    picture = np.zeros((*shape, 3), np.uint8)
    np.savez(
        folder / "evaluation" / f"examples-{network}.npz",
        key=np.array(keys), image=picture, mask=np.zeros(shape, np.uint8), clusters=segments,
        saliency=np.zeros(shape, np.float32), label=segments, embedding_rgb=picture,
    )  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs and the results of a foreign checkpoint, in folders of like names."""
    a, b, foreign = tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "moco"
    result(a, "kmeans-trained", [40.0, 42.0], accuracy=[80.0, 82.0])
    result(a, "kmeans-initial", [7.0])
    result(a, "linear-trained", [60.0])
    result(b, "kmeans-trained", [50.0], accuracy=[70.0])
    result(b, "linear-trained", [60.0])
    result(foreign, "kmeans-resnet", [30.0])
    result(foreign, "made-up-resnet", [1.0], "voc")
    result(foreign, "kmeans-dino", [35.0])
    for folder, lr in ((a, 0.1), (b, 0.2)):
        text = f"run:\n  directory: {folder}\n  steps: 9\noptim:\n  lr: {lr}\nnote: '{HOSTILE}'\n"
        (folder / "config.yaml").write_text(text)
        lines = [json.dumps({"step": 10 * i, "loss_contrastive": lr * i}) for i in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
    examples(a, "trained", ["x", "y", HOSTILE])
    examples(b, "trained", [HOSTILE, "z", "x"])
    return [a, b, foreign]


def figures(columns: list[Column]) -> dict[str, list[float | None]]:
    return {
        f"{row.data_set}/{row.title}/{row.measure}": [cell and cell.mean for cell in row.cells]
        for row in compared_rows(columns)
    }


def test_every_figure_meets_its_own(runs: list[Path]) -> None:
    columns = read_columns(runs)
    assert [column.title for column in columns] == ["a/run", "b/run", "moco: dino", "moco: resnet"]
    assert figures(columns) == {
        "/K-means/mIoU": [41, 50, 35, 30],
        "/K-means/accuracy": [81, 70, None, None],
        "/Linear classifier/mIoU": [60, 60, None, None],
        "PASCAL VOC 2012/Made-up/mIoU": [None, None, None, 1],
    }
    first, second, third, fourth = compared_rows(columns)
    assert [row.best for row in (first, second, third, fourth)] == [{1}, {0}, set(), set()]
    assert [before and before.mean for before in first.before] == [7, None, None, None]
    spread = first.cells[0]
    assert spread is not None
    assert (spread.std, spread.count) == (pytest.approx(2**0.5), 2)


def test_only_settings_that_differ_are_shown(runs: list[Path]) -> None:
    columns = read_columns(runs)
    assert differing_settings(columns) == [("optim.lr", ["0.1", "0.2", None, None])]
    assert differing_settings(columns[1:]) == []


def test_pictures_of_the_same_keys(runs: list[Path]) -> None:
    rows = shared_pictures(read_columns(runs))
    assert [row["key"] for row in rows] == ["x", HOSTILE]
    assert [sorted(row["clusters"]) for row in rows] == [[0, 1], [0, 1]]
    assert rows[0]["classes"] == HOSTILE


def test_the_command_prints_and_writes(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "pages" / "compared.html"
    with pytest.raises(SystemExit) as stop:
        main(["compare", *map(str, runs), "--html", str(page)])
    assert stop.value.code == 0
    assert "50.0" in capsys.readouterr().out
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "default-src 'none'" in text
    assert text.count('<path class="many run-') == 2
    assert '<span class="best">50.0' in text
    assert text.count("data:image/png;base64,") == 2 * 4
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(runs[0])])
    assert stop.value.code == 2
    assert "give a second run" in capsys.readouterr().err


def test_the_terminal_shows_names_as_they_are(tmp_path: Path) -> None:
    for name in ("[red]a", "b"):
        result(tmp_path / name, "[bold]odd-trained", [10.0, 14.0])
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    show_comparison(read_columns([tmp_path / "[red]a", tmp_path / "b"]), console)
    shown = console.export_text()
    assert "[red]a" in shown
    assert "[bold]odd, mIoU" in shown
    assert "12.0 ± 2.8 (2)" in shown


def test_titles_tell_folders_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a/x/run", tmp_path / "b/x/run", tmp_path / "other"]
    assert [distinct_title(one, folders) for one in folders] == ["a/x/run", "b/x/run", "other"]
    assert distinct_title(folders[0], [folders[0], folders[0]]) == "run"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "no settings by name"),
        ("a: [1\n", "not the settings"),
        ("a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("a: " + "[" * 12 + "{b: 1}" + "]" * 12, "deep"),
        ("".join(f"k{i}: {i}\n" for i in range(2001)), "more than 2000"),
        ("x: '" + "y" * (1 << 20) + "'", "too large"),
        # nine levels of nine references each, a billion leaves
        (
            "l0: &l0 {a: 1}\n"
            + "".join(
                f"l{i}: &l{i} {{{', '.join(f'k{j}: *l{i - 1}' for j in range(9))}}}\n"
                for i in range(1, 7)
            ),
            "more than 2000",
        ),
    ],
)
def test_settings_that_are_none_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        flat_settings(path)


def test_settings_are_flat(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    text = "run: {directory: /a, steps: 3}\nrates: [1, 2]\nviews:\n- size: 4\n- size: null\n"
    path.write_text(text)
    expected: dict[str, Any] = {
        "run.steps": "3", "rates": "1, 2", "views[0].size": "4", "views[1].size": "None",
    }  # fmt: skip
    assert flat_settings(path) == expected


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run and no results"):
        read_columns([tmp_path])
    for number in range(9):
        result(tmp_path, f"kmeans-n{number}", [1.0])
    with pytest.raises(InputError, match="9 networks are too many"):
        read_columns([tmp_path])
    empty = [tmp_path / "e", tmp_path / "f"]
    for folder in empty:
        (folder / "evaluation").mkdir(parents=True)
    columns = read_columns(empty)
    assert [column.network for column in columns] == ["initial", "initial"]
    write_comparison(columns, tmp_path / "page.html")
    assert "None of them has been evaluated yet." in (tmp_path / "page.html").read_text()
