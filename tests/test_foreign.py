"""Networks from files of others: names, architecture, what is missing, what is hostile."""

import argparse
import json
import logging
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from data_pipeline.errors import InputError
from tests.untrusted import Malicious
from trainer import load_encoder
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import load_config, save_config
from trainer.distributed import Ranks
from trainer.engine import network_state
from trainer.model import PixelEncoder
from trainer.network_description import KEY, describe_network
from trainer.partial import PARTS, PartialEncoder
from trainer.settings import ModelConfig
from trainer.weight_files import count_parts, known_unused, our_names

State = dict[str, Tensor]
SMALL = ModelConfig("small", decoder_channels=16, embedding_dim=6, atrous_rates=(1, 2, 3))
IMAGES = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """The released network from torchvision's own parts, by the released names."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torchvision.models.resnet50(
            weights=None, replace_stride_with_dilation=[False, True, True]
        )
        del self.backbone.fc
        self.decoder = nn.Sequential(*list(DeepLabHead(2048, 21).children())[:-1])
        self.head = nn.Conv2d(256, 32, 1)
        self.classification_head = nn.Conv2d(256, 1, 1, bias=False)

    def last(self, images: Tensor) -> Tensor:
        for name, module in self.backbone.named_children():
            if name != "avgpool":
                images = module(images)
        return images

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.decoder(self.last(images))
        both = torch.cat([self.head(features), self.classification_head(features)], 1)
        dense = F.interpolate(both, images.shape[2:], mode="bilinear", align_corners=False)
        return dense[:, :-1], dense[:, -1]


def shuffle_statistics(network: nn.Module) -> None:
    """Batch norms that do something, and keep features near 1 in size."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=draw)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5, generator=draw)  # type: ignore[union-attr]
                module.weight.uniform_(0.3, 1, generator=draw)
                module.bias.normal_(0, 0.1, generator=draw)


