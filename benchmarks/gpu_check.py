"""Everything that only a GPU can show, in one run: `python -m benchmarks.gpu_check`.

Mixed decoding against CPU decoding; the one-pass loss with keys of 32 and 16 bits against float64,
its time and memory; training steps in bf16 with a bank of 65,536 entries, and the same over all
GPUs with nccl; both engines in every precision, compiled and with activations computed twice, going
on from each other's checkpoints; a rank that hangs. Writes a Markdown file into
`benchmarks/results/`; without a GPU it says so and ends with status 0.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.build_config import BuildConfig, BuildOptions
from data_pipeline.fetch import Fetcher
from data_pipeline.index import DatasetIndex
from data_pipeline.loader import make_loader
from data_pipeline.manifest import Manifest
from data_pipeline.order import SampleOrder
from data_pipeline.reader import SampleReader
from data_pipeline.sources.generated import list_scenes
from data_pipeline.views import IMAGENET_STD, ViewConfig
from data_pipeline.write_shards import build_shards
from trainer.distributed import Ranks
from trainer.environment import describe_environment
from trainer.loss import pixel_contrastive_loss

Row = tuple[str, str, str]  # what, figure, verdict


def decoding(manifest: Manifest) -> list[Row]:
    """Mixed decoding and augmentation against the CPU's, in grey levels, and its speed."""
    views = ViewConfig(image_size=224)
    index = DatasetIndex(manifest)
    fetcher = Fetcher(SampleReader(index), SampleOrder(index.counts, 0, 8), views, 8)
    samples = fetcher.fetch(np.arange(64))
    reference = make_loader("torch", 64, 224, 8, torch.device("cpu")).load(samples)
    loader = make_loader("dali", 64, 224, 8, torch.device("cuda", 0))
    batch = loader.load(samples)
    scale = 255 * torch.tensor(IMAGENET_STD)[None, :, None, None]
    levels = float(((batch.query_image.cpu() - reference.query_image) * scale).abs().mean())
    masks = float((batch.query_mask.cpu() == reference.query_mask).float().mean())
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        loader.load(samples)
    torch.cuda.synchronize()
    speed = 20 * 64 / (time.perf_counter() - start)
    return [
        ("mixed decoding against CPU, mean grey levels", f"{levels:.2f}", _verdict(levels < 2)),
        ("masks that agree", f"{masks:.2%}", _verdict(masks > 0.999)),
        ("images a second, two 224-pixel views", f"{speed:,.0f}", "measured"),
    ]


def losses() -> list[Row]:
    """The one-pass loss and its gradient on the GPU against dense float64."""
    draw = torch.Generator().manual_seed(0)
    unit = lambda n: F.normalize(torch.randn(n, 32, generator=draw), dim=1)  # noqa: E731
    prototypes, bank = unit(64).cuda(), unit(8192).cuda()
    targets = torch.randint(64, (20_000,), generator=draw).cuda()
    near = F.normalize(prototypes[targets] + 0.3 * unit(20_000).cuda(), dim=1)
    ones = torch.ones(20_000, device="cuda")
    rows = []
    for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 5e-3)):
        keys = bank.to(dtype)
        worst = 0.0
        for temperature in (0.05, 0.07, 0.1, 0.5):
            wide = near.double().requires_grad_()
            logits = wide @ torch.cat([prototypes.double(), keys.double()]).T / temperature
            F.cross_entropy(logits, targets, reduction="sum").backward()  # type: ignore[no-untyped-call]
            mine = near.clone().requires_grad_()
            chunks = keys.split(5000)  # type: ignore[no-untyped-call]
            pixel_contrastive_loss(mine, targets, prototypes, chunks, temperature, ones).backward()  # type: ignore[no-untyped-call]
            worst = max(worst, _relative(mine.grad, wide.grad))
        name = str(dtype).removeprefix("torch.")
        rows.append(
            (f"gradient error, {name} keys, four T", f"{worst:.1e}", _verdict(worst < limit))
        )
    return rows


