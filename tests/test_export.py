"""Networks for other programs: what they compute there is what they compute here."""

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.errors import InputError
from tests.test_foreign import SMALL, our_network
from trainer import Encoder, export, load_encoder
from trainer.export import TOLERANCE, DenseNetwork, compare, export_network
from trainer.export_cli import main
from trainer.model import upsample
from trainer.partial import PartialEncoder, PartialOutput
from trainer.settings import ModelConfig

IMAGES = torch.randn(3, 3, 45, 70, generator=torch.Generator().manual_seed(2))
PROBE = (torch.randn(4, 16, 1, 1), torch.randn(4))


def small(classifier: bool = False) -> Encoder:
    return Encoder(our_network(), 12, classifier=PROBE if classifier else None)


def alone(backbone: str) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = PartialEncoder(ModelConfig(backbone), frozenset({"backbone"}))
    return Encoder(network, 0, frozenset({"backbone"}), origin="its file")


def test_safetensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    for number, encoder in enumerate((small(classifier=True), alone("resnet18"))):
        file = tmp_path / f"{number}.safetensors"
        assert export_network(encoder, file, "safetensors") is None
        again = load_encoder(file)
        assert again.network.config == encoder.network.config
        assert (again.step, again.parts) == (encoder.step, encoder.parts)
        expected = encoder.network.state_dict()
        assert again.network.state_dict().keys() == expected.keys()
        for name, value in again.network.state_dict().items():
            assert torch.equal(value, expected[name]), name
            assert value.dtype == expected[name].dtype
        for one, two in zip(again.classifier or (), encoder.classifier or (), strict=True):
            assert torch.equal(one, two)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_a_network_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    encoder = small()
    encoder.network.embedding_head.weight[0, 0] = torch.nan  # type: ignore[index]
    with pytest.raises(InputError, match=r"embedding_head\.weight is not a number"):
        export_network(encoder, tmp_path / "x.safetensors", "safetensors")
    assert list(tmp_path.iterdir()) == []


def test_torchvision_loads_its_resnet(tmp_path: Path) -> None:
    encoder = alone("resnet18")
    export_network(encoder, tmp_path / "resnet18.pth", "torchvision")
    state = torch.load(tmp_path / "resnet18.pth", weights_only=True)
    theirs = torchvision.models.resnet18(weights=None)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ["fc.weight", "fc.bias"]
    assert unexpected == []
    for name, value in encoder.network.backbone.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    assert all(type(value) is Tensor for value in state.values())
    with pytest.raises(InputError, match=r"backbone small.*resnet18.*--format safetensors"):
        export_network(small(), tmp_path / "small.pth", "torchvision")


@pytest.fixture
def short() -> Encoder:
    """With one convolution for a backbone: what is traced of the rest is real, and quicker."""
    encoder = small(classifier=True)
    encoder.network.backbone = torch.nn.Conv2d(3, 128, 8, stride=8).requires_grad_(False)
    return encoder


