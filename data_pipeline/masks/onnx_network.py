"""Saliency from any ONNX network that the user has: U²-Net, BASNet, IS-Net, or one of their own.

Sizes, normalisations and what is done to the first output are those of the published inference
code (U²-Net: Qin et al., Pattern Recognition 2020; BASNet: Qin et al., CVPR 2019; IS-Net: Qin et
al., ECCV 2022). Pictures and maps are resized with Pillow's bilinear filter everywhere.
"""

from __future__ import annotations

import hashlib
import logging
import math
import mmap
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from scipy.special import expit

from data_pipeline.errors import InputError
from data_pipeline.masks.predictor import Float32, UInt8

log = logging.getLogger(__name__)

Triple = tuple[float, float, float]
Activation = Literal["none", "sigmoid", "minmax"]
ACTIVATIONS = ("none", "sigmoid", "minmax")

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
SIZES = (16, 4096)
MAX_FIXED_BATCH = 64
OUTSIDE = 1e-3  # how far a map without activation may leave [0, 1]
CHECKS_PATHS = (1, 24)  # the first onnxruntime that keeps external data within the model's folder

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_EXTERNAL = re.compile(rb"\n\x08location\x12([\x01-\x7f])")  # entry of a TensorProto, then a name
_ADDRESS = b"_ORT_MEM_ADDR_"  # onnxruntime's mark for data at an address of the process


@dataclass(frozen=True)
class Preset:
    """How pictures enter a network, and what its output becomes.

    Attributes:
        size: side of the square that pictures are resized to, pixels; `None`: the network's own.
        mean, std: of RGB values in [0, 1].
        by_maximum: values are divided by the picture's largest one instead of 255.
        activation: `none` takes the output as it is, `sigmoid` takes it as logits, `minmax`
            stretches each map to [0, 1]; a map that is flat becomes zeros.
    """

    size: int | None
    mean: Triple
    std: Triple
    by_maximum: bool
    activation: Activation


PRESETS = {
    "auto": Preset(None, IMAGENET_MEAN, IMAGENET_STD, False, "minmax"),
    "u2net": Preset(320, IMAGENET_MEAN, IMAGENET_STD, True, "minmax"),
    "basnet": Preset(256, IMAGENET_MEAN, IMAGENET_STD, True, "minmax"),
    "isnet": Preset(1024, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0), False, "minmax"),
}


