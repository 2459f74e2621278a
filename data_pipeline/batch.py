"""What a loader hands to the trainer."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: two views of B images, S×S pixels.

    Attributes:
        query_image, key_image: float32 [B, 3, S, S], normalised with ImageNet's mean and deviation,
            channels-last in memory.
        query_mask, key_mask: uint8 [B, S, S], proposal ids; 0 background, 255 ignore. A view for
            which no crop of valid coverage was found is 255 everywhere.
        sample_id: int64 [B], number of the sample in its data set.
    """

    query_image: Tensor
    key_image: Tensor
    query_mask: Tensor
    key_mask: Tensor
    sample_id: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; a copy from pinned memory does not wait."""
        return Batch(*(field.to(device, non_blocking=True) for field in self._fields()))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Says that work on `stream` reads the batch, which was made on another one."""
        for field in self._fields():
            field.record_stream(stream)

    def _fields(self) -> tuple[Tensor, ...]:
        return self.query_image, self.key_image, self.query_mask, self.key_mask, self.sample_id
