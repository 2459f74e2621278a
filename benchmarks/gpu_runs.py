"""Whole training runs on GPUs, started as a user starts them, and the loader that feeds them."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_loss import DEVICE, Row, verdict
from data_pipeline.fetch import Fetcher
from data_pipeline.index import DatasetIndex
from data_pipeline.loader import BatchStream, make_loader
from data_pipeline.manifest import Manifest
from data_pipeline.order import SampleOrder
from data_pipeline.reader import SampleReader
from data_pipeline.views import IMAGENET_STD, ViewConfig
from trainer.distributed import cores_per_rank

_AT_A_TIME = 5  # runs of 16 images that share a GPU: their speeds say nothing


def decoding(manifest: Manifest) -> list[Row]:
    """Mixed decoding and augmentation against the CPU's, in grey levels."""
    views = ViewConfig(image_size=224)
    index = DatasetIndex(manifest)
    fetcher = Fetcher(SampleReader(index), SampleOrder(index.counts, 0, 8), views, cores_per_rank())
    samples = fetcher.fetch(np.arange(64))
    reference = make_loader("torch", 64, 224, 8, torch.device("cpu")).load(samples)
    loader = make_loader("dali", 64, 224, 8, DEVICE)
    batch = loader.load(samples)
    scale = 255 * torch.tensor(IMAGENET_STD)[None, :, None, None]
    off = ((batch.query_image.cpu() - reference.query_image) * scale).abs()
    levels, worst = float(off.mean()), float(off.mean((1, 2, 3)).max())
    masks = float((batch.query_mask.cpu() == reference.query_mask).float().mean())
    last = channels_last(batch.query_image)
    loader.close()
    fetcher.close()
    figure = f"{levels:.2f}, of the worst image {worst:.2f}"
    return [
        Row("mixed decoding against the CPU's, mean grey levels", figure, verdict(levels < 2)),
        Row("masks that agree", f"{masks:.3%}", verdict(masks > 0.999)),
        Row("images come channels-last", str(last), verdict(last)),
    ]


def loader_speed(manifest: Manifest) -> list[Row]:
    """Two views of 224 pixels, batches of 64, from shards to the GPU's memory, nothing else."""
    rows = []
    for name in ("torch", "dali"):
        stream = BatchStream(
            manifest,
            ViewConfig(image_size=224),
            loader=name,
            batch_size=64,
            seed=0,
            window=8,
            rank=0,
            world_size=1,
            start=0,
            threads=cores_per_rank(),
            prefetch=2,
            device=DEVICE,
        )
        try:
            for _ in range(6):
                next(stream)
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(20):
                next(stream)
            torch.cuda.synchronize()
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        finally:
            stream.close()
        figure = f"{20 * 64 / seconds:,.0f}; {1000 * cpu / 20 / 64:.1f} cpu-ms an image"
        rows.append(Row(f"images a second, loader {name}", figure, "measured"))
    return rows


def channels_last(images: torch.Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last)


def training(manifest: Manifest, folder: Path, ranks: int, loader: str) -> list[Row]:
    """ResNet-50 at 224 pixels, 64 images a GPU, bf16, a bank of 65,536: speed of 60 steps."""
    run, what = folder / f"run-{ranks}-{loader}", f"training on {ranks} GPUs, loader {loader}"
    error = train(
        *(manifest, run, ranks, f"data.batch_size={64 * ranks}", f"data.loader={loader}"),
        *("run.steps=60", "run.log_every=10", "run.checkpoint_every=60", "run.tensorboard=true"),
        *("bank.capacity=65536", "bank.mask_same_image=true", "bank.move=bank"),
    )
    if error:
        return [Row(what, error, "FAILED")]
    last = metrics(run)[-3:]
    middle = {key: float(np.median([row[key] for row in last])) for key in last[0]}
    figure = (
        f"{middle['images_per_second']:,.0f} images/s, {middle['data_wait']:.0%} of the time "
        f"waiting for data, {middle['memory_mb']:,.0f} MB, loss {middle['loss']:.3f}"
    )
    rows = [Row(what, figure, verdict(all(np.isfinite(row["loss"]) for row in last)))]
    if ranks > 1:
        moved, wait = middle["bank_mb_received"], middle["bank_wait_ms"]
        figure = f"{moved:.2f} MB received, {wait:.2f} ms waited for it"
        rows.append(Row(f"bank of 65,536 in a step on {ranks} GPUs", figure, "measured"))
    return rows