class OnnxNetwork:
    """Saliency from an ONNX network; a `Predictor`. Made by `load`.

    Attributes:
        name: file, and a digest of its bytes and of all settings.
        batch_size: pictures that are run together; 1 where the network takes one at a time.
    """

    def __init__(self, path: Path, session: Any, preset: Preset, size: tuple[int, int]) -> None:
        self.path = path
        self.preset = preset
        self.size = size  # height, width
        self.name = f"onnx-{path.stem}"
        self.batch_size = 1
        self._session = session
        self._input = session.get_inputs()[0]
        first = self._input.shape[0]
        self._copies = first if isinstance(first, int) else 1  # that a fixed batch is filled with

    @classmethod
    def load(
        cls,
        path: Path,
        preset: str = "auto",
        batch_size: int = 8,
        threads: int = 1,
        size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        activation: str | None = None,
        device: str = "cpu",
    ) -> OnnxNetwork:
        """Opens a network, and runs it once to see that it is one of saliency.

        Args:
            path: ONNX file with one input [B, 3, H, W] of RGB, whose first output is a map
                [B, 1, H', W'] or [B, H', W']. Data in files of its own is read only from within
                the folder of the model. A network is a program: it may take any time and memory.
            preset: key of `PRESETS`; auto has ImageNet's normalisation and the network's own size.
            batch_size: pictures at a time, where the network takes any number of them and gives
                each the map that it gives it alone; otherwise pictures are run one by one.
            threads: of onnxruntime, for this process.
            size: side that pictures are resized to, instead of the preset's. The size of a network
                that fixes it goes before the preset's, and may not be contradicted.
            mean, std: three numbers each, instead of the preset's.
            activation: one of `ACTIVATIONS`, instead of the preset's.
            device: cpu or cuda.

        Raises:
            InputError: an argument is out of range, onnxruntime or its CUDA provider is missing, or
                the file is not such a network; says what to do.
        """
        if batch_size < 1 or threads < 1:
            raise InputError(f"batch size {batch_size}, threads {threads}: both are at least 1")
        settings = _settings(preset, size, mean, std, activation)
        digest = _read_digest(path)
        session = _open_session(path, threads, device)
        height, width = _input_size(path, session, settings, size)
        network = cls(path, session, settings, (height, width))
        digest.update(repr((astuple(settings), height, width)).encode())
        network.name += f"-{digest.hexdigest()[:16]}"
        if network._takes_batches(batch_size, exact=device == "cpu"):
            network.batch_size = batch_size
        return network

    def predict(self, images: Sequence[UInt8]) -> list[Float32]:
        """Saliency in [0, 1], float32 [H, W], of each picture uint8 [H, W, 3].

        Raises:
            InputError: the network gave something else than finite maps, or left [0, 1] without an
                activation.
        """
        maps: list[Float32] = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            outputs = self._run(np.stack([self._prepare(image) for image in part]))
            for image, output in zip(part, outputs, strict=True):
                maps.append(_resize(self._activate(output), image.shape[:2]))
        return maps

    def _prepare(self, image: UInt8) -> Float32:
        """The picture as the network takes it, [3, H, W]."""
        height, width = self.size
        resized = np.asarray(
            Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        )
        top = max(int(resized.max()), 1) if self.preset.by_maximum else 255
        mean, std = (np.asarray(x, np.float32) for x in (self.preset.mean, self.preset.std))
        values = (resized.astype(np.float32) / np.float32(top) - mean) / std
        return np.ascontiguousarray(values.transpose(2, 0, 1))

    def _run(self, pictures: Float32) -> Float32:
        """First output [B, H', W'] for [B, 3, H, W]; a fixed batch is filled with copies of one."""
        feed = np.repeat(pictures, self._copies, 0).astype(_TYPES[self._input.type])
        wanted = [self._session.get_outputs()[0].name]
        try:
            output = self._session.run(wanted, {self._input.name: feed})[0]
        except Exception as error:  # onnxruntime has an exception of its own for each status
            raise InputError(
                f"{self.path} does not run on {_shape(feed)}: {_reason(error)}; "
                "give the size that the network was made for, or export it anew"
            ) from None
        return self._check_output(output, len(feed))[:: self._copies]

    def _check_output(self, output: Any, batch: int) -> Float32:
        if not isinstance(output, np.ndarray) or output.dtype.kind not in "fiub":
            raise InputError(
                f"the first output of {self.path} is not a tensor of numbers; "
                "export the network with its saliency map as first output"
            )
        shape = _shape(output)
        if output.ndim == 4 and output.shape[1] == 1:
            output = output[:, 0]
        if output.ndim != 3 or len(output) != batch or 0 in output.shape:
            raise InputError(
                f"the first output of {self.path} is {shape} for a batch of {batch}; expected one "
                f"map a picture, [{batch}, 1, H, W] or [{batch}, H, W]: export the network with "
                "its saliency map as first output"
            )
        output = output.astype(np.float32)
        if not np.isfinite(output).all():
            raise InputError(
                f"{self.path} gives NaN or infinite values; export it in float32, and check that "
                "mean and std are those that it was trained with"
            )
        return np.asarray(output)

    def _activate(self, output: Float32) -> Float32:
        low, high = float(output.min()), float(output.max())
        if self.preset.activation == "sigmoid":
            return np.asarray(expit(output))
        if self.preset.activation == "minmax":
            if high - low <= 1e-6 * max(1.0, abs(high)):
                return np.zeros_like(output)
            return np.asarray((output - low) / (high - low), np.float32)
        if low < -OUTSIDE or high > 1 + OUTSIDE:
            raise InputError(
                f"{self.path} gives values from {low:.3g} to {high:.3g}, not in [0, 1]; take the "
                "activation sigmoid where they are logits, minmax otherwise"
            )
        return output

    def _takes_batches(self, batch_size: int, exact: bool) -> bool:
        """Runs the network once alone and once with a neighbour, which must change nothing.

        A stretch to [0, 1] inside the network, for one, would be over the whole batch.
        """
        noise = np.random.default_rng(0).integers(0, 256, (2, *self.size, 3), np.uint8)
        noise[0] = 64 + noise[0] // 2  # the neighbour has both extremes
        pictures = np.stack([self._prepare(picture) for picture in noise])
        alone = self._run(pictures[:1])
        self._activate(alone)
        if batch_size == 1 or isinstance(self._input.shape[0], int):
            return False
        try:
            together = self._run(pictures)[:1]
        except InputError as error:
            log.info("%s: run one by one, since batches fail: %s", self.path, error)
            return False
        # on a GPU other kernels are chosen for other batches
        tolerance = 0.0 if exact else 1e-3 * float(np.abs(alone).max())
        if alone.shape == together.shape and float(np.abs(alone - together).max()) <= tolerance:
            return True
        log.info("%s: run one by one, since neighbours in a batch change a map", self.path)
        return False


def _settings(
    name: str,
    size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    activation: str | None,
) -> Preset:
    """The preset with what was given in place of its values."""
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}; it can be one of: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if size is not None:
        if not SIZES[0] <= size <= SIZES[1]:
            raise InputError(f"size {size} is not in {SIZES[0]}…{SIZES[1]} pixels")
        preset = replace(preset, size=size)
    if mean is not None:
        preset = replace(preset, mean=_triple("mean", mean))
    if std is not None:
        preset = replace(preset, std=_triple("std", std))
        if min(preset.std) <= 0:
            raise InputError(f"std {list(std)} is not above 0")
    if activation is not None:
        if activation not in ACTIVATIONS:
            raise InputError(
                f"there is no activation {activation!r}; it can be one of: {', '.join(ACTIVATIONS)}"
            )
        preset = replace(preset, activation=activation)  # type: ignore[arg-type]
    return preset


