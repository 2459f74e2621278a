"""Evaluation while training: it changes nothing, counts nothing, and ends nothing."""

import gc
import hashlib
import logging
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import InputError
from data_pipeline.labelled import labelled_shards
from data_pipeline.manifest import read_manifest
from evaluation.cluster import ClusterConfig
from evaluation.kmeans import evaluate_kmeans
from evaluation.kmeans_config import KMeansConfig
from evaluation.online import EvenlySpread, OnlineKMeans
from launch.attempt import is_finished
from tests.forked import Program
from tests.ranks import run_on_ranks
from tests.run_state import run_state
from tests.sample_data import build_scene_shards, flip_byte
from tests.test_train import ENVIRONMENT, EXACT
from tests.test_train import command as train_command
from trainer import load_encoder
from trainer.clock import Clock
from trainer.config import TrainConfig, load_config, resume_difference
from trainer.distributed import Ranks
from trainer.engine import make_engine
from trainer.metrics import MetricsLog, read_metrics
from trainer.model import PixelEncoder
from trainer.online import OnlineEvaluation
from trainer.precision import settle_precision
from trainer.preemption import StopRequest
from trainer.preflight import Plan, plan_run
from trainer.state import TrainState
from trainer.train import train
from trainer.watchdog import Watchdog

STEPS, IMAGES = 6, 7
ALONE = Ranks(0, 1, torch.device("cpu"))
FIGURES = ("step", "kmeans_miou", "kmeans_std", "foreground_iou")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards to train on and, of other scenes, to evaluate on."""
    root = tmp_path_factory.mktemp("data")
    build_scene_shards(root / "train", 12, 40)
    build_scene_shards(root / "val", IMAGES, 40, 4, seed=5)
    return root


def command(data: Path, run: Path, *settings: str) -> list[str]:
    return train_command(
        *(data / "train", run, 1, f"run.steps={STEPS}", "run.log_every=2", "data.loader=torch"),
        *("run.checkpoint_every=2", "run.precision=float32", "data.batch_size=4"),
        *settings,
    )


def online(data: Path, *settings: str) -> tuple[str, ...]:
    """Evaluated every two steps with a foreground that an untrained network has, too."""
    foreground = ("online.foreground=probability", "online.pooling=normalized", "online.seeds=2")
    return (f"online.shards={data / 'val'}", "online.every=2", *foreground, *settings)


def settings_of(arguments: list[str]) -> TrainConfig:
    settings = arguments[arguments.index("demo_cpu") + 1 :]
    return settle_precision(load_config("demo_cpu", None, settings))


def train_here(arguments: list[str], ask_to_stop: bool = False) -> list[dict[str, Any]]:
    """Trains in this process, as the command would; the rows of its metrics."""
    config = settings_of(arguments)
    plan = plan_run(config, 1)
    stop = StopRequest(plan.run, ALONE)
    if ask_to_stop:
        stop.asked = lambda: True  # type: ignore[method-assign]
    with Watchdog(ALONE, 60, 60, plan.run / "hangs") as watchdog:
        train(config, plan, ALONE, stop, watchdog)
    return read_metrics(plan.run / "metrics.jsonl")


def figures(rows: list[dict[str, Any]]) -> list[list[float]]:
    return [[row[name] for name in FIGURES] for row in rows if "online_seconds" in row]


def training(rows: list[dict[str, Any]]) -> list[list[float]]:
    return [[row[name] for name in EXACT] for row in rows if "online_seconds" not in row]


@pytest.fixture(scope="module")
def evaluated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "evaluated"
    train_here(command(data, run, *online(data)))
    return run


@pytest.mark.slow
def test_training_is_the_same_bit_for_bit_with_and_without(
    data: Path, evaluated: Path, tmp_path: Path
) -> None:
    rows = train_here(command(data, tmp_path / "run"))
    with_figures = read_metrics(evaluated / "metrics.jsonl")
    assert training(rows) == training(with_figures)
    assert figures(rows) == []
    first, second = run_state(tmp_path / "run", STEPS), run_state(evaluated, STEPS)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    # after a step's own row, the network before training too
    steps = [(row["step"], "online_seconds" in row) for row in with_figures]
    assert steps == [(0, True), *[(step, own) for step in (2, 4, 6) for own in (False, True)]]
    assert is_finished(evaluated)


@pytest.mark.slow
def test_figures_are_those_of_the_command_on_the_checkpoint(data: Path, evaluated: Path) -> None:
    found = figures(read_metrics(evaluated / "metrics.jsonl"))
    for encoder, row in (
        (load_encoder(evaluated, initial=True), found[0]),
        (load_encoder(evaluated), found[-1]),
    ):
        config = settings_of(command(data, evaluated, *online(data)))
        evaluator = OnlineKMeans(config, read_manifest(data / "val"), ALONE)
        wanted, _ = evaluate_kmeans(
            encoder,
            labelled_shards(read_manifest(data / "val")),
            KMeansConfig(
                config.views.image_size,
                evaluator._prototype,
                ClusterConfig(pca=32, seeds=(1234, 1235)),
            ),
            ALONE,
        )
        assert row == [encoder.step, wanted.mean, wanted.std, wanted.foreground_iou]
    assert found[0][1:] != found[-1][1:]


@pytest.mark.slow
def test_killed_during_an_evaluation_and_after_one_it_ends_with_the_same_figures(
    data: Path, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = read_metrics(evaluated / "metrics.jsonl")
    run = tmp_path / "during"
    arguments = command(data, run, *online(data))
    at = arguments.index("trainer.train")
    faulty = [*arguments[:at], "tests.faulty_train", "evaluating", "0", "3", *arguments[at + 1 :]]
    process = Program(faulty, ENVIRONMENT, subprocess.PIPE, subprocess.STDOUT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -9, output
    rows = read_metrics(run / "metrics.jsonl")
    assert (rows[-1]["step"], len(figures(rows))) == (4, 2)
    assert [figures(rows), training(rows)] != [figures(wanted), training(wanted)]
    rows = train_here(arguments)
    assert (figures(rows), training(rows)) == (figures(wanted), training(wanted))

    run = tmp_path / "after"
    save = TrainState.save

    def fail(state: TrainState, step: int) -> None:
        if step == 4:
            raise ConnectionAbortedError("here it was killed")
        save(state, step)

    monkeypatch.setattr(TrainState, "save", fail)
    with pytest.raises(ConnectionAbortedError):
        train_here(command(data, run, *online(data)))
    assert len(figures(read_metrics(run / "metrics.jsonl"))) == 3
    monkeypatch.undo()
    rows = train_here(command(data, run, *online(data)))
    assert (figures(rows), training(rows)) == (figures(wanted), training(wanted))


@pytest.mark.slow
def test_a_stop_does_not_wait_for_an_evaluation_which_the_next_start_makes_up_for(
    data: Path, evaluated: Path, tmp_path: Path
) -> None:
    arguments = command(data, tmp_path / "run", *online(data, "online.every=1"))
    rows = train_here(arguments, ask_to_stop=True)
    assert [row[0] for row in figures(rows)] == [0]
    rows = train_here(arguments, ask_to_stop=True)
    assert [row[0] for row in figures(rows)] == [0, 1]
    arguments = command(data, tmp_path / "run", *online(data))
    found = figures(train_here(arguments))
    assert [row[0] for row in found] == [0, 1, 2, 4, 6]  # its settings may change
    wanted = figures(read_metrics(evaluated / "metrics.jsonl"))
    assert [row for row in found if row[0] != 1] == wanted


@pytest.mark.slow
def test_a_sample_that_cannot_be_read_costs_the_figures_and_not_the_run(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(data / "val", tmp_path / "val")
    flip_byte(tmp_path / "val/shard-000001.tar", 600)
    with caplog.at_level(logging.WARNING):
        rows = train_here(command(data, tmp_path / "run", *online(tmp_path), "run.steps=2"))
    failed = [(row["step"], row["online_failed"]) for row in rows if "online_seconds" in row]
    assert failed == [(0, 1.0), (2, 1.0)]
    assert [row["step"] for row in rows if "loss" in row] == [2]
    said = [one.getMessage() for one in caplog.records if "while training" in one.getMessage()]
    assert len(said) == 1
    assert "rank 0: the evaluation while training failed" in said[0]
    assert "shard-000001.tar" in said[0]
    assert "checksum" in said[0]


class Recorder:
    """Of what the watchdog is told, on ranks that have no launcher and so no store for one."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []

    def at(self, activity: str, step: int, micro: int = 0) -> None:
        self.told.append((activity, step, micro))


