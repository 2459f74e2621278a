"""Generated scenes as a source: data for the demo and the tests that no one has to download."""

import io
from dataclasses import dataclass

from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.sample import RawSample, encode_png
from data_pipeline.sources.item import Listing
from data_pipeline.sources.scenes import CLASSES, render_scene, scene_size

MAX_SIZE = 4096  # pixels; a larger scene takes gigabytes to render


@dataclass(frozen=True)
class SceneItem:
    """Scene `index` of the endless series that `seed` defines."""

    seed: int
    index: int
    base_size: int

    @property
    def key(self) -> str:
        return f"scene_{self.seed:03d}_{self.index:07d}"

    @property
    def source(self) -> str:
        return f"scenes:{self.seed}:{self.base_size}:{self.index}"

    def read(self) -> RawSample:
        height, width = scene_size(self.seed, self.index, self.base_size)
        scene = render_scene(self.seed, self.index, height, width)
        image = io.BytesIO()
        Image.fromarray(scene.image).save(image, "JPEG", quality=92)
        return RawSample(image.getvalue(), encode_png(scene.mask), encode_png(scene.label))

    def sizes(self) -> tuple[int, ...]:
        return ()


def list_scenes(count: int, seed: int, base_size: int) -> Listing:
    """Lists `count` scenes of about `base_size` pixels a side.

    Raises:
        InputError: a number is out of range.
    """
    if count < 1 or not 16 <= base_size <= MAX_SIZE or not 0 <= seed < 2**64:
        raise InputError(
            f"scenes: count {count}, size {base_size}, seed {seed}; need a count of at least 1, "
            f"a size of 16 to {MAX_SIZE} and a seed of 0 to 2^64 - 1"
        )
    entries = (SceneItem(seed, index, base_size) for index in range(count))
    description = {"source": "scenes", "seed": str(seed), "size": str(base_size)}
    return Listing(entries, CLASSES, description)