def _triple(what: str, values: Sequence[float]) -> Triple:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
        raise InputError(f"{what} {list(values)} is not three numbers, one a channel of RGB")
    return numbers[0], numbers[1], numbers[2]


def _read_digest(path: Path) -> hashlib._Hash:
    """SHA-256 of a model and of the data files that it names, which must lie in its folder.

    onnxruntime itself refuses paths and links that leave the folder since 1.24; older ones get no
    model with data outside it. Entries that are written in an unusual order are left to it.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}; give the ONNX file of a saliency network")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            digest = hashlib.sha256(data)
            outside = data.find(_ADDRESS) >= 0
            mentioned = data.find(b"location") >= 0
            found = (data[m.end() : m.end() + m[1][0]] for m in _EXTERNAL.finditer(data))
            names = sorted({name.decode("utf-8", "surrogateescape") for name in found})
    except (OSError, ValueError) as error:  # mmap refuses an empty file
        raise InputError(f"{path} cannot be read ({error}); copy it here again") from None
    folder = path.resolve().parent
    files = [(path.parent / name).resolve() for name in names]
    if outside or not all(folder in file.parents for file in files):
        raise InputError(
            f"{path} names data outside its own folder, which is not read: do not trust it, or "
            "save it anew as one file"
        )
    if mentioned and _runtime_version() < CHECKS_PATHS:
        raise InputError(
            f"{path} may name data in other files, and this onnxruntime does not keep them to the "
            "model's folder; save it as one file, or install onnxruntime>=1.24"
        )
    for part in files:
        if part.is_file():  # onnxruntime says what is missing
            with part.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
    return digest


def _runtime_version() -> tuple[int, ...]:
    return tuple(int(part) for part in _onnxruntime().__version__.split(".")[:2])


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            f"ONNX networks need onnxruntime ({error}): pip install 'maskbank[masks]' installs it"
        ) from None
    return onnxruntime


def _open_session(path: Path, threads: int, device: str) -> Any:
    runtime = _onnxruntime()
    providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    if device not in providers:
        raise InputError(f"there is no device {device!r}; it can be one of: cpu, cuda")
    missing = (
        f"device cuda: this onnxruntime runs on {', '.join(runtime.get_available_providers())}"
    )
    remedy = "install onnxruntime-gpu and CUDA's libraries, or take the device cpu"
    if providers[device] not in runtime.get_available_providers():
        raise InputError(f"{missing}; {remedy}")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # errors are raised, and told once
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        session = runtime.InferenceSession(str(path), options, providers=[providers[device]])
    except Exception as error:  # onnxruntime has an exception of its own for each status
        raise InputError(
            f"{path} cannot be opened as an ONNX network ({_reason(error)}); "
            "copy it here again, or export it anew"
        ) from None
    if providers[device] not in session.get_providers():  # it falls back to the CPU with a warning
        raise InputError(f"device cuda: onnxruntime could not start it; {remedy}")
    return session


def _input_size(path: Path, session: Any, preset: Preset, given: int | None) -> tuple[int, int]:
    """Height and width that the network gets: its own where it fixes them."""
    inputs = session.get_inputs()
    shapes = ", ".join(f"{item.name} {item.type} {item.shape}" for item in inputs)
    expected = "expected one input [B, 3, H, W] of floating point; export the network so"
    if len(inputs) != 1 or inputs[0].type not in _TYPES or len(inputs[0].shape) != 4:
        raise InputError(f"the inputs of {path} are: {shapes or 'none'}; {expected}")
    batch, channels, *sides = inputs[0].shape
    if isinstance(batch, int) and not 1 <= batch <= MAX_FIXED_BATCH:
        raise InputError(
            f"{path} fixes its batch to {batch}; export it with a batch of 1 or of any"
        )
    if isinstance(channels, int) and channels != 3:
        last = ", with the channels second" if sides[1] == 3 else ""
        raise InputError(
            f"the input of {path} is {shapes}, of {channels} channels; {expected}{last}"
        )
    fixed = [side for side in sides if isinstance(side, int)]
    if given is not None and any(side != given for side in fixed):
        raise InputError(
            f"size {given} was given, but the network {path} fixes its input to {sides}; "
            "leave the size out, or export the network with another"
        )
    if len(fixed) < 2 and preset.size is None:
        raise InputError(
            f"{path} takes pictures of any size; give the size that it was trained at, "
            "or a preset that has one: " + ", ".join(k for k, v in PRESETS.items() if v.size)
        )
    height, width = (side if isinstance(side, int) else preset.size for side in sides)
    assert height is not None
    assert width is not None
    if not all(1 <= side <= SIZES[1] for side in (height, width)):
        raise InputError(f"{path} takes pictures of {height}×{width}; {SIZES[1]} is the most here")
    return height, width


def _resize(values: Float32, shape: Sequence[int]) -> Float32:
    """A map [H', W'] at the picture's size [H, W]."""
    resized = Image.fromarray(values).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(np.clip(np.asarray(resized), 0, 1), np.float32)


def _shape(values: Any) -> str:
    return "[" + ", ".join(str(side) for side in values.shape) + "]"


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
