"""`maskbank evaluate …` in the test's own process, and a run for it to evaluate."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.cli import main
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import load_config, save_config
from trainer.distributed import Ranks
from trainer.encoder import initial_network
from trainer.engine import network_state

MODEL = ("model.decoder_channels=16", "model.embedding_dim=6", "model.atrous_rates=[1,2,3]")


def tiny_run(folder: Path) -> Path:
    """A run directory with a small network, as drawn, in a checkpoint of step 12."""
    folder.mkdir(parents=True)
    config = load_config("demo_cpu", None, [*MODEL, "run.seed=5"])
    save_config(config, folder / "config.yaml")
    writer = CheckpointWriter(folder, Ranks(0, 1, torch.device("cpu")), 1, 0)
    state = network_state(initial_network(config), "model")
    writer.start(12, state, {}, {"progress": {"step": 12}})
    while writer.step is not None:
        writer.wait()
        writer.advance(writer.busy, bool(writer.failure))
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status of a command, what it printed, and its errors."""
    threads = torch.get_num_threads()
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, said.out, said.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command says on its way out with status 2."""
    status, out, error = evaluate(capsys, *arguments)
    assert status == 2, error
    assert "Traceback" not in out + error
    lines = [line for line in error.splitlines() if line.startswith("maskbank: ")]
    assert len(lines) == 1, error
    return lines[0].removeprefix("maskbank: ")


def read_result(run: Path, name: str) -> dict[str, Any]:
    """RUN/evaluation/NAME.json."""
    value: dict[str, Any] = json.loads((run / "evaluation" / f"{name}.json").read_text())
    return value
