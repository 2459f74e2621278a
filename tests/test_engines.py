"""DDP and DeepSpeed train alike, and go on from each other's checkpoints."""

import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.engine_parity import Case, compare
from data_pipeline.build_config import BuildConfig
from data_pipeline.sources.generated import list_scenes
from data_pipeline.write_shards import build_shards
from tests.ranks import run_on_ranks
from tests.test_train import finish, finish_in_full, start
from trainer.checkpoint import newest_checkpoint
from trainer.deepspeed_engine import DeepSpeedEngine
from trainer.distributed import Ranks
from trainer.engine import EngineConfig, make_engine
from trainer.metrics import read_metrics
from trainer.model import ModelConfig, PixelEncoder
from trainer.optimizer import build_optimizer
from trainer.schedule import OptimConfig

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")
BATCH, SAMPLES = 8, 120
STEPS = SAMPLES // BATCH  # one epoch
# Batch norm over a few small images triples a difference in the last bit at every step; DeepSpeed
# lays weights out differently than DDP, so that convolutions round differently.
FROZEN = ("model.batch_norm=frozen", "optim.lr=0.1")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shards"
    build_shards(list_scenes(SAMPLES, 0, 40), root, BuildConfig(30, "ids"))
    return root


def command(shards: Path, run: Path, ranks: int, *settings: str) -> list[str]:
    return [
        *(sys.executable, "-m", "launch.ranks", "--standalone", f"--nproc-per-node={ranks}"),
        *("-m", "trainer.train", "--recipe", "demo_cpu", f"data.shards={shards}"),
        *(f"run.directory={run}", f"run.steps={STEPS}", "run.log_every=1", "run.threads=1"),
        *("data.threads=1", "data.loader=torch", "views.image_size=32", f"data.batch_size={BATCH}"),
        *("model.decoder_channels=16", "model.embedding_dim=8", "bank.capacity=30"),
        *("run.tensorboard=false", "run.precision=float32", "optim.lr=0.004"),
        # dropout draws in the order of memory, in which DeepSpeed lays weights out differently
        *("optim.warmup_steps=0", "run.timeout_seconds=60", "model.dropout=0"),
        *settings,
    ]


def losses(run: Path) -> list[tuple[float, float]]:
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [(row["loss"], row["gradient_norm"]) for row in rows]


def zero(stage: int) -> tuple[str, str]:
    return "engine.name=deepspeed", f"engine.zero_stage={stage}"


@pytest.fixture(scope="module")
def with_ddp(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    run = tmp_path_factory.mktemp("runs") / "ddp"
    finish(command(shards, run, 2, *FROZEN))
    return losses(run)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_epoch_has_the_same_losses_in_every_stage_of_zero_as_with_ddp(
    shards: Path, with_ddp: list[tuple[float, float]], tmp_path: Path, stage: int
) -> None:
    finish(command(shards, tmp_path / "run", 2, *FROZEN, *zero(stage)))
    for found, expected in zip(losses(tmp_path / "run"), with_ddp, strict=True):
        assert found[0] == pytest.approx(expected[0], abs=1e-5)
        assert found[1] == pytest.approx(expected[1], rel=1e-3)


OPTIONS = [
    (*FROZEN, "optim.name=adamw", "optim.lr=0.001", "model.freeze=[stem,layer1]"),
    ("model.batch_norm=sync", "data.batch_size=9", "optim.clip_norm=1.0"),
]


@pytest.mark.parametrize(
    ("options", "stage"),
    list(zip(OPTIONS, (3, 1), strict=True)),
    ids=["adamw", "uneven"],
)
def test_adamw_clipping_and_uneven_parts_are_the_same_too(
    shards: Path, tmp_path: Path, options: tuple[str, ...], stage: int
) -> None:
    shorter = ("run.steps=6", *options)
    finish(command(shards, tmp_path / "ddp", 2, *shorter))
    finish(command(shards, tmp_path / "zero", 2, *shorter, *zero(stage)))
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("ddp", "zero")]
    for expected, found in zip(*rows, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=2e-5)
        assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3)


# all of them: benchmarks/engine_parity.py
ACCUMULATING = (
    Case(0, offload=False, accumulate=3, skip=True),
    Case(1, offload=False, accumulate=2),
    Case(1, offload=True, accumulate=3),
    Case(2, offload=False, accumulate=2),
    Case(2, offload=True, accumulate=2, skip=True),
    Case(3, offload=False, accumulate=2),
)


def test_accumulation_is_the_same_in_every_stage_restarted_clipped_and_after_a_skipped_step(
    shards: Path, tmp_path: Path
) -> None:
    found = compare(ACCUMULATING, 2, tmp_path, shards, finish)
    assert found.keys() == set(ACCUMULATING)
    for case, ways in found.items():
        for way, difference in ways.items():
            assert not difference.error, (case.name, way, difference.error)
            assert difference.worst < 1e-4, (case.name, way, difference.largest)


