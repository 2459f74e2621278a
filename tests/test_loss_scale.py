"""fp16 under DeepSpeed: a scale that falls, gradients of their true size, a state to go on from."""

import pytest
import torch

from tests.ranks import run_on_ranks
from trainer.deepspeed_engine import LossScale
from trainer.distributed import Ranks
from trainer.engine import GOOD_STEPS, Engine, EngineConfig, make_engine
from trainer.model import ModelConfig, PixelEncoder
from trainer.schedule import OptimConfig

pytest.importorskip("deepspeed")


def new_engine(ranks: Ranks, config: EngineConfig, precision: str) -> Engine:
    torch.manual_seed(0)
    model = ModelConfig("small", decoder_channels=8, embedding_dim=4, dropout=0.0)
    network = PixelEncoder(model).train()
    optim = OptimConfig(clip_norm=0.01, accumulate=2)
    engine = make_engine(config, optim, network, 8, ranks, precision)
    engine.rehearse(torch.zeros(2, 3, 32, 32))
    return engine


def one_step(engine: Engine, times: float = 1.0) -> float:
    """Returns the gradient's norm, NaN if the step was passed over."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    engine.update_momentum(0.99)
    for more_follow in (True, False):  # the first overflows, and the second does not
        with engine.accumulating(more_follow):
            output = engine.forward(images)
            factor = times if more_follow else 1.0
            engine.backward(factor * output.embedding.float().square().mean())
    finite = engine.gradient_is_finite()
    norm = engine.step(0.1, skip=not finite)
    return float(norm) if finite else float("nan")


def run(ranks: Ranks, stage: int) -> None:
    expected = new_engine(ranks, EngineConfig(), "float32")
    engine = new_engine(ranks, EngineConfig("deepspeed", stage), "fp16")
    before = {s.name: s.value.clone() for s in engine.state() if s.part == "model"}
    for _ in range(2):
        assert one_step(engine, 1e6) != one_step(engine, 1e6)  # NaN
    state = {(s.part, s.name): s.value.clone() for s in engine.state()}
    assert float(state["optimizer", "loss_scale"]) == 65536 / 16
    assert ("optimizer", "momentum_buffer.embedding_head.weight") in state
    for name, value in before.items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(value, state["model", name]), name

    assert one_step(engine) == pytest.approx(one_step(expected), rel=2e-2)
    weights = [p for n, p in expected.network.named_parameters() if n == "embedding_head.weight"]
    moved = weights[0] - before["embedding_head.weight"]
    found = {s.name: s.value.clone() for s in engine.state() if s.part == "model"}
    mine = found["embedding_head.weight"] - before["embedding_head.weight"]
    assert float((mine - moved).norm() / moved.norm()) < 2e-2  # clipped in the same way, too

    state["optimizer", GOOD_STEPS] = torch.tensor(7.0)
    for config in (EngineConfig("deepspeed", stage), EngineConfig()):
        other = new_engine(ranks, config, "fp16")
        other.load_optimizer(lambda name: state.get(("optimizer", name)))
        kept = {s.name: float(s.value) for s in other.state() if s.name.startswith("loss_scale")}
        assert kept == {"loss_scale": 65536 / 16, GOOD_STEPS: 7}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_overflows_lowers_the_scale_and_nothing_else(stage: int) -> None:
    run_on_ranks(run, 2, stage)


def test_the_scale_rises_after_two_thousand_good_steps() -> None:
    scale = LossScale(8.0)
    scale.update(bad=True)
    for _ in range(1999):
        scale.update(bad=False)
    assert scale.value == 4.0
    scale.update(bad=False)
    assert scale.value == 8.0
