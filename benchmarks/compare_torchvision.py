"""torchvision's reference loop for segmentation as a contender: supervised, one view.

    python -m benchmarks.compare_torchvision [--root FOLDER --shards FOLDER] [--rounds 5]

It does what references/segmentation of torchvision (BSD) does: pictures as PIL, the presets'
transforms (shorter side to between half and twice a base size, flip, crop padded where it must be,
ImageNet's normalisation; base and crop are 520 and 480 there, and keep that ratio here), torch's
DataLoader, a DeepLabV3 head, cross entropy that passes over 255, SGD with momentum and a poly
schedule, float32. The backbone is the ResNet-18 at stride 8 that maskbank trains. It learns from
labels, one view a picture, without a momentum encoder: compare the cost of training only.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

from benchmarks.comparison_data import Picture, list_pictures
from benchmarks.contender import claim_protocol, serve
from benchmarks.side_by_side import script

_BASE_TO_CROP = 520 / 480
_CLASSES, _IGNORE = 21, 255
_LEARNING_RATE, _STEPS = 0.02, 1500
_PREFETCH = 2  # batches a worker, torch's default


def contend(options: argparse.Namespace) -> None:
    claim_protocol()
    import torch
    from PIL import Image
    from torch import Tensor, nn
    from torch.nn import functional as F
    from torchvision import tv_tensors
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead
    from torchvision.transforms import v2

    from benchmarks.dilated_resnet import dilated_resnet18

    base = round(options.size * _BASE_TO_CROP)
    fill = {tv_tensors.Mask: _IGNORE, "others": 0}
    transform = v2.Compose(
        [
            v2.RandomResize(base // 2, base * 2),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomCrop(options.size, pad_if_needed=True, fill=fill),
            v2.ToImage(),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )

    class Labelled(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
        def __init__(self, pictures: list[Picture]) -> None:
            self.pictures = pictures

        def __len__(self) -> int:
            return len(self.pictures)

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            picture = self.pictures[index]
            with Image.open(picture.image) as file:
                image = file.convert("RGB")
            with Image.open(picture.label) as file:
                label = tv_tensors.Mask(file)
            image, label = transform(image, label)
            return image, label.squeeze(0).long()

    torch.manual_seed(0)
    dataset = Labelled(list_pictures(options.root))
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=options.batch,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )
    backbone, head = dilated_resnet18(), DeepLabHead(512, _CLASSES)
    network = nn.Sequential(backbone, head).train()
    optimizer = torch.optim.SGD(network.parameters(), _LEARNING_RATE, 0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, _STEPS, 0.9)

    def batches() -> Iterator[list[Tensor]]:
        for _ in itertools.count():
            yield from loader

    stream = batches()

    def step() -> tuple[int, float]:
        images, labels = next(stream)
        logits = F.interpolate(network(images), labels.shape[1:], mode="bilinear")
        loss = F.cross_entropy(logits, labels, ignore_index=_IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return len(images), float(loss.detach())

    def save(path: Path) -> None:
        torch.save(backbone.state_dict(), path)

    settings = {
        "loader": f"PIL, DataLoader, {options.workers} workers",
        "network": "resnet18 at stride 8, DeepLabV3 head",
        "views": 1,
        "size": options.size,
        "batch": options.batch,
        "precision": "float32",
        "threads": torch.get_num_threads(),
        "prefetched": _PREFETCH * options.workers,
    }
    serve(step, "torchvision, supervised", settings, save)


if __name__ == "__main__":
    script(__doc__, ["maskbank", "maskbank-float32", "torchvision"], contend)