def loss_speed() -> list[Row]:
    """Time and extra memory of the one-pass loss, as the cost model needs them."""
    rows = []
    for pixels, entries in ((200_000, 65_536), (200_000, 1 << 20), (1024, 1 << 22)):
        queries = F.normalize(torch.randn(pixels, 32, device="cuda"), dim=1).requires_grad_()
        prototypes = F.normalize(torch.randn(64, 32, device="cuda"), dim=1)
        bank = F.normalize(torch.randn(entries, 32, device="cuda"), dim=1).half()
        targets = torch.randint(64, (pixels,), device="cuda")
        ones = torch.ones(pixels, device="cuda")
        seconds, extra = [], 0
        for _ in range(5):
            queries.grad = None
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            before, start = torch.cuda.memory_allocated(), time.perf_counter()
            chunks = bank.split(65_536)  # type: ignore[no-untyped-call]
            pixel_contrastive_loss(queries, targets, prototypes, chunks, 0.1, ones).backward()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            extra = torch.cuda.max_memory_allocated() - before
        best = min(seconds)
        figure = (
            f"{1000 * best:.1f} ms, {best / pixels / entries:.1e} s a pair, {extra / 1e6:,.0f} MB"
        )
        rows.append((f"loss, {pixels:,} pixels × {entries:,} float16 keys", figure, "measured"))
    return rows


