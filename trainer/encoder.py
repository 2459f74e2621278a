"""A trained encoder as one module, for evaluation and notebooks."""

from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipeline.errors import InputError
from data_pipeline.resize import Resize
from trainer.checkpoint import DESCRIPTION, FOLDER, Checkpoint, newest_checkpoint
from trainer.config import TrainConfig, load_config
from trainer.foreign import Classifier, FileNetwork, read_network
from trainer.images import Pictures, prepare_images, require_images
from trainer.model import PixelEncoder, upsample
from trainer.partial import PARTS, Part, PartialEncoder
from trainer.settings import ModelConfig
from trainer.weights import load_exactly, load_start

_CONFIG = "config.yaml"
_TRAINED = "give a network with one: a run directory, or a MaskContrast checkpoint"
_REMEDIES: dict[Part, tuple[str, str]] = {
    "backbone": ("backbone", _TRAINED),
    "decoder": ("decoder", _TRAINED),
    "embedding": ("embedding head", _TRAINED),
    "saliency": ("saliency head", _TRAINED),
}


class Encoder(nn.Module):
    """A pixel encoder in evaluation mode.

    Args:
        network: the trained network. Its `features` are [B, C, h, w] with C =
            `config.decoder_channels`, its embeddings have `config.embedding_dim` dimensions.
        step: optimizer steps that it was trained for; 0 where a file does not say it.
        parts: that it has. Without an embedding head its features are its embeddings.
        classifier: of a linear probe: weight [C, K, 1, 1] and bias [C] on the features.
        origin: how errors call it.
    """

    def __init__(
        self,
        network: PixelEncoder | PartialEncoder,
        step: int,
        parts: frozenset[Part] = PARTS,
        classifier: Classifier | None = None,
        origin: str = "this network",
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.step = step
        self.parts = parts
        self.origin = origin
        weight, bias = (None, None) if classifier is None else classifier
        # buffers, so that they go where the network goes
        self.register_buffer("_weight", weight, persistent=False)
        self.register_buffer("_bias", bias, persistent=False)

    @property
    def classifier(self) -> Classifier | None:
        """Weight [C, K, 1, 1] and bias [C] on the network's features, of a linear probe."""
        weight, bias = self._weight, self._bias
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
            return None
        return weight, bias

    def require(self, part: Part, purpose: str = "this", remedy: str = "") -> None:
        """Raises InputError unless the network has `part`, which `purpose` needs; before any work.

        A backbone alone can be embedded without an embedding head: by its own features.

        Args:
            part: of a network.
            purpose: for the message.
            remedy: what to do about it there, if not to take another network.
        """
        if part not in self.parts:
            name, usual = _REMEDIES[part]
            remedy = remedy or usual
            raise InputError(f"{self.origin} has no {name}, which {purpose} needs; {remedy}")

    def images(self, pictures: Pictures, size: int = 512, resize: Resize = "opencv") -> Tensor:
        """What `embed` takes, from pictures: float32 [B, 3, S, S] on the network's device.

        Resized and normalised as in evaluation, whose figures hold for these.

        Args:
            pictures: one or several of: a path, a PIL image of any mode (turned upright as its EXIF
                says), an RGB array uint8 [H, W, 3] or grey [H, W], a tensor uint8 [3, H, W]; or an
                array or tensor of several.
            size: S, pixels; that of your evaluations.
            resize: opencv or antialias (`resize_image`).

        Raises:
            InputError: something else, naming which.
        """
        device = next(self.network.parameters()).device
        return prepare_images(pictures, size, resize).to(device)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, D, H, W] (not normalised) and saliency logits [B, H, W].

        Args:
            images: as `images` makes them: float [B, 3, H, W], normalised with ImageNet's mean and
                deviation.

        Raises:
            InputError: the network has no saliency head, or `images` is something else.
        """
        require_images(images)
        self.require("saliency", "predicted saliency", "`embeddings` works without one")
        size = (images.shape[2], images.shape[3])
        output = self.network(images)
        return upsample(output.embedding, size), upsample(output.saliency, size)[:, 0]

    def embeddings(self, images: Tensor) -> Tensor:
        """Embeddings [B, D, H, W] (not normalised), of a network with or without saliency."""
        require_images(images)
        size = (images.shape[2], images.shape[3])
        return upsample(self.network(images).embedding, size)


def load_encoder(
    path: Path | str, initial: bool = False, model: ModelConfig | None = None
) -> Encoder:
    """The encoder of a run directory, a checkpoint's folder, or a file of ours or of others.

    Args:
        path: run directory, of which the newest checkpoint is taken; one of its checkpoints; or a
            file (`foreign.read_network`).
        initial: of a run, the network as it was before training instead, for comparison.
        model: the architecture of a file, where the file does not tell it.

    Raises:
        InputError: no run, no complete checkpoint, a file that cannot be read, or one of another
            architecture.
    """
    path = Path(path)
    if initial and (path.is_file() or (path / DESCRIPTION).is_file()):
        raise InputError(
            f"{path} is one network, and the one before its training is not in it; give the run "
            "directory for the initial network"
        )
    if path.is_file():
        found = _read_file(path, model)
        return Encoder(found.network, found.step, found.parts, found.classifier, str(path))
    if not path.exists():
        raise InputError(f"{path} is no run directory and no file: there is nothing of that name")
    if model is not None:
        raise InputError(f"{path} is no file; the architecture of a run is in its {_CONFIG}")
    if (path / DESCRIPTION).is_file():
        return _from_checkpoint(_named_checkpoint(path), path.resolve().parents[1])
    config = read_run_config(path)
    if initial:
        return Encoder(initial_network(config), 0, origin=str(path))
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        raise InputError(f"{path} has no complete checkpoint; train first, or go on with training")
    return _from_checkpoint(checkpoint, path)


def _read_file(path: Path, model: ModelConfig | None) -> FileNetwork:
    """A network's file; one inside a run directory is of the architecture of the run."""
    folder = path.resolve().parent
    # RUN/export/encoder.safetensors, RUN/checkpoints/step-00001000/model.safetensors
    for run, inside in (
        (folder.parent, folder.name == "export"),
        (folder.parent.parent, folder.parent.name == FOLDER),
    ):
        if model is None and inside and (run / _CONFIG).is_file():
            model = read_run_config(run).model
    return read_network(path, model)


def _named_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint whose folder the user gave."""
    checkpoint = Checkpoint(path, 0)
    if problem := checkpoint.problem():
        raise InputError(f"checkpoint {problem}; take another one, or the run directory")
    return Checkpoint(path, int(checkpoint.describe()["progress"]["step"]))


def _from_checkpoint(checkpoint: Checkpoint, run: Path) -> Encoder:
    network = PixelEncoder(read_run_config(run).model)
    state = checkpoint.load("model")
    load_exactly(network, state, str(checkpoint.path), str(run / _CONFIG))
    return Encoder(network, checkpoint.step, origin=str(checkpoint.path))


def read_run_config(run: Path) -> TrainConfig:
    """The resolved configuration of a run directory."""
    file = run / _CONFIG
    if not file.is_file():
        raise InputError(f"{run} is no run directory: it has no {_CONFIG}")
    return load_config(file=file)


def initial_network(config: TrainConfig) -> PixelEncoder:
    """The network before its first step: the same on every rank and in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        network = PixelEncoder(config.model)
    load_start(network, config.model.start)
    return network
