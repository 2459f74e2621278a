"""Backbones of timm: where features are, names, frozen parts, weights of others, refusals."""

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.errors import InputError
from trainer.backbones import build_backbone
from trainer.config import load_config
from trainer.model import ModelConfig, PixelEncoder
from trainer.momentum import make_momentum_encoder
from trainer.weights import load_start

VIT, CONVNEXT = "timm/vit_tiny_patch16_224", "timm/convnext_atto"


def encoder_of(backbone: str, **values: Any) -> PixelEncoder:
    return PixelEncoder(ModelConfig(backbone, decoder_channels=16, embedding_dim=8, **values))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# where features are ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_at_stride_16_are_torchvisions_with_the_last_stage_dilated(name: str) -> None:
    backbone, channels = build_backbone(name, 16)
    images = noise(1, 3, 64, 96)
    with torch.no_grad():
        features = backbone.eval()(images)
    assert features.shape == (1, channels, 4, 6)
    if name == "resnet50":
        theirs = torchvision.models.resnet50(
            weights=None, replace_stride_with_dilation=[False, False, True]
        ).eval()
        backbone.load_state_dict(theirs.state_dict(), strict=False)
        body = nn.Sequential(*list(theirs.children())[:-2])
        with torch.no_grad():
            torch.testing.assert_close(backbone(images), body(images))
        return
    dilation = {n: m.dilation for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d)}
    assert dilation["layer3.1.conv2"] == (1, 1)
    assert dilation["layer4.0.conv1"] == (1, 1)
    assert dilation["layer4.0.conv2"] == dilation["layer4.1.conv1"] == (2, 2)


def test_a_vits_features_are_timms_patch_tokens_after_the_norm() -> None:
    backbone, channels = build_backbone(VIT, 16)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    theirs.load_state_dict(backbone.state_dict())
    images = noise(2, 3, 32, 48)
    with torch.no_grad():
        tokens = theirs.forward_features(images)
        features = backbone.eval()(images)
    assert channels == 192
    assert torch.equal(features.flatten(2).transpose(1, 2), tokens[:, 1:])  # without the class
    assert features.shape == (2, 192, 2, 3)


