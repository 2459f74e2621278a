"""One run on 4, then 2, then 3 ranks: nodes go and come, the batches stay."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.build_config import BuildConfig
from data_pipeline.sources.generated import list_scenes
from data_pipeline.write_shards import build_shards
from tests.forked import Program
from tests.test_train import children
from trainer.checkpoint import complete_checkpoints, newest_checkpoint
from trainer.metrics import read_metrics

pytestmark = pytest.mark.slow
STEPS, BATCH = 80, 12


def settings(shards: Path, run: Path) -> list[str]:
    return [
        *("--recipe", "demo_cpu", f"data.shards={shards}", f"run.directory={run}"),
        *(f"run.steps={STEPS}", "run.log_every=4", "run.checkpoint_every=4", "run.threads=1"),
        *("data.threads=1", "data.loader=torch", "views.image_size=32", f"data.batch_size={BATCH}"),
        *("bank.capacity=37", "bank.mask_same_image=true", "optim.lr=0.2"),
        *("model.decoder_channels=16", "model.embedding_dim=8", "model.dropout=0"),
        *("model.batch_norm=frozen", "run.precision=float32", "run.tensorboard=false"),
        *("run.timeout_seconds=20", "run.start_timeout_seconds=60"),
    ]


def node(
    port: int, num_ranks: int, record: Path, arguments: list[str], host: bool = False
) -> Program:
    """One node's launcher; ranks of all nodes form one run. The host is the one that stays."""
    launcher = [sys.executable, "-m", "launch.ranks", "--nnodes=1:2", "--max-restarts=5"]
    launcher += [f"--nproc-per-node={num_ranks}", "--rdzv-backend=c10d", "--rdzv-id=elastic"]
    launcher += [
        f"--rdzv-endpoint=localhost:{port}",
        f"--rdzv-conf=last_call_timeout=3,is_host={host}",
    ]
    output = record.parent / f"node-{num_ranks}-{time.monotonic_ns()}.txt"
    words = [*launcher, "-m", "tests.recorded_train", str(record), *arguments]
    with output.open("wb") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return Program(words, environment, file.fileno(), subprocess.STDOUT)


def wait_for(what: Callable[[], bool], first: Program) -> None:
    deadline = time.monotonic() + 240
    while not what():
        assert first.poll() is None, "the first node ended early"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def batches(record: Path) -> dict[int, dict[int, list[int]]]:
    """Ids of every global batch, in the order of the ranks, by batch and by world size."""
    parts: dict[tuple[int, int], dict[int, list[int]]] = {}
    for file in record.glob("rank-*.jsonl"):
        for line in file.read_text().splitlines():
            number, world_size, rank, ids = json.loads(line)
            parts.setdefault((number, world_size), {})[rank] = ids
    found: dict[int, dict[int, list[int]]] = {}
    for (number, world_size), by_rank in parts.items():
        if len(by_rank) == world_size:  # a killed rank may have taken none
            ids = [one for rank in range(world_size) for one in by_rank[rank]]
            found.setdefault(number, {})[world_size] = ids
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def test_nodes_go_and_come_and_the_batches_stay(tmp_path: Path) -> None:
    shards, record, run = tmp_path / "shards", tmp_path / "record", tmp_path / "run"
    build_shards(list_scenes(20, 0, 40), shards, BuildConfig(7, "ids"))
    whole = tmp_path / "whole"
    undisturbed = node(free_port(), 4, tmp_path / "record-whole", settings(shards, whole), True)

    port, arguments = free_port(), settings(shards, run)
    first = node(port, 2, record, arguments, host=True)
    second = node(port, 2, record, arguments)
    newest = lambda: max((c.step for c in complete_checkpoints(run)), default=0)  # noqa: E731
    try:
        wait_for(lambda: newest() >= 8, first)
        for pid in (*children(second.pid), second.pid):  # a node that dies says nothing
            os.kill(pid, signal.SIGKILL)
        at_two = newest() + 4
        wait_for(lambda: newest() >= at_two, first)
        third = node(port, 1, record, arguments)
        assert first.wait(timeout=240) == 0
        assert third.wait(timeout=60) == 0
    finally:
        for process in (first, second):
            process.kill()
    assert undisturbed.wait(timeout=240) == 0

    expected = batches(tmp_path / "record-whole")
    found = batches(record)
    assert sorted(found) == sorted(expected) == list(range(STEPS))
    seen = set()
    for number, by_world_size in found.items():
        for world_size, ids in by_world_size.items():
            assert ids == expected[number][4], (number, world_size)
            seen.add(world_size)
    assert seen == {2, 3, 4}

    ends = [newest_checkpoint(path) for path in (run, whole)]
    banks = []
    for end in ends:
        assert end is not None
        assert end.step == STEPS
        parts = list(end.bank_parts())
        order = torch.cat([part["sequence"] for part in parts]).argsort()
        banks.append({k: torch.cat([part[k] for part in parts])[order] for k in parts[0]})
    assert torch.equal(banks[0]["sequence"], banks[1]["sequence"])
    assert torch.equal(banks[0]["sample_id"], banks[1]["sample_id"])
    assert torch.equal(banks[0]["update"], banks[1]["update"])
    torch.testing.assert_close(banks[0]["key"], banks[1]["key"], rtol=0, atol=1e-3)
    losses = [read_metrics(path / "metrics.jsonl")[-1]["loss"] for path in (run, whole)]
    assert abs(losses[0] - losses[1]) < 1e-4
