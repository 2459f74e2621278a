"""Everything that only a GPU can show, in one run: `python -m benchmarks.gpu_check`.

The machine's ceilings; the one-pass loss against float64 and its time against its floor; upsampled
pixels and the head against float64; where the time of a training step goes; mixed decoding against
CPU decoding; training with both loaders, in both engines and every precision, going on from each
other's checkpoints, on one GPU and on all of them; a rank that hangs; evaluations against the
CPU's, and their speed. `--only losses,decoding` runs these sections alone. What a section found is
printed and written into `benchmarks/results/` when it ends. Without a GPU it says so and ends with
status 0.
"""

import argparse
import functools
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import gpu_evaluation, gpu_loss, gpu_pixels, gpu_runs, gpu_step
from benchmarks.gpu_loss import DEVICE, Rates, Row, measure_rates
from data_pipeline.build_config import BuildConfig, BuildOptions
from data_pipeline.manifest import Manifest
from data_pipeline.sources.generated import list_scenes
from data_pipeline.write_shards import build_shards
from trainer.distributed import Ranks
from trainer.environment import describe_environment

SCENES = 1000
Section = Callable[[], list[Row]]


def sections(folder: Path) -> dict[str, Section]:
    """All that there are, by name, in the order in which they run."""
    rates: Callable[[], Rates] = functools.cache(measure_rates)
    data: Callable[[], Manifest] = functools.cache(lambda: make_shards(folder))
    most = torch.cuda.device_count()
    counts = sorted({1, *(n for n in (2, 4) if n < most), most})
    found: dict[str, Section] = {
        "ceilings": lambda: gpu_loss.ceilings(rates()),
        "losses": gpu_loss.losses,
        "pixels": gpu_pixels.pixels,
        "loss_speed": lambda: gpu_loss.loss_speed(rates()),
        "step": lambda: gpu_step.step_parts(data(), folder, rates()),
        "variants": lambda: gpu_step.variants(data(), folder),
        "decoding": lambda: gpu_runs.decoding(data()),
        "loaders": lambda: gpu_runs.loader_speed(data()),
        "training_torch": lambda: gpu_runs.training(data(), folder, 1, "torch"),
        "training_dali": lambda: gpu_runs.training(data(), folder, 1, "dali"),
        "across": lambda: gpu_runs.across(data(), folder, 1),
        "engines": lambda: gpu_runs.engines(data(), folder, 1),
        "evaluation": lambda: gpu_evaluation.evaluation(data(), folder),
    }
    for n in counts[1:]:
        found[f"training_{n}"] = lambda n=n: gpu_runs.training(data(), folder, n, "auto")  # type: ignore[misc]
    if most > 1:
        found["engines_all"] = lambda: gpu_runs.engines(data(), folder, most)
        found["across_all"] = lambda: gpu_runs.across(data(), folder, most)
        found["hang"] = lambda: gpu_runs.hang(data(), folder, most)
    return found


def make_shards(folder: Path) -> Manifest:
    config = BuildConfig(samples_per_shard=250, mask_mode="ids")
    options = BuildOptions(min(16, len(os.sched_getaffinity(0))))
    return build_shards(list_scenes(SCENES, 0, 320), folder / "shards", config, options)


def run_section(name: str, section: Section) -> list[Row]:
    """Its rows; an exception is one of them."""
    start = time.perf_counter()
    try:
        rows = section()
    except Exception as error:
        traceback.print_exc()
        said = " ".join(f"{type(error).__name__}: {error}".split())
        rows = [Row(f"section {name}", said[:400], "FAILED")]
    for row in rows:
        print(f"| {row.what} | {row.figure} | {row.verdict} |", flush=True)
    torch.cuda.empty_cache()
    print(f"# {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return rows


def write(target: Path, command: str, rows: list[Row]) -> None:
    described = describe_environment(Ranks(0, torch.cuda.device_count(), DEVICE))
    machine = ", ".join(f"{key} {described.get(key)}" for key in ("torch", "cuda", "dali", "numpy"))
    lines = [
        "# What only a GPU can show",
        "",
        f"`{command}`, {described['date']}, {torch.cuda.device_count()} × {described['device']}, "
        f"{described['cores']} cores of {described['cpu']}, python {described['python']}, "
        f"{machine}",
        "",
        "| what | figure | |",
        "|---|---|---|",
        *(f"| {row.what} | {row.figure.replace('|', '/')} | {row.verdict} |" for row in rows),
    ]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def default_target() -> Path:
    described = describe_environment(Ranks(0, 1, DEVICE))
    device = described["device"].replace(" ", "-").lower()
    return Path(__file__).with_name("results") / f"gpu_check_{device}_{described['date']}.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--only", default="", help="sections, with commas between")
    parser.add_argument("--seconds", type=float, default=1e9, help="no section begins after these")
    parser.add_argument("--output", type=Path, help="the file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: torch sees no GPU here")
        return
    start, rows = time.perf_counter(), []
    target = options.output or default_target()
    command = " ".join(["python -m benchmarks.gpu_check", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as name:
        known = sections(Path(name))
        chosen = options.only.split(",") if options.only else list(known)
        if unknown := set(chosen) - set(known):
            parser.error(f"no section {', '.join(unknown)}; there are {', '.join(known)}")
        for section in chosen:
            if time.perf_counter() - start > options.seconds:
                rows.append(Row(f"section {section}", "not run: no time left", "skipped"))
            else:
                rows += run_section(section, known[section])
            write(target, command, rows)
    print(target)
    sys.exit(int(any(row.verdict == "FAILED" for row in rows)))


if __name__ == "__main__":
    main()
