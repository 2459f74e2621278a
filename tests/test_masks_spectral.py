"""Spectral masks: the cut, the features it is made on, and the weights they come from."""

import argparse
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy.linalg import eigh
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.masks import spectral
from data_pipeline.masks.spectral import SpectralSaliency, cut, load_weights, second_eigenvector
from tests.untrusted import Malicious

timm = pytest.importorskip("timm")

MODEL = "test_vit"  # timm's smallest: 6 layers of 64, patches of 16, made for 160 pixels
SIZE = 160


def state(seed: int = 0, model: str = MODEL) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    network = timm.create_model(model, pretrained=False, num_classes=0)
    return dict(network.state_dict())


def save(path: Path, tensors: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save(tmp_path / "vit.safetensors", state())


def square(
    height: int = 160, width: int = 160, ground: int = 30, thing: int = 220
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A noisy picture with a rectangle in the middle, and where that is."""
    inside = np.zeros((height, width), bool)
    inside[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = True
    noise = np.random.default_rng(1).integers(-20, 20, (height, width, 3))
    values = np.where(inside[..., None], thing, ground) + noise
    return np.clip(values, 0, 255).astype(np.uint8), inside


def overlap(saliency: NDArray[Any], inside: NDArray[np.bool_]) -> float:
    found = saliency > 0.5
    return float((found & inside).sum() / (found | inside).sum())


def patches(inside: NDArray[np.bool_], noise: float = 0.0, seed: int = 0) -> NDArray[np.float64]:
    """Features [rows, columns, 8] of two kinds that are at right angles."""
    features = np.zeros((*inside.shape, 8))
    features[inside, 0] = 3
    features[~inside, 1] = 2
    return features + noise * np.random.default_rng(seed).standard_normal(features.shape)


def block(rows: slice, columns: slice, shape: tuple[int, int] = (8, 8)) -> NDArray[np.bool_]:
    inside = np.zeros(shape, bool)
    inside[rows, columns] = True
    return inside


# ---------------------------------------------------------------- the cut


def test_the_eigenvector_is_that_of_the_generalised_problem() -> None:
    rng = np.random.default_rng(0)
    affinity = rng.random((30, 30)) ** 4
    affinity = affinity + affinity.T
    degree = np.diag(affinity.sum(1))
    _, vectors = eigh(degree - affinity, degree, subset_by_index=[1, 1])
    expected = vectors[:, 0] / np.linalg.norm(vectors)
    found = second_eigenvector(affinity)
    found = found / np.linalg.norm(found)
    np.testing.assert_allclose(found * np.sign(found @ expected), expected, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_one_half_is_where_the_paper_cuts(seed: int) -> None:
    inside = block(slice(2, 5), slice(3, 6), (7, 9))
    features = patches(inside, 1.2, seed)
    nodes = features.reshape(-1, 8) / np.linalg.norm(features.reshape(-1, 8), axis=1)[:, None]
    affinity = np.where(nodes @ nodes.T > 0.2, 1, 1e-5)
    degree = np.diag(affinity.sum(1))
    vector = eigh(degree - affinity, degree, subset_by_index=[1, 1])[1][:, 0]
    expected = vector > vector.mean()
    if not expected[np.abs(vector).argmax()]:
        expected = ~expected
    saliency = cut(features)
    assert saliency.dtype == np.float32
    assert (saliency.min(), saliency.max()) == (0, 1)
    np.testing.assert_array_equal(saliency > 0.5, expected.reshape(7, 9))


def test_the_smaller_side_is_the_object_and_the_map_is_flat_on_either() -> None:
    inside = block(slice(4, 7), slice(1, 5))
    np.testing.assert_allclose(cut(patches(inside)), inside, atol=1e-3)
    np.testing.assert_allclose(cut(7 * patches(~inside)), inside, atol=1e-3)  # lengths do not count


def test_a_side_that_holds_the_corners_is_the_ground() -> None:
    frame = ~block(slice(1, 7), slice(1, 7))
    assert frame.sum() == 28  # the smaller side, but all four corners
    np.testing.assert_allclose(cut(patches(frame)), ~frame, atol=1e-3)
    strip = block(slice(6, 8), slice(0, 8))  # an object that is cut off, with two corners
    np.testing.assert_allclose(cut(patches(strip)), strip, atol=1e-3)
    three = frame & ~block(slice(0, 1), slice(0, 1))
    np.testing.assert_allclose(cut(patches(three)), ~three, atol=1e-3)


def test_the_sign_of_the_eigenvector_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features = patches(block(slice(6, 8), slice(0, 8)), 0.3)  # two corners are on either side
    expected = cut(features)
    monkeypatch.setattr(
        spectral, "second_eigenvector", lambda affinity: -second_eigenvector(affinity)
    )
    np.testing.assert_array_equal(cut(features), expected)


def test_tau_decides_what_is_joined() -> None:
    inside = block(slice(2, 5), slice(2, 5))
    features = np.where(inside[..., None], (0.3, np.sqrt(1 - 0.09)), (1.0, 0.0))  # cosine 0.3
    assert not cut(features).any()  # everything is joined
    np.testing.assert_allclose(cut(features, tau=0.4), inside, atol=1e-3)


def test_nothing_to_cut() -> None:
    alike = np.ones((5, 6, 3))
    apart = np.eye(30).reshape(5, 6, 30)
    for features in (alike, apart, np.zeros((5, 6, 3)), np.ones((1, 1, 3))):
        assert not cut(features).any()
    pair = np.array([[[1.0, 0], [0, 1]], [[1, 0], [1, 0]]])
    np.testing.assert_allclose(cut(pair), [[0, 1], [0, 0]], atol=1e-3)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(("ground", "thing"), [(30, 220), (220, 30)])
@pytest.mark.parametrize(("height", "width"), [(160, 160), (300, 220), (90, 200)])
def test_a_square_is_found(weights: Path, height: int, width: int, ground: int, thing: int) -> None:
    predictor = SpectralSaliency.load(MODEL, weights, size=320)
    image, inside = square(height, width, ground, thing)
    (saliency,) = predictor.predict([image])
    assert saliency.shape == inside.shape
    assert saliency.dtype == np.float32
    assert 0 <= saliency.min() < 0.05
    assert 0.95 < saliency.max() <= 1
    assert overlap(saliency, inside) > 0.9


def test_neighbours_and_repetition_change_nothing(weights: Path) -> None:
    predictor = SpectralSaliency.load(MODEL, weights, size=SIZE, batch_size=4)
    assert predictor.batch_size == 1
    images = [square(160, 160)[0], square(80, 150)[0], square(160, 160, 200, 40)[0]]
    images.append(np.full((40, 160, 3), 9, np.uint8))
    alone = [predictor.predict([image])[0] for image in images]
    for order in ([0, 1, 2, 3], [3, 2, 0, 1], [2, 2]):
        maps = predictor.predict([images[i] for i in order])
        for index, found in zip(order, maps, strict=True):
            np.testing.assert_array_equal(found, alone[index])
    assert predictor.predict([]) == []


def test_pictures_of_one_shape_go_together_on_other_devices(weights: Path) -> None:
    predictor = SpectralSaliency.load(MODEL, weights, size=SIZE)
    images = [square(160, 160)[0], square(80, 160)[0], square(160, 160, 200, 40)[0]]
    alone = predictor.predict(images)
    predictor.batch_size = 2  # as on a GPU
    for found, expected in zip(predictor.predict(images), alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_picture_in_which_nothing_is_gets_zeros(weights: Path) -> None:
    predictor = SpectralSaliency.load(MODEL, weights, size=SIZE)
    flat = np.full((100, 130, 3), 200, np.uint8)
    assert not predictor.predict([flat])[0].any()


def test_extreme_shapes(weights: Path) -> None:
    predictor = SpectralSaliency.load(MODEL, weights, size=SIZE)
    images = [np.zeros(shape, np.uint8) for shape in ((1, 1, 3), (2, 3000, 3), (5000, 1, 3))]
    images[1][:, 1000:1600] = 250
    maps = predictor.predict(images)
    assert [found.shape for found in maps] == [(1, 1), (2, 3000), (5000, 1)]
    assert overlap(maps[1], images[1][..., 0] > 0) > 0.7  # ten patches wide


def manual_keys(network: Any, picture: Tensor) -> NDArray[np.float64]:
    """Keys of the last layer, as TokenCut takes them: layer by layer, all heads side by side."""
    with torch.inference_mode():
        tokens = network.patch_embed(picture)
        tokens = network.norm_pre(network._pos_embed(tokens))
        for layer in network.blocks[:-1]:
            tokens = layer(tokens)
        last = network.blocks[-1]
        dim = tokens.shape[-1]
        normed = last.norm1(tokens)
        keys = normed @ last.attn.qkv.weight[dim : 2 * dim].T + last.attn.qkv.bias[dim : 2 * dim]
    return np.asarray(keys[:, network.num_prefix_tokens :].double())


def test_features_are_the_keys_of_the_last_layer(weights: Path) -> None:
    predictor = SpectralSaliency.load(MODEL, weights, size=SIZE)
    picture = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    expected = manual_keys(predictor.network, picture)
    assert expected.shape == (2, 100, 64)
    np.testing.assert_allclose(predictor._keys(picture), expected, atol=1e-4)


def test_register_tokens_are_no_patches() -> None:
    torch.manual_seed(0)
    network = timm.models.VisionTransformer(
        img_size=64,
        patch_size=16,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=0,
        reg_tokens=4,
        dynamic_img_size=True,
    )
    predictor = SpectralSaliency(network, 160, 1, (0.5,) * 3, (0.25,) * 3)
    picture = torch.rand(1, 3, 160, 96)
    np.testing.assert_allclose(predictor._keys(picture), manual_keys(network, picture), atol=1e-5)
    assert predictor._keys(picture).shape == (1, 60, 32)
    image, inside = square(320, 320)
    predictor.size = 320
    assert overlap(predictor.predict([image])[0], inside) > 0.85


def test_positions_are_interpolated_as_timm_does(weights: Path) -> None:
    predictor = SpectralSaliency.load(MODEL, weights, size=256)
    network = timm.create_model(MODEL, pretrained=False, num_classes=0, img_size=(192, 256))
    network.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state(), network))
    picture = torch.rand(1, 3, 192, 256, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(
        predictor._keys(picture), manual_keys(network.eval(), picture), atol=1e-4
    )


def test_normalisation_is_imagenets_or_the_tags(tmp_path: Path) -> None:
    model = "vit_tiny_patch16_224"
    path = save(tmp_path / "vit.safetensors", state(0, model))
    image = np.full((32, 32, 3), 255, np.uint8)
    plain = SpectralSaliency.load(model, path, size=32)._prepare(image, (2, 2))
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert plain.shape == (3, 32, 32)
    np.testing.assert_allclose(plain[:, 3, 5], expected, rtol=1e-6)
    tagged = SpectralSaliency.load(f"{model}.augreg_in21k", path, size=32)._prepare(image, (2, 2))
    np.testing.assert_allclose(tagged[:, 3, 5], [1, 1, 1], rtol=1e-6)


# ---------------------------------------------------------------- weights


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def test_checkpoints_of_others_are_understood(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    mine, other = state(0), state(1)
    head = {"head.mlp.0.weight": torch.ones(4, 64), "head.last_layer.weight_g": torch.ones(4, 1)}
    classifier = {"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)}
    files = {
        "plain.pth": mine,
        "timm.safetensors": mine | classifier,
        "dino_full.pth": {  # DINO's full checkpoints
            "student": prefixed("module.backbone.", other) | prefixed("module.", head),
            "teacher": prefixed("backbone.", mine) | head,
            "args": argparse.Namespace(arch="deit_small", lr=0.0005),
            "epoch": 100,
        },
        "dinov2.pth": prefixed("student.backbone.", other) | prefixed("teacher.backbone.", mine),
        "deit.pt": {"model": mine},
        "moco.tar": {"epoch": 1, "state_dict": prefixed("module.base_encoder.", mine)},
    }
    image, _ = square()
    maps = {}
    for name, content in files.items():
        predictor = SpectralSaliency.load(MODEL, save(tmp_path / name, content), size=SIZE)
        for key, value in predictor.network.state_dict().items():
            assert torch.equal(value, mine[key]), (name, key)
        maps[name] = predictor.predict([image])[0]
        np.testing.assert_array_equal(maps[name], maps["plain.pth"])
    assert "'teacher.backbone.' is taken" in caplog.text


def test_names_of_dinov2_are_translated() -> None:
    def build() -> Any:
        return timm.models.VisionTransformer(
            img_size=64,
            patch_size=16,
            embed_dim=32,
            depth=2,
            num_heads=2,
            num_classes=0,
            reg_tokens=2,
            no_embed_class=True,
            dynamic_img_size=True,
            init_values=0.1,
        )

    theirs = dict(build().state_dict())
    theirs["register_tokens"] = theirs.pop("reg_token") + 3
    theirs["mask_token"] = torch.zeros(1, 32)
    theirs["pos_embed"] = torch.cat([torch.zeros(1, 1, 32), theirs["pos_embed"]], 1)
    theirs["cls_token"] = theirs["cls_token"] + 5
    network = build()
    load_weights(network, theirs, Path("dinov2.pth"), "model")
    assert torch.equal(network.reg_token, theirs["register_tokens"])
    assert torch.equal(network.cls_token, theirs["cls_token"])
    assert torch.equal(network.pos_embed, theirs["pos_embed"][:, 1:])


def test_weights_are_never_downloaded() -> None:
    with pytest.raises(InputError, match=r"none are downloaded: give the file .*dino_deitsmall16"):
        SpectralSaliency.load("vit_small_patch16_224.dino", None, 224, 1, "cpu")


def test_files_that_hold_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(path: Path, reason: str) -> None:
        with pytest.raises(InputError, match=reason) as caught:
            SpectralSaliency.load(MODEL, path, size=SIZE)
        assert str(path) in str(caught.value)

    refused(tmp_path / "gone.pth", "does not exist; give")
    refused(tmp_path, "is not a file; give")
    for name in ("bad.safetensors", "bad.pth"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        refused(tmp_path / name, "cannot be read as tensors")
    refused(save(tmp_path / "bad.pth", {"model": Malicious()}), "cannot be read as tensors")
    assert "unpickled" not in capsys.readouterr().out
    refused(save(tmp_path / "list.pth", [torch.ones(1)]), "hold no named tensors")
    refused(save(tmp_path / "empty.pth", {"state_dict": {}, "epoch": 3}), "hold no named tensors")
    broken = state()
    broken["blocks.2.mlp.fc1.bias"] = torch.full((192,), float("nan"))
    refused(save(tmp_path / "nan.pth", broken), "blocks.2.mlp.fc1.bias has NaN")


def test_weights_of_another_network_are_told_apart(tmp_path: Path) -> None:
    mine = state()

    def refused(tensors: dict[str, Tensor], reason: str) -> None:
        path = save(tmp_path / "other.pth", tensors)
        with pytest.raises(InputError, match=reason) as caught:
            SpectralSaliency.load(MODEL, path, size=SIZE)
        assert "instead of test_vit" in str(caught.value)

    less = {key: value for key, value in mine.items() if not key.startswith("blocks.5.")}
    refused(less, r"missing blocks\.5\.norm1\.weight, .* and 8 more; unexpected none")
    more = mine | {"blocks.6.norm1.weight": torch.ones(64)}
    refused(more, r"missing none; unexpected blocks\.6\.norm1\.weight; of another shape none")
    bent = mine | {"blocks.0.mlp.fc1.bias": torch.ones(128)}
    refused(bent, r"another shape blocks\.0\.mlp\.fc1\.bias \[128\] instead of \[192\]")
    refused(state(0, "vit_tiny_patch16_224"), r"proj\.weight is \[192, 3, 16, 16\], that of test_v")
    finer = mine | {"patch_embed.proj.weight": torch.ones(64, 3, 8, 8)}
    refused(
        finer, r"patch_embed\.proj\.weight is \[64, 3, 8, 8\], that of test_vit \[64, 3, 16, 16"
    )
    refused({"conv1.weight": torch.ones(64, 3, 7, 7)}, r"missing cls_token.*unexpected conv1")
    refused(mine | {"pos_embed": torch.ones(1, 53, 64)}, "not a ViT's|another shape pos_embed")


def test_weights_that_the_keys_do_not_need_may_be_missing(tmp_path: Path) -> None:
    mine = state()
    trimmed = {key: value for key, value in mine.items() if not key.startswith("norm.")}
    path = save(tmp_path / "trimmed.safetensors", trimmed | {"fc_norm.weight": torch.ones(64)})
    image, inside = square()
    found = SpectralSaliency.load(MODEL, path, size=SIZE).predict([image])[0]
    whole = save(tmp_path / "whole.safetensors", mine)
    np.testing.assert_array_equal(
        found, SpectralSaliency.load(MODEL, whole, size=SIZE).predict([image])[0]
    )
    assert overlap(found, inside) > 0.7


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            {"model": "vit_smal_patch16_224"},
            "timm has no model 'vit_smal_patch16_224'; .*near: vit_",
        ),
        ({"model": "hf-hub:timm/vit_base_patch16_224.dino"}, "timm has no model 'hf-hub:"),
        ({"model": "local-dir:/tmp"}, "timm has no model 'local-dir:/tmp'"),
        ({"model": "resnet18"}, "the model resnet18 cannot be used .* expected a plain ViT"),
        ({"model": "test_vit.nobodys_tag"}, "the model test_vit.nobodys_tag cannot be used"),
        ({"model": "test_vit_relpos"}, "test_vit_relpos .* expected a plain ViT"),
        ({"size": 31}, "size 31 is less than two patches of 16 pixels; give at least 32"),
        ({"size": 4096}, "65,536 patches of 16 pixels, more than 6,400; give at most 1280"),
        ({"batch_size": 0}, "batch size 0"),
        ({"device": "tpu"}, "no device 'tpu'; it can be one of: cpu, cuda"),
        ({"device": "cuda:97"}, "device cuda:97: torch sees . GPUs; take the device cpu"),
    ],
)
def test_arguments_out_of_range(weights: Path, arguments: dict[str, Any], reason: str) -> None:
    given = {"model": MODEL, "weights": weights, "size": SIZE, **arguments}
    with pytest.raises(InputError, match=reason):
        SpectralSaliency.load(**given)


def test_the_name_tells_weights_and_settings_apart(tmp_path: Path, weights: Path) -> None:
    other = save(tmp_path / "other.safetensors", state(1))
    names = [
        SpectralSaliency.load(MODEL, weights, size=SIZE).name,
        SpectralSaliency.load(MODEL, weights, size=320).name,
        SpectralSaliency.load(MODEL, other, size=SIZE).name,
        SpectralSaliency.load("test_vit.r160_in1k", weights, size=SIZE).name,
    ]
    assert len(set(names)) == 4
    assert re.fullmatch(r"tokencut-test_vit-[0-9a-f]{16}", names[0])
    assert SpectralSaliency.load(MODEL, weights, SIZE, batch_size=3).name == names[0]
