"""lightly's DenseCL as a contender: dense contrast with a momentum encoder and memory banks.

    python -m benchmarks.compare_lightly [--root FOLDER --shards FOLDER] [--rounds 5] [--steps 10]

lightly (https://docs.lightly.ai, MIT) is called as its documented PyTorch example for DenseCL calls
it: LightlyDataset, DenseCLTransform and torch's DataLoader; DenseCLProjectionHead with 128
dimensions for the image and for each place; two NTXentLoss with banks of 4,096 entries; plain SGD
at .06; float32. What differs: pictures of --size pixels; the ResNet-18 is dilated to stride 8, as
maskbank's is; and keys come from the momentum network without gradients, as the method has it: the
example sends them through the trained network, which takes longer. It has no decoder and no masks,
so its step is of another kind: compare the cost of training, not what is learnt.
"""

import argparse
import copy
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.comparison_data import list_pictures
from benchmarks.contender import claim_protocol, serve
from benchmarks.side_by_side import script

_DIMENSIONS, _BANK, _LEARNING_RATE, _MOMENTUM = 128, 4096, 0.06, 0.996
_PREFETCH = 2  # batches a worker, torch's default


def contend(options: argparse.Namespace) -> None:
    claim_protocol()
    import torch
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models import utils
    from lightly.models.modules import DenseCLProjectionHead
    from lightly.transforms import DenseCLTransform
    from torch import Tensor, nn

    from benchmarks.dilated_resnet import dilated_resnet18

    torch.manual_seed(0)
    names = [os.path.relpath(p.image, options.root / "images") for p in list_pictures(options.root)]
    dataset = LightlyDataset(
        str(options.root / "images"),
        transform=DenseCLTransform(input_size=options.size),
        filenames=names,
    )
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=options.batch,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )

    class Branch(nn.Module):
        """Backbone and the two heads."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = dilated_resnet18()
            self.image_head = DenseCLProjectionHead(512, 512, _DIMENSIONS)
            self.place_head = DenseCLProjectionHead(512, 512, _DIMENSIONS)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Features [B, h·w, 512], embeddings [B, 128] and of places [B, h·w, 128]."""
            features = self.backbone(images)
            of_image = self.image_head(features.mean((2, 3)))
            features = features.flatten(2).movedim(1, 2)
            return features, of_image, self.place_head(features)

    network = Branch()
    momentum_network = copy.deepcopy(network)
    utils.deactivate_requires_grad(momentum_network)
    image_loss = NTXentLoss(memory_bank_size=(_BANK, _DIMENSIONS))
    place_loss = NTXentLoss(memory_bank_size=(_BANK, _DIMENSIONS))
    optimizer = torch.optim.SGD(network.parameters(), lr=_LEARNING_RATE)
    bf16 = options.precision == "bf16"

    def batches() -> Iterator[list[Tensor]]:
        for _ in itertools.count():
            for views, _, _ in loader:
                yield views

    stream = batches()

    def step() -> tuple[int, float]:
        query_view, key_view = next(stream)
        utils.update_momentum(network, momentum_network, m=_MOMENTUM)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            query_features, query_image, query_places = network(query_view)
            with torch.no_grad():
                key_features, key_image, key_places = momentum_network(key_view)
        # losses in float32, as maskbank's
        key_places = utils.select_most_similar(
            query_features.detach().float(), key_features.float(), key_places.float()
        )
        places = place_loss(query_places.float().flatten(0, 1), key_places.flatten(0, 1))
        loss = 0.5 * (image_loss(query_image.float(), key_image.float()) + places)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return len(query_view), float(loss.detach())

    def save(path: Path) -> None:
        torch.save(network.backbone.state_dict(), path)

    settings = {
        "loader": f"LightlyDataset, DataLoader, {options.workers} workers",
        "network": "resnet18 at stride 8, DenseCL heads",
        "views": 2,
        "size": options.size,
        "batch": options.batch,
        "precision": options.precision,
        "bank": f"{_BANK} of images and {_BANK} of places",
        "threads": torch.get_num_threads(),
        "prefetched": _PREFETCH * options.workers,
    }
    serve(step, f"lightly, DenseCL, {options.precision}", settings, save)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")


if __name__ == "__main__":
    only = ["maskbank", "maskbank-float32", "lightly", "lightly-bf16"]
    script(__doc__, only, contend, add_arguments)
