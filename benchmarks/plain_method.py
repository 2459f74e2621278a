"""The published method written out plainly: what maskbank's training is compared with.

PIL and a DataLoader, embeddings at full resolution, a replicated queue, dense logits, float32: as
one would write down the paper (Van Gansbeke et al., ICCV 2021, sections 3 and 4.1), with its
objective and augmentation and none of maskbank's code. It stands in for released implementations.
"""

import copy
import random
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.transforms import functional as TF

Views = tuple[Tensor, Tensor, Tensor, Tensor]  # query image and mask, key image and mask


class TwoViews(Dataset[Views]):
    """Two views of every image in the released archive's layout, with their masks.

    Args:
        root: holds images/, the folder of masks and sets/trainaug.txt.
        masks: that folder.
        size: side of the views, pixels.
    """

    def __init__(self, root: Path, masks: str, size: int) -> None:
        self.root, self.masks, self.size = root, masks, size
        self.names = (root / "sets/trainaug.txt").read_text().split()
        self.colour = transforms.Compose(
            [
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> Views:
        name = self.names[number]
        image = Image.open(self.root / "images" / f"{name}.jpg").convert("RGB")
        mask = Image.open(self.root / self.masks / f"{name}.png").convert("L")
        return (*self._view(image, mask), *self._view(image, mask))

    def _view(self, image: Image.Image, mask: Image.Image) -> tuple[Tensor, Tensor]:
        size = [self.size, self.size]
        for _ in range(16):
            window = transforms.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])
            nearest = transforms.InterpolationMode.NEAREST
            cropped = TF.resized_crop(mask, *window, size, nearest)
            inside = torch.from_numpy(np.array(cropped)) > 0
            if 0.01 <= inside.float().mean() <= 0.99:
                break
        crop = TF.resized_crop(image, *window, size)
        if random.random() < 0.5:
            crop, inside = TF.hflip(crop), inside.flip(-1)
        return self.colour(crop), inside


class Encoder(nn.Module):
    """ResNet at output stride 8 and a DeepLabV3 head: embedding [B, D, H, W], logit [B, H, W]."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18(weights=None)
        for stage, rate in ((resnet.layer3, 2), (resnet.layer4, 4)):
            for number, block in enumerate(stage):
                if block.downsample is not None:
                    block.downsample[0].stride = (1, 1)
                for name in ("conv1", "conv2"):
                    conv = getattr(block, name)
                    half = rate // 2 if number == 0 and name == "conv1" else rate
                    conv.stride, conv.dilation, conv.padding = (1, 1), (half, half), (half, half)
        resnet.avgpool, resnet.fc = nn.Identity(), nn.Identity()
        self.backbone = resnet
        pyramid = ASPP(512, [12, 24, 36], 256)
        pyramid.project[3].p = dropout
        self.decoder = nn.Sequential(
            pyramid,
            nn.Conv2d(256, 256, 3, padding=1, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(),
        )
        self.head = nn.Conv2d(256, dim, 1)
        self.classification_head = nn.Conv2d(256, 1, 1, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        x = self.decoder(net.layer4(net.layer3(net.layer2(net.layer1(x)))))
        embedding = F.interpolate(self.head(x), images.shape[-2:], mode="bilinear")
        logit = F.interpolate(self.classification_head(x), images.shape[-2:], mode="bilinear")
        return embedding, logit[:, 0]


class PlainMethod:
    """Training, a step at a time.

    Args:
        root, masks: of the images, see `TwoViews`.
        size: side of the views, pixels.
        batch_size: images a step.
        steps: of the whole schedule, poly to the power of 0.9.
        capacity: K prototypes in the queue.
        lr, m, temperature: of SGD, of the momentum encoder, of the softmax.
        workers: of the DataLoader.
        seed: of everything.
    """

    def __init__(
        self,
        root: Path,
        *,
        masks: str = "saliency_unsupervised_model",
        size: int = 96,
        batch_size: int = 32,
        steps: int = 1000,
        capacity: int = 256,
        dim: int = 32,
        dropout: float = 0.5,
        lr: float = 0.05,
        m: float = 0.99,
        temperature: float = 0.5,
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        self.m, self.temperature, self.lr, self.steps = m, temperature, lr, steps
        self.query_encoder = Encoder(dim, dropout).train()
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        self.queue = F.normalize(torch.randn(capacity, dim), dim=1)
        self.pointer, self.step_number = 0, 0
        self.optimizer = torch.optim.SGD(
            self.query_encoder.parameters(), lr, momentum=0.9, weight_decay=1e-4
        )
        self.loader = DataLoader(
            TwoViews(root, masks, size),
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        self._batches = iter(self.loader)

    def step(self) -> tuple[int, float]:
        """One training step; images in it, and its loss."""
        try:
            batch = next(self._batches)
        except StopIteration:
            self._batches = iter(self.loader)
            batch = next(self._batches)
        query_image, query_mask, key_image, key_mask = batch
        self._follow()
        embedding, logit = self.query_encoder(query_image)
        queries = F.normalize(embedding, dim=1).permute(0, 2, 3, 1)[query_mask]
        target = torch.arange(len(query_mask))[:, None, None].expand_as(query_mask)[query_mask]
        prototypes = self._prototypes(key_image, key_mask)

        logits = torch.cat([queries @ prototypes.T, queries @ self.queue.T], 1) / self.temperature
        counts = torch.bincount(target, minlength=len(prototypes))
        weight = 1 / torch.log(1.02 + counts / counts.sum())
        weight = torch.cat([weight, torch.ones(len(self.queue))])
        contrastive = F.cross_entropy(logits, target, weight)
        negative = 1 - query_mask.float().mean()
        balance = torch.where(query_mask, negative, 1 - negative)
        saliency = F.binary_cross_entropy_with_logits(logit, query_mask.float(), balance)
        loss = contrastive + saliency

        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * (1 - self.step_number / self.steps) ** 0.9
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._enqueue(prototypes)
        self.step_number += 1
        return len(query_image), float(loss.detach())

    def save(self, path: Path) -> None:
        """The query encoder, under the names of the released checkpoints."""
        state = self.query_encoder.state_dict()
        torch.save({"model": {f"module.model_q.{name}": v for name, v in state.items()}}, path)

    @torch.no_grad()
    def _follow(self) -> None:
        pairs = zip(self.key_encoder.parameters(), self.query_encoder.parameters(), strict=True)
        for key, query in pairs:
            key.data = key.data * self.m + query.data * (1 - self.m)

    @torch.no_grad()
    def _prototypes(self, images: Tensor, masks: Tensor) -> Tensor:
        embedding = F.normalize(self.key_encoder(images)[0], dim=1)
        sums = torch.einsum("bdhw,bhw->bd", embedding, masks.float())
        return F.normalize(sums, dim=1)

    @torch.no_grad()
    def _enqueue(self, prototypes: Tensor) -> None:
        places = (self.pointer + torch.arange(len(prototypes))) % len(self.queue)
        self.queue[places] = prototypes
        self.pointer = (self.pointer + len(prototypes)) % len(self.queue)
