"""`maskbank shards build …` as a user starts it: what it prints, writes and exits with."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import build_cli, cli
from data_pipeline.errors import InputError
from data_pipeline.manifest import read_manifest
from tests.sample_data import encode, folder_pair, object_mask, released_tree, write


def maskbank(*arguments: object, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", "shards", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "300"},
        check=False,
    )


def rows(printed: str) -> dict[str, str]:
    """The table that a build prints: name -> value."""
    cells = [re.split(r"[│┃|]", line) for line in printed.splitlines()]
    return {parts[1].strip(): parts[2].strip() for parts in cells if len(parts) == 4}


def run_main(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The same without a process of its own: exit status, and what went to stderr."""
    with pytest.raises(SystemExit) as caught:
        cli.main([*map(str, arguments)])
    code = caught.value.code
    return (code if isinstance(code, int) else 0), capsys.readouterr().err


# ---------------------------------------------------------------- as processes


@pytest.mark.slow
def test_build_folder(tmp_path: Path) -> None:
    images, masks = folder_pair(tmp_path, ["a", "b", "sub/c", "d"], labels=True)
    (images / "d.jpg").write_bytes(b"broken")
    classes = write(tmp_path / "classes.txt", b"background\nthing\nother\n")
    output = tmp_path / "shards[red]"  # brackets are no markup
    done = maskbank(
        *("build", "folder", "--images", images, "--masks", masks, "-o", output),
        *("--labels", tmp_path / "labels", "--classes", classes),
        *("--samples-per-shard", 2, "--mask-mode", "ids", "--shuffle-seed", -1, "-p", 2),
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert str(output) in done.stderr.splitlines()
    table = rows(done.stderr)
    assert (table["samples"], table["shards"], table["classes"]) == ("3", "2", "3")
    assert (table["with masks"], table["with labels"]) == ("3", "3")
    assert table["failed"] == f"1: see {output / 'failures.jsonl'}"
    assert re.search(r"1  image: cannot be decoded", done.stderr)
    manifest = read_manifest(output)
    assert [entry.samples for entry in manifest.shards] == [2, 1]
    assert manifest.classes == ("background", "thing", "other")
    assert manifest.failures == 1
    config = manifest.configuration
    given = ("source", "images", "masks", "labels", "samples_per_shard", "mask_mode")
    assert {name: config[name] for name in (*given, "shuffle_seed")} == {
        "source": "folder",
        "images": str(images),
        "masks": str(masks),
        "labels": str(tmp_path / "labels"),
        "samples_per_shard": 2,
        "mask_mode": "ids",
        "shuffle_seed": -1,
    }
    failure = json.loads((output / "failures.jsonl").read_text())
    assert (failure["source"], failure["stage"]) == ("d.jpg", "image")


@pytest.mark.slow
def test_build_voc(tmp_path: Path) -> None:
    root = released_tree(tmp_path / "VOC", {"trainaug": ["a", "b", "c"], "val": ["d"]})
    output = tmp_path / "shards"
    done = maskbank(
        *("build", "voc", "--root", root, "--split", "trainaug", "-o", output),
        *("--masks", "saliency_unsupervised_model"),
    )
    assert done.returncode == 0
    table = rows(done.stderr)
    assert (table["samples"], table["with masks"], table["with labels"]) == ("3", "3", "3")
    assert "failed" not in table
    manifest = read_manifest(output)
    assert len(manifest.classes) == 21
    assert manifest.configuration["split"] == "trainaug"
    unknown = maskbank("build", "voc", "--root", root, "--split", "train", "-o", tmp_path / "x")
    assert unknown.returncode == 2
    assert unknown.stderr == (
        f"maskbank: no split 'train' in {root / 'sets'}; --split can be one of: trainaug, val\n"
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_build_scenes(tmp_path: Path) -> None:
    arguments = ("build", "scenes", "--count", 6, "--size", 32, "--samples-per-shard", 3)
    done = maskbank(*arguments, "--output", "here", cwd=tmp_path)
    assert done.returncode == 0
    table = rows(done.stderr)
    assert (table["samples"], table["shards"], table["classes"]) == ("6", "2", "11")
    manifest = read_manifest(tmp_path / "here")
    assert manifest.configuration["size"] == "32"
    assert manifest.configuration["mask_mode"] == "auto"
    again = maskbank(*arguments, "--seed", 1, "--output", "here", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr == (
        "maskbank: here holds a build with another configuration: seed is '1', was '0'. "
        "Give the same options to go on with it, or give --output another folder\n"
    )
    assert read_manifest(tmp_path / "here") == manifest


@pytest.mark.slow
@pytest.mark.parametrize("command", ["folder", "voc", "scenes"])
def test_help_shows_an_example(command: str) -> None:
    done = maskbank("build", command, "--help")
    assert done.returncode == 0
    assert f"Example: maskbank shards build {command} --" in done.stdout.replace("`", "")


# ---------------------------------------------------------------- what the user can get wrong


def test_user_errors_are_one_paragraph_and_exit_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = folder_pair(tmp_path, ["a"])
    soft = encode(np.arange(256, dtype=np.uint8).reshape(16, 16))
    out = ("-o", tmp_path / "out")
    folder = ("build", "folder", "--images", images, *out)
    labels = tmp_path / "labels"
    write(labels / "a.png", encode(object_mask()))
    empty = write(tmp_path / "empty.txt", b"\n")
    cases = [
        (("build", "folder", "--images", tmp_path / "no", *out), "no is not a folder"),
        ((*folder, "--masks", tmp_path / "no"), "no is not a folder"),
        ((*folder, "--mask-mode", "soft"), "--mask-mode is 'soft'; it can be auto, binary, ids, c"),
        ((*folder, "--samples-per-shard", 0), "samples per shard is 0"),
        ((*folder, "--labels", labels), "--labels and --classes go together"),
        ((*folder, "--classes", empty), "--labels and --classes go together"),
        ((*folder, "--labels", labels, "--classes", empty), "names 0 classes"),
        ((*folder, "--labels", labels, "--classes", tmp_path / "no"), "cannot be read"),
        (("build", "voc", "--root", masks, "--split", "val", *out), "is no PASCAL tree"),
        (("build", "scenes", "--count", 0, *out), "count 0"),
        (("build", "folder", "--images", images, "-o", images), "already holds 'a.jpg'"),
    ]
    for arguments, reason in cases:
        status, printed = run_main(capsys, *arguments)
        assert status == 2, arguments
        assert printed.startswith("maskbank: "), arguments
        assert reason in printed
        assert printed.count("\n") == 1
        assert "Traceback" not in printed
        assert not (tmp_path / "out").exists()
    write(masks / "a.png", soft)
    status, printed = run_main(capsys, *folder, "--masks", masks)
    assert status == 2
    assert printed.splitlines()[-1].startswith("maskbank: not one of 1 samples could be used")
    assert "soft saliency map" in printed
    assert "Traceback" not in printed


def test_failures_of_the_system_are_one_paragraph_and_exit_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "no space left; free some", "/somewhere")

    monkeypatch.setattr(build_cli, "build_shards", full)
    status, printed = run_main(capsys, "build", "scenes", "--count", 1, "-o", tmp_path / "out")
    assert (status, printed) == (1, "maskbank: /somewhere: no space left; free some\n")


def test_wrong_options_are_told_by_the_parser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ("build", "scenes", "--processes", 0, "-o", tmp_path),
        ("build", "scenes", "--count", "many", "-o", tmp_path),
        ("build", "scenes"),
        ("build", "movies"),
    ):
        status, printed = run_main(capsys, *arguments)
        assert status == 2
        assert "Usage: maskbank shards build" in printed
        assert "Traceback" not in printed


def test_the_error_for_a_caller_is_a_value_error() -> None:
    assert issubclass(InputError, ValueError)
