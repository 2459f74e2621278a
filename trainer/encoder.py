"""A trained encoder as one module, for evaluation and notebooks."""

from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipeline.errors import InputError
from trainer.checkpoint import newest_checkpoint
from trainer.config import TrainConfig, load_config
from trainer.model import PixelEncoder, upsample
from trainer.weights import load_start


class Encoder(nn.Module):
    """A pixel encoder in evaluation mode.

    Args:
        network: the trained network.
        step: optimizer steps that it was trained for.
    """

    def __init__(self, network: PixelEncoder, step: int) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.step = step

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, D, H, W] (not normalised) and saliency logits [B, H, W].

        Args:
            images: float32 [B, 3, H, W], normalised with ImageNet's mean and deviation.
        """
        size = (images.shape[2], images.shape[3])
        output = self.network(images)
        return upsample(output.embedding, size), upsample(output.saliency, size)[:, 0]


def load_encoder(path: Path | str, initial: bool = False) -> Encoder:
    """The encoder of a run directory, from its newest checkpoint.

    Args:
        path: run directory.
        initial: the network as it was before training instead, for comparison.

    Raises:
        InputError: no run, no complete checkpoint, or one of another architecture.
    """
    run = Path(path)
    config = read_run_config(run)
    if initial:
        return Encoder(initial_network(config), 0)
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        raise InputError(f"{run} has no complete checkpoint; train first, or go on with training")
    network = PixelEncoder(config.model)
    state = checkpoint.load("model")
    own = network.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if _shape(state, name) != _shape(own, name):
            raise InputError(
                f"{checkpoint.path} is of another architecture than {run / 'config.yaml'}: {name} "
                f"is {_shape(state, name)} there, and {_shape(own, name)} by the configuration"
            )
    network.load_state_dict(state)
    return Encoder(network, checkpoint.step)


def _shape(state: dict[str, Tensor], name: str) -> str:
    return str(list(state[name].shape)) if name in state else "missing"


def read_run_config(run: Path) -> TrainConfig:
    """The resolved configuration of a run directory."""
    file = run / "config.yaml"
    if not file.is_file():
        raise InputError(f"{run} is no run directory: it has no config.yaml")
    return load_config(file=file)


def initial_network(config: TrainConfig) -> PixelEncoder:
    """The network before its first step: the same on every rank and in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        network = PixelEncoder(config.model)
    load_start(network, config.model.start)
    return network