_VARIANTS = {
    "ddp float32": ("run.precision=float32",),
    "ddp bf16": ("run.precision=bf16",),
    "ddp fp16": ("run.precision=fp16",),
    "ddp bf16 compiled": ("run.precision=bf16", "model.compile=true"),
    "ddp bf16, activations twice": ("run.precision=bf16", "model.checkpoint_activations=true"),
    "zero-1 bf16": ("run.precision=bf16", "engine.name=deepspeed"),
    "zero-2 fp16": ("run.precision=fp16", "engine.name=deepspeed", "engine.zero_stage=2"),
    "zero-2 bf16, optimizer on the host": (
        *("run.precision=bf16", "engine.name=deepspeed", "engine.zero_stage=2"),
        "engine.offload_optimizer=true",
    ),
    "zero-3 bf16": ("run.precision=bf16", "engine.name=deepspeed", "engine.zero_stage=3"),
}


def engines(manifest: Manifest, folder: Path, ranks: int) -> list[Row]:
    """Thirty steps of ResNet-50 in every engine and precision: last loss and memory."""

    def one(name: str) -> Row:
        run, what = folder / f"engine-{ranks}-{name}", f"{name}, {ranks} GPUs"
        limits = ("run.steps=30", "run.checkpoint_every=15", "run.log_every=5")
        error = train(manifest, run, ranks, *limits, *_VARIANTS[name])
        if error:
            return Row(what, error, "FAILED")
        last = metrics(run)[-1]
        # fp16 lowers its loss scale in the first steps
        well = np.isfinite(last["loss"]) and last["skipped_steps"] <= (15 if "fp16" in name else 0)
        figure = (
            f"loss {last['loss']:.3f}, {last['memory_mb']:,.0f} MB, {last['skipped_steps']} skipped"
        )
        return Row(what, figure, verdict(bool(well)))

    with ThreadPoolExecutor(_AT_A_TIME if ranks == 1 else 1) as pool:
        return list(pool.map(one, _VARIANTS))


def across(manifest: Manifest, folder: Path, ranks: int) -> list[Row]:
    """ZeRO-3 to step 15, then DDP to step 30 from its checkpoint."""
    run = folder / f"across-{ranks}"
    steps = ("run.steps=30", "run.checkpoint_every=15", "run.log_every=5")
    first = ("engine.name=deepspeed", "engine.zero_stage=3")
    error = train(manifest, run, ranks, *steps, *first, fault=("raise", "0", "20"))
    went_on = train(manifest, run, ranks, *steps)
    done = [row["step"] for row in metrics(run)]
    well = "shard-000003" in error and not went_on and done == [5, 10, 15, 20, 25, 30]
    figure = went_on or f"{error[:80]}; then steps {done}"
    return [Row(f"ZeRO-3, then DDP, {ranks} GPUs", figure, verdict(well))]


def hang(manifest: Manifest, folder: Path, ranks: int) -> list[Row]:
    """The last rank stops in step 7: all end, it is named, nccl's collectives are recorded."""
    run, start = folder / f"hang-{ranks}", time.perf_counter()
    limit = ("run.timeout_seconds=20", "run.steps=30")
    said = train(manifest, run, ranks, *limit, fault=("stop", str(ranks - 1), "7"))
    seconds = time.perf_counter() - start
    recorded = len(list(run.glob("hangs/*/collectives-*.json")))
    well = f"rank {ranks - 1}: no sign of life for 20 s" in said and recorded == ranks - 1
    figure = f"{seconds:.0f} s, {recorded} ranks' collectives: {said[:200]}"
    return [Row(f"a stopped rank of {ranks}", figure, verdict(well))]


def train(
    manifest: Manifest, run: Path, ranks: int, *settings: str, fault: tuple[str, ...] = ()
) -> str:
    """Trains ResNet-50 at 224 pixels, 16 images a rank; what was said if that failed, else ''."""
    program = ("tests.faulty_train", *fault) if fault else ("trainer.train",)
    command = [
        *(sys.executable, "-m", "launch.ranks", "--standalone", f"--nproc-per-node={ranks}"),
        *("-m", *program, "--recipe", "voc_unsupervised_saliency", "model.start=random"),
        *(f"data.shards={manifest.root}", f"run.directory={run}", f"run.device={DEVICE.type}"),
        *(
            f"data.batch_size={16 * ranks}",
            "run.tensorboard=false",
            "run.precision=bf16",
            *settings,
        ),
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=150)
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode(errors="replace")
        return f"not done after 150 s: {said[-300:]}".replace("\n", " ")
    if not result.returncode:
        return ""
    print(result.stderr[-3000:], file=sys.stderr, flush=True)
    lines = [line for line in result.stderr.splitlines() if line.startswith("maskbank:")]
    return " ".join(lines or [result.stderr[-300:].replace("\n", " ")])


def metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
