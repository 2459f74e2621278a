"""Networks for other programs: safetensors, torchvision's names, ONNX, torch.export.

Every file is loaded again and compared before it takes its name.
"""

import importlib
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

import torch
import torchvision
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from data_pipeline.errors import InputError
from data_pipeline.files import atomic_write, require_writable_file
from data_pipeline.views import IMAGENET_MEAN, IMAGENET_STD
from trainer.encoder import Encoder
from trainer.model import upsample
from trainer.network_description import describe_network
from trainer.settings import RESNETS
from trainer.weights import load_exactly

Format = Literal["safetensors", "torchvision", "onnx", "torch-export"]
FORMATS: tuple[Format, ...] = get_args(Format)
TOLERANCE = 1e-4  # of the largest value of an output: what another order of sums may change
SMALLEST = 32  # side of images, pixels; traced networks take none that are smaller
_OPSET = 18


@dataclass(frozen=True)
class Exported:
    """What a file takes and gives.

    Attributes:
        outputs: names, in order.
        size: height and width of images; None where any will do.
        difference: largest one from the network, as a share of the output's largest value.
    """

    outputs: tuple[str, ...]
    size: tuple[int, int] | None
    difference: float


class DenseNetwork(nn.Module):
    """Images [B, 3, H, W] to what is known of each pixel, at the images' size.

    `outputs` of embedding [B, D, H, W] (not normalised), saliency [B, H, W] (logits), and classes
    [B, C, H, W] (logits of a linear probe): those that the encoder has.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.network = encoder.network
        self.outputs: tuple[str, ...] = ("embedding",)
        if "saliency" in encoder.parts:
            self.outputs += ("saliency",)
        self.classifier: nn.Conv2d | None = None
        if encoder.classifier is not None:
            weight, bias = encoder.classifier
            self.classifier = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
            self.classifier.load_state_dict({"weight": weight, "bias": bias})
            self.classifier.requires_grad_(False)
            self.outputs += ("classes",)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        size: Any = images.shape[2:]
        features = self.network.features(images)
        output = self.network.heads(features)
        found = [upsample(output.embedding, size)]
        if "saliency" in self.outputs:
            found.append(upsample(output.saliency, size)[:, 0])
        if self.classifier is not None:
            found.append(upsample(self.classifier(features), size))
        return tuple(found)


def export_network(
    encoder: Encoder,
    path: Path,
    kind: Format,
    size: tuple[int, int] = (224, 224),
    device: torch.device | None = None,
) -> Exported | None:
    """Writes an encoder for other programs; what was traced is described.

    Args:
        encoder: to write.
        path: of the file; only a whole and compared one takes its place.
        kind: safetensors (our names, settings as metadata: `load_encoder` reads it back bit for
            bit); torchvision (a state dict of its ResNet, without fc); onnx; or torch-export
            (`torch.export.load`). The last two take any batch, height and width where the network
            can be traced so, else any batch of `size`.
        size: height and width of the images that a network is traced with, pixels.
        device: that a torch-export program is traced on and for; the CPU by default.

    Raises:
        InputError: the network is not of that kind or cannot be traced, a package is missing, or
            the file would not compute what the network does.
    """
    require_writable_file(path)
    if kind == "safetensors":
        _write_safetensors(encoder, path)
        return None
    if kind == "torchvision":
        _write_torchvision(encoder, path)
        return None
    if min(size) < SMALLEST:
        raise InputError(f"--size is {size[0]} {size[1]}; sides must be at least {SMALLEST}")
    if kind == "onnx":
        require_onnx()
        encoder.to("cpu")
        return _write_traced(DenseNetwork(encoder), path, size, save_onnx, run_onnx)
    encoder.to(device or "cpu")
    return _write_traced(DenseNetwork(encoder), path, size, save_program, run_program)


def _write_safetensors(encoder: Encoder, path: Path) -> None:
    if path.suffix != ".safetensors":
        raise InputError(f"--output: {path} should end in .safetensors, by which it is known")
    state = {n: value.cpu().contiguous() for n, value in encoder.network.state_dict().items()}
    if encoder.classifier is not None:
        weight, bias = encoder.classifier
        state |= {
            "classifier.weight": weight.cpu().contiguous(),
            "classifier.bias": bias.cpu().contiguous(),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(save(state, describe_network(encoder.network.config, encoder.step)))
        file.flush()
        found = load_file(file.name)
        wrong = [name for name, value in state.items() if not torch.equal(found[name], value)]
        if wrong:  # NaN is not equal to itself
            raise InputError(
                f"{encoder.origin}: {wrong[0]} is not a number somewhere, or was not written as it "
                "is; the file was not kept"
            )


def _write_torchvision(encoder: Encoder, path: Path) -> None:
    name = encoder.network.config.backbone
    if name not in RESNETS:
        raise InputError(
            f"{encoder.origin} has the backbone {name}, and torchvision's format is for "
            f"{', '.join(RESNETS)}; take --format safetensors, onnx or torch-export"
        )
    state = {
        n: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for n, value in encoder.network.backbone.state_dict().items()
    }
    with torch.device("meta"):  # only its names and shapes are asked for
        theirs: nn.Module = getattr(torchvision.models, name)(weights=None)
    own = {n: value for n, value in theirs.state_dict().items() if not n.startswith("fc.")}
    del theirs.fc
    load_exactly(theirs, {n: v.to("meta") for n, v in state.items()}, str(path), name)
    assert own.keys() == state.keys()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save(state, file)


Save = Callable[[ExportedProgram, IO[bytes], tuple[str, ...]], None]
Run = Callable[[Path], Callable[[Tensor], Sequence[Tensor]]]


def _write_traced(
    network: DenseNetwork, path: Path, size: tuple[int, int], save_as: Save, load: Run
) -> Exported:
    """Traces, writes, loads and compares; only then the file takes its name."""
    program, fixed = trace(network, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        save_as(program, file, network.outputs)
        file.flush()
        difference = compare(network, load(Path(file.name)), size, fixed)
    return Exported(network.outputs, size if fixed else None, difference)


def trace(network: DenseNetwork, size: tuple[int, int]) -> tuple[ExportedProgram, bool]:
    """The program of a network for any batch, and for any height and width, or for one size alone.

    Returns:
        the program, and whether it is for images of `size` alone.

    Raises:
        InputError: it cannot be traced.
    """
    device = next(network.parameters()).device
    images = torch.zeros(2, 3, *size, device=device)
    height, width = Dim("height", min=SMALLEST), Dim("width", min=SMALLEST)
    reason = ""
    for fixed, sides in ((False, {2: height, 3: width}), (True, {})):
        dynamic = {"images": {0: Dim("batch"), **sides}}
        try:
            with torch.no_grad():
                program = torch.export.export(network, (images,), dynamic_shapes=dynamic)
        except Exception as error:  # of many kinds, for what a network does
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            continue
        for node in program.graph.nodes:  # which names files of this machine
            node.meta.pop("stack_trace", None)
        return program, fixed
    raise InputError(f"this network cannot be traced by torch.export ({reason})")


@torch.no_grad()
def compare(
    network: DenseNetwork,
    run: Callable[[Tensor], Sequence[Tensor]],
    size: tuple[int, int],
    fixed: bool,
) -> float:
    """The largest difference of `run` from the network, relative to each output's largest value.

    On two batches of noise, of two sizes unless `fixed`.

    Raises:
        InputError: it is above `TOLERANCE`, or `run` fails.
    """
    draw = torch.Generator().manual_seed(0)
    other = size if fixed else (size[0] + 25, max(SMALLEST, size[1] - 11))
    largest = 0.0
    for batch, (height, width) in ((1, size), (3, other)):
        images = torch.randn(batch, 3, height, width, generator=draw)
        what = f"the exported network, for {batch} images of {height}×{width} pixels,"
        expected = network(images.to(next(network.parameters()).device))
        try:
            found = run(images)
        except Exception as error:  # of the runtime
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise InputError(f"{what} fails ({reason}); the file was not kept") from None
        for name, one, two in zip(network.outputs, expected, found, strict=True):
            if one.shape != two.shape:
                raise InputError(f"{what} gives {name} of the shape {list(two.shape)}")
            scale = one.abs().max().clamp_min(1e-12)
            difference = float((one.cpu() - two.cpu()).abs().max() / scale.cpu())
            if not difference <= TOLERANCE:  # NaN too
                raise InputError(
                    f"{what} gives another {name}: it differs by {difference:.1e} of the largest "
                    f"value, and {TOLERANCE:.0e} is allowed; the file was not kept"
                )
            largest = max(largest, difference)
    return largest


def save_program(program: ExportedProgram, file: IO[bytes], outputs: tuple[str, ...]) -> None:
    """Writes what `torch.export.load` reads."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"outputs.txt": "\n".join(outputs)})
    file.write(buffer.getbuffer())


