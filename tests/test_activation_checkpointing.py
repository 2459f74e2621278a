"""Checkpointed blocks: the same numbers bit for bit, in less memory, under the same names."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

from tests.ranks import run_on_ranks
from trainer.activation_checkpointing import checkpoint_blocks, find_blocks
from trainer.backbones import build_backbone
from trainer.batch_norm import CpuSyncBatchNorm, convert_batch_norm
from trainer.distributed import Ranks
from trainer.model import ModelConfig, PixelEncoder
from trainer.momentum import make_momentum_encoder

VIT, CONVNEXT = "timm/vit_tiny_patch16_224", "timm/convnext_atto"
BACKBONES = [
    *("small", "resnet18", VIT, CONVNEXT, "timm/resnet18", "timm/regnety_002"),
    pytest.param("resnet50", marks=pytest.mark.slow),
]


def encoder_of(backbone: str, checkpointed: bool, **values: Any) -> PixelEncoder:
    torch.manual_seed(0)
    config = ModelConfig(
        backbone,
        decoder_channels=16,
        embedding_dim=8,
        checkpoint_activations=checkpointed,
        **values,
    )
    return PixelEncoder(config).train()


def with_dropout(encoder: PixelEncoder) -> PixelEncoder:
    """Dropout at the end of every block, where there is a place for it."""
    for module in encoder.backbone.modules():
        if isinstance(module, BasicBlock):
            module.bn2 = nn.Sequential(module.bn2, nn.Dropout(0.3))
        elif isinstance(getattr(module, "drop_path2", None), nn.Identity):
            module.drop_path2 = nn.Dropout(0.3)
    return encoder


def images(rank: int = 0, step: int = 0, size: int = 40) -> Tensor:
    draw = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(3, 3, size, size, generator=draw)


def after_steps(
    encoder: PixelEncoder, rank: int = 0, steps: int = 2, bf16: bool = False, outer: Any = None
) -> dict[str, Tensor]:
    """Losses, gradients, parameters and statistics after some steps of descent."""
    found: dict[str, Tensor] = {}
    for step in range(steps):
        torch.manual_seed(100 * step + rank)
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = (outer or encoder)(images(rank, step))
        loss = output.embedding.float().square().mean() + output.saliency.float().sigmoid().mean()
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        found[f"random {step}"] = torch.rand(1)  # as many random numbers were drawn
        for name, parameter in encoder.named_parameters():
            if parameter.grad is not None:
                found[f"gradient {step} {name}"] = parameter.grad.clone()
                parameter.data.add_(parameter.grad, alpha=-0.1)
    return found | {name: value.clone() for name, value in encoder.state_dict().items()}


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_losses_gradients_and_statistics_are_the_same_bits(backbone: str, bf16: bool) -> None:
    plain = after_steps(with_dropout(encoder_of(backbone, False)), bf16=bf16)
    assert_identical(after_steps(with_dropout(encoder_of(backbone, True)), bf16=bf16), plain)
    if backbone in ("small", "timm/regnety_002"):
        assert any("num_batches" in n and int(value) == 2 for n, value in plain.items())


@pytest.mark.parametrize("batch_norm", ["plain", "frozen"])
def test_frozen_parts_and_frozen_statistics(batch_norm: str) -> None:
    values: dict[str, Any] = {"batch_norm": batch_norm}
    for backbone, freeze in (
        ("small", ("stem", "layer2")),
        ("resnet18", ("conv1", "bn1", "layer1")),
        (VIT, ("patch_embed", "pos_embed", "blocks.0", "blocks.2")),
        ("timm/resnet18", ("layer1.0", "layer3")),
    ):
        plain = after_steps(encoder_of(backbone, False, freeze=freeze, **values))
        assert_identical(after_steps(encoder_of(backbone, True, freeze=freeze, **values)), plain)


def on_a_rank(ranks: Ranks, backbone: str, checkpointed: bool, bf16: bool) -> dict[str, Tensor]:
    encoder = with_dropout(encoder_of(backbone, checkpointed, batch_norm="sync"))
    convert_batch_norm(encoder, ranks)
    if ranks.world_size > 1 and backbone == "small":
        assert isinstance(encoder.backbone.layer1[0].bn1, CpuSyncBatchNorm)
    parallel: Any = encoder
    if ranks.world_size > 1:
        parallel = DistributedDataParallel(encoder, broadcast_buffers=False)
    return after_steps(encoder, ranks.rank, bf16=bf16, outer=parallel)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "world_size", "bf16"),
    [("small", 2, False), ("small", 3, True), ("timm/resnet18", 2, False), (VIT, 2, True)],
)
def test_over_ranks_with_common_statistics(backbone: str, world_size: int, bf16: bool) -> None:
    plain = run_on_ranks(on_a_rank, world_size, backbone, False, bf16)
    checkpointed = run_on_ranks(on_a_rank, world_size, backbone, True, bf16)
    for found, expected in zip(checkpointed, plain, strict=True):
        assert_identical(found, expected)
    if backbone == "small":
        name = "backbone.layer2.0.bn1.running_mean"
        assert torch.equal(plain[0][name], plain[1][name])
        assert not torch.equal(plain[0]["loss 0"], plain[1]["loss 0"])


def saved_bytes(encoder: PixelEncoder) -> int:
    """Bytes of what forward keeps for backward, each storage once, without parameters."""
    storages: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = encoder.backbone(images(size=64))
    assert features.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize(
    ("backbone", "least"),
    [("small", 2), ("resnet50", 3), (VIT, 8), (CONVNEXT, 8), ("timm/regnety_002", 3)],
)
def test_much_less_is_kept(backbone: str, least: float) -> None:
    plain = saved_bytes(encoder_of(backbone, False))
    checkpointed = saved_bytes(encoder_of(backbone, True))
    assert checkpointed * least < plain


def test_copies_are_checkpointed_on_their_own_weights() -> None:
    encoder = encoder_of("small", True)
    momentum_encoder = make_momentum_encoder(encoder).train()
    assert type(momentum_encoder.backbone.layer1[0]) is type(encoder.backbone.layer1[0])
    statistics = momentum_encoder.backbone.layer1[0].bn1
    with torch.no_grad():
        momentum_encoder(images())
    assert int(statistics.num_batches_tracked) == 1
    assert int(encoder.backbone.layer1[0].bn1.num_batches_tracked) == 0

    copied = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    assert_identical(after_steps(copied), after_steps(encoder_of("small", True)))


@pytest.mark.parametrize("backbone", ["small", VIT, CONVNEXT])
def test_evaluation_and_passes_without_gradients_are_plain(
    backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(backbone, True)
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr("trainer.activation_checkpointing.checkpoint", counted)
    with torch.no_grad():
        encoder(images())
    assert calls == []
    evaluated = encoder.eval()(images())
    assert calls == []
    assert evaluated.embedding.requires_grad
    encoder.train()(images())
    assert len(calls) == len(find_blocks(encoder.backbone)) > 3


@pytest.mark.parametrize("backbone", BACKBONES)
def test_names_stay_and_doing_it_twice_is_doing_it_once(backbone: str) -> None:
    plain, encoder = encoder_of(backbone, False), encoder_of(backbone, True)
    assert list(encoder.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in encoder.named_modules()] == [n for n, _ in plain.named_modules()]
    for mine, theirs in zip(encoder.modules(), plain.modules(), strict=True):
        assert isinstance(mine, type(theirs))
    assert checkpoint_blocks(encoder.backbone) == 0
    assert checkpoint_blocks(plain.backbone) == len(find_blocks(encoder.backbone))


@pytest.mark.parametrize(
    ("backbone", "count", "one"),
    [
        ("small", 4, "layer2.1"),
        ("resnet50", 16, "layer3.5"),
        (VIT, 12, "blocks.11"),
        (CONVNEXT, 12, "stages_3.blocks.1"),
        ("timm/mobilenetv3_small_050", 12, "blocks.3.1"),
        ("timm/regnety_002", 5, "s3"),  # has no sequences
    ],
)
def test_blocks_are_what_a_network_repeats(backbone: str, count: int, one: str) -> None:
    network, _ = build_backbone(backbone)
    blocks = find_blocks(network)
    assert len(blocks) == len(set(blocks)) == count
    assert network.get_submodule(one) in blocks
    inside = {id(part) for block in blocks for part in block.modules() if part is not block}
    assert not any(id(block) in inside for block in blocks)


def test_a_graph_may_be_run_through_backward_twice() -> None:
    encoder = encoder_of("small", True)
    loss = encoder(images()).embedding.square().sum()
    statistics = {name: value.clone() for name, value in encoder.named_buffers()}
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad()
    loss.backward()
    twice = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    for name, value in encoder.named_buffers():
        assert torch.equal(value, statistics[name])


def test_an_error_in_a_repetition_leaves_the_statistics_in_place() -> None:
    encoder = encoder_of("small", True)
    norm = encoder.backbone.layer2[0].bn1
    before = norm.running_mean
    loss = encoder(images()).embedding.square().sum()

    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    norm.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss.backward()
    assert norm.running_mean is before
    assert int(norm.num_batches_tracked) == 1
