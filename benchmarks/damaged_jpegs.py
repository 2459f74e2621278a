"""How many damaged JPEGs does the check find that a build makes? Pillow's for comparison.

    python -m benchmarks.damaged_jpegs [--files 300] [--seed 0]

A JPEG has no checksum: bits that are flipped may leave another valid picture, and nobody can tell.
"""

import argparse
import io

import numpy as np
from PIL import Image

from data_pipeline.errors import SampleError
from data_pipeline.pictures import open_checked
from data_pipeline.sources.scenes import render_scene

SIDES, FLIPS, SCENES = (64, 300), (1, 4, 16, 64), 20


def found_by_us(data: bytes) -> bool:
    try:
        open_checked(data, "image")
    except SampleError:
        return True
    return False


def found_by_pillow(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).load()
    except Exception:  # it raises OSError, SyntaxError, struct.error, …
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    print("| side, pixels | bits flipped | found | found by Pillow |\n|---|---|---|---|")
    for side in SIDES:
        whole = []
        for number in range(SCENES):
            file = io.BytesIO()
            Image.fromarray(render_scene(1, number, side, side).image).save(
                file, "JPEG", quality=90
            )
            whole.append(file.getvalue())
        assert not any(found_by_us(data) for data in whole)
        for flips in FLIPS:
            ours = pillows = 0
            for number in range(options.files):
                data = bytearray(whole[number % SCENES])
                for place in rng.choice(8 * len(data), flips, replace=False).tolist():
                    data[place // 8] ^= 1 << place % 8
                ours += found_by_us(bytes(data))
                pillows += found_by_pillow(bytes(data))
            print(
                f"| {side} | {flips} | {ours / options.files:.0%} | {pillows / options.files:.0%} |"
            )


if __name__ == "__main__":
    main()