def run_program(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """A file of `save_program`, ready to run where it was traced."""
    with path.open("rb") as file:
        program = torch.export.load(file)
    device = next(iter(program.state_dict.values())).device
    module = program.module()
    return lambda images: module(images.to(device))


def require_onnx() -> None:
    """Raises InputError unless what writes and runs ONNX is installed."""
    try:
        for package in ("onnx", "onnxruntime", "onnxscript"):
            importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"--format onnx needs more packages ({error}): pip install 'maskbank[export]'"
        ) from None


def save_onnx(program: ExportedProgram, file: IO[bytes], outputs: tuple[str, ...]) -> None:
    """Writes an ONNX network of `images` with these outputs, and how images are normalised."""
    noisy = logging.getLogger("onnxscript"), logging.getLogger("torch.onnx")
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own parts
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["images"],
                output_names=list(outputs),
                opset_version=_OPSET,
                verbose=False,
            )
    except Exception as error:  # of many kinds, for what a network does
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"torch.onnx cannot export this network ({reason})") from None
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
    model = exported.model_proto
    _name_sides(model)
    # where the exporter was installed, and more of that kind
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.functions):
        del part.metadata_props[:]
    for key, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        model.metadata_props.add(key=key, value=" ".join(str(value) for value in values))
    try:
        file.write(model.SerializeToString())
    except ValueError as error:  # protobuf's limit is 2 GB
        raise InputError(f"this network is too large for one ONNX file ({error})") from None


def _name_sides(model: Any) -> None:
    """Gives the open sides of images the names that people know."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    named = zip(dims, ("batch", "", "height", "width"), strict=True)
    names = {dim.dim_param: name for dim, name in named if dim.dim_param}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def run_onnx(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """A file of `save_onnx`, ready to run on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: [
        torch.from_numpy(values) for values in session.run(None, {"images": images.numpy()})
    ]
