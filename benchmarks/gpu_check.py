"""Everything that only a GPU can show, in one run: `python -m benchmarks.gpu_check`.

Mixed decoding against CPU decoding, the losses on the GPU in float32 and bf16 against float64,
training steps in bf16 with time and memory, and the same over all GPUs with nccl. Writes a Markdown
file into `benchmarks/results/`; without a GPU it says so and ends with status 0.
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

from data_pipeline.fetch import Fetcher
from data_pipeline.index import DatasetIndex
from data_pipeline.loader import make_loader
from data_pipeline.manifest import Manifest
from data_pipeline.order import SampleOrder
from data_pipeline.reader import SampleReader
from data_pipeline.sources.generated import list_scenes
from data_pipeline.views import IMAGENET_STD, ViewConfig
from data_pipeline.write_shards import BuildConfig, build_shards
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
    """The contrastive loss and its gradient on the GPU against dense float64."""
    draw = torch.Generator().manual_seed(0)
    unit = lambda n: F.normalize(torch.randn(n, 32, generator=draw), dim=1)  # noqa: E731
    queries, prototypes, bank = unit(20_000), unit(64), unit(4096)
    targets = torch.randint(64, (20_000,), generator=draw)
    wide = queries.double().cuda().requires_grad_()
    keys = torch.cat([prototypes, bank]).double().cuda()
    F.cross_entropy(wide @ keys.T / 0.1, targets.cuda(), reduction="sum").backward()  # type: ignore[no-untyped-call]
    rows = []
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        mine = queries.to(dtype).cuda().requires_grad_()
        chunks = bank.to(dtype).cuda().split(1024)  # type: ignore[no-untyped-call]
        ones = torch.ones(len(queries), dtype=dtype, device="cuda")
        keys_here = prototypes.to(dtype).cuda()
        pixel_contrastive_loss(mine, targets.cuda(), keys_here, chunks, 0.1, ones).backward()  # type: ignore[no-untyped-call]
        error = _relative(mine.grad, wide.grad)
        name = str(dtype).removeprefix("torch.")
        rows.append((f"gradient error, {name}", f"{error:.1e}", _verdict(error < limit)))
    return rows


def training(manifest: Manifest, folder: Path, ranks: int) -> list[Row]:
    """ResNet-50 at 224 pixels, 64 images a GPU, bf16: speed and memory of 60 steps."""
    run = folder / f"run-{ranks}"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [
        *(sys.executable, *(launcher if ranks > 1 else []), "-m", "trainer.train"),
        *("--recipe", "voc_unsupervised_saliency", f"data.shards={manifest.root}"),
        *(f"run.directory={run}", "run.steps=60", "run.log_every=10", "run.device=cuda"),
        *(f"data.batch_size={64 * ranks}", "run.checkpoint_every=60"),
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
        ("peak GPU memory", f"{last[-1]['memory_mb']:,.0f} MB", "measured"),
    ]


def main() -> None:
    if not torch.cuda.is_available():
        print("skipped: torch sees no GPU here")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = BuildConfig(samples_per_shard=250, mask_mode="ids")
        manifest = build_shards(list_scenes(1000, 0, 320), folder / "shards", config, processes=8)
        counts = sorted({1, torch.cuda.device_count()})
        rows = [*decoding(manifest), *losses()]
        rows += [row for ranks in counts for row in training(manifest, folder, ranks)]
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