@pytest.fixture(scope="module")
def plain() -> Plain:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = Plain().eval()
    shuffle_statistics(network)
    return network


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.slow
def test_a_released_checkpoint_gives_what_the_plain_network_gives(
    plain: Plain, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = prefixed(plain.state_dict(), "module.model_q.")
    state |= prefixed(plain.state_dict(), "module.model_k.") | {"module.queue": torch.ones(32, 8)}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"model": state, "optimizer": optimizer, "epoch": 39}, tmp_path / "released.pth.tar")
    with caplog.at_level(logging.INFO, logger="trainer"):
        encoder = load_encoder(tmp_path / "released.pth.tar")
    own, theirs = encoder.network.state_dict(), plain.state_dict()
    assert len(own) == len(theirs)
    for name, value in theirs.items():
        head, _, rest = name.partition(".")
        ours = {"head": "embedding_head", "classification_head": "saliency_head"}.get(head, head)
        assert torch.equal(own[f"{ours}.{rest}"], value), name
    with torch.no_grad():
        embeddings, saliency = encoder.embed(IMAGES)
        expected = plain(IMAGES)
    assert embeddings.shape == (2, 32, 32, 40)
    assert embeddings.std() > 0.01
    torch.testing.assert_close(embeddings, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(saliency, expected[1], rtol=0, atol=1e-5)
    assert encoder.parts == PARTS
    assert encoder.classifier is None
    assert encoder.network.config == ModelConfig()  # inferred: the published architecture
    encoder.require("saliency")
    assert f"module.model_k {len(theirs)}, module.queue 1" in caplog.text
    assert "not used" not in caplog.text


@pytest.mark.parametrize("kind", ["released", "torchvision"])
def test_a_linear_probe_brings_its_classifier(plain: Plain, tmp_path: Path, kind: str) -> None:
    state = {n: v for n, v in plain.state_dict().items() if "head" not in n}
    weight, bias = torch.randn(21, 256, 1, 1), torch.randn(21)
    state |= {"decoder.4.weight": weight, "decoder.4.bias": bias}
    if kind == "released":
        torch.save({"model": prefixed(state, "module.")}, tmp_path / "probe.pth")
    else:
        state = {n.replace("decoder.", "classifier."): value for n, value in state.items()}
        with torch.device("meta"):
            theirs = torchvision.models.segmentation.deeplabv3_resnet50(
                weights=None, weights_backbone=None
            )
        assert state.keys() == theirs.state_dict().keys()
        torch.save(state | {"aux_classifier.0.weight": torch.ones(1)}, tmp_path / "probe.pth")
    encoder = load_encoder(tmp_path / "probe.pth")
    assert encoder.parts == {"backbone", "decoder"}
    assert encoder.classifier is not None
    assert torch.equal(encoder.classifier[0], weight)
    assert torch.equal(encoder.classifier[1], bias)
    if kind == "torchvision":
        return
    with torch.no_grad():
        features = plain.decoder(plain.last(IMAGES))
        torch.testing.assert_close(encoder.network.features(IMAGES), features, rtol=0, atol=1e-5)
        assert encoder.embeddings(IMAGES).shape == (2, 256, 32, 40)
    assert encoder.network.config.embedding_dim == encoder.network.config.decoder_channels == 256
    assert encoder.double().classifier[0].dtype == torch.float64  # type: ignore[index]
    with pytest.raises(InputError, match=r"probe\.pth has no saliency head.*K-means.*; take masks"):
        encoder.require("saliency", "K-means", "take masks")


def test_moco_is_its_backbone(
    plain: Plain, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = plain.backbone.state_dict()
    body |= {f"fc.{n}.{part}": torch.ones(1) for n in (0, 2) for part in ("weight", "bias")}
    state = prefixed(body, "module.encoder_q.") | prefixed(body, "module.encoder_k.")
    state |= {"module.queue": torch.ones(128, 4), "module.queue_ptr": torch.zeros(1)}
    file = tmp_path / "moco.pth.tar"
    torch.save({"epoch": 800, "arch": "resnet50", "state_dict": state}, file)
    with caplog.at_level(logging.INFO, logger="trainer"):
        encoder = load_encoder(file)
    assert encoder.parts == {"backbone"}
    assert encoder.network.config.embedding_dim == encoder.network.config.decoder_channels == 2048
    with torch.no_grad():
        expected = plain.last(IMAGES)
        output = encoder.network(IMAGES)
        assert torch.equal(encoder.network.features(IMAGES), output.embedding)
    assert output.embedding.shape == (2, 2048, 4, 5)
    torch.testing.assert_close(output.embedding, expected, rtol=0, atol=1e-5)
    for wrong in (lambda: output.saliency, lambda: encoder.embed(IMAGES)):
        with pytest.raises(InputError, match="has no saliency head"):
            wrong()
    assert "backbone.fc 4" in caplog.text
    assert "not used" not in caplog.text


def resnet18() -> State:
    state: State = torchvision.models.resnet18(weights=None).state_dict()
    return state


@pytest.mark.parametrize("kind", ["torchvision", "teacher", "student", "dinov2", "mocov3"])
def test_backbones_load_under_every_name(tmp_path: Path, kind: str) -> None:
    body = resnet18()
    other = {name: value - 9 for name, value in body.items()}
    file = tmp_path / "weights.pth"
    head = {"head.mlp.0.weight": torch.ones(2), "head.last_layer.weight_g": torch.ones(2)}
    student = prefixed(prefixed(other, "backbone.") | head, "module.")
    teacher = prefixed(body, "backbone.") | head
    inside: Any = {
        "torchvision": {n: v for n, v in body.items() if "num_batches" not in n},  # as old ones
        "teacher": {"student": student, "teacher": teacher, "args": argparse.Namespace(lr=1)},
        "student": {"student": prefixed(teacher, "module."), "epoch": 3},
        "dinov2": {"model": prefixed(teacher, "teacher.") | prefixed(student, "student.")},
        "mocov3": {
            "state_dict": prefixed(body, "module.base_encoder.")
            | prefixed(other, "module.momentum_encoder.")
            | {"module.predictor.0.weight": torch.ones(2)}
        },
    }[kind]
    torch.save(inside, file)
    encoder = load_encoder(file)
    assert encoder.parts == {"backbone"}
    assert encoder.network.config.backbone == "resnet18"
    assert encoder.network.config.embedding_dim == 512
    for name, value in encoder.network.backbone.state_dict().items():
        assert torch.equal(
            value, inside.get(name, torch.tensor(0)) if kind == "old" else body[name]
        )


@pytest.mark.parametrize(
    ("counts", "kind", "name"),
    [
        ((3, 4, 6, 3), "conv2", "resnet34"),
        ((3, 4, 6, 3), "conv3", "resnet50"),
        ((3, 4, 23, 3), "conv3", "resnet101"),
        ((3, 8, 36, 3), "conv3", ""),
        ((2, 2, 2, 3), "conv2", ""),
    ],
)
def test_the_backbone_is_told_by_its_blocks(
    counts: tuple[int, ...], kind: str, name: str, tmp_path: Path
) -> None:
    state = {"conv1.weight": torch.ones(1)} | {
        f"layer{stage}.{block}.{kind}.weight": torch.ones(1)
        for stage, count in enumerate(counts, 1)
        for block in range(count)
    }
    save_file(state, tmp_path / "few.safetensors")
    expected = f"another architecture than {name} " if name else "none of resnet18, resnet34"
    with pytest.raises(InputError, match=expected):
        load_encoder(tmp_path / "few.safetensors")


# our own files ---------------------------------------------------------------------------------


def our_network(config: ModelConfig = SMALL) -> PixelEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = PixelEncoder(config)
    shuffle_statistics(network)
    return network


def test_a_file_of_a_run_has_the_architecture_of_the_run(tmp_path: Path) -> None:
    rates = "model.atrous_rates=[1,2,3]"
    settings = ["model.decoder_channels=16", "model.embedding_dim=6", rates]
    save_config(load_config("demo_cpu", None, settings), tmp_path / "config.yaml")
    for folder, name in (("export", "encoder"), ("checkpoints/step-00000004", "model")):
        (tmp_path / folder).mkdir(parents=True)
        file = tmp_path / folder / f"{name}.safetensors"
        save_file(our_network().state_dict(), file)
        assert load_encoder(file).network.config.atrous_rates == (1, 2, 3)
    elsewhere = tmp_path / "alone.safetensors"
    elsewhere.write_bytes(file.read_bytes())
    assert load_encoder(elsewhere).network.config.atrous_rates == (12, 24, 36)
    said = load_encoder(elsewhere, model=SMALL)
    with torch.no_grad():
        expected = our_network().eval()(IMAGES).embedding
        assert torch.equal(said.network(IMAGES).embedding, expected)
    with pytest.raises(InputError, match="give the run directory"):
        load_encoder(elsewhere, initial=True)
    with pytest.raises(InputError, match=r"embedding_dim is 6 by its tensors, and 7"):
        load_encoder(elsewhere, model=replace(SMALL, embedding_dim=7))


def test_a_checkpoints_folder_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    settings = ["model.decoder_channels=16", "model.embedding_dim=6", "model.atrous_rates=[1,2,3]"]
    save_config(load_config("demo_cpu", None, settings), tmp_path / "config.yaml")
    network = our_network()
    writer = CheckpointWriter(tmp_path, Ranks(0, 1, torch.device("cpu")), 1, 0)
    writer.start(12, network_state(network, "model"), {}, {"progress": {"step": 12}})
    while writer.step is not None:
        writer.wait()
        writer.advance(writer.busy, bool(writer.failure))
    folder = tmp_path / "checkpoints" / "step-00000012"
    encoder = load_encoder(folder)
    assert (encoder.step, encoder.parts, encoder.origin) == (12, PARTS, str(folder))
    assert torch.equal(encoder.network.state_dict()["decoder.1.weight"], network.decoder[1].weight)
    with pytest.raises(InputError, match="give the run directory"):
        load_encoder(folder, initial=True)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"bits")
    with pytest.raises(InputError, match=r"model\.safetensors has another checksum.*take another"):
        load_encoder(folder)


def test_a_network_without_saliency_head_has_embeddings(tmp_path: Path) -> None:
    state = our_network().state_dict()
    del state["saliency_head.weight"]
    save_file(state, tmp_path / "partial.safetensors")
    encoder = load_encoder(tmp_path / "partial.safetensors")
    assert encoder.parts == {"backbone", "decoder", "embedding"}
    assert isinstance(encoder.network, PartialEncoder)
    assert encoder.embeddings(IMAGES).shape == (2, 6, 32, 40)
    assert encoder.network.features(IMAGES).shape == (2, 16, 8, 10)
    with pytest.raises(InputError, match=r"partial\.safetensors has no saliency head, which predi"):
        encoder.embed(IMAGES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.layer3.0.conv2.weight": torch.ones(2, 2)}, r"conv2\.weight is \[2, 2\] there"),
        ({"backbone.layer3.0.bn2.bias": None}, r"layer3\.0\.bn2\.bias is missing there"),
        ({"backbone.layer3.1.conv1.weight": torch.ones(2)}, r"conv1\.weight is \[2\] there"),
        ({"decoder.1.weight": None}, r"decoder\.1\.weight is missing"),
        ({"embedding_head.weight": torch.ones(6, 9, 1, 1)}, "takes 9 channels, but the decoder"),
        ({"embedding_head.0.weight": torch.ones(2)}, r"embedding_head\.0\.weight is \[2\] there"),
        ({"embedding_head.bias": torch.full((6,), torch.nan)}, r"_head\.bias has NaN"),
        ({"saliency_head.weight": torch.ones(1, 16, 1, 1).int()}, r"int32 instead"),
        ({"classifier.weight": torch.ones(4, 9, 1, 1)}, r"should be \[classes, 16, 1, 1\]"),
        ({"classifier.bias": torch.ones(4)}, "a bias, but no weight"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    state: Any = our_network().state_dict() | change
    state = {name: value for name, value in state.items() if value is not None}
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(InputError, match=rf"wrong\.safetensors.*{message}"):
        load_encoder(tmp_path / "wrong.safetensors")


def test_tensors_that_nobody_knows_are_counted_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = our_network().state_dict()
    state |= {"criterion.weight": torch.ones(3), "criterion.bias": torch.ones(3)}
    save_file(state, tmp_path / "more.safetensors")
    load_encoder(tmp_path / "more.safetensors")
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert said[0].endswith("2 tensors are not used: criterion 2")


# strangers' files ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_hostile_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"x": Malicious()}}, tmp_path / "evil.pth")
    # a shape of terabytes that costs its writer four bytes
    torch.save({"decoder.1.weight": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "huge.pth")
    torch.save({"x": torch.ones(3).to_sparse()}, tmp_path / "sparse.pth")
    torch.save({"conv1.weight": torch.ones(9)}, tmp_path / "good.pth")
    with (
        zipfile.ZipFile(tmp_path / "good.pth") as good,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for info in good.infolist():
            packed.writestr(info.filename, good.read(info), zipfile.ZIP_DEFLATED)
    save_file({"layers.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    for name, message in (
        ("evil.pth", "cannot be read as tensors"),
        ("huge.pth", "no dense tensor of its own"),
        ("sparse.pth", "no dense tensor of its own"),
        ("packed.pth", "compressed"),
        ("other.safetensors", "no network that is known here: its tensors are layers 1"),
        ("none.pth", "is no run directory and no file"),
    ):
        with pytest.raises(InputError, match=rf"{name}.*{message}"):
            load_encoder(tmp_path / name)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # timm would download it
        ({"backbone": "timm/hf-hub:stranger/network"}, "timm .* has no model"),
        ({"backbone": "${oc.env:HOME}"}, r"model\.backbone is '\$\{oc\.env:HOME\}'"),
        ({"backbone": 3}, "model.backbone is 3"),
        ({"embedding_dim": 1 << 40}, "embedding_dim is 6 by its tensors"),
        ({"decoder_channels": 17}, "decoder_channels is 16 by its tensors"),
        ({"atrous_rates": [1, 2, 1 << 40]}, "atrous_rates are not in"),
        ({"atrous_rates": [1, 2]}, r"atrous_rates is \[1, 2\]"),
        ({"freeze": "stem"}, "freeze is 'stem'"),
        ({"compile": 1}, "compile is 1"),
        ({"dropout": 2}, "model.dropout must be in"),
        ({"speed": 2}, "model.'speed' is no setting"),
        ({"embedding_dim": True}, r"model\.embedding_dim is True"),
    ],
)
def test_a_strangers_description_is_checked(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    metadata = describe_network(SMALL, 7)
    value = json.loads(metadata[KEY])
    value["model"] |= change
    file = tmp_path / "described.safetensors"
    save_file(our_network().state_dict(), file, metadata | {KEY: json.dumps(value)})
    with pytest.raises(InputError, match=message):
        load_encoder(file)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version":1,"step":-1,"model":{}}', "[" * 60_000, '{"version":2}']
)
def test_a_description_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "described.safetensors"
    save_file(our_network().state_dict(), file, {KEY: text})
    with pytest.raises(InputError, match="its description is wrong"):
        load_encoder(file)


def test_a_description_names_no_path() -> None:
    text = describe_network(ModelConfig(start="/home/me/moco.pth"), 3)[KEY]
    assert "/home" not in text
    assert (
        json.loads(describe_network(ModelConfig(start="imagenet"), 3)[KEY])["model"]["start"]
        == "imagenet"
    )


def test_names_left_out_are_counted_by_part() -> None:
    state = {
        "module.model_q.head.weight": torch.ones(1),
        "module.model_k.head.weight": torch.ones(1),
    }
    named, left = our_names(state | {"module.queue": torch.ones(1)})
    assert list(named) == ["embedding_head.weight"]
    assert count_parts(left) == "module.model_k 1, module.queue 1"
    assert all(map(known_unused, left))
    assert not known_unused("head.0.weight")  # an embedding head of another kind
    assert count_parts(f"part{n:02}.x" for n in range(10)).endswith("part07 1 and 2 more parts")