def test_patches_at_stride_8_are_the_same_patches_half_a_patch_apart() -> None:
    dense, _ = build_backbone(VIT, 8)
    native, _ = build_backbone(VIT, 16)
    native.load_state_dict(dense.state_dict())
    images = noise(1, 3, 64, 64)
    with torch.no_grad():
        overlapping = dense.patch_embed(images)
        # patch i has its middle at 8 i + 4, so that every second one is whole after 4 pixels
        apart = native.patch_embed(images[:, :, 4:-12, 4:-12])
    assert overlapping.shape == (1, 8, 8, 192)
    torch.testing.assert_close(overlapping[:, 1:7:2, 1:7:2], apart)


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [
        ("timm/vit_tiny_patch16_224", 8),
        ("timm/vit_tiny_patch16_224", 16),
        ("timm/vit_small_patch8_224", 8),
        ("timm/vit_small_patch8_224", 16),
        ("timm/vit_small_patch14_dinov2", 8),
        ("timm/vit_small_patch14_reg4_dinov2", 16),
        ("timm/eva02_tiny_patch14_224", 8),
        ("timm/convnext_atto", 8),
        ("timm/convnext_atto", 16),
        ("timm/resnet18", 8),
    ],
)
def test_a_spot_is_found_where_it_is(name: str, output_stride: int) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, output_stride)[0].eval()
    for height, width in ((96, 96), (90, 101)):
        rows, columns = round(height / output_stride), round(width / output_stride)
        for row, column in ((0, columns - 1), (rows // 2, 1), (rows - 1, columns // 2)):
            y, x = (row + 0.5) * height / rows, (column + 0.5) * width / columns
            images = noise(1, 3, height, width)
            spot = images.clone()
            spot[:, :, round(y) - 3 : round(y) + 3, round(x) - 3 : round(x) + 3] += 3
            with torch.no_grad():
                change = (backbone(spot) - backbone(images)).square().sum(1)[0]
            assert change.shape == (rows, columns)
            peak = divmod(int(change.argmax()), columns)
            # dilated kernels of two pixels (ConvNeXt) have their middle between two features
            assert max(abs(peak[0] - row), abs(peak[1] - column)) <= ("convnext" in name)


@pytest.mark.parametrize("name", [VIT, CONVNEXT, "timm/vit_small_patch14_dinov2"])
def test_images_of_other_sizes_are_resized_to_whole_features(name: str) -> None:
    backbone = build_backbone(name, 8)[0].eval()
    images = noise(1, 3, 45, 67)  # 5.6 × 8.4 features
    resized = F.interpolate(images, (48, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        features = backbone(images)
        assert features.shape[2:] == (6, 8)
        if "dinov2" in name:
            assert features.shape[2:] == backbone(resized).shape[2:]
        else:
            torch.testing.assert_close(features, backbone(resized))
        assert backbone(noise(1, 3, 3, 20)).shape[2:] == (1, 2)


def test_patches_that_no_stride_divides_stay_and_images_are_resized() -> None:
    backbone = build_backbone("timm/vit_small_patch14_dinov2", 8)[0].eval()
    theirs = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True)
    theirs.load_state_dict(backbone.state_dict())
    images = noise(1, 3, 32, 48)
    resized = F.interpolate(images, (4 * 14, 6 * 14), mode="bilinear")
    with torch.no_grad():
        tokens = theirs.eval().forward_features(resized)[:, 1:]
        torch.testing.assert_close(backbone(images).flatten(2).transpose(1, 2), tokens)


def test_the_last_norm_is_applied_where_timm_has_it_after_pooling() -> None:
    backbone = build_backbone("timm/deit3_small_patch16_224", 16)[0].eval()
    assert isinstance(backbone.norm, nn.LayerNorm)
    pooled = build_backbone("timm/eva02_tiny_patch14_224", 16)[0].eval()
    assert isinstance(pooled.norm, nn.Identity)
    with torch.no_grad():
        features = pooled(noise(1, 3, 32, 32))
    torch.testing.assert_close(features.mean(1), torch.zeros(1, 2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.var(1), torch.ones(1, 2, 2), atol=0.02, rtol=0)


# in the encoder --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions", "channels"),
    [(VIT, 5.52, 192), (CONVNEXT, 3.37, 320), ("timm/vit_base_patch16_siglip_224", 85.8, 768)],
)
def test_encoders_have_the_published_parameters_and_a_gradient_in_each(
    name: str, millions: float, channels: int
) -> None:
    encoder = encoder_of(name, output_stride=16).train()
    assert sum(p.numel() for p in encoder.backbone.parameters()) == pytest.approx(
        1e6 * millions, rel=2e-3
    )
    assert encoder.decoder[0].convs[0][0].in_channels == channels
    output = encoder(noise(2, 3, 32, 48))
    assert output.embedding.shape == (2, 8, 2, 3)
    assert output.saliency.shape == (2, 1, 2, 3)
    (output.embedding.sum() + output.saliency.sum()).backward()
    # DDP waits for every parameter
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", [VIT, CONVNEXT, "resnet18"])
def test_sixteen_bits(name: str) -> None:
    encoder = encoder_of(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = encoder(noise(2, 3, 40, 40))
    assert output.embedding.dtype == torch.bfloat16
    output.embedding.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


def test_parts_of_timms_networks_can_be_frozen() -> None:
    frozen = ("patch_embed", "pos_embed", "cls_token", "blocks.0")
    encoder = encoder_of(VIT, freeze=frozen).train()
    found = {n for n, p in encoder.backbone.named_parameters() if not p.requires_grad}
    expected = {n for n, _ in encoder.backbone.named_parameters() if n.startswith(frozen)}
    assert found == {n for n in expected if not n.startswith("blocks.0") or ".0." in n[:9]}
    assert not encoder.backbone.blocks[0].training
    assert encoder.backbone.blocks[1].training
    copied = make_momentum_encoder(encoder).train()
    assert not copied.backbone.blocks[0].training

    encoder = encoder_of("timm/resnet18", freeze=("conv1", "bn1", "layer1")).train()
    before = encoder.backbone.layer1[0].bn1.running_mean.clone()
    encoder(noise(2, 3, 32, 32)).embedding.sum().backward()
    assert torch.equal(encoder.backbone.layer1[0].bn1.running_mean, before)
    assert encoder.backbone.conv1.weight.grad is None
    assert encoder.backbone.layer2[0].conv1.weight.grad is not None


def test_images_are_normalised_as_timms_weights_expect_it() -> None:
    """Plain names see ImageNet's normalisation, as DINO's weights do; names with tags do not."""
    torch.manual_seed(0)
    plain = encoder_of("timm/vit_tiny_patch16_224").eval()
    tagged = encoder_of("timm/vit_tiny_patch16_224.augreg_in21k").eval()
    assert list(tagged.state_dict()) == list(plain.state_dict())
    assert ModelConfig(VIT, start="imagenet").timm_images
    tagged.load_state_dict(plain.state_dict())
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        torch.testing.assert_close(
            tagged((pixels - mean) / std).embedding, plain((pixels - 0.5) / 0.5).embedding
        )
        same = encoder_of("timm/vit_small_patch16_224.dino").backbone
    assert not any("image" in name for name, _ in same.named_buffers())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["voc_vit_small", "voc_convnext_tiny"])
def test_recipes_name_parts_that_their_networks_have(recipe: str) -> None:
    config = load_config(recipe, None, ["model.start=random"])
    encoder = PixelEncoder(config.model).eval()
    with torch.no_grad():
        assert encoder(noise(1, 3, 64, 64)).embedding.shape == (1, 32, 8, 8)
    frozen = sum(p.numel() for p in encoder.parameters() if not p.requires_grad)
    assert (frozen > 0) == bool(config.model.freeze)
    assert (config.loss.temperature, config.run.epochs) == (0.5, 40)


# refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": "vit_tiny_patch16_224"}, "or timm/NAME for a network of timm"),
        ({"backbone": "timm/vit_tiny_patch16_244"}, "did you mean vit_tiny_patch16_224"),
        ({"backbone": "timm/vit_small_patch16_224_dino"}, r"mean vit_small_patch16_224\.dino,"),
        ({"backbone": "timm/vit_small_patch16_224.dyno"}, r"no weights 'dyno' .* augreg.*, dino$"),
        ({"backbone": "timm/"}, r"no model ''.* see timm\.list_models"),
        ({"backbone": "timm/../x"}, r"no model '\.\./x'"),
        ({"backbone": "timm/hf-hub:timm/resnet18"}, "no model 'hf-hub:timm/resnet18'"),
        ({"backbone": "timm/swin_tiny_patch4_window7_224"}, r"stride .*what works: .*vit_\*"),
        ({"backbone": "timm/beit_base_patch16_224"}, r"stride 8: .*what works: .*convnext\*"),
        ({"backbone": "timm/vit_base_r26_s32_224"}, "timm cannot dilate it"),
        ({"backbone": "timm/halonet26t"}, "does not take images of any size"),
        ({"backbone": VIT, "output_stride": 14}, "output_stride is 14; it can be 8 or 16"),
        ({"backbone": "resnet50", "output_stride": 4}, "output_stride is 4; it can be 8 or 16"),
        ({"backbone": "small", "output_stride": 16}, "small always has 4"),
        ({"backbone": VIT, "freeze": ("block.0",)}, r"did you mean blocks\.0.* pos_embed"),
        ({"backbone": CONVNEXT, "freeze": ("stages.0",)}, r"'stages\.0', which .*mean stages_0"),
        ({"backbone": CONVNEXT, "freeze": ("forward",)}, "it has stem_0, stem_1, stages_0"),
        ({"backbone": VIT, "freeze": ("",)}, "names '', which"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PixelEncoder(ModelConfig(**values))


def test_without_timm_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"needs timm .*: pip install timm"):
        encoder_of(VIT)
    assert encoder_of("small").config.backbone == "small"


@pytest.mark.slow
def test_timm_is_imported_when_it_is_asked_for_and_not_before() -> None:
    program = (
        "import sys, trainer.train, trainer.encoder\n"
        "from trainer.model import ModelConfig, PixelEncoder\n"
        "PixelEncoder(ModelConfig('small'))\n"
        f"ModelConfig({VIT!r})\n"
        "assert 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# starts ----------------------------------------------------------------------------------------


def changed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value + 1 for name, value in state.items()}


def vit(**values: Any) -> nn.Module:
    network: nn.Module = timm.create_model("vit_tiny_patch16_224", **values)
    return network


@pytest.mark.parametrize(
    "kind", ["timm.safetensors", "dino.pth", "dino_full.pth", "dinov2_full.pth", "mocov3.pth"]
)
def test_vits_load_from_files_of_timm_and_of_others(tmp_path: Path, kind: str) -> None:
    state = changed(vit(num_classes=10).state_dict())
    body = {name: value for name, value in state.items() if not name.startswith("head")}
    file = tmp_path / kind
    if kind == "timm.safetensors":
        save_file(state, file)
    elif kind == "dino.pth":
        torch.save(body, file)
    elif kind == "dino_full.pth":
        other = {f"module.backbone.{n}": v - 9 for n, v in body.items()}
        teacher = {f"backbone.{n}": v for n, v in body.items()} | {
            "head.mlp.0.weight": torch.ones(2)
        }
        torch.save(
            {"student": other, "teacher": teacher, "args": argparse.Namespace(lr=0.1), "epoch": 7},
            file,
        )
    elif kind == "dinov2_full.pth":
        inside = {f"student.backbone.{n}": v - 9 for n, v in body.items()}
        inside |= {f"teacher.backbone.{n}": v for n, v in body.items()}
        torch.save({"model": inside, "iteration": 9}, file)
    else:
        inside = {f"module.base_encoder.{n}": v for n, v in state.items()}
        inside |= {f"module.momentum_encoder.{n}": v - 9 for n, v in state.items()}
        torch.save({"state_dict": inside, "arch": "vit_tiny"}, file)
    encoder = encoder_of(VIT)
    report = load_start(encoder, str(file))
    assert report is not None
    assert all(name.startswith(("decoder", "embedding", "saliency")) for name in report.missing)
    assert report.unexpected == ()
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, body[name]), name


def test_positions_of_another_grid_are_resampled_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = vit(img_size=384).state_dict()
    save_file(large, tmp_path / "384.safetensors")
    encoder = encoder_of(VIT)
    with caplog.at_level(logging.INFO, logger="trainer"):
        load_start(encoder, str(tmp_path / "384.safetensors"))
    assert "positional embeddings resampled from 577 to 197 tokens" in caplog.text
    expected = timm.layers.resample_abs_pos_embed(large["pos_embed"], (14, 14))
    assert torch.equal(encoder.backbone.pos_embed, expected)
    assert torch.equal(encoder.backbone.pos_embed[:, 0], large["pos_embed"][:, 0])


def test_released_dinov2_files_load(tmp_path: Path) -> None:
    own = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0).state_dict()
    theirs = dict(own)
    theirs["register_tokens"] = theirs.pop("reg_token")
    theirs["mask_token"] = torch.zeros(1, 384)
    theirs["pos_embed"] = torch.cat([torch.full((1, 1, 384), 0.5), own["pos_embed"]], 1)
    torch.save(theirs, tmp_path / "dinov2.pth")
    encoder = encoder_of("timm/vit_small_patch14_reg4_dinov2")
    report = load_start(encoder, str(tmp_path / "dinov2.pth"))
    assert report is not None
    assert report.unexpected == ()
    assert torch.equal(encoder.backbone.pos_embed, own["pos_embed"])
    assert torch.equal(encoder.backbone.cls_token, own["cls_token"] + 0.5)


@pytest.mark.parametrize("kind", ["timm", "released"])
def test_convnexts_load_from_files_of_timm_and_as_released(tmp_path: Path, kind: str) -> None:
    state = changed(timm.create_model("convnext_atto").state_dict())
    if kind == "released":
        renamed = {}
        for name, value in state.items():
            name = name.replace("stem.", "downsample_layers.0.").replace("head.norm.", "norm.")
            name = name.replace("head.fc.", "head.").replace("conv_dw", "dwconv")
            name = name.replace("mlp.fc", "pwconv").replace(".blocks.", ".")
            if ".downsample." in name:
                name = "downsample_layers." + name.removeprefix("stages.").replace(
                    "downsample.", ""
                )
            renamed[name] = value.flatten(1) if value.shape[2:] == (1, 1) else value
        torch.save({"model": renamed}, tmp_path / "start.pth")
    else:
        torch.save(state, tmp_path / "start.pth")
    encoder = encoder_of(CONVNEXT)
    report = load_start(encoder, str(tmp_path / "start.pth"))
    assert report is not None
    assert all(name.startswith(("decoder", "embedding", "saliency")) for name in report.missing)
    own = encoder.backbone.state_dict()
    assert torch.equal(own["stem_0.weight"], state["stem.0.weight"])
    name = "stages.3.blocks.1.mlp.fc2.weight"
    assert torch.equal(own[name.replace(".", "_", 1)], state[name])


def test_timms_resnets_load_moco(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18(weights=None, num_classes=128).state_dict()
    state = {f"module.encoder_q.{name}": value for name, value in theirs.items()}
    state |= {f"module.encoder_k.{name}": torch.zeros_like(v) for name, v in theirs.items()}
    torch.save({"state_dict": state}, tmp_path / "moco.pth.tar")
    encoder = encoder_of("timm/resnet18")
    report = load_start(encoder, str(tmp_path / "moco.pth.tar"))
    assert report is not None
    assert report.unexpected == ()
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("backbone", [VIT, CONVNEXT])
def test_an_encoder_of_ours_is_a_start_too(tmp_path: Path, backbone: str) -> None:
    trained = encoder_of(backbone)
    save_file(trained.state_dict(), tmp_path / "encoder.safetensors")
    encoder = encoder_of(backbone, checkpoint_activations=True, compile=True)
    report = load_start(encoder, str(tmp_path / "encoder.safetensors"))
    assert report is not None
    assert (report.missing, report.unexpected) == ((), ())
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name])


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ("vit_small_patch8_224", r"has patches of 8×8 pixels, timm/vit_tiny_patch16_224 of 16×16"),
        ("vit_small_patch16_224", r"another architecture: backbone\.\S+ is \[1, 1, 384\]"),
        (
            "deit3_small_patch16_224",
            r"does not fit timm/vit_tiny\S+ \(shape .* set model\.backbone",
        ),
        ("convnext_atto", "has none of this network's tensors"),
        ("resnet18", "has none of this network's tensors"),
    ],
)
def test_files_of_other_networks_are_refused(tmp_path: Path, there: str, message: str) -> None:
    torch.save(timm.create_model(there).state_dict(), tmp_path / "other.pth")
    encoder = encoder_of(VIT)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_start(encoder, str(tmp_path / "other.pth"))
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])


def test_weights_that_timm_has_not_are_said_to_be_missing() -> None:
    encoder = encoder_of("timm/seresnet18")
    with pytest.raises(InputError, match=r"no weights of seresnet18; .* model\.start=FILE"):
        load_start(encoder, "imagenet")


@pytest.mark.slow
def test_weights_that_cannot_be_downloaded_are_said_to(tmp_path: Path) -> None:
    program = (
        "from trainer.model import ModelConfig, PixelEncoder\n"
        "from trainer.weights import load_start\n"
        f"load_start(PixelEncoder(ModelConfig({VIT!r}, start='imagenet')), 'imagenet')"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "data_pipeline.errors.InputError: timm's weights of vit_tiny_patch16_224"
    )
    assert last.endswith("give it as model.start=FILE")
