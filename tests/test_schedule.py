"""Learning rates."""

import pytest

from trainer.schedule import OptimConfig, learning_rate


def test_poly_per_epoch_is_the_published_one() -> None:
    config = OptimConfig(lr=0.004)
    rates = [learning_rate(config, step, 400, 10.0) for step in range(400)]
    for epoch in range(40):
        expected = 0.004 * (1 - epoch / 40) ** 0.9
        assert rates[10 * epoch : 10 * epoch + 10] == pytest.approx([expected] * 10)


def test_poly_per_step_and_warmup() -> None:
    config = OptimConfig(lr=1.0, per="step", warmup_steps=4)
    rates = [learning_rate(config, step, 100, 7.3) for step in range(100)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[50] == pytest.approx(0.5**0.9)
    assert 0 < rates[99] < 0.02


def test_constant_and_fractional_epochs_stay_positive() -> None:
    assert learning_rate(OptimConfig(lr=2, schedule="constant"), 77, 100, 10) == 2
    config = OptimConfig(lr=1.0)
    assert all(learning_rate(config, step, 25, 9.7) > 0 for step in range(25))
    assert learning_rate(config, 0, 3, 100.0) == 1.0
