"""The ways of making masks, as small descriptions that travel to worker processes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import InputError
from data_pipeline.masks.predictor import Predictor

_REMEDY = "pip install 'maskbank[masks]' installs what masks are made with"


class Method(Protocol):
    """What a worker makes its own predictor from. Picklable."""

    def __hash__(self) -> int: ...

    def load(self, threads: int) -> Predictor:
        """Loads the predictor, for `threads` threads.

        Raises:
            InputError: weights or options are wrong, or a package is missing.
        """
        ...


@dataclass(frozen=True)
class PriorMethod:
    """`background_prior.BackgroundPrior`: no weights, CPU only; size: longest side, pixels."""

    size: int = 320

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 2048:
            raise InputError(f"--size is {self.size}; it can be 16 to 2048 pixels")

    def load(self, threads: int) -> Predictor:
        try:
            from data_pipeline.masks.background_prior import BackgroundPrior, PriorConfig
        except ImportError as error:
            raise InputError(f"the prior needs {error.name}, which is missing: {_REMEDY}") from None
        return BackgroundPrior(PriorConfig(size=self.size))


@dataclass(frozen=True)
class OnnxMethod:
    """`onnx_network.OnnxNetwork`; see its `load` for the fields."""

    weights: Path
    preset: str = "auto"
    batch_size: int = 8
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    activation: str | None = None
    device: str = "cpu"

    def load(self, threads: int) -> Predictor:
        from data_pipeline.masks.onnx_network import OnnxNetwork

        return OnnxNetwork.load(
            self.weights,
            self.preset,
            self.batch_size,
            threads,
            size=self.size,
            mean=self.mean,
            std=self.std,
            activation=self.activation,
            device=self.device,
        )


@dataclass(frozen=True)
class SpectralMethod:
    """`spectral.SpectralSaliency`; see its `load` for the fields."""

    model: str
    weights: Path | None
    size: int = 480
    batch_size: int = 8
    device: str = "cpu"

    def load(self, threads: int) -> Predictor:
        try:
            import torch

            from data_pipeline.masks.spectral import SpectralSaliency
        except ImportError as error:
            raise InputError(f"this method needs {error.name}: {_REMEDY}") from None
        torch.set_num_threads(threads)
        return SpectralSaliency.load(
            self.model, self.weights, self.size, self.batch_size, self.device
        )
