"""Compiled blocks: nearly the same numbers, the same names, a compilation a kind of block."""

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from data_pipeline.errors import InputError
from tests.ranks import run_on_ranks
from trainer.activation_checkpointing import find_blocks
from trainer.batch_norm import convert_batch_norm
from trainer.compilation import compile_network
from trainer.distributed import Ranks
from trainer.model import ModelConfig, PixelEncoder
from trainer.momentum import make_momentum_encoder

VIT = "timm/vit_tiny_patch16_224"


def encoder_of(backbone: str, **values: Any) -> PixelEncoder:
    torch.manual_seed(0)
    config = ModelConfig(backbone, decoder_channels=16, embedding_dim=8, **values)
    return PixelEncoder(config).train()


def step(
    encoder: PixelEncoder, bf16: bool = False, backend: str = "", ranks: Ranks | None = None
) -> dict[str, Tensor]:
    """Loss and gradients against a momentum encoder, and the statistics of both."""
    torch._dynamo.reset()
    counters.clear()
    momentum_encoder = make_momentum_encoder(encoder).train()
    for network in (encoder, momentum_encoder) if backend else ():
        assert compile_network(network, backend) == len(find_blocks(network.backbone))
    parallel: Any = encoder
    if ranks is not None and ranks.world_size > 1:
        parallel = DistributedDataParallel(encoder, broadcast_buffers=False)
    draw = torch.Generator().manual_seed(0 if ranks is None else ranks.rank)
    pictures = torch.randn(3, 3, 32, 32, generator=draw)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        query = parallel(pictures)
        with torch.no_grad():
            key = momentum_encoder(pictures)
    loss = (query.embedding.float() - 0.5 * key.embedding.float()).square().mean()
    loss = loss + query.saliency.float().sigmoid().mean()
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    for network in (encoder, momentum_encoder):
        found |= {f"{id(network) == id(encoder)} {n}": v for n, v in network.named_buffers()}
    return {name: value.clone() for name, value in found.items()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        # a bias before batch norm has no gradient but rounding
        scale = max(float(value.float().abs().max()), 1e-4)
        assert float((found[name].float() - value.float()).abs().max()) <= tolerance * scale, name


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("backbone", ["small", VIT, "timm/convnext_atto"])
def test_training_steps_are_nearly_the_same(backbone: str, checkpointed: bool) -> None:
    plain = step(encoder_of(backbone))
    encoder = encoder_of(backbone, checkpoint_activations=checkpointed)
    names = list(encoder.state_dict())
    compiled = step(encoder, backend="aot_eager")
    assert list(encoder.state_dict()) == names
    assert_near(compiled, plain, 1e-4)
    # each kind of block with gradients and without; nothing fell back to the plain code
    kinds = {"small": 4, VIT: 1, "timm/convnext_atto": 4}[backbone]
    assert counters["stats"]["unique_graphs"] == 2 * kinds
    assert not counters["graph_break"]


def on_a_rank(ranks: Ranks, compiled: bool) -> dict[str, Tensor]:
    encoder = encoder_of("small", checkpoint_activations=compiled, batch_norm="sync")
    convert_batch_norm(encoder, ranks)
    return step(encoder, backend="aot_eager" if compiled else "", ranks=ranks)


@pytest.mark.slow
def test_over_ranks_with_common_statistics() -> None:
    plain = run_on_ranks(on_a_rank, 2, False)
    compiled = run_on_ranks(on_a_rank, 2, True)
    for found, expected in zip(compiled, plain, strict=True):
        assert_near(found, expected, 1e-4)
    name = "backbone.layer2.0.bn1.weight"
    assert torch.equal(compiled[0][name], compiled[1][name])
    assert not torch.equal(compiled[0]["loss"], compiled[1]["loss"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_with_the_compiler_that_training_uses() -> None:
    plain = step(encoder_of(VIT, output_stride=16), bf16=True)
    encoder = encoder_of(VIT, output_stride=16, checkpoint_activations=True)
    compiled = step(encoder, bf16=True, backend="inductor")
    torch.testing.assert_close(compiled["loss"], plain["loss"], rtol=1e-2, atol=0)
    names = [name for name, _ in encoder.named_parameters()]
    mine, theirs = (torch.cat([part[n].flatten() for n in names]) for part in (compiled, plain))
    assert float(torch.cosine_similarity(mine, theirs, 0)) > 0.99
    assert float(mine.norm() / theirs.norm()) == pytest.approx(1, abs=0.05)


def test_copies_are_not_compiled_and_evaluation_is_as_before() -> None:
    encoder = encoder_of("small")
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = encoder.eval()(pictures).embedding
        compile_network(encoder, "eager")
        assert encoder.backbone.layer1[0]._compiled_call_impl is not None
        assert copy.deepcopy(encoder).backbone.layer1[0]._compiled_call_impl is None
        assert torch.equal(encoder(pictures).embedding, before)


def test_a_missing_compiler_is_said_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"model\.compile needs the compiler no-such-compiler"):
        compile_network(encoder_of("small"))
    monkeypatch.delenv("CXX")
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/nowhere")
    with pytest.raises(InputError, match=r"Python's headers, /nowhere/Python\.h .*compile=false"):
        compile_network(encoder_of("small"))