@pytest.mark.slow
def test_onnx_gives_the_same_at_other_sizes(short: Encoder, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = tmp_path / "short.onnx"
    written = export_network(short, file, "onnx", (48, 56))
    assert written is not None
    assert written.size is None
    assert written.outputs == ("embedding", "saliency", "classes")
    session = runtime.InferenceSession(file)
    sides = ["batch", "height", "width"]
    assert session.get_inputs()[0].shape == [sides[0], 3, *sides[1:]]
    shapes = {one.name: one.shape for one in session.get_outputs()}
    assert shapes == {
        "embedding": [sides[0], 6, *sides[1:]],
        "saliency": sides,
        "classes": [sides[0], 4, *sides[1:]],
    }
    found = session.run(None, {"images": IMAGES.numpy()})
    with torch.no_grad():
        logits = F.conv2d(short.network.features(IMAGES), *PROBE)
        expected = (*short.embed(IMAGES), upsample(logits, (45, 70)))
    for one, two in zip(expected, found, strict=True):
        allowed = TOLERANCE * float(one.abs().max())
        np.testing.assert_allclose(two, one.numpy(), rtol=0, atol=allowed)
    content = file.read_bytes()
    assert b"stack_trace" not in content
    assert b"site-packages" not in content
    assert session.get_modelmeta().custom_metadata_map["mean"] == "0.485 0.456 0.406"


@pytest.mark.slow
def test_torch_export_gives_the_same_at_other_sizes(short: Encoder, tmp_path: Path) -> None:
    file = tmp_path / "short.pt2"
    written = export_network(short, file, "torch-export", (48, 56))
    assert written is not None
    assert written.size is None
    assert written.difference <= TOLERANCE
    extra = {"outputs.txt": ""}
    program = torch.export.load(file, extra_files=extra)
    assert extra["outputs.txt"] == "embedding\nsaliency\nclasses"
    with torch.no_grad():
        found, expected = program.module()(IMAGES), short.embed(IMAGES)
    for one, two in zip(expected, found[:2], strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    assert b"site-packages" not in file.read_bytes()


class OneSize(torch.nn.Module):
    """Has features for images of one size only, as networks with fixed positions have."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SMALL
        self.positions = torch.nn.Parameter(torch.randn(1, 3, 32, 40))

    def features(self, images: Tensor) -> Tensor:
        return images + self.positions

    def heads(self, features: Tensor) -> PartialOutput:
        return PartialOutput(features)


def test_a_network_of_one_size_is_exported_for_it(tmp_path: Path) -> None:
    encoder = Encoder(OneSize(), 0, frozenset({"backbone"}))  # type: ignore[arg-type]
    written = export_network(encoder, tmp_path / "one.pt2", "torch-export", (32, 40))
    assert written is not None
    assert written.size == (32, 40)
    assert written.outputs == ("embedding",)


@torch.no_grad()
def test_another_result_is_refused() -> None:
    network = DenseNetwork(small())
    scale = float(network(IMAGES)[0].abs().max())

    def changed(by: float, batch: int = 3) -> Callable[[Tensor], Sequence[Tensor]]:
        def run(images: Tensor) -> Sequence[Tensor]:
            embedding, saliency = network(images)
            if len(images) == batch:
                embedding[-1, -1, -1, -1] += by
            return embedding, saliency

        return run

    assert compare(network, changed(0), (32, 32), fixed=False) == 0
    assert compare(network, changed(TOLERANCE * scale / 20), (32, 32), fixed=False) > 0
    for by in (TOLERANCE * scale * 20, float("nan")):
        for batch in (1, 3):
            with pytest.raises(InputError, match=r"gives another embedding.*was not kept"):
                compare(network, changed(by, batch), (32, 32), fixed=False)

    def one_size_only(images: Tensor) -> Sequence[Tensor]:
        assert images.shape[2:] == (32, 32), "bad size"
        return network(images)  # type: ignore[no-any-return]

    compare(network, one_size_only, (32, 32), fixed=True)
    with pytest.raises(InputError, match=r"3 images of 57×32 pixels, fails \(bad size"):
        compare(network, one_size_only, (32, 32), fixed=False)


def test_a_file_that_differs_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(OneSize(), 0, frozenset({"backbone"}))  # type: ignore[arg-type]
    file = tmp_path / "one.pt2"
    file.write_text("what was there before")

    def other(program: object, target: io.BytesIO, outputs: object) -> None:
        save(program, target, outputs)
        encoder.network.positions.data += 1  # type: ignore[union-attr]

    save: Callable[..., None] = export.save_program
    monkeypatch.setattr(export, "save_program", other)
    with pytest.raises(InputError, match="another embedding"):
        export_network(encoder, file, "torch-export", (32, 40))
    assert file.read_text() == "what was there before"
    assert list(tmp_path.iterdir()) == [file]


def test_the_command_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tmp_path / "n.safetensors"
    export_network(small(), network, "safetensors")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    out = str(tmp_path / "out.onnx")
    for arguments, message in (
        (["--format", "tf", "-o", out], "--format is 'tf'; it can be safetensors, torchvision"),
        (["--format", "onnx", "-o", out], "pip install 'maskbank[export]'"),
        (["--format", "onnx", "-o", out, "--size", "8", "64"], "must be at least 32"),
        (["-o", out], "should end in .safetensors"),
        (["-o", str(network / "x.safetensors")], f"{network} is not a folder"),
        (["-o", str(tmp_path)], "is a folder; give the path of a file"),
        (["-o", "/dev/null"], "is a device or a pipe"),
        (["-o", out, "--device", "tpu"], "--device is 'tpu'"),
        (["-o", out, "--initial"], "give the run directory"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(network), *arguments])
        error = capsys.readouterr().err
        assert stop.value.code == 2, error
        assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["n.safetensors"]


def test_the_command_writes_and_the_file_describes_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_network(small(), tmp_path / "first.safetensors", "safetensors")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "first.safetensors"), "-o", str(tmp_path / "n.safetensors")])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'n.safetensors'}\n"
    with safe_open(tmp_path / "n.safetensors", "pt") as file:
        value = json.loads(file.metadata()["maskbank"])
    assert value["step"] == 12
    assert value["model"]["atrous_rates"] == [1, 2, 3]
