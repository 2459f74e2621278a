"""The benchmarks of the bank run, at sizes that say nothing about speed, and their figures hold."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cost_model
from benchmarks.nodes import nodes, why_not

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def figures(file: Path, *arguments: str) -> list[dict[str, Any]]:
    run(*arguments, "--output", str(file))
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_every_method_of_the_loss_gives_the_same_gradient(tmp_path: Path) -> None:
    rows = figures(tmp_path / "a", "benchmarks.bank_loss", "--cases", "1000x300", "--rounds", "2")
    assert {"dense", "rows", "maskbank"} <= {row["method"] for row in rows}
    assert all(row["gradient_error"] < 1e-5 for row in rows)
    assert all(len(row["seconds"]) == 2 for row in rows)


@pytest.mark.slow
def test_bytes_on_the_wire_are_those_of_the_formula(tmp_path: Path) -> None:
    """The loopback carries headers too, and whatever else the machine sends itself meanwhile."""
    where = ("--ranks", "3", "--entries", "40,30000", "--rounds", "1")
    small, large = figures(tmp_path / "a", "benchmarks.bank_scaling", "exchange", *where)
    assert large["counted_mb"] == pytest.approx(30_000 * 32 * 4 * 2 / 3 / 1e6)
    assert large["counted_mb"] <= large["on_wire_mb"]
    assert small["counted_mb"] == pytest.approx(14 * 2 * 32 * 4 / 1e6)  # 40 entries in 3 × 14 slots
    assert large["shard_mb"] == pytest.approx(10_000 * 32 * 4 / 1e6)


@pytest.mark.slow
@pytest.mark.parametrize("move", ["auto", "bank"])
def test_a_few_pixels_against_a_large_bank(tmp_path: Path, move: str) -> None:
    where = ("--ranks", "2", "--entries", "70001", "--pixels", "33", "--move", move)
    (row,) = figures(tmp_path / "a", "benchmarks.bank_scaling", "sampled", *where)
    assert row["moved"] == ("pixels" if move == "auto" else "bank")
    assert row["gradient_error"] < 1e-5
    assert row["shard_entries"] == 35_001
    expected = {"auto": cost_model.pixel_bytes(33, 2), "bank": 35_001 * 32 * 4}[move]
    assert row["received_mb"] == pytest.approx(expected / 1e6)


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=f"no nodes: {why_not()}")
def test_ranks_on_nodes_of_their_own(tmp_path: Path) -> None:
    try:
        with nodes(1, 1.0):
            pass
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no nodes: {error}")
    where = ("--ranks", "2", "--entries", "500", "--rounds", "1", "--images", "2", "--gbit", "1")
    (row,) = figures(tmp_path / "a", "benchmarks.bank_scaling", "hidden", *where)
    assert all(row[kind][0] > 0 for kind in ("early", "late", "without", "alone"))


def test_the_model_is_within_a_third_of_what_was_measured() -> None:
    """Of the committed measurements: the loss everywhere, exchanges of many chunks."""
    files = sorted((ROOT / "benchmarks/results").glob("bank_*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.open()]
    loss = [row for row in rows if row["question"] == "loss" and row["method"] == "maskbank"]
    pixel, pair = cost_model.fit_loss(loss)
    for row in loss:
        model = row["pixels"] * (pixel + pair * row["keys"])
        assert model == pytest.approx(sorted(row["seconds"])[len(row["seconds"]) // 2], rel=1 / 3)
    exchange = [row for row in rows if row["question"] == "exchange" and row["ranks"] > 1]
    for row in exchange:
        assert row["counted_mb"] == pytest.approx(row["formula_mb"])
        alike = [r for r in exchange if (r["gbit"], r["ranks"]) == (row["gbit"], row["ranks"])]
        if row["entries"] > cost_model.CHUNK:
            model = cost_model.exchange_seconds(row, cost_model.fit_link(alike))
            assert model == pytest.approx(sorted(row["seconds"])[1], rel=1 / 3)


def test_pixels_travel_where_that_moves_fewer_bytes() -> None:
    machine = cost_model.Machine(1e-9, 1e-12, 1e9, 1e-5, 0.01, 0.01)
    few, many = (cost_model.cost(machine, n, 1 << 20, 4, 4) for n in (1000, 600_000))
    assert (few.moved, many.moved) == ("pixels", "bank")
    assert few.received == 3 * 1000 * 4 * 66
    assert many.received == (1 << 20) * 128 * 3 / 4
    assert few.exposed == few.exchange  # known after the encoder only
    assert many.exposed == 0
    # a chunk is 6.3 ms on the wire; the second is there while the first is attended to
    hasty = dataclasses.replace(machine, encoder_seconds=0.001)
    assert cost_model.cost(hasty, 600_000, 1 << 20, 4, 4).exposed == pytest.approx(5.3e-3, rel=1e-2)


@pytest.mark.slow
def test_building_and_the_plain_loop_are_measured(tmp_path: Path) -> None:
    where = ("--samples", "100", "--side", "32", "--rounds", "1")
    rows = figures(tmp_path / "a", "benchmarks.shards", *where)
    assert [row["samples"] for row in rows] == [10] * 3 + [100] * 3
    assert all(row["seconds"] > 0 and row["memory"] > 10 for row in rows)


@pytest.mark.slow
def test_a_build_that_is_killed_ends_in_the_same_bytes() -> None:
    printed = run("benchmarks.killed_builds", "--runs", "2", "--kills", "1", "--seed", "3")
    assert printed.startswith("2 of 2 runs ended in the same bytes; ")
