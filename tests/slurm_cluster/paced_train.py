"""`trainer.train` at a pace: `-m tests.slurm_cluster.paced_train SECONDS FILE …`.

Each step takes SECONDS longer until there is a FILE, so that a test can reach into a run, and then
need not wait for it.
"""

import sys
import time
from pathlib import Path

from data_pipeline.batch import Batch
from data_pipeline.loader import BatchStream
from trainer.train import main

if __name__ == "__main__":
    seconds, fast = float(sys.argv[1]), Path(sys.argv[2])
    plain_next = BatchStream.__next__

    def paced(stream: BatchStream) -> Batch:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not fast.exists():
            time.sleep(min(0.1, seconds))
        return plain_next(stream)

    BatchStream.__next__ = paced  # type: ignore[method-assign]
    main(sys.argv[3:])