def training(manifest: Manifest, folder: Path, ranks: int) -> list[Row]:
    """ResNet-50 at 224 pixels, 64 images a GPU, bf16: speed and memory of 60 steps."""
    run = folder / f"run-{ranks}"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [
        *(sys.executable, *(launcher if ranks > 1 else []), "-m", "trainer.train"),
        *("--recipe", "voc_unsupervised_saliency", f"data.shards={manifest.root}"),
        *(f"run.directory={run}", "run.steps=60", "run.log_every=10", "run.device=cuda"),
        *(f"data.batch_size={64 * ranks}", "run.checkpoint_every=60", "bank.capacity=65536"),
        *("bank.mask_same_image=true", "bank.move=bank"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if result.returncode:
        return [(f"training on {ranks} GPUs", result.stderr[-300:].replace("\n", " "), "FAILED")]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines][-3:]
    speed = float(np.median([row["images_per_second"] for row in last]))
    wait = float(np.median([row["data_wait"] for row in last]))
    finite = all(np.isfinite(row["loss"]) for row in last)
    return [
        (f"training on {ranks} GPUs, images a second", f"{speed:,.0f}", _verdict(finite)),
        ("share of time waiting for data", f"{wait:.0%}", "measured"),
        ("MB of the bank received in a step", f"{last[-1]['bank_mb_received']:.2f}", "measured"),
        ("ms a step waiting for the bank", f"{last[-1]['bank_wait_ms']:.2f}", "measured"),
        ("peak GPU memory", f"{last[-1]['memory_mb']:,.0f} MB", "measured"),
    ]


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
    """Thirty steps of ResNet-50 in every engine and precision: last loss, speed, memory."""
    rows = []
    for name, settings in _VARIANTS.items():
        run = folder / f"engine-{ranks}-{name}"
        error = _train(manifest, run, ranks, "run.steps=30", "run.checkpoint_every=15", *settings)
        if error:
            rows.append((f"{name}, {ranks} GPUs", error, "FAILED"))
            continue
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        # fp16 lowers its loss scale in the first steps
        well = np.isfinite(last["loss"]) and last["skipped_steps"] <= (15 if "fp16" in name else 0)
        figure = (
            f"loss {last['loss']:.3f}, {last['images_per_second']:,.0f} images/s, "
            f"{last['memory_mb']:,.0f} MB, {last['skipped_steps']} skipped"
        )
        rows.append((f"{name}, {ranks} GPUs", figure, _verdict(bool(well))))
    return rows


def across(manifest: Manifest, folder: Path, ranks: int) -> list[Row]:
    """ZeRO-3 to step 15, then DDP to step 30 from its checkpoint."""
    run = folder / f"across-{ranks}"
    first = ("engine.name=deepspeed", "engine.zero_stage=3", "run.checkpoint_every=15")
    error = _train(manifest, run, ranks, "run.steps=30", *first, fault=("raise", "0", "20"))
    went_on = _train(manifest, run, ranks, "run.steps=30", "run.checkpoint_every=15")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    well = bool(error) and not went_on and steps[-1] == 30
    return [(f"ZeRO-3, then DDP, {ranks} GPUs", went_on or f"steps {steps}", _verdict(well))]


def hang(manifest: Manifest, folder: Path, ranks: int) -> list[Row]:
    """The last rank stops in step 7: all end, it is named, nccl's collectives are recorded."""
    run, start = folder / f"hang-{ranks}", time.perf_counter()
    limit = ("run.timeout_seconds=20", "run.steps=30")
    said = _train(manifest, run, ranks, *limit, fault=("stop", str(ranks - 1), "7"))
    seconds = time.perf_counter() - start
    recorded = len(list(run.glob("hangs/*/collectives-*.json")))
    well = f"rank {ranks - 1}: no sign of life for 20 s" in said and recorded == ranks - 1
    figure = f"{seconds:.0f} s, {recorded} ranks' collectives: {said[:200]}"
    return [(f"a stopped rank of {ranks}", figure, _verdict(well))]


def _train(
    manifest: Manifest, run: Path, ranks: int, *settings: str, fault: tuple[str, ...] = ()
) -> str:
    """Trains ResNet-50 at 224 pixels; what was said if that failed, else ''."""
    program = ("tests.faulty_train", *fault) if fault else ("trainer.train",)
    command = [
        *(sys.executable, "-m", "launch.ranks", "--standalone", f"--nproc-per-node={ranks}"),
        *("-m", *program, "--recipe", "voc_unsupervised_saliency"),
        *(f"data.shards={manifest.root}", f"run.directory={run}", "run.log_every=5"),
        *("run.device=cuda", f"data.batch_size={16 * ranks}", "run.tensorboard=false"),
        *settings,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    if not result.returncode:
        return ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("maskbank:")]
    return " ".join(lines or [result.stderr[-300:].replace("\n", " ")])


def main() -> None:
    if not torch.cuda.is_available():
        print("skipped: torch sees no GPU here")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = BuildConfig(samples_per_shard=250, mask_mode="ids")
        listing = list_scenes(1000, 0, 320)
        manifest = build_shards(listing, folder / "shards", config, BuildOptions(8))
        counts = sorted({1, torch.cuda.device_count()})
        rows = [*decoding(manifest), *losses(), *loss_speed()]
        for ranks in counts:
            rows += training(manifest, folder, ranks)
            rows += engines(manifest, folder, ranks) + across(manifest, folder, ranks)
        if max(counts) > 1:
            rows += hang(manifest, folder, max(counts))
    environment = describe_environment(Ranks(0, max(counts), torch.device("cuda", 0)))
    table = "\n".join(f"| {what} | {figure} | {verdict} |" for what, figure, verdict in rows)
    text = (
        f"# What only a GPU can show\n\n`python -m benchmarks.gpu_check`, {environment['date']}, "
        f"{max(counts)} × {environment['device']}, torch {environment['torch']}\n\n"
        f"| what | figure | |\n|---|---|---|\n{table}\n"
    )
    device = environment["device"].replace(" ", "-").lower()
    target = Path(__file__).with_name("results") / f"gpu_check_{device}_{environment['date']}.md"
    target.write_text(text)
    print(text)
    sys.exit(int(any(row[2] == "FAILED" for row in rows)))


def _relative(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float((found.double() - expected).abs().max() / expected.abs().max())


def _verdict(good: bool) -> str:
    return "ok" if good else "FAILED"


if __name__ == "__main__":
    main()