class Stream:
    wait_seconds = 0.0


def two_steps(
    ranks: Ranks, config: TrainConfig, plan: Plan | None, damaged: bool
) -> tuple[dict[Any, str], list[Any], list[float], list[bool]]:
    """State, rows, what the watchdog heard and modes, after steps with an evaluation in between."""
    gc.freeze()  # DeepSpeed collects garbage, of all that the server has imported
    torch.manual_seed(0)
    network = PixelEncoder(config.model).train()
    engine = make_engine(config.engine, config.optim, network, 4, ranks, "float32")
    engine.rehearse(torch.zeros(2, 3, 32, 32))
    draw = torch.Generator().manual_seed(ranks.rank)
    recorder, log = Recorder(), None
    if plan is not None:
        online = OnlineEvaluation(config, plan, engine, ranks, recorder)  # type: ignore[arg-type]
        if ranks.is_main:
            log = MetricsLog(plan.run, 0, 2, False)
        if damaged and ranks.rank == 1:  # its disk shows it less
            shutil.rmtree(config.online.shards)
    for step in range(2):
        output = engine.forward(torch.randn(2, 3, 32, 32, generator=draw))
        engine.backward(output.embedding.square().mean() + (output.saliency - 2).square().mean())
        engine.gradient_is_finite()
        engine.step(0.05)
        if plan is not None:
            clock = Clock(4, Stream(), 0, step)  # type: ignore[arg-type]
            online.evaluate_if_due(step + 1, log, clock, leave_out=False)
    state = {}
    for part, name, value in engine.state():
        state[part, name] = hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    modes = [module.training for module in network.modules()]
    drawn = [float(torch.rand(())), *(part[2] for part in recorder.told)]
    rows = [] if log is None or plan is None else read_metrics(plan.run / "metrics.jsonl")
    return state, rows, drawn, modes


