"""Evaluations on a GPU: the figures of the CPU, and images a second (a section of gpu_check)."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu_loss import DEVICE, Row, verdict
from data_pipeline.labelled import LabelledSet, ShardSet, labelled_shards
from data_pipeline.manifest import Manifest
from data_pipeline.sample import decode_rgb
from evaluation.cluster import ClusterConfig
from evaluation.kmeans import evaluate_kmeans
from evaluation.kmeans_config import KMeansConfig
from evaluation.label_propagation import PropagationConfig, propagate
from evaluation.linear_probe import LinearConfig, evaluate_linear
from evaluation.online import EvenlySpread
from evaluation.predict import PredictConfig, Predictor
from evaluation.prototypes import PrototypeConfig
from evaluation.retrieval import RetrievalConfig, evaluate_retrieval
from trainer.distributed import Ranks, cores_per_rank
from trainer.encoder import Encoder
from trainer.model import PixelEncoder
from trainer.settings import ModelConfig

IMAGES = 64  # of which the CPU scores the same figures
HALVES = PrototypeConfig("probability", 0.5, "weighted")


def evaluation(manifest: Manifest, folder: Path, device: torch.device = DEVICE) -> list[Row]:
    """K-means, retrieval and the linear classifier on the device and on the CPU; speeds."""
    samples = labelled_shards(manifest)
    few = EvenlySpread(samples, min(IMAGES, len(samples)))
    gpu, cpu = Ranks(0, 1, device), Ranks(0, 1, torch.device("cpu"))
    rows = _kmeans(few, samples, gpu, cpu)
    retrieval = RetrievalConfig(128, HALVES, batch_size=8)
    found = [
        evaluate_retrieval(_encoder("resnet18"), few, few, retrieval, ranks)[0][0]
        for ranks in (gpu, cpu)
    ]
    rows.append(_agree("retrieval", *(one.mean for one in found)))
    linear = LinearConfig(size=128, epochs=4, batch_size=8, augment=False)
    probed = [
        evaluate_linear(_encoder("resnet18"), few, few, linear, ranks, cache=folder)[0][0]
        for ranks in (gpu, cpu)
    ]
    rows.append(_agree("linear classifier", *(one.mean for one in probed)))
    return [*rows, _propagation(device), _prediction(few, device)]


def _encoder(backbone: str) -> Encoder:
    torch.manual_seed(0)
    network = PixelEncoder(ModelConfig(backbone))
    with torch.no_grad():
        network.train()(torch.randn(4, 3, 64, 64))  # batch norms that know something
    return Encoder(network, 0)


def _agree(what: str, found: float, expected: float) -> Row:
    figure = f"{found:.2f} against {expected:.2f} on the CPU"
    return Row(f"{what}, mIoU", figure, verdict(abs(found - expected) < 0.5))


def _kmeans(few: LabelledSet, every: ShardSet, gpu: Ranks, cpu: Ranks) -> list[Row]:
    cluster = ClusterConfig(pca=8, seeds=(1234,))
    small = KMeansConfig(128, HALVES, cluster, batch_size=8)
    rows = []
    for unit in ("image", "pixel"):
        config = replace(small, unit=unit)  # type: ignore[arg-type]
        found = [
            evaluate_kmeans(_encoder("resnet18"), few, config, ranks)[0] for ranks in (gpu, cpu)
        ]
        rows.append(_agree(f"K-means of {unit}s", *(one.mean for one in found)))
    for precision in ("float32", "bf16"):
        config = replace(small, size=512, batch_size=16, precision=precision)
        encoder = _encoder("resnet50")
        evaluate_kmeans(encoder, few, config, gpu)
        start = time.perf_counter()
        evaluate_kmeans(encoder, every, config, gpu, threads=cores_per_rank())
        speed = len(every) / (time.perf_counter() - start)
        what = f"K-means, ResNet-50 at 512 pixels, {precision}, from shards"
        rows.append(Row(what, f"{speed:.1f} images/s", "measured"))
    return rows


def _propagation(device: torch.device) -> Row:
    """Frames a second at 480×854, stride 8, 256 channels, full context."""
    frames = [torch.randn(256, 60, 107, device=device) for _ in range(25)]
    mask = torch.zeros(480, 854, dtype=torch.uint8, device=device)
    mask[100:300, 200:500] = 1
    start = time.perf_counter()
    for _ in propagate(iter(frames), mask, PropagationConfig()):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    speed = len(frames) / (time.perf_counter() - start)
    return Row("label propagation, 480p, 256 channels", f"{speed:.1f} frames/s", "measured")


def _prediction(few: LabelledSet, device: torch.device) -> Row:
    """The predicted saliency is that of the CPU."""
    image = decode_rgb(few.read(0).image)
    config = PredictConfig(saliency=True)
    found, expected = (
        Predictor(_encoder("resnet18"), None, where, config).predict(image).saliency
        for where in (device, torch.device("cpu"))
    )
    assert found is not None
    assert expected is not None
    off = float(abs(found - expected).max())
    return Row("predicted saliency, largest difference", f"{off:.4f}", verdict(off < 0.02))
