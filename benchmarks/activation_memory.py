"""What does the backbone keep for the backward pass, with and without activation checkpointing?

    python -m benchmarks.activation_memory

Bytes of everything that forward saves, each storage once and without parameters, for one image of
224 pixels under bf16 autocast. Counted, not timed: the same on any machine.
"""

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trainer.model import ModelConfig, PixelEncoder

_CASES = (
    ("resnet50", 8),
    ("timm/vit_small_patch16_224", 8),
    ("timm/vit_small_patch16_224", 16),
    ("timm/convnext_tiny", 8),
)


def saved_mib(config: ModelConfig) -> float:
    """MiB that the backbone keeps."""
    torch.manual_seed(0)
    encoder = PixelEncoder(config).train()
    parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    storages: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    images = torch.randn(1, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        features = encoder.backbone(images)
    assert features.requires_grad
    return sum(storages.values()) / 2**20


def main() -> None:
    table = Table("backbone", "stride", "MiB an image", "with checkpointing")
    for backbone, stride in _CASES:
        kept = [
            saved_mib(
                ModelConfig(backbone, output_stride=stride, checkpoint_activations=checkpointed)
            )
            for checkpointed in (False, True)
        ]
        table.add_row(backbone, str(stride), *(f"{value:.0f}" for value in kept))
    Console().print(table)


if __name__ == "__main__":
    main()