def without_and_with(ranks: Ranks, config: TrainConfig, plan: Plan) -> tuple[Any, Any]:
    return two_steps(ranks, config, None, False), two_steps(ranks, config, plan, False)


def engine_settings(data: Path, run: Path, *settings: str) -> TrainConfig:
    evaluated = online(data, "online.every=1", "online.batch_size=2")
    return settings_of(command(data, run, *evaluated, "run.steps=2", *settings))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 3])
def test_on_two_ranks_each_engine_trains_the_same_and_takes_equal_passes(
    data: Path, tmp_path: Path, stage: int | None
) -> None:
    engine = () if stage is None else ("engine.name=deepspeed", f"engine.zero_stage={stage}")
    if engine:
        pytest.importorskip("deepspeed")
    config = engine_settings(data, tmp_path / "run", *engine, "online.images=5")
    plan = plan_run(config, 2)
    both = run_on_ranks(without_and_with, 2, config, plan)
    for plain, found in both:
        assert found[0] == plain[0]
        assert found[2][0] == plain[2][0]
        assert found[3] == plain[3]
        # rank 1 has two of the five images, and takes two passes of two images all the same
        assert found[2][1:] == [-2, -1, 0, -2, -1, 0]
    rows = both[0][1][1]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["foreground_iou"] > 0 for row in rows)


@pytest.mark.slow
def test_a_failure_of_one_rank_is_the_same_decision_on_all(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "train", tmp_path / "train")
    shutil.copytree(data / "val", tmp_path / "val")
    config = engine_settings(tmp_path, tmp_path / "run")
    found = run_on_ranks(two_steps, 2, config, plan_run(config, 2), True)
    assert [row["online_failed"] for row in found[0][1]] == [1.0, 1.0]
    assert [rank[2][1:] for rank in found] == [[-2, -1, 0, -2, -1, 0]] * 2


