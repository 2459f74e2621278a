"""Unlabelled images, of which the unreadable ones are left out and counted."""

import logging

from data_pipeline.errors import InputError
from data_pipeline.labelled import UnlabelledShards
from data_pipeline.resize import Resize
from data_pipeline.whole_images import WholeImage, WholeImages

_log = logging.getLogger(__name__)
_REPORTED = 10  # unreadable samples that a rank names


class Photographs(WholeImages):
    """Images of shards without labels.

    Evaluation needs every sample, since its score is of a whole data set; a clustering of one's own
    photographs does without the few that are damaged.

    Attributes:
        unreadable: ids of the samples that this rank left out so far.
    """

    def __init__(
        self, samples: UnlabelledShards, size: int, threads: int, resize: Resize = "antialias"
    ) -> None:
        super().__init__(samples, size, threads, resize)
        self.unreadable: set[int] = set()

    def attempt(self, sample_id: int) -> WholeImage | None:
        try:
            return self.read(sample_id)
        except InputError as error:
            self.unreadable.add(sample_id)
            if len(self.unreadable) <= _REPORTED:
                _log.warning("left out: %s", str(error).partition("; evaluation")[0])
            return None
