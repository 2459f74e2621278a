"""Networks: strides, dilation, names, frozen parts, and weights from elsewhere."""

import logging
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from data_pipeline.errors import InputError
from tests.untrusted import Malicious
from trainer.backbones import BACKBONES, build_backbone
from trainer.model import ModelConfig, PixelEncoder, upsample
from trainer.momentum import make_momentum_encoder, update_momentum
from trainer.weights import load_start

SMALL = ModelConfig(backbone="small", decoder_channels=16, embedding_dim=8)


@pytest.mark.parametrize("name", BACKBONES)
def test_strides_and_widths(name: str) -> None:
    backbone, channels = build_backbone(name)
    stride = 4 if name == "small" else 8
    with torch.no_grad():
        features = backbone.eval()(torch.zeros(1, 3, 64, 40))
    assert features.shape == (1, channels, 64 // stride, 40 // stride)


def test_basic_blocks_are_dilated_as_torchvision_dilates_bottlenecks() -> None:
    ours, _ = build_backbone("resnet18")
    found = {
        name: (module.stride, module.dilation)
        for name, module in ours.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and "layer" in name
    }
    assert found["layer2.0.conv1"] == ((2, 2), (1, 1))
    assert found["layer3.0.conv1"] == ((1, 1), (1, 1))
    assert found["layer3.0.conv2"] == ((1, 1), (2, 2))
    assert found["layer3.1.conv1"] == ((1, 1), (2, 2))
    assert found["layer4.0.conv1"] == ((1, 1), (2, 2))
    assert found["layer4.0.conv2"] == ((1, 1), (4, 4))
    assert found["layer4.1.conv2"] == ((1, 1), (4, 4))


def test_resnet50_equals_torchvisions_dilated_network() -> None:
    theirs = torchvision.models.resnet50(
        weights=None, replace_stride_with_dilation=[False, True, True]
    ).eval()
    ours, _ = build_backbone("resnet50")
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == []
    assert unexpected == ["fc.weight", "fc.bias"]
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    body = nn.Sequential(*list(theirs.children())[:-2])
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), body(images))


def test_encoder_gives_embedding_and_saliency_at_the_stride() -> None:
    encoder = PixelEncoder(SMALL).eval()
    output = encoder(torch.zeros(2, 3, 32, 48))
    assert output.embedding.shape == (2, 8, 8, 12)
    assert output.saliency.shape == (2, 1, 8, 12)
    assert encoder.saliency_head.bias is None
    assert upsample(output.embedding.bfloat16(), (32, 48)).dtype == torch.float32


def test_frozen_stages_have_no_gradient_and_keep_their_statistics() -> None:
    config = ModelConfig(backbone="small", decoder_channels=16, freeze=("stem", "layer1"))
    encoder = PixelEncoder(config).train()
    momentum_encoder = make_momentum_encoder(encoder).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder(torch.randn(2, 3, 32, 32)).embedding.sum().backward()
    momentum_encoder(torch.randn(2, 3, 32, 32))
    for network in (encoder, momentum_encoder):
        for name, value in network.state_dict().items():
            frozen = name.startswith(("backbone.stem", "backbone.layer1"))
            if frozen:
                assert torch.equal(value, before[name]), name
    assert not torch.equal(
        encoder.state_dict()["backbone.layer2.0.bn1.running_mean"],
        before["backbone.layer2.0.bn1.running_mean"],
    )
    for name, parameter in encoder.named_parameters():
        frozen = name.startswith(("backbone.stem", "backbone.layer1"))
        assert parameter.requires_grad != frozen, name


def test_momentum_encoder_moves_by_one_minus_m() -> None:
    encoder = PixelEncoder(SMALL)
    momentum_encoder = make_momentum_encoder(encoder)
    start = encoder.embedding_head.weight.detach().clone()
    with torch.no_grad():
        encoder.embedding_head.weight += 1
    update_momentum(momentum_encoder.parameters(), encoder.parameters(), 0.9)
    torch.testing.assert_close(momentum_encoder.embedding_head.weight, start + 0.1)
    assert not any(p.requires_grad for p in momentum_encoder.parameters())


def test_moco_checkpoints_load_by_name(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18(weights=None, num_classes=128)
    state = {f"module.encoder_q.{name}": value for name, value in theirs.state_dict().items()}
    state |= {f"module.encoder_k.{name}": value for name, value in theirs.state_dict().items()}
    state["module.queue"] = torch.zeros(128, 16)
    file = tmp_path / "moco.pth.tar"
    torch.save({"epoch": 800, "arch": "resnet18", "state_dict": state}, file)
    encoder = PixelEncoder(ModelConfig(backbone="resnet18", decoder_channels=16))
    report = load_start(encoder, str(file))
    assert report is not None
    assert report.unexpected == ()
    assert all(name.startswith(("decoder", "embedding", "saliency")) for name in report.missing)
    torch.testing.assert_close(
        encoder.backbone.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight
    )


def test_safetensors_report_names_what_is_missing_and_unexpected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = PixelEncoder(SMALL)
    state = {n: v + 1 if v.is_floating_point() else v for n, v in encoder.state_dict().items()}
    del state["embedding_head.bias"]
    state["extra.weight"] = torch.zeros(2)
    save_file(state, tmp_path / "start.safetensors")
    with caplog.at_level(logging.INFO):
        report = load_start(encoder, str(tmp_path / "start.safetensors"))
    assert report is not None
    assert report.missing == ("embedding_head.bias",)
    assert report.unexpected == ("extra.weight",)
    assert "embedding_head.bias" in caplog.text
    torch.testing.assert_close(encoder.saliency_head.weight, state["saliency_head.weight"])


def test_a_start_of_another_architecture_is_refused_by_key(tmp_path: Path) -> None:
    wide = PixelEncoder(ModelConfig(backbone="small", decoder_channels=32, embedding_dim=8))
    save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(InputError, match=r"another architecture: decoder\.0\S+ is \[32"):
        load_start(PixelEncoder(SMALL), str(tmp_path / "wide.safetensors"))


def test_files_that_are_no_tensors_are_refused_and_never_unpickled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {"x": Malicious()}}, tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save({"a": 1}, tmp_path / "empty.pth")
    save_file({"y": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("evil.pth", "text.pth", "text.safetensors", "empty.pth", "other.safetensors"):
        with pytest.raises(InputError, match=name):
            load_start(PixelEncoder(SMALL), str(tmp_path / name))
    with pytest.raises(InputError, match="there is no file"):
        load_start(PixelEncoder(SMALL), str(tmp_path / "none.pth"))
    assert "unpickled" not in capsys.readouterr().out
