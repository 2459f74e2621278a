"""`maskbank evaluate table`: every row from one command, the same on several ranks."""

import json
from pathlib import Path

import pytest

from evaluation.commands import table as table_command
from tests.evaluation_command import evaluate, read_result, refused, tiny_run
from tests.evaluation_data import block_shards, scene_shards

pytestmark = pytest.mark.slow
QUICK = [
    *("--size", "40", "--device", "cpu", "--foreground", "probability", "--pca", "4"),
    *("--no-augment", "--epochs", "2", "--decay-epoch", "1", "--clusters", "12"),
    *("--fractions", "50,100", "--splits", "2", "--finetune-epochs", "1", "--min-steps", "2"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("table")
    for name, seed in (("train", 1), ("test", 2)):
        scene_shards(folder / name, 8, seed)
    return tiny_run(folder / "run"), folder / "train", folder / "test"


def test_every_row_of_two_networks(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, train, test = folders
    status, out, error = evaluate(
        capsys,
        *("table", run, "--train-shards", train, "--shards", test, "--with-initial", "--html"),
        *QUICK,
    )
    assert status == 0, error
    table = json.loads((run / "table.json").read_text())
    assert table["networks"] == {"trained": 12, "initial": 0}
    rows = {(row["protocol"], row["measure"]): row["values"] for row in table["rows"]}
    main = [protocol for protocol, measure in rows if measure == "mIoU"]
    assert main == [
        *("kmeans", "kmeans-many-12", "kmeans-majority-500", "retrieval-11"),
        *("linear", "linear-crf", "finetune-50", "finetune-100"),
    ]
    for (protocol, measure), values in rows.items():
        assert values.keys() == {"trained", "initial"}, (protocol, measure)
        for network in values:
            found = read_result(run, f"{protocol}-{network}")
            if measure == "mIoU":
                assert values[network] == pytest.approx(found["miou"]["values"], abs=1e-3)
    assert len(rows["kmeans", "mIoU"]["trained"]) == 5
    assert len(rows["finetune-50", "mIoU"]["initial"]) == 2
    assert "published" in out
    text = (run / "table.md").read_text()
    assert text.startswith("| | trained | initial | published |\n|---|---|---|---|\n")
    assert (run / "report.html").is_file()
    for name in ("kmeans", "kmeans-many-12", "linear"):
        assert (run / f"evaluation/{name}-trained.safetensors").is_file()


def test_rows_that_cannot_be_scored_are_told_and_the_others_kept(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a threshold that the untrained saliency never reaches no bank has a mask."""
    run, train, test = folders
    status, out, _ = evaluate(
        capsys,
        *("table", run, "--train-shards", train, "--shards", test, "--with-initial", "--html"),
        *("--output", tmp_path, "--rows", "kmeans,retrieval,linear", *QUICK, "--threshold", "1"),
    )
    assert status == 1
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["networks"] == {"trained": 12, "initial": 0}
    made = {row["protocol"]: row["values"].keys() for row in table["rows"]}
    assert made == {key: {"trained", "initial"} for key in ("kmeans", "linear", "linear-crf")}
    missing = [(one["row"], one["network"], one["step"]) for one in table["not_scored"]]
    assert missing == [("retrieval", "trained", 12), ("retrieval", "initial", 0)]
    for text in (out, (tmp_path / "table.md").read_text()):
        assert "not scored" in text
        words = " ".join(text.split())
        assert "retrieval of the initial network could not be scored: no image of the bank" in words
    assert read_result(tmp_path, "linear-initial")["network"] == "initial"
    assert (tmp_path / "report.html").is_file()


def test_a_row_is_written_before_the_next_begins(
    folders: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end(*_: object) -> None:
        raise OSError("the disk is gone")

    run, train, test = folders
    monkeypatch.setattr(table_command, "run_linear", end)
    status, _, error = evaluate(
        capsys,
        *("table", run, "--train-shards", train, "--shards", test, "--output", tmp_path),
        *("--rows", "kmeans,linear", *QUICK),
    )
    assert (status, "the disk is gone" in error) == (1, True)
    kept = json.loads((tmp_path / "table.json").read_text())
    assert {row["protocol"] for row in kept["rows"]} == {"kmeans"}
    assert read_result(tmp_path, "kmeans-trained")["images"] == 8


def test_rows_need_what_they_learn_on(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _, test = folders
    alone = ("table", run, "--shards", test, "--output", tmp_path / "alone", *QUICK)
    status, _, error = evaluate(capsys, *alone)
    assert status == 0, error
    table = json.loads((tmp_path / "alone/table.json").read_text())
    assert {row["protocol"] for row in table["rows"]} == {
        *("kmeans", "kmeans-many-12", "kmeans-majority-500"),
    }
    assert "--train-shards" in refused(capsys, *alone, "--rows", "kmeans,linear")
    assert "--rows has 'all'" in refused(capsys, *alone, "--rows", "all")
    other = block_shards(tmp_path / "other", [1, 2]).manifest.root
    text = refused(capsys, *alone, "--train-shards", other)
    assert "have different classes" in text
