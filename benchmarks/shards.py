"""How fast are shards built, with how much memory, and against a plain ShardWriter loop?

    python -m benchmarks.shards [--samples 100000] [--side 96] [--rounds 3] [--folder DIR]
    python -m benchmarks.shards --memory 10000,100000,1000000

The loop reads, decodes and checks every image and mask with Pillow, brings masks into the same
form and hands them to `webdataset.ShardWriter`. Rounds are interleaved. Pictures are made once, in
`DIR/pictures-…`, and used again.
"""

import argparse
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.sources.scenes import render_scene

SCENES, PER_FOLDER, PER_SHARD = 400, 1000, 1000
ONE_PROCESS = "maskbank, 1 process"
_POLL = 0.05  # seconds between two looks at the memory


def make_pictures(root: Path, samples: int, side: int) -> None:
    """`samples` pairs of JPEG and 0/255 PNG: crops of scenes, each brightened otherwise."""
    if (root / "COMPLETE").exists():
        return
    parts = [
        (root, start, min(start + PER_FOLDER, samples), side)
        for start in range(0, samples, PER_FOLDER)
    ]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_make_part, parts))
    (root / "COMPLETE").touch()


def _make_part(part: tuple[Path, int, int, int]) -> None:
    root, start, end, side = part
    name = f"{start // PER_FOLDER:05d}"
    for kind in ("images", "masks"):
        (root / kind / name).mkdir(parents=True, exist_ok=True)
    for number in range(start, end):
        rng = np.random.Generator(np.random.Philox(key=number))
        scene = _scene(number % SCENES, side + side // 4)
        row, column = (int(value) for value in rng.integers(0, side // 4, 2))
        window = np.s_[row : row + side, column : column + side]
        light = rng.uniform(0.7, 1.3)
        image = np.clip(scene.image[window] * light, 0, 255).astype(np.uint8)
        mask = ((scene.mask[window] > 0) * 255).astype(np.uint8)
        Image.fromarray(image).save(root / "images" / name / f"{number:07d}.jpg", quality=90)
        Image.fromarray(mask).save(root / "masks" / name / f"{number:07d}.png")


_SCENES: dict[int, Any] = {}


def _scene(number: int, side: int) -> Any:
    if number not in _SCENES:
        _SCENES[number] = render_scene(5, number, side, side)
    return _SCENES[number]


def plain_loop(pictures: Path, output: Path) -> int:
    """What one writes without a tool; the number of samples."""
    import webdataset

    output.mkdir(parents=True)
    written = 0
    pattern = str(output / "shard-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=PER_SHARD, verbose=0) as writer:
        for image_path in sorted((pictures / "images").rglob("*.jpg")):
            relative = image_path.relative_to(pictures / "images").with_suffix("")
            try:
                data = image_path.read_bytes()
                image = Image.open(io.BytesIO(data))
                image.load()
                mask_data = (pictures / "masks" / relative).with_suffix(".png").read_bytes()
                mask = np.asarray(Image.open(io.BytesIO(mask_data)))
                if mask.shape != (image.height, image.width) or mask.ndim != 2:
                    raise ValueError("the mask does not have its image's size")
                if not set(np.unique(mask).tolist()) <= {0, 255}:
                    raise ValueError("the mask has other values than 0 and 255")
                ids = (mask > 0).astype(np.uint8)
                encoded = io.BytesIO()
                Image.fromarray(ids).save(encoded, "PNG")
            except (OSError, ValueError) as error:
                print(relative, error, file=sys.stderr)
                continue
            info = {
                "height": image.height,
                "width": image.width,
                "object_share": float(ids.mean()),
                "source": str(relative),
            }
            writer.write(
                {
                    "__key__": str(relative),
                    "jpg": data,
                    "mask.png": encoded.getvalue(),
                    "json": json.dumps(info).encode(),
                }
            )
            written += 1
    return written


def run(command: list[str]) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory (MB, over all processes) of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    peak = _Peak(process.pid)
    status = process.wait()
    seconds = time.perf_counter() - start
    memory = peak.stop()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu": cpu, "memory": memory}


class _Peak:
    """Looks at the resident memory of a process and its children until it is stopped."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._ended = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        self._ended.set()
        self._thread.join()
        return self._peak / 1e6

    def _watch(self) -> None:
        while not self._ended.wait(_POLL):
            self._peak = max(self._peak, sum(_resident(pid) for pid in _family(self._pid)))


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from _family(int(child))


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def ours(pictures: Path, output: Path, processes: int) -> list[str]:
    command = [sys.executable, "-m", "data_pipeline.cli", "build", "folder"]
    command += ["--images", str(pictures / "images"), "--masks", str(pictures / "masks")]
    return [*command, "--output", str(output), "--processes", str(processes)]


def from_list(pictures: Path, output: Path, rows: int, processes: int) -> list[str]:
    """A build of `rows` samples from the same few files, each row with a key of its own."""
    images = sorted((pictures / "images").rglob("*.jpg"))
    path = output.with_suffix(".csv")
    with path.open("w") as file:
        file.write("key,image,mask\n")
        for number in range(rows):
            image = images[number % len(images)]
            mask = pictures / "masks" / image.relative_to(pictures / "images").with_suffix(".png")
            file.write(f"{number:08d},{image.resolve()},{mask.resolve()}\n")
    command = [sys.executable, "-m", "data_pipeline.cli", "build", "list", "--list", str(path)]
    command += ["--duplicates", "keep", "--output", str(output)]
    return [*command, "--processes", str(processes)]


def measure_memory(folder: Path, counts: list[int], side: int) -> None:
    cores = len(os.sched_getaffinity(0))
    pictures = folder / f"pictures-1000-{side}"
    make_pictures(pictures, 1000, side)
    for rows in counts:
        row = {"arm": "memory", "samples": rows}
        row |= run(from_list(pictures, folder / "out", rows, cores))
        print(json.dumps(row), flush=True)
        shutil.rmtree(folder / "out")


def theirs(pictures: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.shards", "--loop", str(pictures), str(output)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path, help="JSON lines of what was measured.")
    parser.add_argument("--memory", help="Only memory, of so many samples, as 10000,1000000.")
    parser.add_argument("--loop", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        plain_loop(*options.loop)
        return
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        if options.memory:
            measure_memory(folder, [int(n) for n in options.memory.split(",")], options.side)
            return
        rows = []
        for samples in (options.samples // 10, options.samples):
            pictures = folder / f"pictures-{samples}-{options.side}"
            make_pictures(pictures, samples, options.side)
            arms = {
                f"maskbank, {cores} processes": (ours(pictures, folder / "out", cores), cores),
                ONE_PROCESS: (ours(pictures, folder / "out", 1), 1),
                "plain ShardWriter loop": (theirs(pictures, folder / "out"), 1),
            }
            for number in range(options.rounds if samples == options.samples else 1):
                for arm, (command, used) in arms.items():
                    if arm == ONE_PROCESS and samples == options.samples and number:
                        continue  # once is enough to see
                    row = {"arm": arm, "samples": samples, **run(command)}
                    row["busy"] = row["cpu"] / row["seconds"] / used
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    shutil.rmtree(folder / "out")
    if options.output:
        options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    large = [row for row in rows if row["samples"] == options.samples]
    loops = [row["seconds"] for row in large if row["arm"].startswith("plain")]
    for arm in arms:
        seconds = [row["seconds"] for row in large if row["arm"] == arm]
        ratios = [loop / own for loop, own in zip(loops, seconds, strict=False)]
        busy = [row["busy"] for row in large if row["arm"] == arm]
        print(
            f"{arm}: {options.samples / statistics.median(seconds):,.0f} samples/s, "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) times the "
            f"loop, cores busy {min(busy):.0%}–{max(busy):.0%}"
        )


if __name__ == "__main__":
    main()