def test_a_run_goes_from_engine_to_engine_and_from_rank_to_rank(
    shards: Path, with_ddp: list[tuple[float, float]], tmp_path: Path
) -> None:
    run, frozen = tmp_path / "run", (*FROZEN, "run.checkpoint_every=3")
    finish(command(shards, tmp_path / "whole", 2, *frozen))
    legs = [(2, zero(3)), (1, ()), (3, zero(1)), (2, zero(2)), (2, ())]
    for number, (ranks, engine) in enumerate(legs):
        arguments = command(shards, run, ranks, *frozen, *engine)
        process = start(arguments)
        while number < len(legs) - 1 and process.poll() is None:
            found = newest_checkpoint(run)
            if found is not None and found.step >= 3 * (number + 1):
                (run / "STOP").touch()
                break
            time.sleep(0.02)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    end = newest_checkpoint(run)
    assert end is not None
    assert end.step == STEPS
    assert not (run / "STOP").exists()
    expected = losses(tmp_path / "whole")
    for got, wanted in zip(losses(run), expected, strict=True):
        assert got[0] == pytest.approx(wanted[0], abs=1e-5)
    whole = newest_checkpoint(tmp_path / "whole")
    assert whole is not None
    for part in ("model", "momentum", "optimizer"):
        saved, wanted_part = end.load(part), whole.load(part)
        assert saved.keys() == wanted_part.keys()
        for name, value in wanted_part.items():
            torch.testing.assert_close(saved[name], value, rtol=1e-3, atol=1e-5, msg=name)


def ten_steps(ranks: Ranks, stage: int | None) -> tuple[list[float], list[list[float]]]:
    """Losses, and two weights at the end, with batch norm, dropout and equally laid out weights."""
    torch.manual_seed(0)
    network = PixelEncoder(ModelConfig("small", decoder_channels=16)).train()
    config = EngineConfig() if stage is None else EngineConfig("deepspeed", stage)
    engine = make_engine(config, OptimConfig(), network, 8, ranks, "float32")
    engine.rehearse(torch.zeros(4, 3, 32, 32))
    draw = torch.Generator().manual_seed(ranks.rank)
    found = []
    for step in range(10):
        engine.update_momentum(0.9)
        images = torch.randn(4, 3, 32, 32, generator=draw)
        torch.manual_seed(step)
        target = engine.embed_keys(images).embedding
        output = engine.forward(images)
        loss = (output.embedding - target - 1).square().mean()
        loss = loss + (output.saliency - 2).square().mean()
        engine.backward(loss)
        found.append(float(loss.detach()))
        assert engine.gradient_is_finite()
        engine.step(0.05)
    names = ("embedding_head.weight", "backbone.stem.0.weight")
    state = {(part, name): value.flatten().tolist() for part, name, value in engine.state()}
    return found, [state[part, name] for part in ("model", "momentum") for name in names]


def test_with_weights_laid_out_alike_every_stage_trains_as_ddp_does() -> None:
    expected = run_on_ranks(ten_steps, 2, None)
    assert expected[0][0][-1] < 0.5 * expected[0][0][0]
    for stage in (0, 1, 2, 3):
        for (losses_of, weights), (wanted, wanted_weights) in zip(
            run_on_ranks(ten_steps, 2, stage), expected, strict=True
        ):
            assert losses_of == pytest.approx(wanted, abs=1e-5)
            for got, want in zip(weights, wanted_weights, strict=True):
                assert got == pytest.approx(want, abs=1e-5)


def optimizer_bytes(ranks: Ranks, stage: int | None) -> tuple[int, int]:
    """Bytes of the optimizer's state on this rank, and of all weights."""
    torch.manual_seed(0)
    network = PixelEncoder(
        ModelConfig("small", decoder_channels=16, atrous_rates=(1, 2, 3))
    ).train()
    weights = sum(p.numel() * 4 for p in network.parameters())
    config = EngineConfig() if stage is None else EngineConfig("deepspeed", stage)
    optim = OptimConfig(name="adamw")
    engine = make_engine(config, optim, network, 4, ranks, "float32")
    engine.rehearse(torch.zeros(2, 3, 32, 32))
    base = engine.base_optimizer if isinstance(engine, DeepSpeedEngine) else engine.optimizer  # type: ignore[attr-defined]
    if stage is None:
        list(engine.state())  # makes it
    tensors = [value for state in base.state.values() for value in state.values()]
    return sum(value.nbytes for value in tensors if value.ndim), weights


def test_deepspeed_runs_on_one_rank_without_a_launcher(shards: Path, tmp_path: Path) -> None:
    arguments = command(shards, tmp_path / "run", 1, *FROZEN, "run.steps=2", *zero(2))
    alone = [sys.executable, *arguments[arguments.index("trainer.train") - 1 :]]
    finish_in_full(alone)
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["step"] == 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_zero_1_cuts_the_optimizers_memory_by_the_number_of_ranks(world_size: int) -> None:
    for held, weights in run_on_ranks(optimizer_bytes, world_size, None):
        assert held == 2 * weights
    for held, weights in run_on_ranks(optimizer_bytes, world_size, 1):
        assert held == pytest.approx(2 * weights / world_size, rel=0.01)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_held_step_changes_nothing_and_makes_the_state(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(OptimConfig(name=name), [weight])
    weight.grad = torch.full((3,), torch.nan)
    optimizer.hold = True
    optimizer.step()
    assert weight.tolist() == [1, 1, 1]
    assert all((value == 0).all() for value in optimizer.state[weight].values())
    optimizer.hold = False
    fresh = torch.nn.Parameter(torch.ones(3))
    reference = build_optimizer(OptimConfig(name=name), [fresh])
    for _ in range(2):
        weight.grad, fresh.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
        reference.step()
    assert torch.equal(weight, fresh)
