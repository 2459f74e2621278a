"""What every way of making masks has in common: pictures in, saliency maps out."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]


class Predictor(Protocol):
    """A saliency estimator.

    Attributes:
        name: of the method and its weights, kept with the masks, so that two never mix.
        batch_size: pictures that it likes to get at a time.
    """

    name: str
    batch_size: int

    def predict(self, images: Sequence[UInt8]) -> list[Float32]:
        """Saliency in [0, 1], float32 [H, W], of each RGB picture uint8 [H, W, 3].

        The result for a picture does not depend on the others in its batch.
        """
        ...
