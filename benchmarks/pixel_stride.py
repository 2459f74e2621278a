"""What does `loss.pixel_stride` change? Gradients of the same batches with all pixels and on grids.

    python -m benchmarks.pixel_stride --shards FOLDER [--encoder FILE] [--batches 6]

A step's gradient over the whole network on a grid is compared with that over all pixels: the cosine
between the two, and, as the scale of it, the cosine between two batches of all pixels, which is how
alike gradients are that training adds up anyway. Dropout is off. Without --encoder the network is
random.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.side_by_side import machine_line
from data_pipeline.batch import Batch
from data_pipeline.loader import BatchStream
from data_pipeline.manifest import read_manifest
from data_pipeline.views import ViewConfig
from trainer.distributed import Ranks
from trainer.encoder import load_encoder
from trainer.memory_bank import ShardedMemoryBank
from trainer.model import PixelEncoder, PixelOutput
from trainer.objective import choose_pixels, contrast_views
from trainer.settings import BankConfig, LossConfig, ModelConfig

_STRIDES = (1, 2, 4, 8, 16)
_CPU = torch.device("cpu")


def gradient(network: PixelEncoder, batch: Batch, stride: int) -> tuple[Tensor, float]:
    """Of the contrastive loss, and the seconds that it took from the encoder's outputs down."""
    config, ranks = LossConfig(pixel_stride=stride, saliency_weight=0.0), Ranks(0, 1, _CPU)
    bank = ShardedMemoryBank(BankConfig(capacity=0), network.config.embedding_dim, ranks)
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        query = network(batch.query_image)
        with torch.no_grad():
            key = network(batch.key_image)
    outputs = PixelOutput(*(part.detach().requires_grad_() for part in query))
    begun = time.perf_counter()
    chosen = choose_pixels(batch, ranks, config)
    losses = contrast_views(outputs, key, batch, chosen, bank, ranks, config)
    losses.total.backward()
    seconds = time.perf_counter() - begun
    query.embedding.backward(outputs.embedding.grad)
    found = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return torch.cat(found).double(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--encoder", type=Path, help="a saved network")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=6)
    options = parser.parse_args()
    if options.shards is None:
        print("skipped: give --shards")
        return
    config = ModelConfig(backbone="resnet18", dropout=0.0)
    network = PixelEncoder(config)
    if options.encoder is not None:
        saved = load_encoder(options.encoder).network
        network.load_state_dict(saved.state_dict())
    network = network.to(memory_format=torch.channels_last).train()
    stream = BatchStream(
        read_manifest(options.shards),
        dataclasses.replace(ViewConfig(), image_size=options.size),
        loader="torch",
        batch_size=options.batch,
        seed=0,
        window=8,
        rank=0,
        world_size=1,
        start=0,
        threads=1,
        prefetch=1,
        device=_CPU,
    )
    rows: dict[int, list[Tensor]] = {stride: [] for stride in _STRIDES}
    spent: dict[int, list[float]] = {stride: [] for stride in _STRIDES}
    for batch in itertools.islice(stream, options.batches):
        for stride in _STRIDES:
            found, seconds = gradient(network, batch, stride)
            rows[stride].append(found)
            spent[stride].append(seconds)
    stream.close()
    print(f"{machine_line()}\n")
    print("| pixel_stride | cosine to all pixels | loss, both ways, ms |\n|---|---|---|")
    for stride in _STRIDES:
        pairs = zip(rows[stride], rows[1], strict=True)
        cosines = [float(torch.cosine_similarity(a, b, 0)) for a, b in pairs]
        milliseconds = 1000 * statistics.median(spent[stride])
        print(f"| {stride} | {_spread(cosines)} | {milliseconds:.0f} |")
    between = [
        float(torch.cosine_similarity(a, b, 0)) for a, b in itertools.combinations(rows[1], 2)
    ]
    print(f"\nTwo batches of all pixels: {_spread(between)}")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}–{max(values):.3f})"


if __name__ == "__main__":
    main()