def test_what_is_wrong_with_the_shards_is_said_before_any_work(data: Path, tmp_path: Path) -> None:
    arguments = command(data, tmp_path / "run", "online.shards=/nowhere")
    with pytest.raises(InputError, match=r"online.shards: /nowhere holds no manifest"):
        plan_run(settings_of(arguments), 1)
    shutil.copytree(data / "val", tmp_path / "val")
    (tmp_path / "val/shard-000001.tar").unlink()
    with pytest.raises(InputError, match=r"online.shards: .*shard-000001.tar"):
        plan_run(settings_of(command(data, tmp_path / "run", *online(tmp_path))), 1)
    plain = plan_run(settings_of(command(data, tmp_path / "run")), 1)
    with_online = plan_run(settings_of(command(data, tmp_path / "run", *online(data))), 1)
    assert plain.online is None
    assert plain.data_fingerprint == with_online.data_fingerprint


def test_shards_without_labels_are_refused(data: Path, tmp_path: Path) -> None:
    from data_pipeline.build_config import BuildConfig
    from data_pipeline.sources.folder import list_folder
    from data_pipeline.write_shards import build_shards
    from tests.sample_data import folder_pair

    build_shards(list_folder(*folder_pair(tmp_path, ["a"])), tmp_path / "val", BuildConfig())
    with pytest.raises(InputError, match=r"online.shards: .*have no label, which evaluation needs"):
        plan_run(settings_of(command(data, tmp_path / "run", *online(tmp_path))), 1)


def test_a_run_goes_on_with_other_settings_of_the_evaluation(data: Path, tmp_path: Path) -> None:
    before = settings_of(command(data, tmp_path))
    after = settings_of(command(data, tmp_path, *online(data, "online.size=8", "online.pca=0")))
    assert resume_difference(before, after) == ""
    with pytest.raises(InputError, match=r"online.every.* must be at least 1"):
        replace(after.online, every=0)
    with pytest.raises(InputError, match=r"online.foreground is 'truth'; it can be logit"):
        replace(after.online, foreground="truth")


def test_a_part_of_the_images_is_spread_evenly(data: Path) -> None:
    samples = labelled_shards(read_manifest(data / "val"))
    part = EvenlySpread(samples, 3)
    assert [part.key(number) for number in range(3)] == [samples.key(n) for n in (0, 2, 4)]
    assert part.read(1).label == samples.read(2).label
    whole = EvenlySpread(samples, IMAGES)
    assert [whole.key(n) for n in range(IMAGES)] == [samples.key(n) for n in range(IMAGES)]


def test_a_long_evaluation_is_no_hang_and_a_hang_in_one_is(tmp_path: Path) -> None:
    watchdog = Watchdog(ALONE, 60, 60, tmp_path)  # its thread is not started
    for left in (3, 2, 1):
        watchdog.at("evaluating", 4, -left)
        assert watchdog._look(1) == ""
        watchdog._since -= 50
        assert watchdog._look(2) == ""
    watchdog._since -= 50
    assert "rank 0 has been evaluating in step 5 for 100 s" in watchdog._look(3)
    behind = watchdog._sign(4).place
    watchdog.at("evaluating", 4, 0)
    assert behind < watchdog._sign(5).place
    evaluated = watchdog._sign(5).place
    watchdog.at("saving", 4)
    assert evaluated < watchdog._sign(6).place


def test_its_time_counts_in_the_total_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("trainer.clock.time.perf_counter", lambda: now)
    clock = Clock(8, Stream(), 10.0, 0)  # type: ignore[arg-type]
    now += 2
    with clock.paused():
        now += 30
    now += 2
    read = clock.read(4, 10)
    assert (read["images_per_second"], read["eta_seconds"], read["seconds"]) == (8, 6, 44)


def test_tensorboard_keeps_what_was_logged_at_the_step_of_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    for first in (0, 2):
        log = MetricsLog(tmp_path, first, 4, True)
        for step in (first, first + 1, first + 2)[first // 2 :]:
            log.write_online({"step": step, "kmeans_miou": 10.0 * first + step})
        log.close()
    events = (
        event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
        .Reload()
        .Scalars("kmeans_miou")
    )
    assert [(event.step, event.value) for event in events] == [
        *((0, 0.0), (1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)),
    ]
